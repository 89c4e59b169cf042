"""Split fake-quantizations of activations into the way to bytes and the way back.

Before                                   After
    y = fake_quantize(x, s, z, 0, 255)       q = quantize(x, s, z, 0, 255)      bytes
                                             y = dequantize(q, s, z, 0, 255)

Who can read bytes may now read q; each step alone is one pass over memory.

Left alone: weights; scales per channel, or that are not constant; more than 8 bits; other dtypes
than float32; processors that do not multiply bytes exactly, and machines without oneDNN's own
library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fxopt.affine import is_constant
from fxopt.backends.eager.cpu.grids import activation_obstacle, multiplies_bytes
from fxopt.backends.eager.onednn.quantized_operators import dequantize, quantize
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize
from fxopt.rewrite import Rewriter


@dataclass(frozen=True)
class QuantizeActivations:
    """Let activations be bytes."""

    name: ClassVar[str] = "quantize-activations"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Split each fake-quantization of what is no constant."""
        rewriter = Rewriter(graph)
        for node in graph.find(fake_quantize):
            args: Any = node.args
            if is_constant(graph, args[0]):
                continue
            why = activation_obstacle(graph, node)
            if why is None and not multiplies_bytes():
                why = "there are no kernels for bytes here"
            if why is not None:
                rewriter.miss(node, why)
                continue
            whole = rewriter.insert(quantize, *args, before=node)
            back = rewriter.insert(dequantize, whole, *args[1:], before=node, like=node)
            rewriter.replace(node, back)
        return rewriter.result()
