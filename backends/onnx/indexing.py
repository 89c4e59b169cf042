"""Reading parts of tensors: slices, selections, indices, windows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits
from fxopt.shapes import is_static_shape

END = 2**63 - 1  # how ATen and ONNX write "to the end"


@emits("slice.Tensor", moves=True)
def _slice(e: Emitter, x: Any, dim: int, start: Any, end: Any, step: Any) -> Value | None:
    """One Slice for a chain of them along different axes: all but the last emit nothing."""
    start, end = 0 if start is None else start, END if end is None else end
    source, bounds = e.slices.pop(x, (x, {}))
    if start != 0 or end != END or step != 1:
        bounds = {**bounds, dim: (start, end, step)}
    if _goes_on(e.node, bounds):
        e.slices[e.node] = source, bounds
        return None
    if not bounds:
        return e.value(source)
    starts, ends, steps = map(list, zip(*bounds.values(), strict=True))
    return e.op("Slice", source, starts, ends, list(bounds), steps if set(steps) != {1} else None)


def _goes_on(node: fx.Node, bounds: Mapping[int, Any]) -> bool:
    """Whether all that reads a slice is a slice along another axis; their sizes are numbers."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not torch.ops.aten.slice.Tensor:
        return False
    (user,) = users
    numbers = all(isinstance(n, int) for n in (*user.args[2:], *itertools.chain(*bounds.values())))
    return numbers and user.args[1] not in bounds and is_static_shape(node)


@emits("narrow", moves=True)
def _narrow(e: Emitter, x: Any, dim: int, start: Any, length: Any) -> Value:
    end = e.op("Add", e.sizes([start]), e.sizes([length]))
    return e.op("Slice", x, [start], end, [dim])


@emits("select.int", moves=True)
def _select(e: Emitter, x: Any, dim: int, index: Any) -> Value:
    return e.op("Gather", x, e.number(index, torch.int64), axis=dim)


@emits("index_select", moves=True)
def _index_select(e: Emitter, x: Any, dim: int, index: Any) -> Value:
    if not shape_of(x):
        return e.value(x)
    flat = index if shape_of(index) else e.op("Reshape", index, [1])
    return e.op("Gather", x, flat, axis=dim)


@emits("embedding", moves=True)
def _embedding(e: Emitter, weight: Any, index: Any, *rest: Any) -> Value:
    return e.op("Gather", weight, index, axis=0)


@emits("gather", moves=True)
def _gather(e: Emitter, x: Any, dim: int, index: Any, *rest: Any, **named: Any) -> Value:
    if not shape_of(x):
        return e.value(x) if not shape_of(index) else e.op("Expand", x, e.op("Shape", index))
    return e.op("GatherElements", x, index, axis=dim)


@emits("take_along_dim", moves=True)
def _take_along_dim(e: Emitter, x: Any, index: Any, dim: int | None = None) -> Value:
    if dim is None:
        flat, order = e.op("Reshape", x, [-1]), e.op("Reshape", index, [-1])
        return e.op("GatherElements", flat, order, axis=0)
    sizes, source = shape_of(index), shape_of(x)
    if any(
        str(a) != str(b)
        for axis, (a, b) in enumerate(zip(sizes, source, strict=True))
        if axis != dim
    ):
        e.fail("take_along_dim with sizes that broadcast")
    return e.op("GatherElements", x, index, axis=dim)


@emits("take", moves=True)
def _take(e: Emitter, x: Any, index: Any) -> Value:
    return e.op("Gather", e.op("Reshape", x, [-1]), index, axis=0)


# -- advanced indexing ----------------------------------------------------------------------------


def spelled_out(e: Emitter, indices: list[Any]) -> dict[int, tuple[Value, Any]]:
    """Return the integer index of each indexed dimension, and its sizes; a mask is several."""
    found: dict[int, tuple[Value, Any]] = {}
    dim = 0
    for index in indices:
        if index is None:
            dim += 1
            continue
        shape = shape_of(index)
        if index.meta["val"].dtype in (torch.bool, torch.uint8):
            rows = e.op("NonZero", e.operand(index, torch.bool))
            for row in range(len(shape)):
                picked = e.op("Gather", rows, e.number(row, torch.int64), axis=0)
                found[dim] = (picked, None)
                dim += 1
        else:
            found[dim] = (e.operand(index, torch.int64), shape)
            dim += 1
    return found


