"""Follow channels through a graph: which identity stands at which index of which dimension.

Each index of each dimension of each constant is an identity. A value's dimension carries the vector
of identities along it, or None where nothing can go (the batch, a position in an image). Visiting
the nodes in order,

    elementwise calls, contractions and residual sums  unite the identities that they let meet,
    data movement                                      moves them: the very call, on the identities,
    a reshape that splits a dimension                  unites along all factors but one (a `Site`),
    a softmax over them, an unknown call, the output   freeze them, with the reason.

What each operator does stands in the modules beside this one, registered with `@follows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.groups import Role
from fxopt.channels.partition import Ids, Partition, Reason
from fxopt.cost.call import operator_name
from fxopt.graph_module import GraphModule

Along = tuple[Ids | None, ...]  # for each dimension of a tensor, the identities along it
Follow = Callable[["Follower", fx.Node], Any]  # returns Along, or a list of them

_FOLLOW: dict[Any, Follow] = {}
_ROLES = tuple(Role)


def follows(*targets: Any) -> Callable[[Follow], Follow]:
    """Register what these operators do to channels."""

    def register(function: Follow) -> Follow:
        for target in targets:
            _FOLLOW[target] = function
        return function

    return register


@dataclass(frozen=True)
class Site:
    """A place where a dimension is split into factors of which only one may lose indices.

    `axes` are the factors that could, the preferred one first; `ids` stand along the chosen one.
    """

    node: str
    place: str
    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    chosen: int
    ids: Ids

    @property
    def key(self) -> tuple[str, str]:
        """What names the site in every run over the same graph."""
        return self.node, self.place


class Follower:
    """One walk over a graph. `choices` say which factor of a site may lose indices."""

    def __init__(
        self,
        graph: GraphModule,
        choices: Mapping[tuple[str, str], int] | None = None,
        *,
        heads: str = "heads",
        reduced: bool = False,
    ) -> None:
        self.graph = graph
        self.choices = choices or {}
        self.heads = heads
        self.reduced = reduced  # whether channels that a mean or a norm reduces may go
        self.partition = Partition()
        self.along: dict[fx.Node, Any] = {}
        self.constants: dict[str, Along] = {}
        self.sites: dict[tuple[str, str], Site] = {}
        self.disliked: set[tuple[str, str]] = set()
        self.computed: list[tuple[fx.Node, int, Ids]] = []  # by contractions with a weight
        self.read: list[tuple[fx.Node, int, int]] = []  # node, operand, dimension contracted
        self.batches: list[Ids] = []  # of products of two activations: attention's heads
        self.reductions: list[tuple[fx.Node, str, Ids]] = []  # where removing is approximate
        self._unloved: list[Ids] = []
        self._roles = np.zeros(0, np.int8)
        self._derived: set[fx.Node] = set()  # constants, and what follows from them alone

    def walk(self) -> Follower:
        """Visit every node."""
        for node in self.graph.graph.nodes:
            self.along[node] = self._visit(node)
        self._settle_dislikes()
        return self

    # -- asking -------------------------------------------------------------------------------

    def of(self, node: Any) -> Along:
        """Return what stands along the dimensions of a tensor."""
        found = self.along[node]
        assert isinstance(found, tuple)
        return found

    def is_weight(self, node: Any) -> bool:
        """Whether a value follows from constants alone."""
        return node in self._derived

    def role_of(self, ids: Ids) -> Role:
        """Return the role of the first of these identities that has one."""
        known = self._roles[ids[ids < len(self._roles)]]
        known = known[known > 0]
        return _ROLES[int(known[0]) - 1] if len(known) else Role.OTHER

    # -- saying -------------------------------------------------------------------------------

    def fresh(self, size: Any) -> Ids | None:
        """Return new identities along a dimension; None where nothing can go from it."""
        return self.partition.fresh(size) if isinstance(size, int) and size > 1 else None

    def freeze(self, node: fx.Node, ids: Ids | None, text: str) -> None:
        """Say that these may not go because of what `node` does with them."""
        if ids is not None:
            self.partition.freeze(ids, Reason(node.name, text))

    def freeze_all(self, node: fx.Node, text: str) -> None:
        """Say that nothing may go from any operand of `node`."""
        for operand in node.all_input_nodes:
            for along in _flat(self.along[operand]):
                for ids in along:
                    self.freeze(node, ids, text)

    def unknown(self, node: fx.Node, text: str) -> Any:
        """Freeze whatever enters and leaves `node`, with the reason; return what leaves."""
        self.freeze_all(node, text)
        return self._held(node, node.meta.get("val"), text)

    def join(self, node: fx.Node, *parts: Ids | None) -> Ids | None:
        """Unite identities that meet; where one cannot go, none of the others can."""
        known = [ids for ids in parts if ids is not None]
        if not known:
            return None
        for ids in known[1:]:
            self.partition.unite(known[0], ids)
        if len(known) < len(parts):
            self.freeze(node, known[0], "they meet a dimension there that cannot shrink")
        return known[0]

    def reduce(self, node: fx.Node, ids: Ids | None, text: str) -> None:
        """Say that a mean or norm over these makes removal approximate: frozen, unless asked.

        In the computation of a weight they are frozen in any case: its value can be cut exactly.
        """
        if ids is None:
            return
        if self.reduced and not self.is_weight(node):
            self.reductions.append((node, text, ids))
        else:
            self.freeze(node, ids, text)

    def mark(self, ids: Ids | None, role: Role, *, weight: Any) -> None:
        """Note what a dimension of a weight is to its channels; the first word stands."""
        if ids is None or not self.is_weight(weight):
            return
        if len(self._roles) < len(self.partition):
            grown = np.zeros(2 * len(self.partition), np.int8)
            grown[: len(self._roles)] = self._roles
            self._roles = grown
        unknown = ids[self._roles[ids] == 0]
        self._roles[unknown] = _ROLES.index(role) + 1

    def compute(self, node: fx.Node, dim: int, ids: Ids | None) -> None:
        """Note that a contraction with a weight computes these channels."""
        if ids is not None:
            self.computed.append((node, dim, ids))

    def contract(self, node: fx.Node, position: int, dim: int) -> None:
        """Note that `node` sums over a dimension of an operand; see `operand`.

        Where it computes a weight from weights, what it sums over is held: reading that as zero
        would be another weight, while from the value of this one any column can be cut.
        """
        if self.is_weight(node):
            ids = self.of(operand(node, position))[dim]
            self.freeze(node, ids, "a weight is computed from all of them")
        else:
            self.read.append((node, position, dim))

    # -- splitting ----------------------------------------------------------------------------

    def split(self, node: fx.Node, place: str, ids: Ids, sizes: Sequence[int]) -> tuple[int, Ids]:
        """Split a dimension into `sizes`, of which only one may lose indices, so that it stays
        rectangular. Returns that axis and the identities along it.
        """
        axes = [axis for axis, size in enumerate(sizes) if size > 1]
        axis = self.choose(node, place, sizes, axes)
        kept = self.unite_across(ids, sizes, axis)
        self.note_site(node, place, sizes, axes, axis, kept)
        return axis, kept

    def choose(self, node: fx.Node, place: str, sizes: Sequence[int], axes: Iterable[int]) -> int:
        """Return which factor of a split may lose indices: as told, else the largest one."""
        known = self.choices.get((node.name, place))
        return known if known is not None else max(axes, key=lambda axis: sizes[axis])

    def unite_across(self, ids: Ids, sizes: Sequence[int], axis: int) -> Ids:
        """Unite along all axes of a grid but one, and return the identities along that."""
        lines = np.moveaxis(ids.reshape(tuple(sizes)), axis, 0).reshape(sizes[axis], -1)
        kept = np.ascontiguousarray(lines[:, 0])
        self.partition.unite(np.repeat(kept, lines.shape[1] - 1), lines[:, 1:].reshape(-1))
        return kept

    def note_site(
        self,
        node: fx.Node,
        place: str,
        sizes: Sequence[int],
        axes: Iterable[int],
        chosen: int,
        ids: Ids,
    ) -> None:
        """Remember a split, so that another factor may be tried."""
        ordered = tuple(sorted(axes, key=lambda axis: -sizes[axis]))
        site = Site(node.name, place, tuple(sizes), ordered, chosen, ids)
        self.sites[site.key] = site

    def dislike(self, ids: Ids | None) -> None:
        """Ask the sites that these come from for another factor, if they have one."""
        if ids is not None:
            self._unloved.append(ids)

    def _settle_dislikes(self) -> None:
        """Find those sites, when the walk is over: once for all, not at each attention."""
        if not self._unloved:
            return
        unloved = np.zeros(len(self.partition), np.bool_)
        unloved[self.partition.roots(np.concatenate(self._unloved))] = True
        for key, site in self.sites.items():
            if len(site.axes) > 1 and unloved[self.partition.roots(site.ids)].any():
                self.disliked.add(key)

    # -- inside -------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._constant(node)
        value = node.meta.get("val")
        if node.op == "placeholder":
            return self._held(node, value, "they meet an input of the model")
        if node.op == "output":
            self.freeze_all(node, "the model returns them")
            return ()
        if node.all_input_nodes and all(map(self.is_weight, node.all_input_nodes)):
            self._derived.add(node)
        follow = _FOLLOW.get(node.target)
        tags = getattr(node.target, "tags", ())
        if follow is None and torch.Tag.pointwise in tags and isinstance(value, torch.Tensor):
            follow = _FOLLOW["pointwise"]
        if follow is None and not node.all_input_nodes:
            return self._held(node, value, f"they meet the values of {operator_name(node.target)}")
        if follow is None:
            word = operator_name(node.target)
            return self.unknown(node, f"it is not known how channels pass through {word}")
        return follow(self, node)

    def _held(self, node: fx.Node, value: Any, text: str) -> Any:
        """Return identities for a value from which nothing can go."""
        if isinstance(value, (list, tuple)):
            return [self._held(node, one, text) for one in value]
        if not isinstance(value, torch.Tensor):
            return ()
        along = tuple(map(self.fresh, value.shape))
        for ids in along:
            self.freeze(node, ids, text)
        return along

    def _constant(self, node: fx.Node) -> Any:
        value, name = node.meta.get("val"), str(node.target)
        if not isinstance(value, torch.Tensor):
            return ()  # the body of a control-flow operator
        if name in self.graph.info.mutated:
            return self._held(node, value, "they meet state that the model keeps between calls")
        self._derived.add(node)
        if name not in self.constants:
            self.constants[name] = tuple(map(self.fresh, value.shape))
        return self.constants[name]


_LISTS: dict[Any, int] = {
    torch.ops.aten.einsum.default: 1, torch.ops.aten.lstm.input: 2, torch.ops.aten.gru.input: 2,
    torch.ops.aten.rnn_tanh.input: 2, torch.ops.aten.rnn_relu.input: 2,
}  # fmt: skip


def operand(node: fx.Node, position: int) -> Any:
    """Return what a contraction reads: its argument at a position, or one of its list of them."""
    place = _LISTS.get(node.target)
    return node.args[position] if place is None else node.args[place][position]  # type: ignore[index]


def with_operand(node: fx.Node, position: int, value: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of a contraction with another operand; see `operand`."""
    place = _LISTS.get(node.target)
    args: list[Any] = list(node.args)
    if place is None:
        args[position] = value
    else:
        args[place] = [*args[place][:position], value, *args[place][position + 1 :]]
    return tuple(args)


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """Return the positional arguments of a call, without fx's types: each would need a cast."""
    return node.args


def _flat(along: Any) -> list[Along]:
    return along if isinstance(along, list) else [along]
