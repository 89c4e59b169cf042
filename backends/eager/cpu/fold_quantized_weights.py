"""Round the weights that no kernel for bytes took, now.

Before                                   After
    u = fake_quantize(w, s, z, −127, 127)    u = constant
    y = conv2d(x, u, b)                      y = conv2d(x, u, b)

Left alone: weights, scales and zero points that are not constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxopt.affine import is_constant
from fxopt.constants import fold
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize
from fxopt.rewrite import Rewriter


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
            args: Any = node.args
            if all(is_constant(graph, one) for one in args[:3]):
                fold(rewriter, node)
        return rewriter.result()
