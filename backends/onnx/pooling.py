"""Pooling: maximum, average, power average, and the adaptive ones."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.backends.onnx.convolution import batched, spread
from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


def _extra(
    size: Any, out: Any, kernel: int, stride: int, pad: int, dilation: int = 1
) -> int | None:
    """Return by how much the last window reaches over the padded end; None where unknown."""
    if not isinstance(size, int) or not isinstance(out, int):
        return None
    return max((out - 1) * stride + dilation * (kernel - 1) + 1 - (size + 2 * pad), 0)


@emits("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(
    e: Emitter, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Value:
    return _max_pools(e, x, kernel, stride, padding, dilation, ceil_mode, False)[0]


@emits("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool_indices(
    e: Emitter, x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> list[Value]:
    return _max_pools(e, x, kernel, stride, padding, dilation, ceil_mode, True)


def _max_pools(
    e: Emitter,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    indices: bool,
) -> list[Value]:
    n = _spatial(e)
    kernels, pads, dilations = spread(kernel, n), spread(padding, n), spread(dilation, n)
    strides = spread(stride, n) if stride else kernels
    value, added = batched(e, x, n)
    fake = e.node.meta["val"]
    out = list((fake[0] if isinstance(fake, (tuple, list)) else fake).shape)[-n:]
    ends, ceil = _ends(shape_of(x)[-n:], out, kernels, strides, pads, dilations, ceil_mode)
    results = list(
        e.ops(
            "MaxPool",
            value,
            outputs=2 if indices else 1,
            kernel_shape=kernels,
            strides=strides,
            pads=pads + ends,
            dilations=dilations,
            ceil_mode=ceil,
        )
    )
    if indices:
        results[1] = _plane_indices(e, x, results[1], n)
    return [e.op("Squeeze", one, [0]) for one in results] if added else results


def _ends(
    sizes: list[Any],
    out: list[Any],
    kernels: list[int],
    strides: list[int],
    pads: list[int],
    dilations: list[int],
    ceil_mode: bool,
) -> tuple[list[int], int | None]:
    """Return the padding at the end, widened where sizes are rounded up, and ONNX's ceil_mode."""
    if not ceil_mode:
        return list(pads), None
    extras = [
        _extra(*row) for row in zip(sizes, out, kernels, strides, pads, dilations, strict=True)
    ]
    known = [extra for extra in extras if extra is not None]
    if len(known) == len(extras):
        widened = [pad + extra for pad, extra in zip(pads, known, strict=True)]
        if all(w < d * (k - 1) + 1 for w, k, d in zip(widened, kernels, dilations, strict=True)):
            return widened, None
    return list(pads), 1


def _plane_indices(e: Emitter, x: Any, indices: Value, n: int) -> Value:
    """ONNX counts from the start of the tensor, PyTorch from that of each channel."""
    sizes = shape_of(x)[-n:]
    if all(isinstance(size, int) for size in sizes):
        plane = 1
        for size in sizes:
            plane *= size
        count = e.number(plane, torch.int64)
    else:
        rank = len(shape_of(x))
        count = e.op("ReduceProd", e.op("Shape", x, start=rank - n), keepdims=0)
    return e.op("Mod", indices, count)


def _spatial(e: Emitter) -> int:
    name = e.called
    return int(
        next(name[i - 1] for i in range(1, len(name)) if name[i] == "d" and name[i - 1].isdigit())
    )


