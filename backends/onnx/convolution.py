"""Convolutions, and their transposes."""

from __future__ import annotations

from typing import Any

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.quantization import bias as quantized_bias
from fxopt.backends.onnx.registry import emits


def spread(value: Any, count: int) -> list[Any]:
    """Return one number, or a list of one, as a list of `count`."""
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    return items * count if len(items) == 1 else items


def batched(e: Emitter, x: Any, spatial: int) -> tuple[Any, bool]:
    """Return a tensor with a batch dimension, and whether it was added."""
    if len(shape_of(x)) == spatial + 2:
        return x, False
    return e.op("Unsqueeze", x, [0]), True


@emits("conv1d", "conv2d", "conv3d")
def _conv(
    e: Emitter,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Value:
    n = len(shape_of(weight)) - 2
    pads = spread(padding, n)
    return _convolve(
        e, x, weight, bias, spread(stride, n), pads + pads, spread(dilation, n), groups
    )


@emits("conv1d.padding", "conv2d.padding", "conv3d.padding")
def _conv_named(
    e: Emitter,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: str,
    dilation: Any,
    groups: int,
) -> Value:
    n = len(shape_of(weight)) - 2
    dilations = spread(dilation, n)
    total = [0] * n
    if padding == "same":
        kernel = shape_of(weight)[2:]
        total = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    before = [t // 2 for t in total]
    after = [t - b for t, b in zip(total, before, strict=True)]
    return _convolve(e, x, weight, bias, spread(stride, n), before + after, dilations, groups)


def _convolve(
    e: Emitter,
    x: Any,
    weight: Any,
    bias: Any,
    strides: list[int],
    pads: list[int],
    dilations: list[int],
    groups: int,
) -> Value:
    value, is_added = batched(e, x, len(strides))
    kernel = e.value(weight)
    within, behind = quantized_bias(e, x, weight, bias)
    result = e.op(
        "Conv",
        value,
        kernel,
        within,
        strides=strides,
        pads=pads,
        dilations=dilations,
        group=groups,
        kernel_shape=_kernel(weight),
    )
    return _finished(e, result, behind, is_added, len(strides))


def _finished(e: Emitter, result: Value, bias: Value | None, is_added: bool, spatial: int) -> Value:
    """Add what the layer could not add, and remove the batch dimension that was added."""
    if bias is not None:
        result = e.op("Add", result, e.op("Unsqueeze", bias, list(range(1, spatial + 1))))
    return e.op("Squeeze", result, [0]) if is_added else result


def _kernel(weight: Any) -> list[int] | None:
    kernel = shape_of(weight)[2:]
    return kernel if all(isinstance(k, int) for k in kernel) else None


@emits("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")
def _conv_transpose(
    e: Emitter,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Value:
    n = len(shape_of(weight)) - 2
    value, is_added = batched(e, x, n)
    kernel = e.value(weight)
    within, behind = quantized_bias(e, x, weight, bias)
    pads = spread(padding, n)
    result = e.op(
        "ConvTranspose",
        value,
        kernel,
        within,
        strides=spread(stride, n),
        pads=pads + pads,
        output_padding=spread(output_padding, n),
        dilations=spread(dilation, n),
        group=groups,
        kernel_shape=_kernel(weight),
    )
    return _finished(e, result, behind, is_added, n)


@emits("convolution")
def _convolution(
    e: Emitter,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Value:
    if transposed:
        return _conv_transpose(
            e, x, weight, bias, stride, padding, output_padding, groups, dilation
        )
    return _conv(e, x, weight, bias, stride, padding, dilation, groups)
