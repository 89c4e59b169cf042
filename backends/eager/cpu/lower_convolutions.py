"""Lower convolutions to the fastest kernel there is for their shape.

Before                                   After, for instance
    y = conv2d(x, w, b)                      v = mkldnn._reorder_convolution_weight(w)
    z = relu(y + r)                          z = mkldnn._convolution_pointwise(x, r, v, b, …)

The ways: oneDNN with what follows fused and the weight in its own layout, by its own library where
one is installed, and by PyTorch's; the convolution of PyTorch, channels last; and for a 1×1
convolution, which is a linear layer over the channels of each position, the ways of linear layers.
Which is the fastest is measured. In oneDNN's favour are fewer passes over the result, in BLAS's
that a call costs a fraction as much as one of PyTorch's oneDNN.

Left alone: weights and biases that are not constant; padding by name; dtypes that oneDNN does not
convolve; without oneDNN's own library small layers, where the call is what takes the time, and
PyTorch's own is the shortest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.backends.eager.cpu.choice import (
    Build,
    is_small,
    itself,
    library_way,
    replace_by_fastest,
)
from fxopt.backends.eager.cpu.epilogues import Epilogue, epilogue_of, onednn_obstacle
from fxopt.backends.eager.cpu.lower_linears import Linear
from fxopt.backends.eager.onednn import operators
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import rank_of, shape_of
from fxopt.timings import Timings

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


@dataclass(frozen=True)
class LowerConvolutions:
    """Convolve, add and activate in the fastest way."""

    timings: Timings | None = field(default=None, compare=False)

    name: ClassVar[str] = "lower-convolutions"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Lower each convolution whose weight is constant."""
        rewriter = Rewriter(graph)
        for node in graph.find(aten.conv2d.default, aten.conv3d.default):
            why = _obstacle(graph, node)
            if why is not None:
                rewriter.miss(node, why)
                continue
            site = _Site(rewriter, node, epilogue_of(node, activation_after_sum=True))
            is_short = is_small(node, shape_of(node.args[1])[1:])
            ways = site.shortest_ways() if is_short else site.ways()
            if ways:
                replace_by_fastest(rewriter, site.last, site.inputs, ways, self.timings)
        return rewriter.result()


def _obstacle(graph: GraphModule, node: fx.Node) -> str | None:
    """Why a convolution is left as it is, in words."""
    if not is_constant(graph, node.args[1]):
        return "its weight is not constant"
    if node.args[2] is not None and not is_constant(graph, node.args[2]):
        return "its bias is not constant"
    if rank_of(node) != rank_of(node.args[1]):
        return "its input is one image, without a batch"
    if isinstance(node.args[4], str):
        return "its padding has a name"
    return onednn_obstacle(node)


class _Site:
    """One convolution with what follows it."""

    def __init__(self, rewriter: Rewriter, node: fx.Node, epilogue: Epilogue) -> None:
        self.rewriter = rewriter
        self.node = node
        self.epilogue = epilogue
        self.last = epilogue.last_of(node)
        args: Any = node.args
        self.x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups = args
        self.inputs = epilogue.inputs(self.x)

    def shortest_ways(self) -> dict[str, Build]:
        """Return those whose calls are short."""
        found = library_way(self.node, self._by_library)
        return {**found, "as it is": partial(itself, self.last)} if found else {}

    def ways(self) -> dict[str, Build]:
        """Return all ways by name."""
        found = library_way(self.node, self._by_library)
        found |= {"oneDNN": self._by_onednn, "channels last": self._by_aten}
        if self._is_pointwise():
            found["linear, oneDNN"] = partial(self._as_linear, fused=True)
            found["linear, BLAS"] = self._as_linear
            found["linear, BLAS, transposed"] = partial(self._as_linear, transposed=True)
        return found

    def _is_pointwise(self) -> bool:
        kernel = shape_of(self.weight)[2:]
        return (
            self.groups == 1
            and all(size == 1 for size in (*kernel, *self.stride))
            and not any(self.padding)
        )

    def _by_library(self) -> fx.Node:
        epilogue = self.epilogue
        other = () if epilogue.other is None else (epilogue.other,)
        return self._insert(
            operators.convolution_add if other else operators.convolution, self.x, *other,
            self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            *epilogue.unary.spelled, like=self.last,
        )

    def _by_onednn(self) -> fx.Node:
        sizes = shape_of(self.x)
        known = list(sizes) if all(isinstance(size, int) for size in sizes) else None
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        packed = self._insert(
            mkldnn._reorder_convolution_weight.default, self.weight, *geometry, known,
            like=self.weight,
        )
        unary = self.epilogue.unary
        if self.epilogue.other is None:
            return self._insert(
                mkldnn._convolution_pointwise.default, self.x, packed, self.bias, *geometry,
                unary.name, list(unary.scalars), unary.algorithm, like=self.last,
            )
        return self._insert(
            mkldnn._convolution_pointwise.binary, self.x, self.epilogue.other, packed, self.bias,
            *geometry, "add", None, None if unary.name == "none" else unary.name,
            list(unary.scalars), None, like=self.last,
        )

    def _by_aten(self) -> fx.Node:
        weight = self._insert(
            aten.clone.default, self.weight, memory_format=_LAYOUT[rank_of(self.node)]
        )
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        new = self._insert(self.node.target, self.x, weight, self.bias, *geometry, like=self.node)
        return self.epilogue.apply(self.rewriter, self.node, new)

    def _as_linear(self, fused: bool = False, transposed: bool = False) -> fx.Node:
        """Insert a linear layer over the channels, which lie last in memory: no copy is made."""
        rank = rank_of(self.node)
        last = [0, *range(2, rank), 1]
        first = [0, rank - 1, *range(1, rank - 1)]
        outputs, channels = shape_of(self.weight)[:2]
        weight = self._insert(aten.reshape.default, self.weight, [outputs, channels])
        x = self._insert(aten.permute.default, self.x, last)
        layer = Linear(self.rewriter, x, weight, self.bias, self.last, self._origin)
        if not fused:
            new = layer.by_blas() if transposed else layer.plain()
            back = self._insert(aten.permute.default, new, first)
            return self.epilogue.apply(self.rewriter, self.node, back)
        epilogue, relu = self.epilogue, None
        if epilogue.other is not None:
            other = self._insert(aten.permute.default, epilogue.other, last)
            epilogue, relu = Epilogue((), other), epilogue.unary
        back = self._insert(aten.permute.default, layer.by_onednn(epilogue), first)
        if relu is None or relu.name == "none":
            return back
        return self._insert(aten.relu.default, back)

    @property
    def _origin(self) -> tuple[fx.Node, ...]:
        return (self.node, *self.epilogue.nodes)

    def _insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.insert(
            target, *args, before=self.last, origin=self._origin, **kwargs
        )


_LAYOUT = {4: torch.channels_last, 5: torch.channels_last_3d}
