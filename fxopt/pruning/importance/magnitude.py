"""Magnitudes: how large the weights of a channel are, in all places where the channel stands.

With W the weights of channel c in all members of the roles that count (Fang et al., "DepGraph:
Towards Any Structural Pruning", CVPR 2023, sum over the group in the same way):

    l1      s = Σ_{w ∈ W} |w|                        Li et al., "Pruning Filters for Efficient
                                                     ConvNets", ICLR 2017
    l2      s = √(Σ_{w ∈ W} w²)
    lamp    s = ‖W_c‖² / Σ_{d: ‖W_d‖ ≥ ‖W_c‖} ‖W_d‖²  Lee et al., "Layer-adaptive sparsity for the
                                                     Magnitude-based Pruning", ICLR 2021

LAMP is defined for single weights; here the weights of a channel are one. Its scores compare
across layers as they are, and the largest channel of a family has score 1: none ever loses all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fxopt.channels.groups import Family
from fxopt.graph_module import GraphModule
from fxopt.pruning.importance.members import PowerSums, check_roles, members_of
from fxopt.pruning.importance.normalization import Normalized

WEIGHTS = ("output", "input", "scale")


@dataclass(frozen=True)
class Magnitude(Normalized):
    """A norm over the weights of a channel; `roles` says which of its members count.

    By default those are the rows that compute the channel, the columns that read it, and the
    factors of its norms, as in DepGraph: a channel that nobody reads matters as little as one
    that is hardly computed. ("output",) alone is the classic norm of a filter.
    """

    roles: tuple[str, ...] = WEIGHTS

    name: ClassVar[str] = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_roles(self.roles)

    def sums(
        self, graph: GraphModule, families: Sequence[Family], order: int
    ) -> list[torch.Tensor]:
        """Return, for each family, Σ |w|^order over the weights of each channel."""
        powers = PowerSums(graph, order)
        return [powers.of(members_of(one, self.roles, self.name)) for one in families]


@dataclass(frozen=True)
class L1(Magnitude):
    """The sum of the absolute values of a channel's weights."""

    name: ClassVar[str] = "l1"

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return Σ |w| per channel."""
        return self.sums(graph, families, 1)


@dataclass(frozen=True)
class L2(Magnitude):
    """The Euclidean norm of a channel's weights."""

    name: ClassVar[str] = "l2"

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return √(Σ w²) per channel."""
        return [one.sqrt() for one in self.sums(graph, families, 2)]


@dataclass(frozen=True)
class Lamp(Magnitude):
    """The share of a channel's squared norm in that of all channels at least as large."""

    normalize: str | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "lamp"

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return ‖W_c‖² / Σ_{d: ‖W_d‖ ≥ ‖W_c‖} ‖W_d‖² per channel; 0 where all weights are 0."""
        return [_lamp(one) for one in self.sums(graph, families, 2)]


def _lamp(squares: torch.Tensor) -> torch.Tensor:
    ordered = squares.sort().values
    from_here_up = ordered.flip(0).cumsum(0).flip(0)
    first_as_large = torch.searchsorted(ordered, squares)  # so that equal ones score alike
    return torch.where(squares > 0, squares / from_here_up[first_as_large], 0.0)
