"""Order: top k, sort, median, search in sorted sequences."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


@emits("topk")
def _topk(
    e: Emitter, x: Any, k: Any, dim: int = -1, largest: bool = True, is_sorted: bool = True
) -> list[Value]:
    if not shape_of(x):
        return [e.value(x), e.number(0, torch.int64)]
    values, indices = e.ops(
        "TopK", x, [k], outputs=2, axis=dim, largest=int(largest), sorted=int(is_sorted)
    )
    return [values, indices]


def _sorted(e: Emitter, x: Any, dim: int, descending: bool) -> list[Value]:
    """Sort a whole dimension; equal elements keep their order, so the sort is stable."""
    if not shape_of(x):
        return [e.value(x), e.number(0, torch.int64)]
    dtype = e.dtype(x)
    work = torch.int32 if dtype == torch.bool else dtype
    values, indices = e.ops(
        "TopK",
        e.operand(x, work),
        e.size_value(x, dim),
        outputs=2,
        axis=dim,
        largest=int(descending),
    )
    return [e.cast(values, work, dtype), indices]


@emits("sort")
def _sort(e: Emitter, x: Any, dim: int = -1, descending: bool = False) -> list[Value]:
    return _sorted(e, x, dim, descending)


@emits("sort.stable")
def _sort_stable(
    e: Emitter, x: Any, *, stable: Any = None, dim: int = -1, descending: bool = False
) -> list[Value]:
    return _sorted(e, x, dim, descending)


@emits("argsort")
def _argsort(e: Emitter, x: Any, dim: int = -1, descending: bool = False) -> Value:
    return _sorted(e, x, dim, descending)[1]


@emits("argsort.stable")
def _argsort_stable(
    e: Emitter, x: Any, *, stable: bool, dim: int = -1, descending: bool = False
) -> Value:
    return _sorted(e, x, dim, descending)[1]


@emits("msort")
def _msort(e: Emitter, x: Any) -> Value:
    return _sorted(e, x, 0, False)[0]


@emits("kthvalue")
def _kthvalue(e: Emitter, x: Any, k: int, dim: int = -1, keep: bool = False) -> list[Value]:
    return _at(e, _sorted(e, x, dim, False), k - 1, dim, keep)


@emits("median.dim")
def _median(e: Emitter, x: Any, dim: int, keep: bool = False) -> list[Value]:
    size = shape_of(x)[dim]
    if not isinstance(size, int):
        e.fail("the median along a symbolic dimension")
    return _at(e, _sorted(e, x, dim, False), (size - 1) // 2, dim, keep)


@emits("median")
def _median_of_all(e: Emitter, x: Any) -> Value:
    count = 1
    for size in shape_of(x):
        if not isinstance(size, int):
            e.fail("the median of a tensor of symbolic size")
        count *= size
    flat = e.op("Reshape", x, [-1])
    middle = (count - 1) // 2
    lowest, _ = e.ops("TopK", flat, [middle + 1], outputs=2, axis=0, largest=0)
    return e.op("Gather", lowest, e.number(middle, torch.int64), axis=0)


def _at(e: Emitter, both: list[Value], place: int, dim: int, keep: bool) -> list[Value]:
    if keep:
        return [e.op("Slice", one, [place], [place + 1], [dim]) for one in both]
    return [e.op("Gather", one, e.number(place, torch.int64), axis=dim) for one in both]


@emits("bucketize.Tensor")
def _bucketize(
    e: Emitter, x: Any, edges: Any, *, out_int32: bool = False, right: bool = False
) -> Value:
    """How many edges lie below each number (or not above it, with `right`)."""
    return _counted(e, e.op("Unsqueeze", x, [-1]), edges, right)


@emits("searchsorted.Tensor")
def _searchsorted(
    e: Emitter,
    edges: Any,
    x: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: Any = None,
    sorter: Any = None,
) -> Value:
    if sorter is not None:
        e.fail("searchsorted with a sorter")
    rank = len(shape_of(edges))
    sequence = edges if rank == 1 else e.op("Unsqueeze", edges, [rank - 1])
    return _counted(e, e.op("Unsqueeze", x, [-1]), sequence, right or side == "right")


def _counted(e: Emitter, x: Value, edges: Any, right: bool) -> Value:
    below = e.op("GreaterOrEqual" if right else "Greater", x, edges)
    ones = e.cast(below, torch.bool, torch.int64)
    return e.cast(e.op("ReduceSum", ones, [-1], keepdims=0), torch.int64, e.out_dtype)
