"""The weights of channels, as the members of a family say where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fxopt.channels.groups import Family, Member, Role
from fxopt.errors import FxoptError, OptionError
from fxopt.graph_module import GraphModule

Roles = Sequence[str]


def check_roles(roles: Roles) -> None:
    """Raise OptionError for words that are no roles."""
    known = [role.value for role in Role]
    named = [roles] if isinstance(roles, str) else roles
    wrong = [role for role in named if role not in known]
    if isinstance(roles, str) or wrong or not roles:
        raise OptionError(f"roles={roles!r}: it is a tuple of some of {', '.join(known)}.")


def members_of(family: Family, roles: Roles, importance: str) -> list[Member]:
    """Return the members that play one of the roles; raise FxoptError where there is none."""
    found = [member for member in family.members if member.role.value in roles]
    if not found:
        there = sorted({member.role.value for member in family.members})
        raise FxoptError(
            f"The importance '{importance}' reads weights of the roles {', '.join(roles)}, and the "
            f"family '{family.name}' has none such: its roles are {', '.join(there) or 'none'}. "
            "Choose other roles=, or another importance."
        )
    return found


def along(tensor: torch.Tensor, member: Member) -> torch.Tensor:
    """Return what belongs to each channel as a row: shape [channels, k · all other sizes]."""
    positions = torch.from_numpy(member.positions).to(tensor.device)
    channels, k = positions.shape
    chosen = tensor.detach().movedim(member.dim, 0)
    chosen = chosen.reshape(len(chosen), -1)
    if positions.numel() != len(chosen) or not _is_in_order(positions):
        chosen = chosen[positions.reshape(-1)]
    return chosen.reshape(channels, k * chosen.shape[1])


def _is_in_order(positions: torch.Tensor) -> bool:
    flat = positions.reshape(-1)
    return bool((flat == torch.arange(len(flat), device=flat.device)).all())


def total(tensor: torch.Tensor, member: Member) -> torch.Tensor:
    """Return Σ of a tensor's elements over all that belongs to each channel: float64 [channels]."""
    others = [dim for dim in range(tensor.dim()) if dim != member.dim]
    sums = tensor.sum(others, dtype=torch.float64) if others else tensor.to(torch.float64)
    return _gathered(sums, member)


class PowerSums:
    """Σ |w|^order per channel, over the weights of a graph.

    A dimension of a weight is summed once, however many families stand along it: behind a
    concatenation there are many.
    """

    def __init__(self, graph: GraphModule, order: int) -> None:
        self._graph = graph
        self._order = order
        self._known: dict[tuple[str, int], torch.Tensor] = {}

    def of(self, members: Iterable[Member]) -> torch.Tensor:
        """Return Σ |w|^order over the weights of each channel in all of these: float64 [channels].
        """
        sums = [_gathered(self._along(one.constant, one.dim), one) for one in members]
        return torch.stack([one.cpu() for one in sums]).sum(0)

    def _along(self, name: str, dim: int) -> torch.Tensor:
        if (name, dim) not in self._known:
            self._known[name, dim] = power_sum(self._graph.constant(name), dim, self._order)
        return self._known[name, dim]


def power_sum(tensor: torch.Tensor, dim: int, order: int) -> torch.Tensor:
    """Return Σ |w|^order over all dimensions but one: float64, one number for each of its indices.

    No weight is copied.
    """
    values = tensor.detach()
    if not (values.is_floating_point() or values.is_complex()):
        values = values.to(torch.float64)
    others = [other for other in range(values.dim()) if other != dim]
    if others and values.numel():
        wide = torch.complex128 if values.is_complex() else torch.float64
        sums = torch.linalg.vector_norm(values, order, dim=others, dtype=wide)
    else:
        sums = values.abs().to(torch.float64) if not others else values.new_zeros(
            values.shape[dim], dtype=torch.float64
        )
    return sums**order


def _gathered(sums: torch.Tensor, member: Member) -> torch.Tensor:
    """Return the sums over the k positions of each channel."""
    return sums[torch.from_numpy(member.positions).to(sums.device)].sum(1)