@emits("avg_pool1d", "avg_pool2d", "avg_pool3d")
def _avg_pool(
    e: Emitter,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    n = _spatial(e)
    kernels, pads = spread(kernel, n), spread(padding, n)
    strides = spread(stride, n) if stride else kernels
    extras = [0] * n
    if ceil_mode:
        rows = zip(shape_of(x)[-n:], e.out_shape[-n:], kernels, strides, pads, strict=True)
        found = [_extra(*row) for row in rows]
        if any(extra is None for extra in found):
            e.fail("an average pool with ceil_mode needs fixed spatial sizes")
        extras = [extra or 0 for extra in found]
    value, added = batched(e, x, n)
    if not any(extras) and divisor_override is None:
        result = _average(e, value, kernels, strides, pads + pads, count_include_pad)
    else:
        result = _average_counted(
            e, x, value, kernels, strides, pads, extras, count_include_pad, divisor_override
        )
    return e.op("Squeeze", result, [0]) if added else result


def _average(
    e: Emitter, value: Any, kernels: list[int], strides: list[int], pads: list[int], include: bool
) -> Value:
    return e.op(
        "AveragePool",
        value,
        kernel_shape=kernels,
        strides=strides,
        pads=pads,
        count_include_pad=1 if include else 0,
    )


def _average_counted(
    e: Emitter,
    x: Any,
    value: Any,
    kernels: list[int],
    strides: list[int],
    pads: list[int],
    extras: list[int],
    include: bool,
    divisor: int | None,
) -> Value:
    """Sum windows, then divide by PyTorch's count: padding counts, what ceil_mode adds does not."""
    n = len(kernels)
    ends = [pad + extra for pad, extra in zip(pads, extras, strict=True)]
    sums = e.op("Pad", value, [0, 0, *pads, 0, 0, *ends])
    average = _average(e, sums, kernels, strides, [0] * (2 * n), True)
    area = 1.0
    for k in kernels:
        area *= k
    if divisor is not None:
        return e.op("Mul", average, e.number(area / divisor, e.out_dtype))
    sizes = shape_of(x)[-n:]
    shape = [size + 2 * pad if include else size for size, pad in zip(sizes, pads, strict=True)]
    ones = torch.ones([1, 1, *shape])
    for axis, (pad, extra) in enumerate(zip(pads, extras, strict=True)):
        widths = [0, 0] * (n - 1 - axis) + [
            0 if include else pad,
            extra if include else pad + extra,
        ]
        ones = torch.nn.functional.pad(ones, widths)
    pool = (
        torch.nn.functional.avg_pool1d,
        torch.nn.functional.avg_pool2d,
        torch.nn.functional.avg_pool3d,
    )[n - 1]
    share = 1.0 / pool(ones, kernels, strides)
    return e.op("Mul", average, e.constant(share.to(e.out_dtype)))


@emits(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
def _adaptive_avg_pool(e: Emitter, x: Any, output_size: list[Any]) -> Value:
    return _adaptive(e, x, output_size, "Average")


@emits("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_max_pool(e: Emitter, x: Any, output_size: list[Any]) -> list[Value | None]:
    if e.used(1):
        e.fail("the indices of an adaptive maximum pool")
    return [_adaptive(e, x, output_size, "Max"), None]


def _adaptive(e: Emitter, x: Any, output_size: list[Any], kind: str) -> Value:
    n = _spatial(e)
    value, added = batched(e, x, n)
    sizes = shape_of(x)[-n:]
    if all(size == 1 for size in output_size):
        double = e.out_dtype == torch.float64 and kind == "Average"
        axes = list(range(2, n + 2))
        result = (
            e.op("ReduceMean", value, axes, keepdims=1)
            if double
            else e.op(f"Global{kind}Pool", value)
        )
    elif [*output_size] == sizes:
        result = e.value(value)
    elif not all(isinstance(size, int) for size in (*sizes, *output_size)):
        e.fail(
            f"an adaptive pool to {list(output_size)} needs fixed spatial sizes",
            "Capture without dynamic spatial dimensions, or pool to 1 there.",
        )
    elif all(size % out == 0 for size, out in zip(sizes, output_size, strict=True)):
        window = [size // out for size, out in zip(sizes, output_size, strict=True)]
        result = e.op(f"{kind}Pool", value, kernel_shape=window, strides=window)
    else:
        result = _uneven(e, value, sizes, [int(size) for size in output_size], kind)
    return e.op("Squeeze", result, [0]) if added else result


def _uneven(e: Emitter, value: Any, sizes: list[int], out: list[int], kind: str) -> Value:
    """Windows of unequal widths: ⌊i·n/m⌋ to ⌈(i+1)·n/m⌉, one dimension after another."""
    for axis, (size, count) in enumerate(zip(sizes, out, strict=True)):
        spans = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
        if kind == "Average":
            matrix = torch.zeros(size, count, dtype=torch.float64)
            for i, (start, end) in enumerate(spans):
                matrix[start:end, i] = 1.0 / (end - start)
            value = _along(e, value, axis + 2, len(sizes) + 2, matrix.to(e.out_dtype))
            continue
        parts = [
            e.op("ReduceMax", e.op("Slice", value, [a], [b], [axis + 2]), [axis + 2], keepdims=1)
            for a, b in spans
        ]
        value = e.op("Concat", *parts, axis=axis + 2)
    return e.value(value)


def _along(e: Emitter, value: Any, axis: int, rank: int, matrix: torch.Tensor) -> Value:
    """Multiply one dimension by a constant matrix."""
    if axis == rank - 1:
        return e.op("MatMul", value, e.constant(matrix))
    if axis == rank - 2:
        return e.op("MatMul", e.constant(matrix.T.contiguous()), value)
    perm = list(range(rank))
    perm[axis], perm[-1] = perm[-1], perm[axis]
    turned = e.op("Transpose", value, perm=perm)
    return e.op("Transpose", e.op("MatMul", turned, e.constant(matrix)), perm=perm)


@emits("max_unpool2d", "max_unpool3d")
def _max_unpool(e: Emitter, x: Any, indices: Any, *rest: Any) -> Value:
    shape, source = e.out_shape, shape_of(x)
    n = _spatial(e)
    if not all(isinstance(size, int) for size in shape):
        e.fail("an unpooling needs fixed sizes")
    lead = shape[:-n]
    plane = 1
    for size in shape[-n:]:
        plane *= size
    flat = [*lead, -1]
    zeros = e.op("Expand", e.number(0.0, e.out_dtype), [*lead, plane])
    filled = e.op(
        "ScatterElements",
        zeros,
        e.op("Reshape", indices, flat),
        e.op("Reshape", x, flat),
        axis=len(source) - n,
    )
    return e.op("Reshape", filled, shape)
