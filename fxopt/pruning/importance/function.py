"""An importance of the user's own: a plain function of a graph and a family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxopt.channels.groups import Family
from fxopt.errors import FxoptError
from fxopt.graph_module import GraphModule
from fxopt.pruning.importance.contract import checked


@dataclass(frozen=True)
class OwnFunction:
    """Scores by `function(graph, family)`, which returns [channels] numbers, taken as they are."""

    function: Callable[[GraphModule, Family], Any]

    name: ClassVar[str] = "own-function"

    def scores(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return what the function says; raise FxoptError where that is no score per channel."""
        return [self._of(graph, family) for family in families]

    def _of(self, graph: GraphModule, family: Family) -> torch.Tensor:
        named = getattr(self.function, "__qualname__", type(self.function).__name__)
        who = f"The importance function '{named}'"
        try:
            with torch.no_grad():
                values = self.function(graph, family)
        except FxoptError:
            raise
        except Exception as error:
            raise FxoptError(
                f"{who} failed for the family '{family.name}' with {type(error).__name__}: {error}"
            ) from error
        return checked(values, family, who)
