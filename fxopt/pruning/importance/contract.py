"""What an importance is: scores for the channels of families, and what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from fxopt.channels.groups import Family
from fxopt.errors import FxoptError
from fxopt.graph_module import GraphModule


@runtime_checkable
class Importance(Protocol):
    """How much each channel matters: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]

    def scores(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return a float64 tensor of shape [channels] per family; the larger, the more it matters.

        The graph is only read. Raises FxoptError where a family cannot be scored.
        """
        ...


def score(
    importance: Importance, graph: GraphModule, families: Sequence[Family]
) -> list[torch.Tensor]:
    """Return the scores of all families, checked: their number, shapes, and that all are finite.

    Raises FxoptError, with the family's name, for what is wrong.
    """
    found = importance.scores(graph, families)
    if len(found) != len(families):
        raise FxoptError(
            f"The importance '{importance.name}' returned {len(found)} tensors of scores for "
            f"{len(families)} families: it must return one for each, in their order."
        )
    return [
        checked(values, family, f"The importance '{importance.name}'")
        for values, family in zip(found, families, strict=True)
    ]


def checked(values: Any, family: Family, who: str) -> torch.Tensor:
    """Return the scores of one family as float64 on the CPU; raise FxoptError for what are none."""
    try:
        scores = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FxoptError(
            f"{who} returned a {type(values).__name__} for the family '{family.name}', not a "
            f"tensor of {family.channels} scores: {error}."
        ) from None
    if scores.shape != (family.channels,):
        raise FxoptError(
            f"{who} returned scores of shape {list(scores.shape)} for the family '{family.name}', "
            f"which has {family.channels} channels: the shape must be [{family.channels}]."
        )
    wrong = int((~torch.isfinite(scores)).sum())
    if wrong:
        raise FxoptError(
            f"{who} returned {wrong} scores that are no finite numbers for the family "
            f"'{family.name}' (layers {', '.join(family.layers) or 'none'}). Look for NaN or "
            "infinity in its weights, or in the data."
        )
    return scores
