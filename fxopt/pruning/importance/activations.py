"""Activations: what the channels carry while the model runs on data.

    mean    mean |a|                                    the larger, the more the channel says
    std     √(mean a² − (mean a)²)                      a constant channel is no more than a bias
    apoz    share of values that are not 0              Hu et al., "Network Trimming", 2016: one
                                                        minus their average percentage of zeros

over batches and positions, in all values where the channels of the family are computed.

By default they are measured behind the norm and the activation that follow a layer: what the next
layer reads. In front of a batch norm a value says nothing, since the norm divides by its scale, and
in front of a ReLU hardly anything is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.channels.groups import Appearance, Family
from fxopt.errors import FxoptError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.interpreter import Interpreter, in_evaluation
from fxopt.objective import flat_inputs_of
from fxopt.pruning.importance.batches import check_batches, first_batches
from fxopt.pruning.importance.normalization import Normalized
from fxopt.shapes import is_tensor

aten = torch.ops.aten
STATISTICS = ("mean", "std", "apoz")
PLACES = ("activation", "layer")
_FOLLOWERS = (  # beside what torch itself tags as pointwise
    aten.batch_norm.default, aten.layer_norm.default, aten.group_norm.default,
    aten.instance_norm.default, aten.rms_norm.default, aten.dropout.default,
    aten.hardswish.default, aten.prelu.default,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Activations(Normalized):
    """A statistic of the values of each channel: "mean" of |a|, "std", or "apoz".

    `data` gives batches again and again: inputs, or pairs (inputs, targets). `batches` limits how
    many are looked at. `at`: "activation", behind the norm and activation that follow the layer;
    or "layer", what the layer itself returns.
    """

    data: Any = field(default=None, repr=False)
    statistic: str = "mean"
    at: str = "activation"
    batches: int | None = None

    name: ClassVar[str] = "activations"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_batches(self, self.data, self.batches)
        for word, value, known in (
            ("statistic", self.statistic, STATISTICS), ("at", self.at, PLACES),
        ):  # fmt: skip
            if value not in known:
                raise OptionError(f"{word}={value!r}: it is one of {', '.join(map(repr, known))}.")

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return the statistic per family and channel."""
        twin = in_evaluation(graph)
        nodes = {node.name: node for node in twin.graph.nodes}
        moments = [Moments(family.channels) for family in families]
        watched: dict[fx.Node, list[tuple[Moments, Appearance]]] = {}
        for family, found in zip(families, moments, strict=True):
            if not family.computed:
                raise FxoptError(
                    f"The importance 'activations' does not know where the channels of the family "
                    f"'{family.name}' are computed. Take an importance that reads weights for it."
                )
            for appearance in family.computed:
                node = nodes[appearance.node]
                place = _behind(node) if self.at == "activation" else node
                watched.setdefault(place, []).append((found, appearance))
        reader = _Reader(twin, watched)
        for batch in first_batches(self.data, self.batches):
            with torch.no_grad():
                reader.run(*flat_inputs_of(twin, batch), enable_io_processing=False)
        return [found.of(self.statistic) for found in moments]


class Moments:
    """Sums over all values of each channel, in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.plain, self.absolute, self.square, self.filled = torch.zeros(
            4, channels, dtype=torch.float64
        )

    def add(self, value: torch.Tensor, appearance: Appearance) -> None:
        """Take in the value of a node."""
        positions = torch.from_numpy(appearance.positions)
        wide = value.detach().movedim(appearance.dim, 0).flatten(1).double()
        for sums, terms in (
            (self.plain, wide), (self.absolute, wide.abs()), (self.square, wide.square()),
            (self.filled, wide != 0),
        ):  # fmt: skip
            sums += terms.sum(1, dtype=torch.float64).cpu()[positions].sum(1)
        self.count += wide.shape[1] * positions.shape[1]

    def of(self, statistic: str) -> torch.Tensor:
        """Return a statistic per channel."""
        count = max(self.count, 1)
        if statistic == "std":
            return (self.square / count - (self.plain / count).square()).clamp(min=0).sqrt()
        return (self.filled if statistic == "apoz" else self.absolute) / count


class _Reader(Interpreter):
    """Takes in the values that are watched."""

    def __init__(
        self, graph: GraphModule, watched: dict[fx.Node, list[tuple[Moments, Appearance]]]
    ) -> None:
        super().__init__(graph)
        self._watched = watched

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node."""
        value = super().run_node(n)
        for moments, appearance in self._watched.get(n, ()):
            moments.add(value, appearance)
        return value


def _behind(node: fx.Node) -> fx.Node:
    """Return the last of the norms and activations that follow a layer, before anything else."""
    while len(node.users) == 1:
        (user,) = node.users
        values = [source for source in user.all_input_nodes if source.op != "get_attr"]
        pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ())
        if not (pointwise or user.target in _FOLLOWERS) or values != [node] or not is_tensor(user):
            return node
        if tuple(user.meta["val"].shape) != tuple(node.meta["val"].shape):
            return node
        node = user
    return node
