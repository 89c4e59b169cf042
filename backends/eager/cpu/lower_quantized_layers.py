"""Lower layers between fake-quantizations to kernels that multiply bytes.

Before                                   After, where it is faster
    y = dequantize(q, s, z, …)               v = quantize(w, t, 0, −127, 127)       once
    u = fake_quantize(w, t, 0, −127, 127)    r = quantized_convolution(q, s, z, …, v, t, b, …,
    c = relu(conv2d(y, u, b, …))                                       "relu", s', z', 0, 255)
    r = quantize(c, s', z', 0, 255)

The kernel adds and activates in floats before it writes, and writes bytes where these alone are
read. What it adds may be bytes, too. The other way is the kernel for floats, with what is then
needed to make floats of bytes, and bytes of floats. Which is faster is measured.

Left alone: inputs that are no bytes; weights that are not rounded to signed bytes with the zero
point 0, or not constant; padding by name; images without a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.backends.eager.cpu.choice import library_way, replace_by_fastest
from fxopt.backends.eager.cpu.epilogues import epilogue_of
from fxopt.backends.eager.cpu.grids import (
    LAYERS,
    Bytes,
    bytes_behind,
    is_fake_quantized,
    multiplies_bytes,
    only_quantized,
    weight_obstacle,
)
from fxopt.backends.eager.onednn import operators, quantized_operators
from fxopt.backends.eager.onednn.quantized_operators import quantize
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import rank_of
from fxopt.timings import Timings

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerQuantizedLayers:
    """Multiply bytes, add and activate in the fastest way."""

    timings: Timings | None = field(default=None, compare=False)

    name: ClassVar[str] = "lower-quantized-layers"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Lower each layer whose input and weight are rounded."""
        rewriter = Rewriter(graph)
        for node in graph.find(*LAYERS):
            if not is_fake_quantized(node.args[1]) or not multiplies_bytes():
                continue
            x = bytes_behind(node.args[0])
            why = _obstacle(graph, node)
            if x is None or why is not None:
                rewriter.miss(node, why or "its input is not quantized")
            else:
                _Site(rewriter, node, x).lower(self.timings)
        return rewriter.result()


def note_on_bytes(graph: GraphModule, lowered: GraphModule) -> tuple[str, ...]:
    """Return what the report says of layers that are rounded; nothing where there are none."""
    rounded = sum(is_fake_quantized(node.args[1]) for node in graph.find(*LAYERS))
    if not rounded:
        return ()
    count = len(lowered.find(*(target for pair in _TARGETS.values() for target in pair)))
    why = "" if multiplies_bytes() else ": for that it needs oneDNN's own library, and VNNI"
    return (f"eager: {count} of {rounded} layers with rounded weights multiply bytes{why}.",)


def _obstacle(graph: GraphModule, node: fx.Node) -> str | None:
    """Why a layer is left as it is, in words."""
    args: Any = node.args
    bias = args[2]
    if bias is not None and not is_constant(graph, bias):
        return "its bias is not constant"
    if node.target is aten.linear.default:
        if rank_of(node) < 2:
            return "oneDNN multiplies rows, and its input is one"
    elif rank_of(node) != rank_of(args[1]):
        return "its input is one image, without a batch"
    return weight_obstacle(graph, args[1])


class _Site:
    """One layer with what follows it."""

    def __init__(self, rewriter: Rewriter, node: fx.Node, x: Bytes) -> None:
        self.rewriter = rewriter
        self.node = node
        self.x = x
        self.epilogue = epilogue_of(node, activation_after_sum=True)
        self.activated = self.epilogue.last_of(node)
        self.quantized = only_quantized(self.activated)
        self.last = self.activated if self.quantized is None else self.quantized
        self.other = bytes_behind(self.epilogue.other)
        self.origin = (node, *self.epilogue.nodes, *filter(None, [self.quantized]))

    def lower(self, timings: Timings | None) -> None:
        """Replace the layer in the fastest way."""
        floats = library_way(self.node, self._by_floats)
        (name,) = floats
        other = self.epilogue.other if self.other is None else self.other.node
        values = [self.x.node, other]
        inputs = dict.fromkeys(v for v in values if v is not None and v.op != "get_attr")
        ways = {f"{name}, bytes": self._by_bytes, **floats}
        replace_by_fastest(self.rewriter, self.last, list(inputs), ways, timings)

    def _by_bytes(self) -> fx.Node:
        args: Any = self.node.args
        weight, scale, zero_point, *bounds = args[1].args
        whole = self._insert(quantize, weight, scale, zero_point, *bounds)
        nothing = (None, None, 0, 0)
        result = nothing if self.quantized is None else self.quantized.args[1:]
        constants = (
            *self.x.grid, whole, scale, *args[2:], *self.epilogue.unary.spelled, *result,
        )  # fmt: skip
        plain, adding = _TARGETS[self.node.target]
        if self.epilogue.other is None:
            return self._insert(plain, self.x.node, *constants, like=self.last)
        if self.other is None:
            added, grid = self.epilogue.other, nothing
        else:
            added, grid = self.other.node, self.other.grid
        return self._insert(adding, self.x.node, added, *constants, *grid, like=self.last)

    def _by_floats(self) -> fx.Node:
        args: Any = self.node.args
        other = () if self.epilogue.other is None else (self.epilogue.other,)
        is_linear = self.node.target is aten.linear.default
        plain, adding = _LINEARS if is_linear else _CONVOLUTIONS
        new = self._insert(
            adding if other else plain, args[0], *other, *args[1:], *self.epilogue.unary.spelled,
            like=self.activated,
        )  # fmt: skip
        if self.quantized is None:
            return new
        return self._insert(quantize, new, *self.quantized.args[1:], like=self.last)

    def _insert(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.insert(
            target, *args, before=self.last, origin=self.origin, **kwargs
        )


_LINEARS = (operators.linear, operators.linear_add)
_CONVOLUTIONS = (operators.convolution, operators.convolution_add)
_QUANTIZED_CONVOLUTIONS = (
    quantized_operators.quantized_convolution, quantized_operators.quantized_convolution_add,
)  # fmt: skip
_TARGETS: dict[Any, Any] = {
    aten.conv2d.default: _QUANTIZED_CONVOLUTIONS,
    aten.conv3d.default: _QUANTIZED_CONVOLUTIONS,
    aten.linear.default: (
        quantized_operators.quantized_linear, quantized_operators.quantized_linear_add,
    ),
}  # fmt: skip
