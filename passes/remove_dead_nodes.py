"""Remove what nobody uses.

Before                                   After
    a = relu(x)                              b = sigmoid(x)
    b = sigmoid(x)                           return b
    return b

A node without users goes, then those of its inputs that only it used, and with a get_attr node its
constant.

Left alone: a call with an effect (random, an assertion, a write, a batch norm in training mode, a
custom operator whose schema may not tell everything), and every input, so that the model is still
called as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.effects import effect
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter


@dataclass(frozen=True)
class RemoveDeadNodes:
    """Erase unused pure nodes, and the constants that only they used."""

    name: ClassVar[str] = "remove-dead-nodes"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Erase dead nodes from the end of the graph to its beginning."""
        rewriter = Rewriter(graph)
        for node in reversed(list(graph.graph.nodes)):
            if node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            reason = effect(node)
            if reason is not None:
                rewriter.miss(node, f"nobody uses it, but {reason}")
            else:
                rewriter.erase(node)
        return rewriter.result()
