"""What a lowered graph says of values that are bytes, and of weights that will be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.backends.eager.cpu.epilogues import onednn_obstacle
from fxopt.backends.eager.onednn import library, operators
from fxopt.backends.eager.onednn.grids import are_bytes, bytes_for
from fxopt.backends.eager.onednn.quantized_operators import dequantize, quantize
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize
from fxopt.shapes import dtype_of, rank_of, shape_of

aten = torch.ops.aten
LAYERS = (aten.conv2d.default, aten.conv3d.default, aten.linear.default)


@dataclass(frozen=True)
class Bytes:
    """A value as bytes, and the scale, zero point and bounds that say what they stand for."""

    node: fx.Node
    grid: tuple[Any, ...]


def multiplies_bytes() -> bool:
    """Whether there are kernels for layers on bytes here, whose sums are exact."""
    api = library()
    return api is not None and api.multiplies_bytes and operators.supports(torch.float32)


def bytes_behind(value: Any) -> Bytes | None:
    """Return the bytes that a value of floats is made from; None where it is not."""
    if isinstance(value, fx.Node) and value.target is dequantize:
        node, *grid = value.args
        assert isinstance(node, fx.Node)
        return Bytes(node, tuple(grid))
    return None


def only_quantized(value: fx.Node) -> fx.Node | None:
    """Return what makes bytes of a value that nobody else reads."""
    readers = list(value.users)
    return readers[0] if len(readers) == 1 and readers[0].target is quantize else None


def same_grid(graph: GraphModule, a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether bytes of two grids stand for the same numbers."""
    if bytes_for(*a[2:]) is not bytes_for(*b[2:]):
        return False
    return all(
        p is q or torch.equal(graph.value(p), graph.value(q))
        for p, q in zip(a[:2], b[:2], strict=True)
    )


def activation_obstacle(graph: GraphModule, node: fx.Node) -> str | None:
    """Why the result of a fake-quantization is no tensor of bytes of one grid, in words."""
    args: Any = node.args
    x, scale, zero_point, low, high = args
    if dtype_of(x) is not torch.float32:
        return f"it rounds {dtype_of(x)}"
    if not is_constant(graph, scale) or not is_constant(graph, zero_point):
        return "its scale or zero point is not constant"
    if any(graph.value(one).numel() != 1 or rank_of(one) > rank_of(x) for one in args[1:3]):
        return "it has more than one scale"
    if not are_bytes(low, high):
        return f"the integers from {low} to {high} are no bytes"
    return onednn_obstacle(node)


def weight_obstacle(graph: GraphModule, weight: Any) -> str | None:
    """Why a layer's weight cannot be held as signed bytes, in words."""
    if not is_fake_quantized(weight):
        return "its weight is not quantized"
    source, scale, zero_point, low, high = weight.args
    if not all(is_constant(graph, one) for one in (source, scale, zero_point)):
        return "its weight is not constant"
    if 0 in shape_of(source):
        return "its weight is empty"
    if bytes_for(low, high) is not torch.int8 or not are_bytes(low, high):
        return f"the integers of its weight, {low} to {high}, are no signed bytes"
    if bool(graph.value(zero_point).any()):
        return "its weight has a zero point"
    outputs, *others = shape_of(source)
    per_channel = (outputs, *(1 for _ in others))
    if shape_of(scale) != per_channel and graph.value(scale).numel() != 1:
        return "its weight has other scales than one for each output"
    return None


def is_fake_quantized(value: Any) -> bool:
    """Whether a value is the result of a fake-quantization."""
    return isinstance(value, fx.Node) and value.target is fake_quantize