def joined(e: Emitter, found: dict[int, tuple[Value, Any]]) -> Value:
    """Return index tensors, broadcast to one shape, as one tensor of index tuples."""
    values = [value for value, _ in found.values()]
    shapes = [shape for _, shape in found.values()]
    if shapes[0] is None or any(str(shape) != str(shapes[0]) for shape in shapes):
        if any(shape is not None for shape in shapes):  # several masks' rows are equally long
            target: Any = e.op("Shape", e.op("Max", *values))
            if all(s is not None and all(isinstance(n, int) for n in s) for s in shapes):
                target = list(torch.broadcast_shapes(*shapes))
            values = [e.op("Expand", value, target) for value in values]
    columns = [e.op("Unsqueeze", value, [-1]) for value in values]
    return columns[0] if len(columns) == 1 else e.op("Concat", *columns, axis=-1)


def index_order(dims: list[int], rank: int) -> list[int]:
    """Return all dimensions, the indexed ones first."""
    return [*dims, *(d for d in range(rank) if d not in dims)]


@emits("index.Tensor", "_unsafe_index.Tensor", moves=True)
def _index(e: Emitter, x: Any, indices: list[Any]) -> Value:
    given = [index for index in indices if index is not None]
    if len(given) == 1 and given[0].meta["val"].dtype not in (torch.bool, torch.uint8):
        return e.op("Gather", x, e.operand(given[0], torch.int64), axis=indices.index(given[0]))
    found = spelled_out(e, indices)
    dims, rank = list(found), len(shape_of(x))
    if len(found) == 1:
        return e.op("Gather", x, found[dims[0]][0], axis=dims[0])
    order = index_order(dims, rank)
    source = x if order == list(range(rank)) else e.op("Transpose", x, perm=order)
    picked = e.op("GatherND", source, joined(e, found))
    adjacent = _adjacent(indices)
    first = dims[0]
    if not adjacent or first == 0:
        return picked
    width = len(e.out_shape) - (rank - len(dims))  # dimensions that the indices have
    moved = [*range(width, width + first), *range(width), *range(width + first, len(e.out_shape))]
    return e.op("Transpose", picked, perm=moved)


def _adjacent(indices: list[Any]) -> bool:
    places = [place for place, index in enumerate(indices) if index is not None]
    return places == list(range(places[0], places[0] + len(places)))


@emits("masked_select")
def _masked_select(e: Emitter, x: Any, mask: Any) -> Value:
    if str(shape_of(x)) != str(shape_of(mask)):
        shape = e.op("Shape", e.op("Or", e.operand(x, torch.bool), mask))
        x, mask = e.op("Expand", x, shape), e.op("Expand", mask, shape)
    return e.op("Compress", e.op("Reshape", x, [-1]), e.op("Reshape", mask, [-1]), axis=0)


@emits("nonzero", moves=True)
def _nonzero(e: Emitter, x: Any) -> Value:
    return e.op("Transpose", e.op("NonZero", e.operand(x, torch.bool)), perm=[1, 0])


@emits("nonzero_numpy", moves=True)
def _nonzero_numpy(e: Emitter, x: Any) -> list[Value]:
    rows = e.op("NonZero", e.operand(x, torch.bool))
    return [
        e.op("Gather", rows, e.number(row, torch.int64), axis=0) for row in range(len(shape_of(x)))
    ]


@emits("one_hot")
def _one_hot(e: Emitter, x: Any, classes: Any = -1) -> Value:
    if classes == -1:
        e.fail(
            "one_hot without num_classes has a size that depends on the data", "Give num_classes."
        )
    return e.op("OneHot", x, e.sizes([classes]), e.constant(np.asarray([0, 1])), axis=-1)


# -- diagonals and windows ------------------------------------------------------------------------


@emits("diagonal", moves=True)
def _diagonal(e: Emitter, x: Any, offset: int = 0, a: int = 0, b: int = 1) -> Value:
    shape = shape_of(x)
    rank = len(shape)
    a, b = a % rank, b % rank
    rows, columns = shape[a], shape[b]
    if not isinstance(rows, int) or not isinstance(columns, int):
        e.fail("the diagonal of a matrix of symbolic size")
    rest = [d for d in range(rank) if d not in (a, b)]
    length = max(min(rows + min(offset, 0), columns - max(offset, 0)), 0)
    points = np.arange(length)
    pairs = np.stack([points - min(offset, 0), points + max(offset, 0)], axis=-1)
    first = e.op("Transpose", x, perm=[a, b, *rest])
    picked = e.op("GatherND", first, e.constant(pairs.astype(np.int64)))
    return e.op("Transpose", picked, perm=[*range(1, rank - 1), 0]) if rest else picked


@emits("trace")
def _trace(e: Emitter, x: Any) -> Value:
    rows, columns = shape_of(x)
    if not isinstance(rows, int) or not isinstance(columns, int):
        e.fail("the trace of a matrix of symbolic size")
    mask = e.constant(torch.eye(rows, columns, dtype=e.out_dtype))
    return e.op("ReduceSum", e.op("Mul", e.operand(x, e.out_dtype), mask), keepdims=0)


