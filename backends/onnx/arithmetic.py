"""Functions of two tensors: arithmetic, comparison, logic, choice. PyTorch promotes types, and
ONNX does not, so operands are cast to the type in which PyTorch computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.backends.onnx.dtypes import FLOATS, INTEGERS
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


def common_dtype(e: Emitter, a: Any, b: Any) -> torch.dtype:
    """Return the dtype to which PyTorch promotes two operands, tensors or numbers."""
    one, two = (x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b))
    one, two = (x if isinstance(x, torch.Tensor) else _plain_number(x) for x in (one, two))
    dtype = torch.result_type(one, two)
    return e.shadow_of(dtype)


def _plain_number(x: Any) -> Any:
    if isinstance(x, torch.SymBool):
        return True
    if isinstance(x, torch.SymFloat):
        return 1.0
    return 1 if isinstance(x, torch.SymInt) else x


def _pair(e: Emitter, a: Any, b: Any, dtype: torch.dtype) -> tuple[Value, Value]:
    return e.operand(a, dtype), e.operand(b, dtype)


def _scaled(e: Emitter, b: Any, alpha: Any, dtype: torch.dtype) -> Value:
    value = e.operand(b, dtype)
    return value if alpha == 1 else e.op("Mul", value, e.number(alpha, dtype))


@emits("add.Tensor")
def _add(e: Emitter, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    dtype = e.out_dtype
    if dtype == torch.bool:
        return e.op("Or", a, e.operand(b, dtype))
    return e.op("Add", e.operand(a, dtype), _scaled(e, b, alpha, dtype))


@emits("sub.Tensor")
def _sub(e: Emitter, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    return e.op("Sub", e.operand(a, e.out_dtype), _scaled(e, b, alpha, e.out_dtype))


@emits("rsub.Tensor", "rsub.Scalar")
def _rsub(e: Emitter, a: Any, b: Any, alpha: Any = 1) -> Value:
    return e.op("Sub", e.operand(b, e.out_dtype), _scaled(e, a, alpha, e.out_dtype))


@emits("mul.Tensor")
def _mul(e: Emitter, a: Any, b: Any) -> Value:
    dtype = e.out_dtype
    return e.op("And" if dtype == torch.bool else "Mul", *_pair(e, a, b, dtype))


@emits("div.Tensor")
def _div(e: Emitter, a: Any, b: Any) -> Value:
    return e.op("Div", *_pair(e, a, b, e.out_dtype))


@emits("div.Tensor_mode", "div.Scalar_mode")
def _div_mode(e: Emitter, a: Any, b: Any, *, rounding_mode: str | None) -> Value:
    left, right = _pair(e, a, b, e.out_dtype)
    if rounding_mode is None:
        return e.op("Div", left, right)
    if rounding_mode == "floor":
        return floor_divide(e, left, right, e.out_dtype)
    quotient = e.op("Div", left, right)
    if e.out_dtype in INTEGERS:  # ONNX truncates integers, as this mode does
        return quotient
    return e.op("Mul", e.op("Sign", quotient), e.op("Floor", e.op("Abs", quotient)))


@emits("floor_divide", "floor_divide.Scalar")
def _floor_divide(e: Emitter, a: Any, b: Any) -> Value:
    return floor_divide(e, *_pair(e, a, b, e.out_dtype), e.out_dtype)


def floor_divide(e: Emitter, a: Value, b: Value, dtype: torch.dtype) -> Value:
    """Emit the quotient rounded down."""
    if dtype in INTEGERS:  # (a − a mod b) / b, where ONNX's mod has the sign of b
        return e.op("Div", e.op("Sub", a, e.op("Mod", a, b)), b)
    return e.op("Floor", e.op("Div", a, b))


@emits("remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor")
def _remainder(e: Emitter, a: Any, b: Any) -> Value:
    left, right = _pair(e, a, b, e.out_dtype)
    if e.out_dtype in INTEGERS:
        return e.op("Mod", left, right)
    # the exact remainder has the sign of a; shifted by b where that differs from the sign of b
    rest = e.op("Mod", left, right, fmod=1)
    zero = e.number(0.0, e.out_dtype)
    wrong = e.op("Less", e.op("Mul", e.op("Sign", rest), e.op("Sign", right)), zero)
    return e.op("Where", wrong, e.op("Add", rest, right), rest)


@emits("fmod.Tensor", "fmod.Scalar")
def _fmod(e: Emitter, a: Any, b: Any) -> Value:
    return e.op("Mod", *_pair(e, a, b, e.out_dtype), fmod=1)


@emits("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar")
def _pow(e: Emitter, a: Any, b: Any) -> Value:
    dtype = e.out_dtype
    if isinstance(b, (int, float)) and dtype in FLOATS:
        x = e.operand(a, dtype)
        if b == 2:
            return e.op("Mul", x, x)
        if b == 1:
            return x
        if b == 0.5:
            return e.op("Sqrt", x)
        if b == -0.5:
            return e.op("Reciprocal", e.op("Sqrt", x))
        if b == -1:
            return e.op("Reciprocal", x)
        if b == 3:
            return e.op("Mul", e.op("Mul", x, x), x)
    work = dtype if dtype in FLOATS or dtype in (torch.int32, torch.int64) else torch.int32
    return e.cast(e.op("Pow", *_pair(e, a, b, work)), work, dtype)


@emits("atan2")
def _atan2(e: Emitter, y: Any, x: Any) -> Value:
    dtype = e.out_dtype
    a, b = _pair(e, y, x, dtype)
    zero, pi = e.number(0.0, dtype), e.number(torch.pi, dtype)
    base = e.op("Atan", e.op("Div", a, b))
    turn = e.op("Where", e.op("Less", a, zero), e.op("Neg", pi), pi)
    angle = e.op("Where", e.op("Less", b, zero), e.op("Add", base, turn), base)
    both = e.op("And", e.op("Equal", a, zero), e.op("Equal", b, zero))  # 0/0
    return e.op("Where", both, zero, angle)


@emits("copysign.Tensor", "copysign.Scalar")
def _copysign(e: Emitter, a: Any, b: Any) -> Value:
    x, y = _pair(e, a, b, e.out_dtype)
    negative = e.op("Less", y, e.number(0.0, e.out_dtype))
    size = e.op("Abs", x)
    return e.op("Where", negative, e.op("Neg", size), size)


@emits("hypot")
def _hypot(e: Emitter, a: Any, b: Any) -> Value:
    x, y = _pair(e, a, b, e.out_dtype)
    return e.op("Sqrt", e.op("Add", e.op("Mul", x, x), e.op("Mul", y, y)))


@emits("xlogy.Tensor", "xlogy.Scalar_Other", "xlogy.Scalar_Self")
def _xlogy(e: Emitter, a: Any, b: Any) -> Value:
    x, y = _pair(e, a, b, e.out_dtype)
    zero = e.number(0.0, e.out_dtype)
    return e.op("Where", e.op("Equal", x, zero), zero, e.op("Mul", x, e.op("Log", y)))


@emits("logaddexp")
def _logaddexp(e: Emitter, a: Any, b: Any) -> Value:
    x, y = _pair(e, a, b, e.out_dtype)  # max + log(1 + e^−|a−b|)
    gap = e.op("Neg", e.op("Abs", e.op("Sub", x, y)))
    return e.op("Add", e.op("Max", x, y), e.op("Softplus", gap))


@emits("lerp.Scalar", "lerp.Tensor")
def _lerp(e: Emitter, a: Any, b: Any, weight: Any) -> Value:
    x, y = _pair(e, a, b, e.out_dtype)
    step = e.op("Mul", e.op("Sub", y, x), e.operand(weight, e.out_dtype))
    return e.op("Add", x, step)


@emits("addcmul", "addcdiv")
def _addc(e: Emitter, x: Any, a: Any, b: Any, *, value: Any = 1) -> Value:
    dtype = e.out_dtype
    how = "Mul" if "addcmul" in e.called else "Div"
    product = e.op(how, *_pair(e, a, b, dtype))
    if value != 1:
        product = e.op("Mul", product, e.number(value, dtype))
    return e.op("Add", e.operand(x, dtype), product)


# -- limits and choice ----------------------------------------------------------------------------


@emits("maximum", "max.other", "fmax")
def _maximum(e: Emitter, a: Any, b: Any) -> Value:
    dtype = e.out_dtype
    return e.op("Or" if dtype == torch.bool else "Max", *_pair(e, a, b, dtype))


@emits("minimum", "min.other", "fmin")
def _minimum(e: Emitter, a: Any, b: Any) -> Value:
    dtype = e.out_dtype
    return e.op("And" if dtype == torch.bool else "Min", *_pair(e, a, b, dtype))


@emits("clamp", "clip")
def _clamp(e: Emitter, x: Any, low: Any, high: Any) -> Value:
    dtype = e.out_dtype
    if dtype.is_floating_point:  # a limit that is missing would be the largest finite number
        low, high = -math.inf if low is None else low, math.inf if high is None else high
    limits = [None if limit is None else e.number(limit, dtype) for limit in (low, high)]
    return e.op("Clip", e.operand(x, dtype), *limits)


@emits("clamp.Tensor", "clip.Tensor", "clamp_min.Tensor", "clamp_max.Tensor")
def _clamp_tensor(e: Emitter, x: Any, low: Any, high: Any = None) -> Value:
    if "clamp_max" in e.called:
        low, high = None, low
    value = e.operand(x, e.out_dtype)
    if low is not None:
        value = e.op("Max", value, e.operand(low, e.out_dtype))
    return value if high is None else e.op("Min", value, e.operand(high, e.out_dtype))


@emits("where.self", "where.Scalar", "where.ScalarOther", "where.ScalarSelf")
def _where(e: Emitter, condition: Any, a: Any, b: Any) -> Value:
    chosen = e.operand(condition, torch.bool)
    return _choose(e, chosen, e.operand(a, e.out_dtype), e.operand(b, e.out_dtype))


def _choose(e: Emitter, condition: Value, a: Value, b: Value) -> Value:
    dtype = e.out_dtype
    if dtype in (torch.bool, torch.int16):  # ONNX Runtime's Where does not know these
        work = torch.int32 if dtype == torch.int16 else torch.uint8
        a, b = e.cast(a, dtype, work), e.cast(b, dtype, work)
        return e.cast(e.op("Where", condition, a, b), work, dtype)
    return e.op("Where", condition, a, b)


@emits("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(e: Emitter, x: Any, mask: Any, value: Any) -> Value:
    return _choose(e, e.value(mask), e.operand(value, e.out_dtype), e.value(x))


# -- comparison and logic -------------------------------------------------------------------------


def _comparison(op_type: str) -> Any:
    def emit(e: Emitter, a: Any, b: Any) -> Value:
        dtype = common_dtype(e, a, b)
        if dtype == torch.bool and op_type != "Equal":
            dtype = torch.int32
        return e.op(op_type, *_pair(e, a, b, dtype))

    return emit


for _name, _op_type in {
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}.items():
    emits(f"{_name}.Tensor", f"{_name}.Scalar")(_comparison(_op_type))


@emits("ne.Tensor", "ne.Scalar")
def _ne(e: Emitter, a: Any, b: Any) -> Value:
    return e.op("Not", e.op("Equal", *_pair(e, a, b, common_dtype(e, a, b))))


@emits("isclose")
def _isclose(e: Emitter, a: Any, b: Any, rtol: float, atol: float, equal_nan: bool) -> Value:
    dtype = common_dtype(e, a, b)
    if equal_nan or dtype not in FLOATS:
        e.fail("isclose is emitted for floating point without equal_nan only")
    x, y = _pair(e, a, b, dtype)
    bound = e.op("Mul", e.op("Abs", y), e.number(rtol, dtype))
    bound = e.op("Add", bound, e.number(atol, dtype))
    near = e.op("LessOrEqual", e.op("Abs", e.op("Sub", x, y)), bound)
    return e.op("Or", near, e.op("Equal", x, y))


@emits("logical_not")
def _logical_not(e: Emitter, x: Any) -> Value:
    return e.op("Not", e.operand(x, torch.bool))


@emits("bitwise_not")
def _bitwise_not(e: Emitter, x: Any) -> Value:
    return e.op("Not" if e.out_dtype == torch.bool else "BitwiseNot", x)


_LOGIC = {"and": "And", "or": "Or", "xor": "Xor"}


def _logical(word: str) -> Any:
    def emit(e: Emitter, a: Any, b: Any) -> Value:
        return e.op(_LOGIC[word], *_pair(e, a, b, torch.bool))

    return emit


def _bitwise(word: str) -> Any:
    def emit(e: Emitter, a: Any, b: Any) -> Value:
        dtype = e.out_dtype
        prefix = "" if dtype == torch.bool else "Bitwise"
        return e.op(prefix + _LOGIC[word], *_pair(e, a, b, dtype))

    return emit


for _word in _LOGIC:
    emits(f"logical_{_word}")(_logical(_word))
    emits(
        *(f"bitwise_{_word}.{kind}" for kind in ("Tensor", "Scalar", "Scalar_Tensor")),
        *(f"__{_word}__.{kind}" for kind in ("Tensor", "Scalar")),
    )(_bitwise(_word))


@emits(
    *(
        f"{name}.{kind}"
        for name in ("bitwise_left_shift", "bitwise_right_shift")
        for kind in ("Tensor", "Tensor_Scalar")
    ),
    *(f"{name}.{kind}" for name in ("__lshift__", "__rshift__") for kind in ("Tensor", "Scalar")),
)
def _shift(e: Emitter, a: Any, b: Any) -> Value:
    # x·2ⁿ, and x/2ⁿ rounded down, which is what shifting means for negative numbers too
    dtype = e.out_dtype
    factor = e.op("Pow", e.number(2, torch.int64), e.operand(b, torch.int64))
    if "left" in e.called or "lshift" in e.called:
        result = e.op("Mul", e.operand(a, torch.int64), factor)
    else:
        result = floor_divide(e, e.operand(a, torch.int64), factor, torch.int64)
    return e.cast(result, torch.int64, dtype)


@emits("to.dtype", "to.device", "_to_copy", "to.prim_Device", moves=True)
def _to(e: Emitter, x: Any, *rest: Any, **named: Any) -> Value:
    source, target = x.meta["val"].dtype, e.node.meta["val"].dtype
    return e.cast(e.value(x), source, target)
