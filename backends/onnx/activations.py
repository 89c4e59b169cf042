"""Activation functions."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


@emits("gelu")
def _gelu(e: Emitter, x: Any, *, approximate: str) -> Value:
    if e.opset >= 20 and e.out_dtype != torch.float64:
        return e.op("Gelu", x, approximate=None if approximate == "none" else approximate)
    dtype = e.out_dtype
    one = e.number(1.0, dtype)
    if approximate == "tanh":  # ½x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))
        cube = e.op("Mul", e.op("Mul", x, x), x)
        inner = e.op("Add", x, e.op("Mul", cube, e.number(0.044715, dtype)))
        inner = e.op("Tanh", e.op("Mul", inner, e.number(math.sqrt(2 / math.pi), dtype)))
    else:
        inner = e.op("Erf", e.op("Div", x, e.number(math.sqrt(2), dtype)))
    product = e.op("Mul", x, e.op("Add", inner, one))
    return e.op("Mul", product, e.number(0.5, dtype))


@emits("silu")
def _silu(e: Emitter, x: Any) -> Value:
    return e.op("Mul", x, e.op("Sigmoid", x))


@emits("hardswish")
def _hardswish(e: Emitter, x: Any) -> Value:
    if e.out_dtype == torch.float64:
        return e.op("Mul", x, _hardsigmoid(e, x))
    return e.op("HardSwish", x)


@emits("hardsigmoid")
def _hardsigmoid(e: Emitter, x: Any) -> Value:
    dtype = e.out_dtype
    if dtype != torch.float64:
        return e.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    shifted = e.op("Add", x, e.number(3.0, dtype))
    clipped = e.op("Clip", shifted, e.number(0.0, dtype), e.number(6.0, dtype))
    return e.op("Div", clipped, e.number(6.0, dtype))


@emits("hardtanh")
def _hardtanh(e: Emitter, x: Any, low: float, high: float) -> Value:
    return e.op("Clip", x, e.number(low, e.out_dtype), e.number(high, e.out_dtype))


@emits("leaky_relu")
def _leaky_relu(e: Emitter, x: Any, slope: float) -> Value:
    if e.out_dtype == torch.float64:
        zero = e.number(0.0, torch.float64)
        scaled = e.op("Mul", x, e.number(slope, torch.float64))
        return e.op("Where", e.op("Less", x, zero), scaled, x)
    return e.op("LeakyRelu", x, alpha=float(slope))


@emits("rrelu")
def _rrelu(e: Emitter, x: Any, lower: float, upper: float, training: bool, *rest: Any) -> Value:
    if training:
        e.fail("rrelu in training mode is random", "Call model.eval() before compiling.")
    return e.op("LeakyRelu", x, alpha=float((lower + upper) / 2))


@emits("prelu")
def _prelu(e: Emitter, x: Any, weight: Any) -> Value:
    rank, one = len(e.out_shape), weight.meta["val"].numel() == 1
    shape = [1] * max(rank, 1) if one else [-1] + [1] * (rank - 2)
    if list(weight.meta["val"].shape) == shape:
        slope = e.value(weight)
    elif e.tensor(weight) is not None:
        name = "x".join(map(str, shape))
        slope = e.weight(weight, f"slope_{name}", lambda t: t.reshape(shape))
    else:
        slope = e.op("Reshape", weight, shape)
    if e.out_dtype == torch.float64:
        below = e.op("Less", x, e.number(0.0, torch.float64))
        return e.op("Where", below, e.op("Mul", x, slope), x)
    return e.op("PRelu", x, slope)


@emits("elu")
def _elu(e: Emitter, x: Any, alpha: float, scale: float, input_scale: float) -> Value:
    dtype = e.out_dtype
    if scale == 1 and input_scale == 1:
        return e.op("Elu", x, alpha=float(alpha))
    low = e.op("Clip", x, None, e.number(0.0, dtype))
    low = e.op("Elu", e.op("Mul", low, e.number(input_scale, dtype)), alpha=float(alpha))
    high = e.op("Relu", x)
    return e.op("Mul", e.op("Add", low, high), e.number(scale, dtype))


@emits("selu")
def _selu(e: Emitter, x: Any) -> Value:
    return e.op("Selu", x)


@emits("celu")
def _celu(e: Emitter, x: Any, alpha: float) -> Value:
    if e.out_dtype == torch.float32:
        return e.op("Celu", x, alpha=float(alpha))
    dtype = e.out_dtype  # α·(e^(min(x,0)/α) − 1) + max(x,0)
    low = e.op("Div", e.op("Clip", x, None, e.number(0.0, dtype)), e.number(alpha, dtype))
    low = e.op("Mul", e.op("Elu", low), e.number(alpha, dtype))
    return e.op("Add", low, e.op("Relu", x))


@emits("softplus")
def _softplus(e: Emitter, x: Any, beta: float, threshold: float) -> Value:
    dtype = e.out_dtype
    if beta == 1:
        soft = e.op("Softplus", x)
        scaled = e.value(x)
    else:
        scaled = e.op("Mul", x, e.number(beta, dtype))
        soft = e.op("Div", e.op("Softplus", scaled), e.number(beta, dtype))
    if threshold >= 20:  # beyond it both agree to the last digit
        return soft
    return e.op("Where", e.op("Greater", scaled, e.number(threshold, dtype)), x, soft)


@emits("log_sigmoid")
def _log_sigmoid(e: Emitter, x: Any) -> Value:
    return e.op("Neg", e.op("Softplus", e.op("Neg", x)))


@emits("tanhshrink")
def _tanhshrink(e: Emitter, x: Any) -> Value:
    return e.op("Sub", x, e.op("Tanh", x))


@emits("softshrink", "hardshrink")
def _shrink(e: Emitter, x: Any, threshold: float) -> Value:
    soft = "softshrink" in e.called
    return e.op("Shrink", x, lambd=float(threshold), bias=float(threshold) if soft else 0.0)


@emits("threshold")
def _threshold(e: Emitter, x: Any, threshold: Any, value: Any) -> Value:
    above = e.op("Greater", x, e.number(threshold, e.out_dtype))
    return e.op("Where", above, x, e.number(value, e.out_dtype))


@emits("glu")
def _glu(e: Emitter, x: Any, dim: int) -> Value:
    left, right = e.ops("Split", x, outputs=2, axis=dim, num_outputs=2)
    return e.op("Mul", left, e.op("Sigmoid", right))


@emits("softmax.int", "log_softmax.int", "_softmax", "_log_softmax")
def _softmax(e: Emitter, x: Any, dim: int, dtype: Any = None) -> Value:
    op_type = "LogSoftmax" if "log_softmax" in e.called else "Softmax"
    value = e.operand(x, e.out_dtype)
    if not e.out_shape:  # one number, whatever it is
        return e.op("Squeeze", e.op(op_type, e.op("Reshape", value, [1]), axis=0), [0])
    return e.op(op_type, value, axis=dim)