@emits("diag_embed")
def _diag_embed(e: Emitter, x: Any, offset: int = 0, a: int = -2, b: int = -1) -> Value:
    rank, shape = len(shape_of(x)) + 1, e.out_shape
    a, b = a % rank, b % rank
    size = shape[a]
    if not isinstance(size, int):
        e.fail("diag_embed of a symbolic size")
    value: Any = x
    if offset:  # then fewer elements than rows
        sides = [max(-offset, 0), max(offset, 0)]
        value = e.op("Pad", value, [*[0] * (rank - 2), sides[0], *[0] * (rank - 2), sides[1]])
    # row i holds its element in column i + offset
    mask = e.constant(torch.eye(size, dtype=e.out_dtype).roll(offset, 1))
    spread = e.op("Mul", e.op("Unsqueeze", value, [-1]), mask)
    rest = iter(range(rank - 2))
    perm = [rank - 2 if d == a else rank - 1 if d == b else next(rest) for d in range(rank)]
    return spread if perm == list(range(rank)) else e.op("Transpose", spread, perm=perm)


@emits("unfold", moves=True)
def _unfold(e: Emitter, x: Any, dim: int, size: int, step: int) -> Value:
    shape = shape_of(x)
    if not shape:
        return e.op("Reshape", x, [1])
    if isinstance(shape[dim], int):
        count = (shape[dim] - size) // step + 1
        grid = np.arange(count)[:, None] * step + np.arange(size)[None, :]
        windows: Value = e.constant(grid.astype(np.int64))
    else:
        limit = e.op("Sub", e.number_of_size(x, dim), e.number(size - 1, torch.int64))
        starts = e.op("Range", e.number(0, torch.int64), limit, e.number(step, torch.int64))
        windows = e.op("Add", e.op("Unsqueeze", starts, [1]), e.constant(np.arange(size)))
    picked = e.op("Gather", x, windows, axis=dim)
    rank = len(shape)
    if dim == rank - 1:
        return picked
    return e.op("Transpose", picked, perm=[*range(dim + 1), *range(dim + 2, rank + 1), dim + 1])


@emits("as_strided", moves=True)
def _as_strided(
    e: Emitter, x: Any, size: list[Any], stride: list[Any], offset: Any = None
) -> Value:
    fake = x.meta["val"]
    numbers = [*size, *stride, offset or 0, *fake.shape]
    if not all(isinstance(n, int) for n in numbers) or not fake.is_contiguous():
        e.fail("as_strided over a tensor of symbolic size or unknown layout")
    places = np.full([1] * len(size), offset or 0, dtype=np.int64)
    for axis, (count, width) in enumerate(zip(size, stride, strict=True)):
        shape = [count if d == axis else 1 for d in range(len(size))]
        places = places + (np.arange(count) * width).reshape(shape)
    return e.op("Gather", e.op("Reshape", x, [-1]), e.constant(places), axis=0)


@emits("im2col")
def _im2col(
    e: Emitter,
    x: Any,
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Value:
    """Gather rows, then columns: [N, C, kh, oh, kw, ow], and bring the windows together."""
    shape = shape_of(x)
    if not all(isinstance(size, int) for size in shape[-2:]):
        e.fail("im2col over symbolic spatial sizes")
    value: Any = x if len(shape) == 4 else e.op("Unsqueeze", x, [0])
    ph, pw = padding
    if ph or pw:
        value = e.op("Pad", value, [0, 0, ph, pw, 0, 0, ph, pw])
    count = 1
    for axis, place in ((0, 2), (1, 4)):
        size = shape[axis - 2] + 2 * padding[axis]
        n = (size - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        rows = np.arange(kernel[axis])[:, None] * dilation[axis]
        grid = rows + np.arange(n)[None, :] * stride[axis]
        value = e.op("Gather", value, e.constant(grid.astype(np.int64)), axis=place)
        count *= n
    value = e.op("Transpose", value, perm=[0, 1, 2, 4, 3, 5])
    channels = e.out_shape[-2]
    lead = [0] if len(shape) == 4 else []
    return e.op("Reshape", value, [*lead, channels if isinstance(channels, int) else -1, count])


@emits("col2im")
def _col2im(
    e: Emitter,
    x: Any,
    output_size: list[int],
    kernel: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> Value:
    single = len(shape_of(x)) == 2
    value = e.op("Unsqueeze", x, [0]) if single else x
    folded = e.op(
        "Col2Im",
        value,
        list(output_size),
        list(kernel),
        dilations=list(dilation),
        pads=[*padding, *padding],
        strides=list(stride),
    )
    return e.op("Squeeze", folded, [0]) if single else folded
