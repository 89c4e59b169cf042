"""Writing parts of tensors: scatter, index_put, slices and selections written back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.indexing import END, index_order, joined, spelled_out
from fxopt.backends.onnx.registry import emits
from fxopt.backends.onnx.shaping import same_size

_REDUCTIONS = {
    "sum": "add",
    "prod": "mul",
    "amax": "max",
    "amin": "min",
    "add": "add",
    "multiply": "mul",
}


def _scattered(
    e: Emitter,
    x: Any,
    dim: int,
    index: Any,
    source: Value,
    reduction: str | None = None,
    rank: int | None = None,
) -> Value:
    rank = len(shape_of(x)) if rank is None else rank
    if reduction is not None and e.out_dtype == torch.float16:
        return _in_float32(
            e,
            lambda a, b: e.op("ScatterElements", a, index, b, axis=dim, reduction=reduction),
            x,
            source,
        )
    if rank == 0:  # a number: ONNX wants a dimension to scatter along
        parts = [e.op("Reshape", part, [1]) for part in (x, index, source)]
        return e.op("Squeeze", e.op("ScatterElements", *parts, axis=0, reduction=reduction), [0])
    return e.op("ScatterElements", x, index, source, axis=dim, reduction=reduction)


def _in_float32(e: Emitter, write: Callable[[Value, Value], Value], x: Any, source: Value) -> Value:
    """The runtime reduces while scattering in any type but float16."""
    wide = [e.cast(e.value(part), torch.float16, torch.float32) for part in (x, source)]
    return e.cast(write(wide[0], wide[1]), torch.float32, torch.float16)


def _scatter_nd(e: Emitter, x: Any, places: Value, source: Value, adds: bool) -> Value:
    reduction = "add" if adds else None
    if adds and e.out_dtype == torch.float16:
        return _in_float32(
            e, lambda a, b: e.op("ScatterND", a, places, b, reduction=reduction), x, source
        )
    return e.op("ScatterND", x, places, source, reduction=reduction)


def _fitting(e: Emitter, source: Any, index: Any) -> Value:
    """Return the part of a source that the index covers."""
    value = e.operand(source, e.out_dtype)
    sizes, wanted = shape_of(source), shape_of(index)
    axes = [a for a, (s, w) in enumerate(zip(sizes, wanted, strict=True)) if not same_size(s, w)]
    if not axes:
        return value
    ends = e.sizes([e.size(index, axis) for axis in axes])
    return e.op("Slice", value, [0] * len(axes), ends, axes)


@emits("scatter.src", "scatter_add", "scatter.reduce", moves=False)
def _scatter(e: Emitter, x: Any, dim: int, index: Any, source: Any, *, reduce: Any = None) -> Value:
    adds = "scatter_add" in e.called
    reduction = "add" if adds else None if reduce is None else _REDUCTIONS[reduce]
    return _scattered(e, x, dim, index, _fitting(e, source, index), reduction)


@emits("scatter.value", "scatter.value_reduce")
def _scatter_value(
    e: Emitter, x: Any, dim: int, index: Any, value: Any, *, reduce: Any = None
) -> Value:
    shape = e.op("Shape", index)
    if all(isinstance(size, int) for size in shape_of(index)):
        shape = e.sizes(shape_of(index))
    source = e.op("Expand", e.number(value, e.out_dtype), shape)
    return _scattered(e, x, dim, index, source, None if reduce is None else _REDUCTIONS[reduce])


@emits("scatter_reduce.two")
def _scatter_reduce(
    e: Emitter, x: Any, dim: int, index: Any, source: Any, reduce: str, *, include_self: bool = True
) -> Value:
    if reduce not in _REDUCTIONS:
        e.fail(f"scatter_reduce with '{reduce}'")
    value = _fitting(e, source, index)
    if include_self:
        return _scattered(e, x, dim, index, value, _REDUCTIONS[reduce])
    neutral = {"sum": 0, "prod": 1, "amax": -np.inf, "amin": np.inf}[reduce]
    if not e.out_dtype.is_floating_point and reduce in ("amax", "amin"):
        limits = torch.iinfo(e.out_dtype)
        neutral = limits.min if reduce == "amax" else limits.max
    blank = e.op("Expand", e.number(neutral, e.out_dtype), e.op("Shape", index))
    cleared = _scattered(e, x, dim, index, blank)
    if not shape_of(x):
        return value
    return _scattered(e, cleared, dim, index, value, _REDUCTIONS[reduce], rank=len(shape_of(x)))


@emits("index_add", "index_copy", "index_fill.int_Scalar", "index_fill.int_Tensor")
def _index_write(e: Emitter, x: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Value:
    """Write along one dimension at the places that a vector lists."""
    rank, dtype = len(shape_of(x)), e.out_dtype
    flat = e.op("Reshape", index, [-1])
    first = [dim, *(d for d in range(rank) if d != dim)]
    back = [first.index(d) for d in range(rank)]
    places = e.op("Unsqueeze", flat, [1])
    turned: Any = x if dim == 0 else e.op("Transpose", x, perm=first)
    value = e.operand(source, dtype)
    if isinstance(source, fx.Node) and shape_of(source):
        value = value if dim == 0 else e.op("Transpose", value, perm=first)
    else:
        rest = e.op("Shape", turned, start=1)
        value = e.op("Expand", value, e.op("Concat", e.op("Shape", flat), rest, axis=0))
    if alpha != 1:
        value = e.op("Mul", value, e.number(alpha, dtype))
    adds = "index_add" in e.called
    written = _scatter_nd(e, turned, places, value, adds)
    return written if dim == 0 else e.op("Transpose", written, perm=back)


@emits("index_put", "_unsafe_index_put")
def _index_put(
    e: Emitter, x: Any, indices: list[Any], values: Any, accumulate: bool = False
) -> Value:
    given = [index for index in indices if index is not None]
    rank, dtype = len(shape_of(x)), e.out_dtype
    value = e.operand(values, dtype)
    mask = given[0] if given[0].meta["val"].dtype == torch.bool and len(given) == 1 else None
    if mask is not None and not accumulate and values.meta["val"].numel() == 1:
        return _masked(e, x, indices.index(mask), mask, value)
    found = spelled_out(e, indices)
    dims = list(found)
    order = index_order(dims, rank)
    turned: Any = x if order == list(range(rank)) else e.op("Transpose", x, perm=order)
    places = joined(e, found)
    lead = e.op("Shape", places, end=-1)
    rest = e.op("Shape", turned, start=len(dims))
    shape = e.op("Concat", lead, rest, axis=0) if rank > len(dims) else lead
    written_rank = _index_rank(found) + rank - len(dims)
    if dims[0] > 0 and _adjacent(dims):
        value = _indexed_first(
            e, value, len(shape_of(values)), dims[0], _index_rank(found), written_rank
        )
    value = e.op("Expand", value, shape)
    written = _scatter_nd(e, turned, places, value, accumulate)
    back = [order.index(d) for d in range(rank)]
    return written if order == list(range(rank)) else e.op("Transpose", written, perm=back)


def _adjacent(dims: list[int]) -> bool:
    return dims == list(range(dims[0], dims[0] + len(dims)))


def _index_rank(found: dict[int, tuple[Value, Any]]) -> int:
    return max(1 if shape is None else len(shape) for _, shape in found.values())


def _indexed_first(
    e: Emitter, value: Value, rank: int, before: int, width: int, full: int
) -> Value:
    """Bring the dimensions of the indices to the front, where ScatterND wants them."""
    if rank < full:
        value = e.op("Unsqueeze", value, list(range(full - rank)))
    order = [*range(before, before + width), *range(before), *range(before + width, full)]
    return e.op("Transpose", value, perm=order)


def _masked(e: Emitter, x: Any, dim: int, mask: Any, value: Value) -> Value:
    rank, width = len(shape_of(x)), len(shape_of(mask))
    after = rank - dim - width
    condition: Any = mask
    if after:
        condition = e.op("Unsqueeze", mask, [width + i for i in range(after)])
    dtype = e.out_dtype
    value = e.op("Reshape", value, [1])
    if dtype in (torch.bool, torch.int16):
        work = torch.int32
        chosen = e.op("Where", condition, e.cast(value, dtype, work), e.operand(x, work))
        return e.cast(chosen, work, dtype)
    return e.op("Where", condition, value, x)


@emits("masked_scatter")
def _masked_scatter(e: Emitter, x: Any, mask: Any, source: Any) -> Value:
    shape = e.op("Shape", x)
    wide = mask if str(shape_of(mask)) == str(shape_of(x)) else e.op("Expand", mask, shape)
    places = e.op("Transpose", e.op("NonZero", wide), perm=[1, 0])
    count = e.op("Shape", places, start=0, end=1)
    values = e.op("Slice", e.op("Reshape", source, [-1]), [0], count, [0])
    return e.op("ScatterND", x, places, values)


# -- slices and selections written back -----------------------------------------------------------


@emits("slice_scatter", moves=True)
def _slice_scatter(
    e: Emitter, x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    value = e.cast(e.value(source), source.meta["val"].dtype, e.node.meta["val"].dtype)
    start, end = 0 if start is None else start, END if end is None else end
    size = shape_of(x)[dim]
    if step != 1:
        return _strided_write(e, x, value, dim, start, end, step)
    if isinstance(start, int) and isinstance(size, int) and start < 0:
        start = max(start + size, 0)
    if isinstance(end, int) and isinstance(size, int):
        end = max(end + size, 0) if end < 0 else min(end, size)
    parts = [value]
    if start != 0:
        parts.insert(0, e.op("Slice", x, [0], [start], [dim]))
    if not isinstance(end, int) or end not in (END, size):
        parts.append(e.op("Slice", x, [end], [END], [dim]))
    return parts[0] if len(parts) == 1 else e.op("Concat", *parts, axis=dim)


def _strided_write(
    e: Emitter, x: Any, value: Value, dim: int, start: Any, end: Any, step: int
) -> Value:
    size = shape_of(x)[dim]
    if not all(isinstance(n, int) for n in (size, start, end, step)):
        e.fail("a strided write to symbolic positions")
    rank = len(shape_of(x))
    places = np.arange(size)[start : min(end, size) : step].astype(np.int64)
    first = [dim, *(d for d in range(rank) if d != dim)]
    back = [first.index(d) for d in range(rank)]
    turned: Any = x
    if dim:
        turned, value = (e.op("Transpose", part, perm=first) for part in (x, value))
    written = e.op("ScatterND", turned, e.constant(places[:, None]), value)
    return e.op("Transpose", written, perm=back) if dim else written


@emits("select_scatter", moves=True)
def _select_scatter(e: Emitter, x: Any, source: Any, dim: int, index: Any) -> Value:
    value = e.cast(e.value(source), source.meta["val"].dtype, e.node.meta["val"].dtype)
    value = e.op("Unsqueeze", value, [dim])
    size = shape_of(x)[dim]
    if not isinstance(index, int) or (index < 0 and not isinstance(size, int)):
        e.fail("a selection written at a symbolic position")
    index = index + size if index < 0 else index
    parts = [value]
    if index > 0:
        parts.insert(0, e.op("Slice", x, [0], [index], [dim]))
    if not isinstance(size, int) or index + 1 < size:
        parts.append(e.op("Slice", x, [index + 1], [END], [dim]))
    return parts[0] if len(parts) == 1 else e.op("Concat", *parts, axis=dim)


@emits("diagonal_scatter")
def _diagonal_scatter(
    e: Emitter, x: Any, source: Any, offset: int = 0, a: int = 0, b: int = 1
) -> Value:
    shape = shape_of(x)
    if len(shape) != 2 or not all(isinstance(size, int) for size in shape) or (a, b) != (0, 1):
        e.fail("a diagonal written into other than one matrix of fixed size")
    points = np.arange(shape_of(source)[0])
    pairs = np.stack([points - min(offset, 0), points + max(offset, 0)], axis=-1)
    return e.op("ScatterND", x, e.constant(pairs.astype(np.int64)), e.operand(source, e.out_dtype))
