"""Geometric median: a channel that lies close to all others can be replaced by them.

    s_c = Σ_d ‖W_c − W_d‖₂        over the channels d of the same family

He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
Acceleration", CVPR 2019, equation 5. A point W_c is the channel's weights in all members that
count, side by side; by default the rows that compute it, as in the paper.

The distances of n channels with m weights each cost n² · m multiplications: a few milliseconds for
a convolution, seconds for a linear layer of 4096 outputs and 25088 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fxopt.channels.groups import Family
from fxopt.graph_module import GraphModule
from fxopt.pruning.importance.members import along, check_roles, members_of
from fxopt.pruning.importance.normalization import Normalized

_COLUMNS = 4096  # taken to float64 at a time


@dataclass(frozen=True)
class GeometricMedian(Normalized):
    """The sum of a channel's distances to all others of its family; `roles`: whose weights."""

    roles: tuple[str, ...] = ("output",)

    name: ClassVar[str] = "geometric-median"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_roles(self.roles)

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return Σ_d ‖W_c − W_d‖₂ per channel."""
        return [self._distances(graph, family) for family in families]

    def _distances(self, graph: GraphModule, family: Family) -> torch.Tensor:
        squares = torch.zeros(family.channels, family.channels, dtype=torch.float64)
        for member in members_of(family, self.roles, self.name):
            for columns in along(graph.constant(member.constant), member).split(_COLUMNS, dim=1):
                points = columns.to("cpu", torch.float64)
                squares += torch.cdist(points, points).square()
        return squares.sqrt().sum(1)
