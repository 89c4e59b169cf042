"""Normalisation: batch, layer, group, instance, root mean square, local response, weight."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.backends.onnx.describe import plain, shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits
from fxopt.backends.onnx.shaping import reshape


def _vector(e: Emitter, given: Any, size: Any, default: float, dtype: torch.dtype) -> Value:
    """Return a weight or bias in `dtype`, or a constant vector where there is none."""
    if given is not None:
        return e.operand(given, dtype)
    if not isinstance(size, int):
        e.fail("a normalisation without weights over a symbolic number of channels")
    return e.constant(torch.full([size], default, dtype=dtype))


@emits("batch_norm")
def _batch_norm(
    e: Emitter,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Value:
    if mean is None or var is None:
        return _instance_norm_of(e, x, weight, bias, eps, over_batch=True)
    if training:
        e.fail(
            "batch norm in training mode updates its statistics",
            "Call model.eval() before compiling.",
        )
    dtype, channels = e.out_dtype, shape_of(x)[1]
    return e.op(
        "BatchNormalization",
        x,
        _vector(e, weight, channels, 1.0, dtype),
        _vector(e, bias, channels, 0.0, dtype),
        e.operand(mean, dtype),
        e.operand(var, dtype),
        epsilon=float(eps),
    )


@emits("_native_batch_norm_legit_no_training")
def _native_batch_norm(
    e: Emitter, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> list[Value | None]:
    return [_batch_norm(e, x, weight, bias, mean, var, False, momentum, eps, False), None, None]


@emits("layer_norm")
def _layer_norm(
    e: Emitter, x: Any, shape: list[int], weight: Any, bias: Any, eps: float, cudnn: bool = False
) -> Value:
    dtype = e.out_dtype
    if weight is None:
        sizes = [plain(size) for size in shape_of(x)[-len(shape) :]]
        if not all(isinstance(size, int) for size in sizes):
            e.fail("a layer norm without weights over symbolic sizes")
        scale = e.constant(torch.ones(sizes, dtype=dtype))
    else:
        scale = e.operand(weight, dtype)
    offset = None if bias is None else e.operand(bias, dtype)
    return e.op("LayerNormalization", x, scale, offset, axis=-len(shape), epsilon=float(eps))


@emits("native_layer_norm")
def _native_layer_norm(
    e: Emitter, x: Any, shape: list[int], weight: Any, bias: Any, eps: float
) -> list[Value | None]:
    return [_layer_norm(e, x, shape, weight, bias, eps), None, None]


@emits("group_norm")
def _group_norm(
    e: Emitter, x: Any, groups: int, weight: Any, bias: Any, eps: float, cudnn: bool = False
) -> Value:
    # ONNX Runtime expands its own GroupNormalization into slower pieces than these
    source, dtype = shape_of(x), e.out_dtype
    if source[1] == groups and len(source) > 2:
        return _instance_norm_of(e, x, weight, bias, eps, over_batch=False)
    split = e.op("Reshape", x, [0, groups, -1])
    if dtype == torch.float64:
        normed = _standardised(e, split, [2], eps)
    else:
        one, zero = (e.constant(torch.full([groups], v, dtype=dtype)) for v in (1.0, 0.0))
        normed = e.op("InstanceNormalization", split, one, zero, epsilon=float(eps))
    value = reshape(e, normed, source, source[:1])
    return _affine(e, value, weight, bias, len(source))


def _affine(e: Emitter, value: Value, weight: Any, bias: Any, rank: int) -> Value:
    """Multiply by a weight and add a bias, one number per channel."""
    shape = [-1] + [1] * (rank - 2)
    for op_type, given in (("Mul", weight), ("Add", bias)):
        if given is None:
            continue
        if rank == 2:
            factor = e.operand(given, e.out_dtype)
        elif e.tensor(given) is not None:
            name = "x".join(map(str, shape[1:]))
            factor = e.weight(given, f"channels_{name}", lambda t: t.reshape(shape))
            factor = e.cast(factor, e.dtype(given), e.out_dtype)
        else:
            factor = e.op("Reshape", e.operand(given, e.out_dtype), shape)
        value = e.op(op_type, value, factor)
    return value


@emits("instance_norm")
def _instance_norm(
    e: Emitter,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Value:
    if not use_input_stats:
        return _batch_norm(e, x, weight, bias, mean, var, False, momentum, eps, cudnn)
    if mean is not None:
        e.fail(
            "instance norm in training mode updates its statistics",
            "Call model.eval() before compiling.",
        )
    return _instance_norm_of(e, x, weight, bias, eps, over_batch=False)


def _instance_norm_of(
    e: Emitter, x: Any, weight: Any, bias: Any, eps: float, *, over_batch: bool
) -> Value:
    dtype, source = e.out_dtype, shape_of(x)
    rank = len(source)
    if not over_batch and dtype != torch.float64 and rank > 2:
        scale = _vector(e, weight, source[1], 1.0, dtype)
        offset = _vector(e, bias, source[1], 0.0, dtype)
        return e.op("InstanceNormalization", x, scale, offset, epsilon=float(eps))
    axes = [0, *range(2, rank)] if over_batch else list(range(2, rank))
    return _affine(e, _standardised(e, x, axes, eps), weight, bias, rank)


def _standardised(e: Emitter, x: Any, axes: list[int], eps: float) -> Value:
    """(x − mean(x)) / √(mean((x − mean(x))²) + ε), in pieces that take any dtype"""
    centred = e.op("Sub", x, e.op("ReduceMean", x, axes, keepdims=1))
    variance = e.op("ReduceMean", e.op("Mul", centred, centred), axes, keepdims=1)
    deviation = e.op("Sqrt", e.op("Add", variance, e.number(eps, e.out_dtype)))
    return e.op("Div", centred, deviation)


@emits("rms_norm")
def _rms_norm(e: Emitter, x: Any, shape: list[int], weight: Any, eps: float | None) -> Value:
    dtype, axis = e.out_dtype, -len(shape)
    if eps is None:
        eps = torch.finfo(e.node.meta["val"].dtype).eps
    whole = e.opset >= 23
    wide = torch.float32 if dtype == torch.float16 and not whole else dtype  # squares overflow
    sizes = [plain(size) for size in shape_of(x)[axis:]]
    scale = None if weight is None else e.operand(weight, wide)
    if scale is None and all(isinstance(size, int) for size in sizes):
        scale = e.constant(torch.ones(sizes, dtype=wide))
    if whole and scale is not None:
        return e.op("RMSNormalization", x, scale, axis=axis, epsilon=float(eps))
    # the pieces that ONNX Runtime makes one kernel of: with Pow, not Mul, and with a scale
    value = e.operand(x, wide)
    square = e.op("Pow", value, e.number(2.0, wide))
    mean = e.op("ReduceMean", square, list(range(axis, 0)), keepdims=1)
    value = e.op("Div", value, e.op("Sqrt", e.op("Add", mean, e.number(eps, wide))))
    return e.cast(value if scale is None else e.op("Mul", value, scale), wide, dtype)


@emits("local_response_norm")
def _local_response_norm(
    e: Emitter, x: Any, size: int, alpha: float, beta: float, k: float
) -> Value:
    return e.op("LRN", x, size=size, alpha=float(alpha), beta=float(beta), bias=float(k))


@emits("_weight_norm", "_weight_norm_interface")
def _weight_norm(e: Emitter, v: Any, g: Any, dim: int = 0) -> Any:
    axes = [axis for axis in range(len(shape_of(v))) if axis != dim]
    norm = e.op("ReduceL2", v, axes, keepdims=1)
    scaled = e.op("Mul", v, e.op("Div", g, norm))
    return scaled if "interface" not in e.called else [scaled, norm]


@emits("cosine_similarity")
def _cosine_similarity(e: Emitter, a: Any, b: Any, dim: int, eps: float) -> Value:
    dtype = e.out_dtype
    floor = e.number(eps, dtype)
    product = e.op("ReduceSum", e.op("Mul", a, b), [dim], keepdims=0)
    norms = [e.op("Max", e.op("ReduceL2", x, [dim], keepdims=0), floor) for x in (a, b)]
    return e.op("Div", product, e.op("Mul", *norms))
