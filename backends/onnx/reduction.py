"""Reductions over dimensions: sums, means, norms, extremes, variances; and cumulations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.dtypes import FLOATS
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


def axes_of(x: Any, dims: Any) -> list[int]:
    """Return the dimensions a reduction of a tensor goes over; none given means all."""
    return wrapped(dims, len(shape_of(x)))


def wrapped(dims: Any, rank: int) -> list[int]:
    """Return dimensions counted from the front; none given means all."""
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(rank))
    given = [dims] if isinstance(dims, int) else list(dims)
    return [d % max(rank, 1) for d in given] if rank else []


def reduce(
    e: Emitter, op_type: str, value: Any, axes: Sequence[int], keep: bool, rank: int
) -> Value:
    """Emit one reducing node; a number without dimensions is its own reduction."""
    if not axes and rank == 0:
        return e.value(value)
    every = len(axes) == rank
    return e.op(op_type, value, None if every else list(axes), keepdims=1 if keep else 0)


@emits("sum", "sum.dim_IntList", "mean", "mean.dim", "prod", "prod.dim_int")
def _sum(e: Emitter, x: Any, dims: Any = None, keep: bool = False, *, dtype: Any = None) -> Value:
    name = e.called
    op_type = "ReduceSum" if "sum" in name else "ReduceMean" if "mean" in name else "ReduceProd"
    if name == "prod.default":
        dims = None
    if isinstance(dims, torch.dtype):
        dims = None
    value = e.operand(x, e.out_dtype)
    return reduce(e, op_type, value, axes_of(x, dims), keep, len(shape_of(x)))


@emits("amax", "amin")
def _extreme(e: Emitter, x: Any, dims: Any = (), keep: bool = False) -> Value:
    op_type = "ReduceMax" if "amax" in e.called else "ReduceMin"
    return _extremes(e, op_type, x, axes_of(x, dims), keep)


def _extremes(e: Emitter, op_type: str, x: Any, axes: Sequence[int], keep: bool) -> Value:
    dtype = e.dtype(x)
    work = torch.int32 if dtype in (torch.int16, torch.bool) else dtype
    value = e.operand(x, work)
    return e.cast(reduce(e, op_type, value, axes, keep, len(shape_of(x))), work, dtype)


@emits("max", "min")
def _whole_extreme(e: Emitter, x: Any) -> Value:
    op_type = "ReduceMax" if e.called.startswith("max") else "ReduceMin"
    return _extremes(e, op_type, x, axes_of(x, None), False)


@emits("aminmax")
def _aminmax(e: Emitter, x: Any, *, dim: int | None = None, keepdim: bool = False) -> list[Value]:
    axes = axes_of(x, dim)
    return [_extremes(e, kind, x, axes, keepdim) for kind in ("ReduceMin", "ReduceMax")]


@emits("max.dim", "min.dim")
def _extreme_dim(e: Emitter, x: Any, dim: int, keep: bool = False) -> list[Value | None]:
    kind = "Max" if e.called.startswith("max") else "Min"
    best = _extremes(e, f"Reduce{kind}", x, axes_of(x, dim), keep)
    return [best, _arg(e, f"Arg{kind}", x, dim, keep) if e.used(1) else None]


@emits("argmax", "argmin")
def _argmax(e: Emitter, x: Any, dim: int | None = None, keep: bool = False) -> Value:
    return _arg(e, "ArgMax" if "argmax" in e.called else "ArgMin", x, dim, keep)


def _arg(e: Emitter, op_type: str, x: Any, dim: int | None, keep: bool) -> Value:
    dtype, rank = e.dtype(x), len(shape_of(x))
    value = e.operand(x, torch.int32 if dtype in (torch.int16, torch.bool) else dtype)
    if rank == 0:
        return e.number(0, torch.int64)
    if dim is None:
        value = e.op("Reshape", value, [-1])
        found = e.op(op_type, value, axis=0, keepdims=0)
        return e.op("Reshape", found, [1] * rank) if keep else found
    return e.op(op_type, value, axis=dim, keepdims=1 if keep else 0)


@emits("any", "any.dim", "any.dims", "all", "all.dim", "all.dims")
def _any(e: Emitter, x: Any, dims: Any = None, keep: bool = False) -> Value:
    rank = len(shape_of(x))
    truth = e.operand(x, torch.bool)
    # the largest of 0 and 1 is "any", the smallest "all"
    op_type = "ReduceMax" if "any" in e.called else "ReduceMin"
    if e.opset >= 20:  # the first in which truth has a largest value
        return reduce(e, op_type, truth, axes_of(x, dims), keep, rank)
    ones = e.cast(truth, torch.bool, torch.int32)
    return e.cast(reduce(e, op_type, ones, axes_of(x, dims), keep, rank), torch.int32, torch.bool)


@emits("count_nonzero", "count_nonzero.dim_IntList")
def _count_nonzero(e: Emitter, x: Any, dims: Any = None) -> Value:
    ones = e.cast(e.operand(x, torch.bool), torch.bool, torch.int64)
    return reduce(e, "ReduceSum", ones, axes_of(x, dims), False, len(shape_of(x)))


@emits("logsumexp")
def _logsumexp(e: Emitter, x: Any, dims: Any, keep: bool = False) -> Value:
    value = e.operand(x, e.out_dtype)
    return reduce(e, "ReduceLogSumExp", value, axes_of(x, dims), keep, len(shape_of(x)))


# -- norms and variances --------------------------------------------------------------------------


@emits("linalg_vector_norm")
def _vector_norm(
    e: Emitter, x: Any, order: Any = 2, dims: Any = None, keep: bool = False, *, dtype: Any = None
) -> Value:
    return _norm(e, x, order, dims, keep)


@emits("norm.ScalarOpt_dim", "norm.Scalar", "norm.ScalarOpt_dim_dtype", "linalg_norm")
def _old_norm(
    e: Emitter, x: Any, order: Any, dims: Any = None, keep: bool = False, **named: Any
) -> Value:
    count = len(shape_of(x)) if dims is None else len(axes_of(x, dims))
    if "linalg_norm" in e.called and order is not None and count == 2:
        e.fail("a matrix norm of that order")
    return _norm(e, x, 2 if order is None else order, dims, keep)


@emits("dist")
def _dist(e: Emitter, a: Any, b: Any, order: Any = 2) -> Value:
    gap = e.op("Sub", e.operand(a, e.out_dtype), e.operand(b, e.out_dtype))
    return _norm_of(e, gap, len(_broadcast(a, b)), order, None, False)


def _broadcast(a: Any, b: Any) -> Sequence[Any]:
    return torch.broadcast_shapes(a.meta["val"].shape, b.meta["val"].shape)


def _norm(e: Emitter, x: Any, order: Any, dims: Any, keep: bool) -> Value:
    return _norm_of(e, e.operand(x, e.out_dtype), len(shape_of(x)), order, dims, keep)


def _norm_of(e: Emitter, value: Value, rank: int, order: Any, dims: Any, keep: bool) -> Value:
    dtype, axes = e.out_dtype, wrapped(dims, rank)
    if rank == 0 and order != 0:
        return e.op("Abs", value)
    if order in (1, 2):
        return reduce(e, f"ReduceL{int(order)}", value, axes, keep, rank)
    if math.isinf(order):
        kind = "ReduceMax" if order > 0 else "ReduceMin"
        return reduce(e, kind, e.op("Abs", value), axes, keep, rank)
    if order == 0:
        some = e.cast(e.cast(value, dtype, torch.bool), torch.bool, dtype)
        return reduce(e, "ReduceSum", some, axes, keep, rank)
    powers = e.op("Pow", e.op("Abs", value), e.number(float(order), dtype))
    total = reduce(e, "ReduceSum", powers, axes, keep, rank)
    return e.op("Pow", total, e.number(1.0 / order, dtype))


@emits("var.correction", "std.correction", "var", "std", "var.dim", "std.dim")
def _var(
    e: Emitter, x: Any, dims: Any = None, *rest: Any, correction: Any = 1, keepdim: bool = False
) -> Value:
    if isinstance(dims, bool):  # var(x, unbiased)
        dims, correction = None, int(dims)
    if len(rest) == 2:  # var.dim(x, dim, unbiased, keepdim)
        correction, keepdim = int(rest[0]), rest[1]
    variance, _ = _moments(e, x, dims, 1 if correction is None else correction, keepdim)
    return e.op("Sqrt", variance) if "std" in e.called else variance


@emits("var_mean.correction", "std_mean.correction", "var_mean.dim", "std_mean.dim")
def _var_mean(
    e: Emitter, x: Any, dims: Any = None, *rest: Any, correction: Any = 1, keepdim: bool = False
) -> list[Value]:
    if len(rest) == 2:
        correction, keepdim = int(rest[0]), rest[1]
    variance, mean = _moments(e, x, dims, 1 if correction is None else correction, keepdim)
    return [e.op("Sqrt", variance) if "std" in e.called else variance, mean]


def _moments(e: Emitter, x: Any, dims: Any, correction: Any, keep: bool) -> tuple[Value, Value]:
    """Return the variance (over n − correction) and the mean."""
    dtype, rank, axes = e.out_dtype, len(shape_of(x)), axes_of(x, dims)
    mean = reduce(e, "ReduceMean", x, axes, True, rank)
    centred = e.op("Sub", x, mean)
    squares = e.op("Mul", centred, centred)
    if correction == 0:
        variance = reduce(e, "ReduceMean", squares, axes, keep, rank)
    else:
        total = reduce(e, "ReduceSum", squares, axes, keep, rank)
        variance = e.op("Div", total, _count(e, x, axes, correction, dtype))
    if not keep and axes:
        mean = e.op("Squeeze", mean, axes)
    return variance, mean


def _count(e: Emitter, x: Any, axes: Sequence[int], correction: Any, dtype: torch.dtype) -> Value:
    sizes = [shape_of(x)[axis] for axis in axes]
    if all(isinstance(size, int) for size in sizes):
        return e.number(float(max(math.prod(sizes) - correction, 0)), dtype)
    dims = e.sizes([e.size(x, axis) for axis in axes])
    count = e.cast(e.op("ReduceProd", dims, keepdims=0), torch.int64, dtype)
    return e.op("Sub", count, e.number(float(correction), dtype))


# -- cumulations ----------------------------------------------------------------------------------


@emits("cumsum")
def _cumsum(e: Emitter, x: Any, dim: int, *, dtype: Any = None) -> Value:
    value = e.operand(x, e.out_dtype)
    if not shape_of(x):
        return value
    work = e.out_dtype if e.out_dtype in FLOATS else torch.int64
    value = e.op("CumSum", e.cast(value, e.out_dtype, work), e.number(dim, torch.int64))
    return e.cast(value, work, e.out_dtype)


@emits("cumprod")
def _cumprod(e: Emitter, x: Any, dim: int, *, dtype: Any = None) -> Value:
    return _scan(e, e.operand(x, e.out_dtype), x, dim, "Mul")


@emits("cummax", "cummin")
def _cummax(e: Emitter, x: Any, dim: int) -> list[Value | None]:
    if e.used(1):
        e.fail("the indices of a cumulative extreme")
    kind = "Max" if "cummax" in e.called else "Min"
    return [_scan(e, e.value(x), x, dim, kind), None]


@emits("logcumsumexp")
def _logcumsumexp(e: Emitter, x: Any, dim: int) -> Value:
    top = e.op("ReduceMax", x, [dim], keepdims=1)
    shifted = e.op("Exp", e.op("Sub", x, top))
    total = e.op("CumSum", shifted, e.number(dim, torch.int64))
    return e.op("Add", e.op("Log", total), top)


def _scan(e: Emitter, value: Value, x: Any, dim: int, op_type: str) -> Value:
    """Cumulate in log₂(n) steps: each joins every element with the one 2ᵏ before it."""
    if not shape_of(x):
        return value
    size = shape_of(x)[dim]
    if not isinstance(size, int):
        e.fail("a cumulative product or extreme along a symbolic dimension")
    step = 1
    while step < size:
        head = e.op("Slice", value, [0], [step], [dim])
        later = e.op("Slice", value, [step], [size], [dim])
        earlier = e.op("Slice", value, [0], [size - step], [dim])
        value = e.op("Concat", head, e.op(op_type, later, earlier), axis=dim)
        step *= 2
    return value


@emits("diff")
def _diff(
    e: Emitter, x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None
) -> Value:
    dtype = e.out_dtype
    parts = [part for part in (prepend, x, append) if part is not None]
    value = (
        e.value(x)
        if len(parts) == 1
        else e.op("Concat", *(e.operand(part, dtype) for part in parts), axis=dim)
    )
    for _ in range(n):
        later = e.op("Slice", value, [1], [2**63 - 1], [dim])
        earlier = e.op("Slice", value, [0], [-1], [dim])
        if dtype == torch.bool:
            value = e.op("Xor", later, earlier)
        else:
            value = e.op("Sub", later, earlier)
    return value
