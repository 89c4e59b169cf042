"""Lower transposed convolutions to oneDNN's kernel, where it is faster.

Before                                   After
    y = conv_transpose2d(x, w, b)            v = mkldnn._reorder_convolution_transpose_weight(w)
    z = relu(y)                              z = mkldnn._convolution_transpose_pointwise(x, v, …)

The ways, timed against each other: oneDNN with an activation fused and the weight in its own
layout, and PyTorch's own as it stands.

Left alone: weights that are not constant; dtypes that oneDNN does not convolve; small ones, where
the call is what takes the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.backends.eager.cpu.choice import Build, is_small, itself, replace_by_fastest
from fxopt.backends.eager.cpu.epilogues import Epilogue, activation_of, onednn_obstacle
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, rank_of, shape_of
from fxopt.timings import Timings

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


@dataclass(frozen=True)
class LowerTransposedConvolutions:
    """Convolve backwards and activate in one kernel."""

    timings: Timings | None = field(default=None, compare=False)

    name: ClassVar[str] = "lower-transposed-convolutions"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Lower each transposed convolution whose weight is constant."""
        rewriter = Rewriter(graph)
        for node in graph.find(aten.conv_transpose2d.input):
            args: Any = node.args
            x, weight = args[:2]
            if not is_constant(graph, weight):
                rewriter.miss(node, "its weight is not constant")
            elif rank_of(node) != rank_of(weight):
                rewriter.miss(node, "its input is one image, without a batch")
            elif (why := onednn_obstacle(node)) is not None:
                rewriter.miss(node, why)
            elif not is_small(x, shape_of(weight)[1:]):
                # in bfloat16 oneDNN's fused activations are wrong at infinities and NaN
                is_full = dtype_of(node) is torch.float32
                epilogue = activation_of(node) if is_full else Epilogue()
                last = epilogue.last_of(node)
                ways: dict[str, Build] = {
                    "oneDNN": partial(_by_onednn, rewriter, node, epilogue),
                    "as it is": partial(itself, last),
                }
                replace_by_fastest(rewriter, last, epilogue.inputs(x), ways, self.timings)
        return rewriter.result()


def _by_onednn(rewriter: Rewriter, node: fx.Node, epilogue: Epilogue) -> fx.Node:
    args: Any = node.args
    x, weight, bias, stride, padding, output_padding, groups, dilation = args
    last = epilogue.last_of(node)
    place: dict[str, Any] = {"before": last, "origin": (node, *epilogue.nodes)}
    packed = rewriter.insert(
        mkldnn._reorder_convolution_transpose_weight.default, weight, padding, output_padding,
        stride, dilation, groups, None, like=weight, **place,
    )
    unary = epilogue.unary
    return rewriter.insert(
        mkldnn._convolution_transpose_pointwise.default, x, packed, bias, padding, output_padding,
        stride, dilation, groups, unary.name, list(unary.scalars), unary.algorithm,
        like=last, **place,
    )
