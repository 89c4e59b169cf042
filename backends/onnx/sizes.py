"""Symbolic sizes: arithmetic on int64 values of shape [1]."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.backends.onnx.arithmetic import floor_divide
from fxopt.backends.onnx.describe import number_dtype
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


@emits("sym_size.int", moves=True)
def _sym_size(e: Emitter, x: Any, axis: int) -> Value:
    return e.size_value(x, axis)


@emits("sym_numel", "numel", moves=True)
def _sym_numel(e: Emitter, x: Any) -> Value:
    return e.op("ReduceProd", e.op("Shape", x), keepdims=1)


@emits("item", "_local_scalar_dense", moves=True)
def _item(e: Emitter, x: Any) -> Value:
    source = x.meta["val"].dtype
    target = _dtype(e.node)
    return e.op("Reshape", e.cast(e.value(x), source, target), [1])


def _dtype(x: Any) -> torch.dtype:
    value = x.meta["val"] if isinstance(x, fx.Node) else x
    return value.dtype if isinstance(value, torch.Tensor) else number_dtype(value)


def _number(e: Emitter, x: Any, dtype: torch.dtype) -> Value:
    if isinstance(x, fx.Node):
        return e.cast(e.value(x), _dtype(x), dtype)
    if dtype == torch.int64:
        return e.sizes([int(x)])
    kind: Any = np.float64 if dtype == torch.float64 else np.bool_
    return e.constant(np.asarray([x], dtype=kind))


def _operands(e: Emitter, a: Any, b: Any, dtype: torch.dtype | None = None) -> tuple[Value, Value]:
    if dtype is None:
        floats = torch.float64 in (_dtype(a), _dtype(b))
        dtype = torch.float64 if floats else torch.int64
    return _number(e, a, dtype), _number(e, b, dtype)


def _binary(op_type: str) -> Any:
    def emit(e: Emitter, a: Any, b: Any) -> Value:
        return e.op(op_type, *_operands(e, a, b))

    return emit


for _functions, _op_type in (
    ((operator.add,), "Add"),
    ((operator.sub,), "Sub"),
    ((operator.mul,), "Mul"),
    ((operator.mod,), "Mod"),
    ((torch.sym_max, max), "Max"),
    ((torch.sym_min, min), "Min"),
    ((operator.eq,), "Equal"),
    ((operator.lt,), "Less"),
    ((operator.le,), "LessOrEqual"),
    ((operator.gt,), "Greater"),
    ((operator.ge,), "GreaterOrEqual"),
):
    emits(*_functions)(_binary(_op_type))


@emits(operator.ne)
def _ne(e: Emitter, a: Any, b: Any) -> Value:
    return e.op("Not", e.op("Equal", *_operands(e, a, b)))


@emits(operator.floordiv)
def _floordiv(e: Emitter, a: Any, b: Any) -> Value:
    left, right = _operands(e, a, b)
    dtype = torch.float64 if torch.float64 in (_dtype(a), _dtype(b)) else torch.int64
    if dtype == torch.int64 and _never_negative(a) and _never_negative(b):
        return e.op("Div", left, right)
    return floor_divide(e, left, right, dtype)


def _never_negative(x: Any) -> bool:
    if isinstance(x, fx.Node):
        return bool(x.meta["val"].node.expr.is_nonnegative)
    return bool(x >= 0)


@emits(operator.truediv)
def _truediv(e: Emitter, a: Any, b: Any) -> Value:
    return e.op("Div", *_operands(e, a, b, torch.float64))


@emits(operator.pow, math.pow)
def _pow(e: Emitter, a: Any, b: Any) -> Value:
    return e.op("Pow", *_operands(e, a, b))


@emits(operator.neg)
def _neg(e: Emitter, a: Any) -> Value:
    return e.op("Neg", a)


@emits(operator.abs, abs)
def _abs(e: Emitter, a: Any) -> Value:
    return e.op("Abs", a)


@emits(torch.sym_float, float)
def _sym_float(e: Emitter, a: Any) -> Value:
    return _number(e, a, torch.float64)


@emits(torch.sym_int, int, math.trunc)
def _sym_int(e: Emitter, a: Any) -> Value:
    return _number(e, a, torch.int64)


@emits(math.floor, math.ceil, round)
def _rounded(e: Emitter, a: Any) -> Value:
    target: Any = e.node.target
    kind = {math.floor: "Floor", math.ceil: "Ceil"}.get(target, "Round")
    return e.cast(e.op(kind, _number(e, a, torch.float64)), torch.float64, torch.int64)


@emits(math.sqrt, getattr(torch, "_sym_sqrt", math.sqrt))
def _sqrt(e: Emitter, a: Any) -> Value:
    return e.op("Sqrt", _number(e, a, torch.float64))


@emits(torch.sym_not, operator.not_)
def _not(e: Emitter, a: Any) -> Value:
    return e.op("Not", _number(e, a, torch.bool))


@emits(operator.and_, operator.or_)
def _logic(e: Emitter, a: Any, b: Any) -> Value:
    kind = "And" if e.node.target is operator.and_ else "Or"
    return e.op(kind, *_operands(e, a, b, torch.bool))


@emits(torch.sym_ite)
def _ite(e: Emitter, condition: Any, a: Any, b: Any) -> Value:
    return e.op("Where", _number(e, condition, torch.bool), *_operands(e, a, b))


@emits(operator.getitem, moves=True)
def _getitem(e: Emitter, x: Any, index: Any) -> Any:
    return e.values(x)[index]  # None where nobody uses it
