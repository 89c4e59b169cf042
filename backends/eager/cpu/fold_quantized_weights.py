"""Round the weights that no kernel for bytes took, now.

Before                                   After
    u = fake_quantize(w, s, z, −127, 127)    u = constant
    y = conv2d(x, u, b)                      y = conv2d(x, u, b)

What reshapes a weight into groups and back is folded with it.

Left alone: weights, scales and zero points that are not constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.constants import fold
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize
from fxopt.rewrite import Rewriter

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.view.default)


@dataclass(frozen=True)
class FoldQuantizedWeights:
    """Let rounded weights be constants, which the lowerings of layers ask for."""

    name: ClassVar[str] = "fold-quantized-weights"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fold each fake-quantization of constants."""
        rewriter = Rewriter(graph)
        for node in graph.find(fake_quantize):
            if all(_is_reshaped_constant(graph, one) for one in node.all_input_nodes):
                fold(rewriter, _reshaped(node))
        return rewriter.result()


def _is_reshaped_constant(graph: GraphModule, node: fx.Node) -> bool:
    args: Any = node.args
    return is_constant(graph, args[0] if node.target in _RESHAPES else node)


def _reshaped(node: fx.Node) -> fx.Node:
    """Return the reshape of a value that is all that is used of it, or else the value."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _RESHAPES else node
