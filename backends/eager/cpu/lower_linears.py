"""Lower linear layers to the fastest kernel there is for their shape.

Before                                   After, for instance
    y = linear(x, w, b)                      v = mkldnn._reorder_linear_weight(w)
    z = gelu(y)                              z = mkldnn._linear_pointwise(x, v, b, "gelu")

The ways: oneDNN with what follows fused, by its own library where one is installed and by
PyTorch's; the linear layer of PyTorch, which is BLAS; the same with
the weight's memory transposed, for which BLAS has another kernel. Which is the fastest is measured.

Left alone: weights and biases that are not constant; dtypes that oneDNN does not multiply; and
without oneDNN's own library small layers, where the call is what takes the time, and PyTorch's own
is the shortest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.backends.eager.cpu.choice import is_small, itself, library_way, replace_by_fastest
from fxopt.backends.eager.cpu.epilogues import Epilogue, epilogue_of, onednn_obstacle
from fxopt.backends.eager.onednn import operators
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_static_shape, rank_of, shape_of
from fxopt.timings import Timings

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


@dataclass(frozen=True)
class LowerLinears:
    """Multiply, add and activate in the fastest way."""

    timings: Timings | None = field(default=None, compare=False)

    name: ClassVar[str] = "lower-linears"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Lower each linear layer whose weight is constant."""
        rewriter = Rewriter(graph)
        for node in graph.find(aten.linear.default):
            why = _obstacle(graph, node)
            if why is not None:
                rewriter.miss(node, why)
            else:
                _lower(rewriter, node, self.timings)
        return rewriter.result()


def _obstacle(graph: GraphModule, node: fx.Node) -> str | None:
    """Why a linear layer is left as it is, in words."""
    if not is_constant(graph, node.args[1]):
        return "its weight is not constant"
    if node.args[2] is not None and not is_constant(graph, node.args[2]):
        return "its bias is not constant"
    if 0 in shape_of(node.args[1]):
        return "its weight is empty"
    if rank_of(node) < 2:
        return "oneDNN multiplies rows, and its input is one"
    return onednn_obstacle(node)


def _lower(rewriter: Rewriter, node: fx.Node, timings: Timings | None) -> None:
    """Replace a linear layer, and what follows it, in the fastest way."""
    args: Any = node.args
    x, weight, bias = args
    epilogue = epilogue_of(node, activation_after_sum=False)
    last = epilogue.last_of(node)
    layer = Linear(rewriter, x, weight, bias, last, (node, *epilogue.nodes))
    ways = library_way(node, partial(layer.by_library, epilogue))
    is_long = not is_small(x, shape_of(weight)[:1])
    if is_long:
        ways["oneDNN"] = partial(layer.by_onednn, epilogue)
    ways["BLAS"] = partial(itself, last)
    if is_long:
        ways["BLAS, transposed"] = partial(_transposed, layer, node, epilogue)
    replace_by_fastest(rewriter, last, epilogue.inputs(x), ways, timings)


def _transposed(layer: Linear, node: fx.Node, epilogue: Epilogue) -> fx.Node:
    return epilogue.apply(layer.rewriter, node, layer.by_blas())


@dataclass(frozen=True)
class Linear:
    """x · wᵀ + b, and where in the graph it is to be computed."""

    rewriter: Rewriter
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    before: fx.Node
    origin: tuple[fx.Node, ...]

    def by_library(self, epilogue: Epilogue) -> fx.Node:
        """Insert the kernel of oneDNN's own library, which does what follows, too."""
        other = () if epilogue.other is None else (epilogue.other,)
        return self._insert(
            operators.linear_add if other else operators.linear, self.x, *other, self.weight,
            self.bias, *epilogue.unary.spelled,
        )

    def by_onednn(self, epilogue: Epilogue) -> fx.Node:
        """Insert oneDNN's kernel, which does what follows, too."""
        rows = math.prod(shape_of(self.x)[:-1]) if is_static_shape(self.x) else None
        packed = self._insert(
            mkldnn._reorder_linear_weight.default, self.weight, rows, like=self.weight
        )
        if epilogue.other is not None:
            return self._insert(
                mkldnn._linear_pointwise.binary, self.x, epilogue.other, packed, self.bias, "add",
                like=epilogue.other,
            )
        unary = epilogue.unary
        return self._insert(
            mkldnn._linear_pointwise.default, self.x, packed, self.bias,
            unary.name, list(unary.scalars), unary.algorithm,
        )

    def by_blas(self) -> fx.Node:
        """Insert PyTorch's own, on a weight that lies transposed."""
        across = self._insert(aten.permute.default, self.weight, [1, 0])
        whole = self._insert(
            aten.clone.default, across, memory_format=torch.contiguous_format
        )
        weight = self._insert(aten.permute.default, whole, [1, 0])
        return self._insert(aten.linear.default, self.x, weight, self.bias)

    def plain(self) -> fx.Node:
        """Insert PyTorch's own."""
        return self._insert(aten.linear.default, self.x, self.weight, self.bias)

    def _insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.insert(
            target, *args, before=self.before, origin=self.origin, **kwargs
        )
