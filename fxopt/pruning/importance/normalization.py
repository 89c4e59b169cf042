"""Scores of different families on one scale, so that a ranking over the whole model is fair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fxopt.channels.groups import Family
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.pruning.importance.contract import checked

Normalization = Callable[[torch.Tensor], torch.Tensor]


def _over(scores: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return scores in a unit of their own; as they are where all of them are 0."""
    return scores / unit if float(unit) > 0 else scores


def _gaussian(scores: torch.Tensor) -> torch.Tensor:
    return _over(scores - scores.mean(), scores.std(correction=0))


def _rank(scores: torch.Tensor) -> torch.Tensor:
    """Return (rank + ½) / channels; equal scores share the mean of their ranks."""
    ordered = scores.sort().values
    below = torch.searchsorted(ordered, scores, side="left")
    up_to = torch.searchsorted(ordered, scores, side="right")
    return (below + up_to).to(torch.float64) / (2 * len(scores))


NORMALIZATIONS: dict[str, Normalization] = {
    "mean": lambda scores: _over(scores, scores.abs().mean()),  # s / mean |s|
    "max": lambda scores: _over(scores, scores.abs().max()),  # s / max |s|
    "sum": lambda scores: _over(scores, scores.abs().sum()),  # s / Σ |s|
    "gaussian": _gaussian,  # (s − mean) / standard deviation
    "rank": _rank,
}


def normalized(scores: torch.Tensor, how: str | None) -> torch.Tensor:
    """Return the scores of one family, normalised; None leaves them as they are."""
    if how is None or not len(scores):
        return scores
    return NORMALIZATIONS[how](scores)


@dataclass(frozen=True)
class Normalized:
    """Base of the importances here: `measure` says how a family is scored, this does the rest.

    `normalize`: "mean", "max" or "sum" divide a family's scores by theirs, "gaussian" gives mean 0
    and standard deviation 1, "rank" numbers between 0 and 1 in the order of the scores. The order
    within a family is always that of the scores themselves.
    """

    normalize: str | None = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        if self.normalize is not None and self.normalize not in list(NORMALIZATIONS):
            raise OptionError(
                f"normalize={self.normalize!r}: it is None or one of "
                f"{', '.join(map(repr, NORMALIZATIONS))}."
            )

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return the scores before they are normalised, one tensor per family."""
        raise NotImplementedError

    def scores(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return a float64 tensor of shape [channels] per family; see `Importance`."""
        who = f"The importance '{getattr(self, 'name', type(self).__name__)}'"
        return [
            normalized(checked(values, family, who), self.normalize)
            for values, family in zip(self.measure(graph, families), families, strict=True)
        ]
