"""Functions of one tensor, element by element."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.backends.onnx.dtypes import FLOATS
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits

# Operators that ONNX has under another name, for floating-point results.
_SAME = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "erf": "Erf",
    "reciprocal": "Reciprocal",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "asin": "Asin",
    "acos": "Acos",
    "atan": "Atan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "asinh": "Asinh",
    "acosh": "Acosh",
    "atanh": "Atanh",
    "softsign": "Softsign",
    "mish": "Mish",
    "log_sigmoid": None,
}


def _unary(op_type: str) -> Any:
    def emit(e: Emitter, x: Any) -> Value:
        return e.op(op_type, e.operand(x, e.out_dtype))

    return emit


for _name, _op_type in _SAME.items():
    if _op_type is not None:
        emits(_name)(_unary(_op_type))

for _name, _op_type in {"abs": "Abs", "sign": "Sign", "sgn": "Sign", "neg": "Neg"}.items():
    emits(_name)(_unary(_op_type))


@emits("floor", "ceil", "round", "trunc", "fix")
def _rounding(e: Emitter, x: Any) -> Value:
    if e.dtype(x) not in FLOATS:
        return e.value(x)
    name = e.called.split(".")[0]
    if name in ("trunc", "fix"):
        return e.op("Mul", e.op("Sign", x), e.op("Floor", e.op("Abs", x)))
    return e.op({"floor": "Floor", "ceil": "Ceil", "round": "Round"}[name], x)


@emits("round.decimals")
def _round_decimals(e: Emitter, x: Any, decimals: int) -> Value:
    scale = e.number(float(10**decimals), e.out_dtype)
    return e.op("Div", e.op("Round", e.op("Mul", x, scale)), scale)


@emits("frac")
def _frac(e: Emitter, x: Any) -> Value:
    whole = e.op("Mul", e.op("Sign", x), e.op("Floor", e.op("Abs", x)))
    return e.op("Sub", x, whole)


@emits(
    "clone",
    "contiguous",
    "alias",
    "detach",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
    "expand_copy",
    "resolve_conj",
    "resolve_neg",
    "positive",
    "conj",
    "real",
    "lift_fresh_copy",
    "detach_copy",
    "alias_copy",
    moves=True,
)
def _same(e: Emitter, x: Any, *rest: Any, **named: Any) -> Value:
    name = e.called
    if "dropout" in name and rest[1] and rest[0] > 0:
        e.fail("dropout in training mode is random", "Call model.eval() before compiling.")
    return e.value(x)


@emits("rsqrt")
def _rsqrt(e: Emitter, x: Any) -> Value:
    return e.op("Reciprocal", e.op("Sqrt", e.operand(x, e.out_dtype)))


@emits("square")
def _square(e: Emitter, x: Any) -> Value:
    return e.op("Mul", x, x)


@emits("exp2")
def _exp2(e: Emitter, x: Any) -> Value:
    return e.op("Pow", e.number(2.0, e.out_dtype), e.operand(x, e.out_dtype))


@emits("expm1")
def _expm1(e: Emitter, x: Any) -> Value:
    dtype = e.out_dtype
    value = e.operand(x, dtype)
    half = e.op("Mul", value, e.number(0.5, dtype))
    # near zero e^x − 1 cancels, and 2·sinh(x/2)·e^(x/2) does not
    near = e.op("Mul", e.op("Mul", e.op("Sinh", half), e.op("Exp", half)), e.number(2.0, dtype))
    far = e.op("Sub", e.op("Exp", value), e.number(1.0, dtype))
    return e.op("Where", e.op("Less", e.op("Abs", half), e.number(0.25, dtype)), near, far)


@emits("log1p")
def _log1p(e: Emitter, x: Any) -> Value:
    dtype = e.out_dtype
    value = e.operand(x, dtype)
    # near zero 1 + x rounds, and 2·atanh(x / (2 + x)) does not
    ratio = e.op("Div", value, e.op("Add", value, e.number(2.0, dtype)))
    near = e.op("Mul", e.op("Atanh", ratio), e.number(2.0, dtype))
    far = e.op("Log", e.op("Add", value, e.number(1.0, dtype)))
    return e.op("Where", e.op("Less", e.op("Abs", value), e.number(0.5, dtype)), near, far)


@emits("log2", "log10")
def _log_base(e: Emitter, x: Any) -> Value:
    base = 2.0 if "log2" in e.called else 10.0
    factor = e.number(1.0 / math.log(base), e.out_dtype)
    return e.op("Mul", e.op("Log", e.operand(x, e.out_dtype)), factor)


@emits("erfc", "special_erfc")
def _erfc(e: Emitter, x: Any) -> Value:
    return e.op("Sub", e.number(1.0, e.out_dtype), e.op("Erf", e.operand(x, e.out_dtype)))


@emits("sinc", "special_sinc")
def _sinc(e: Emitter, x: Any) -> Value:
    dtype = e.out_dtype
    angle = e.op("Mul", e.operand(x, dtype), e.number(math.pi, dtype))
    ratio = e.op("Div", e.op("Sin", angle), angle)
    zero = e.op("Equal", angle, e.number(0.0, dtype))
    return e.op("Where", zero, e.number(1.0, dtype), ratio)


@emits("logit")
def _logit(e: Emitter, x: Any, eps: float | None) -> Value:
    dtype = e.out_dtype
    value = e.operand(x, dtype)
    if eps is not None:
        value = e.op("Clip", value, e.number(eps, dtype), e.number(1.0 - eps, dtype))
    return e.op("Log", e.op("Div", value, e.op("Sub", e.number(1.0, dtype), value)))


@emits("deg2rad", "rad2deg")
def _angle_unit(e: Emitter, x: Any) -> Value:
    factor = math.pi / 180 if "deg2rad" in e.called else 180 / math.pi
    return e.op("Mul", e.operand(x, e.out_dtype), e.number(factor, e.out_dtype))


@emits("isnan")
def _isnan(e: Emitter, x: Any) -> Value:
    if e.dtype(x) not in FLOATS:
        return e.op("Not", e.op("Equal", x, x))
    return e.op("IsNaN", x)


@emits("isinf", "isfinite", "isposinf", "isneginf")
def _isinf(e: Emitter, x: Any) -> Value:
    name = e.called.split(".")[0]
    value = e.operand(
        x, e.dtype(x) if e.dtype(x) in (torch.float32, torch.float64) else torch.float32
    )
    if name == "isfinite":
        return e.op("Not", e.op("Or", e.op("IsInf", value), e.op("IsNaN", value)))
    return e.op(
        "IsInf",
        value,
        detect_negative=0 if name == "isposinf" else None,
        detect_positive=0 if name == "isneginf" else None,
    )


@emits("nan_to_num")
def _nan_to_num(e: Emitter, x: Any, nan: Any, posinf: Any, neginf: Any) -> Value:
    dtype = e.out_dtype
    if dtype not in FLOATS:
        return e.value(x)
    limits = torch.finfo(e.node.meta["val"].dtype)
    value = e.op("Where", e.op("IsNaN", x), e.number(nan or 0.0, dtype), x)
    infinity = float("inf")
    for sign, given, limit in ((1, posinf, limits.max), (-1, neginf, limits.min)):
        found = e.op("Equal", value, e.number(sign * infinity, dtype))
        value = e.op("Where", found, e.number(limit if given is None else given, dtype), value)
    return value
