"""What passes and backends that are wrong on purpose have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxopt.backends.eager import Eager, EagerExecutable
from fxopt.contract import Effect, Precondition
from fxopt.graph_module import GraphModule

aten = torch.ops.aten


class Planted:
    """A pass; its `run` is what is wrong."""

    name: ClassVar[str] = "planted"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()


@dataclass(frozen=True)
class WrongTanh(Eager):
    """A backend that runs PyTorch, and every tanh as a sigmoid."""

    name: ClassVar[str] = "wrong-tanh"

    def lower(self, graph: GraphModule) -> EagerExecutable:
        for node in graph.find(aten.tanh.default):
            node.target = aten.sigmoid.default
        graph.recompile()
        return EagerExecutable(graph)
