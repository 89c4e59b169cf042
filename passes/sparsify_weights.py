"""Set the weights that matter least to 0, one by one or in a pattern that hardware knows.

Before                                       After
    y = linear(x, w)                             y = linear(x, w · mask)

`sparsity` is a share, such as 0.9: the weights with the smallest scores become 0, as many as that
share of each layer (scope="layer"), or of all layers together (scope="global"). Or it is a pattern
such as "2:4": two of every four weights side by side along the inputs stay (Mishra et al.,
"Accelerating Sparse Deep Neural Networks", 2021). A score is the weight's magnitude (Han et al.,
"Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015), or what the
user's function says. Of equal scores the first go, so that there are exactly as many zeros as were
asked for.

Shapes stay, and so does the time: dense kernels multiply by 0, too. What it gains is a smaller file
after compression, and speed on engines with kernels for the pattern. The mask is part of how the
new weight is computed: new weights of the model are put through the same mask.

Left alone: weights that something else reads as well (an embedding tied to a layer); integers,
vectors and state; for a pattern, a number of inputs that is no multiple of it; weights that other
nodes compute; recurrent layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import torch

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.errors import FxoptError, OptionError, VerifyError, unknown_name
from fxopt.graph_module import GraphModule
from fxopt.pruning.sparsity import (
    Blocks,
    Share,
    SparsityRecord,
    Weight,
    count_of,
    largest,
    largest_in_blocks,
    masked,
    shortfall,
    unreadable,
    weights_of,
)
from fxopt.rewrite import Rewriter

Scores = Callable[[GraphModule, str, torch.Tensor], torch.Tensor]
Goal = float | Blocks
SCOPES = ("layer", "global")


@dataclass(frozen=True)
class SparsifyWeights:
    """Set single weights of convolutions, linear layers and products to 0.

    `overrides` maps patterns to a share or pattern of their own, `keep` are patterns of what stays
    dense. A pattern such as "blocks.*.fc1" is compared with the paths of layers; the first that
    fits counts. `importance`: "magnitude", or a function of the graph, the weight's
    name and its values that returns a score for each value, the larger the more it matters.
    """

    sparsity: float | str = 0.5
    scope: str = "layer"
    importance: str | Scores = "magnitude"
    overrides: Mapping[str, float | str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    name: ClassVar[str] = "sparsify-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def __post_init__(self) -> None:
        for given in (self.sparsity, *self.overrides.values()):
            _goal(given)
        if self.scope not in SCOPES:
            raise OptionError(f"scope={self.scope!r}: it is one of {', '.join(map(repr, SCOPES))}.")
        if self.importance != "magnitude" and not callable(self.importance):
            raise OptionError(
                f"importance={self.importance!r}: it is 'magnitude', or a function of a graph, a "
                "weight's name and its values."
            )
        if isinstance(self.keep, str):
            raise OptionError(f"keep={self.keep!r} is one text; write keep=({self.keep!r},).")

    def run(self, graph: GraphModule) -> PassResult:
        """Mask every weight that may be, and check that the zeros are there.

        `details` of the result is a `fxopt.pruning.sparsity.SparsityRecord`.
        """
        rewriter = Rewriter(graph)
        weights = weights_of(graph)
        self._check_patterns(graph, weights)
        for node, words in unreadable(graph):
            rewriter.miss(node, words)
        pool: list[Weight] = []
        shares: list[Share] = []
        dense = 0
        for weight in weights:
            goal = self._goal_of(weight)
            reason = None if goal == 0 else weight.obstacle or _misfit(graph, weight, goal)
            if reason is not None:
                rewriter.miss(weight.node, f"'{weight.name}' stays dense: {reason}")
                dense += 1
            elif isinstance(goal, Blocks):
                mask = largest_in_blocks(self._scores(graph, weight), goal, weight.dim)
                shares.append(self._mask(rewriter, weight, mask, goal))
            elif self.scope == "global" and self._override(weight) is None:
                pool.append(weight)
            elif goal > 0:
                scores = self._scores(graph, weight)
                count = count_of(goal, scores.numel())
                shares.append(self._mask(rewriter, weight, largest(scores, count), count))
        shares += self._mask_together(rewriter, pool)
        record = SparsityRecord(tuple(shares), dense) if shares else None
        return replace(rewriter.result(), details=record)

    def _mask_together(self, rewriter: Rewriter, weights: Sequence[Weight]) -> list[Share]:
        """Mask the smallest of all these weights; each tensor's scores stand behind the last's."""
        goal = _goal(self.sparsity)
        if not weights or isinstance(goal, Blocks):
            return []
        scores = [self._scores(rewriter.graph, weight).cpu() for weight in weights]
        flat = torch.cat([one.reshape(-1) for one in scores])
        count = count_of(goal, flat.numel())
        whole = largest(flat, count)
        gone = int((~whole).sum())
        if gone != count:
            raise VerifyError(f"The layers together lose {gone} weights, not {count}.")
        parts = whole.split([one.numel() for one in scores])
        masks = [part.reshape(one.shape).clone() for part, one in zip(parts, scores, strict=True)]
        return [
            self._mask(rewriter, weight, mask, int((~mask).sum()))
            for weight, mask in zip(weights, masks, strict=True)
        ]

    def _mask(
        self, rewriter: Rewriter, weight: Weight, mask: torch.Tensor, goal: int | Blocks
    ) -> Share:
        value = rewriter.graph.value(weight.node).detach()
        zeroed = masked(value, mask)
        reason = shortfall(zeroed, weight.dim, goal)
        if reason is not None:
            raise VerifyError(f"'{weight.name}' is not as sparse as was asked for: {reason}.")
        share = Share(weight.layers, int((zeroed == 0).sum()), zeroed.numel())
        if torch.equal(zeroed, value):
            return share  # it has these zeros already
        new = rewriter.constant_of(
            zeroed.contiguous(), partial(masked, mask=mask), [weight.node],
            name=f"{weight.name}_sparse", before=weight.node,
        )  # fmt: skip
        rewriter.replace(weight.node, new)
        return share

    def _scores(self, graph: GraphModule, weight: Weight) -> torch.Tensor:
        value = graph.value(weight.node).detach()
        if isinstance(self.importance, str):
            return _finite(value.abs(), f"The weight '{weight.name}'")
        named = getattr(self.importance, "__qualname__", type(self.importance).__name__)
        who = f"The importance function '{named}'"
        try:
            with torch.no_grad():
                scores = torch.as_tensor(self.importance(graph, weight.name, value.clone()))
        except Exception as error:
            raise FxoptError(
                f"{who} failed for '{weight.name}' with {type(error).__name__}: {error}"
            ) from error
        if scores.shape != value.shape:
            raise FxoptError(
                f"{who} returned scores of shape {list(scores.shape)} for '{weight.name}', whose "
                f"values have the shape {list(value.shape)}: it must return one score for each."
            )
        return _finite(scores.detach(), f"{who}, for '{weight.name}',")

    def _goal_of(self, weight: Weight) -> Goal:
        if any(map(weight.matches, self.keep)):
            return 0.0
        own = self._override(weight)
        return _goal(self.sparsity if own is None else own)

    def _override(self, weight: Weight) -> float | str | None:
        """Return the share or pattern of the first override that fits."""
        found = [goal for pattern, goal in self.overrides.items() if weight.matches(pattern)]
        return found[0] if found else None

    def _check_patterns(self, graph: GraphModule, weights: Sequence[Weight]) -> None:
        """Raise OptionError for a pattern that fits nothing."""
        if graph.is_subgraph or any(True for _ in graph.subgraphs()):
            return  # it may be meant for another part
        for pattern in (*self.overrides, *self.keep):
            if not any(weight.matches(pattern) for weight in weights):
                layers = {layer for weight in weights for layer in weight.layers}
                raise unknown_name("layer or pattern of layers:", pattern, layers)


def _goal(given: float | str) -> Goal:
    if isinstance(given, str):
        return Blocks.of(given)
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise OptionError(
            f"sparsity={given!r}: it is a share between 0 and 1, or a pattern such as '2:4'."
        )
    return float(given)


def _misfit(graph: GraphModule, weight: Weight, goal: Goal) -> str | None:
    """Return why a weight does not fit a goal."""
    size = graph.value(weight.node).shape[weight.dim]
    if isinstance(goal, Blocks) and size % goal.size:
        return f"its {size} inputs are no multiple of {goal.size}, as {goal} needs"
    return None


def _finite(scores: torch.Tensor, who: str) -> torch.Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise FxoptError(f"{who} has scores that are no finite numbers, so none is the smallest.")
    return scores
