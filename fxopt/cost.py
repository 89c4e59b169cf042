"""What a node costs: multiply-accumulates, from the shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
Count = Callable[[fx.Node], int]


def macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of a call: one for each product of a contraction.

    Convolutions, linears, matrix products, attention and recurrent layers count; element-wise work
    does not. A symbolic size counts as its example value.
    """
    if node.op != "call_function":
        return 0
    count = _COUNTS.get(node.target)
    return count(node) if count is not None else 0


def _shape(node: Any) -> list[int]:
    return [_number(size) for size in node.meta["val"].shape]


def _number(size: Any) -> int:
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def _output(node: fx.Node) -> list[int]:
    return _shape(node)


def _convolution(node: fx.Node) -> int:
    """Output elements × input channels of a group × kernel size."""
    return math.prod(_output(node)) * math.prod(_shape(node.args[1])[1:])


def _transposed_convolution(node: fx.Node) -> int:
    """Input elements × output channels of a group × kernel size."""
    return math.prod(_shape(node.args[0])) * math.prod(_shape(node.args[1])[1:])


def _contraction(first: int) -> Count:
    """Output elements × the length of the contracted dimension, the last of an argument."""
    return lambda node: math.prod(_output(node)) * _shape(node.args[first])[-1]


def _attention(node: fx.Node) -> int:
    """Query · keyᵀ, then probabilities · value."""
    query, value = _shape(node.args[0]), _shape(node.args[2])
    keys = _shape(node.args[1])[-2]
    return math.prod(query[:-1]) * keys * (query[-1] + value[-1])


def _einsum(node: fx.Node) -> int:
    """The product of the sizes of all indices."""
    args: Any = node.args
    inputs = args[0].split("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    for letters, operand in zip(inputs, args[1], strict=True):
        plain = letters.replace("...", "")
        shape = _shape(operand)
        sizes.update(zip(plain[::-1], shape[::-1], strict=False))
        if "..." in letters:
            sizes["..."] = math.prod(shape[: len(shape) - len(plain)])
    return math.prod(sizes.values()) if len(inputs) > 1 else 0


_COUNTS: dict[Any, Count] = {
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.linear.default: _contraction(0),
    aten.mm.default: _contraction(0),
    aten.mv.default: _contraction(0),
    aten.bmm.default: _contraction(0),
    aten.matmul.default: _contraction(0),
    aten.addmm.default: _contraction(1),
    aten.baddbmm.default: _contraction(1),
    aten.scaled_dot_product_attention.default: _attention,
    aten.einsum.default: _einsum,
}
