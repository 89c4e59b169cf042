"""Rearranging tensors: reshape, permute, expand, join, split, repeat, flip, roll."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.backends.onnx.describe import plain, shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are provably equal."""
    a, b = plain(a), plain(b)
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return bool(a.node.expr == b.node.expr)


def reshape(e: Emitter, value: Any, shape: list[Any], source: list[Any]) -> Value:
    """Reshape to `shape` (sizes, symbolic ones as SymInt) from a tensor of the sizes `source`.

    One unknown size is written −1; one that stands at the same place in the source is written 0;
    only where that does not suffice are sizes computed.
    """
    shape = [plain(size) for size in shape]
    if all(isinstance(size, int) for size in shape):
        return e.op("Reshape", value, shape, allowzero=1 if 0 in shape else None)
    if 0 not in shape:
        kept = [
            0
            if axis < len(source) and not isinstance(size, int) and same_size(size, source[axis])
            else size
            for axis, size in enumerate(shape)
        ]
        unknown = [axis for axis, size in enumerate(kept) if not isinstance(size, int)]
        if len(unknown) <= 1:
            return e.op(
                "Reshape", value, [-1 if axis in unknown else s for axis, s in enumerate(kept)]
            )
    return e.op("Reshape", value, e.sizes(shape), allowzero=1 if 0 in shape else None)


@emits(
    "reshape",
    "view",
    "_unsafe_view",
    "reshape_as",
    "view_as",
    "flatten.using_ints",
    "unflatten.int",
    "ravel",
    "atleast_1d",
    "atleast_2d",
    moves=True,
)
def _reshape(e: Emitter, x: Any, *rest: Any, **named: Any) -> Value:
    shape = e.out_shape
    given = rest[0] if rest else None
    if isinstance(given, (list, tuple)) and any(isinstance(size, fx.Node) for size in given):
        # a size that only a node knows (read from data) is taken from that node
        nodes = {a: g for a, g in enumerate(given) if isinstance(g, fx.Node)}
        unknown = [a for a, size in enumerate(shape) if not isinstance(size, int)]
        if len(unknown) > 1 and not _spelled(shape, shape_of(x)):
            sizes = [nodes.get(a, size if size != -1 else -1) for a, size in enumerate(given)]
            return e.op("Reshape", x, sizes)
    return reshape(e, x, shape, shape_of(x))


def _spelled(shape: list[Any], source: list[Any]) -> bool:
    """Whether all but one of the unknown sizes stand at the same place in the source."""
    unknown = [
        axis
        for axis, size in enumerate(shape)
        if not isinstance(size, int) and not (axis < len(source) and same_size(size, source[axis]))
    ]
    return len(unknown) <= 1 and 0 not in shape


@emits("squeeze.default", "squeeze.dim", "squeeze.dims", moves=True)
def _squeeze(e: Emitter, x: Any, dims: Any = None) -> Value:
    rank = len(shape_of(x))
    wanted = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    axes = [d % max(rank, 1) for d in wanted]
    axes = [d for d in axes if rank and shape_of(x)[d] == 1]
    return e.op("Squeeze", x, axes) if axes else e.value(x)


@emits("unsqueeze", moves=True)
def _unsqueeze(e: Emitter, x: Any, dim: int) -> Value:
    return e.op("Unsqueeze", x, [dim])


@emits("permute", moves=True)
def _permute(e: Emitter, x: Any, dims: list[int]) -> Value:
    if list(dims) == list(range(len(dims))):
        return e.value(x)
    return e.op("Transpose", x, perm=list(dims))


@emits("transpose.int", "swapaxes", "swapdims", moves=True)
def _transpose(e: Emitter, x: Any, a: int, b: int) -> Value:
    perm = list(range(len(shape_of(x))))
    if not perm:
        return e.value(x)
    perm[a], perm[b] = perm[b], perm[a]
    return e.op("Transpose", x, perm=perm)


@emits("t", "mT", "numpy_T", "adjoint", "mH", moves=True)
def _matrix_transpose(e: Emitter, x: Any) -> Value:
    perm = list(range(len(shape_of(x))))
    perm[-2:] = reversed(perm[-2:])
    return e.op("Transpose", x, perm=perm) if len(perm) > 1 else e.value(x)


@emits("movedim.int", "movedim.intlist", moves=True)
def _movedim(e: Emitter, x: Any, source: Any, target: Any) -> Value:
    rank = len(shape_of(x))
    sources = [d % rank for d in ([source] if isinstance(source, int) else source)]
    targets = [d % rank for d in ([target] if isinstance(target, int) else target)]
    rest = iter(d for d in range(rank) if d not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return e.op(
        "Transpose", x, perm=[placed[d] if d in placed else next(rest) for d in range(rank)]
    )


@emits("expand", "expand_as", "broadcast_to")
def _expand(e: Emitter, x: Any, *rest: Any, **named: Any) -> Value:
    shape, source = e.out_shape, shape_of(x)
    if len(shape) == len(source) and all(map(same_size, shape, source)):
        return e.value(x)
    lead = len(shape) - len(source)
    # Expand broadcasts both ways, so a size that stays may be written 1
    sizes = [
        1 if axis >= lead and same_size(size, source[axis - lead]) else size
        for axis, size in enumerate(shape)
    ]
    given = rest[0] if rest and isinstance(rest[0], (list, tuple)) else ()
    for axis, item in enumerate(given):
        if isinstance(item, fx.Node) and sizes[axis] != 1:
            sizes[axis] = item
    return e.op("Expand", x, sizes)


@emits("cat", moves=True)
def _cat(e: Emitter, tensors: list[Any], dim: int = 0) -> Value:
    rank = len(e.out_shape)
    dtype = e.node.meta["val"].dtype
    # PyTorch lets an empty vector stand among tensors of any rank
    parts = [x for x in tensors if len(shape_of(x)) == rank]
    values = [e.cast(e.value(x), x.meta["val"].dtype, dtype) for x in parts]
    return values[0] if len(values) == 1 else e.op("Concat", *values, axis=dim)


@emits("stack", moves=True)
def _stack(e: Emitter, tensors: list[Any], dim: int = 0) -> Value:
    dtype = e.node.meta["val"].dtype
    values = [e.cast(e.value(x), x.meta["val"].dtype, dtype) for x in tensors]
    values = [e.op("Unsqueeze", value, [dim]) for value in values]
    return values[0] if len(values) == 1 else e.op("Concat", *values, axis=dim)


@emits("split_with_sizes", "split_with_sizes_copy", moves=True)
def _split_with_sizes(e: Emitter, x: Any, sizes: list[Any], dim: int = 0) -> list[Value]:
    if len(sizes) == 1:
        return [e.value(x)]
    return list(e.ops("Split", x, sizes, outputs=len(sizes), axis=dim))


@emits("split.Tensor", "chunk", "tensor_split.sections", "tensor_split.indices", moves=True)
def _split(e: Emitter, x: Any, rule: Any, dim: int = 0) -> list[Value]:
    """The sizes of the parts are known from the recorded shapes, but for symbolic ones."""
    parts = [shape_of_fake(fake)[dim] for fake in e.node.meta["val"]]
    if len(parts) == 1:
        return [e.value(x)]
    if all(isinstance(part, int) for part in parts):
        return list(e.ops("Split", x, parts, outputs=len(parts), axis=dim))
    return _split_symbolic(e, x, parts, dim)


def _split_symbolic(e: Emitter, x: Any, parts: list[Any], dim: int) -> list[Value]:
    """All parts but the last have one size, ⌈n / parts⌉ (the number of parts is fixed)."""
    if all(isinstance(part, int) for part in parts[:-1]):
        width = e.sizes([parts[0]])
    else:
        count = e.sizes([len(parts)])
        total = e.op("Add", e.size_value(x, dim), e.sizes([len(parts) - 1]))
        width = e.op("Div", total, count)
    found = []
    for index in range(len(parts)):
        start = e.op("Mul", width, e.sizes([index]))
        last = index == len(parts) - 1
        end = e.sizes([2**63 - 1]) if last else e.op("Mul", width, e.sizes([index + 1]))
        found.append(e.op("Slice", x, start, end, [dim]))
    return found


def shape_of_fake(fake: torch.Tensor) -> list[Any]:
    """Return the sizes of a fake tensor, known ones as integers."""
    return [plain(size) for size in fake.shape]


@emits("unbind.int", moves=True)
def _unbind(e: Emitter, x: Any, dim: int = 0) -> list[Value]:
    count = len(e.node.meta["val"])
    if count == 1:
        return [e.op("Squeeze", x, [dim])]
    parts = e.ops("Split", x, outputs=count, axis=dim, num_outputs=count)
    return [e.op("Squeeze", part, [dim]) for part in parts]


@emits("repeat", "tile")
def _repeat(e: Emitter, x: Any, repeats: list[Any]) -> Value:
    rank, value = len(shape_of(x)), e.value(x)
    if len(repeats) > rank:
        value = e.op("Unsqueeze", value, list(range(len(repeats) - rank)))
    counts = [1] * (rank - len(repeats)) + list(repeats)
    if all(isinstance(count, int) and count == 1 for count in counts):
        return value
    return e.op("Tile", value, counts)


@emits("repeat_interleave.self_int")
def _repeat_interleave(
    e: Emitter, x: Any, repeats: Any, dim: int | None = None, *, output_size: Any = None
) -> Value:
    source = shape_of(x)
    value = e.value(x)
    if dim is None:
        value, dim, source = e.op("Reshape", value, [-1]), 0, [0]
    rank = len(source)
    value = e.op("Unsqueeze", value, [dim + 1])
    value = e.op("Expand", value, [repeats if axis == dim + 1 else 1 for axis in range(rank + 1)])
    sizes = [-1 if axis == dim else 0 for axis in range(rank)]
    if rank - dim == 1:  # what is joined is the end
        return e.op("Reshape", value, sizes)
    return reshape(e, value, e.out_shape, source)


@emits("flip", moves=True)
def _flip(e: Emitter, x: Any, dims: list[int]) -> Value:
    if not dims or not shape_of(x):
        return e.value(x)
    count = len(dims)
    return e.op("Slice", x, [-1] * count, [-(2**63)] * count, list(dims), [-1] * count)


@emits("roll", moves=True)
def _roll(e: Emitter, x: Any, shifts: list[Any], dims: list[int]) -> Value:
    value: Any = x
    if not dims:
        value = e.op("Reshape", x, [-1])
        sizes, axes = [_product(shape_of(x))], [0]
    else:
        sizes, axes = [shape_of(x)[d] for d in dims], list(dims)
    for shift, size, axis in zip(shifts, sizes, axes, strict=True):
        if isinstance(size, int) and isinstance(shift, int):
            shift = shift % size if size else 0
            if not shift:
                continue
            cut = size - shift
            left, right = e.ops("Split", value, [cut, shift], outputs=2, axis=axis)
        elif isinstance(shift, int):  # a Slice counts negative positions from the end
            left = e.op("Slice", value, [0], [-shift], [axis])
            right = e.op("Slice", value, [-shift], [2**63 - 1], [axis])
        else:
            e.fail("a roll by a symbolic number")
        value = e.op("Concat", right, left, axis=axis)
    if not dims:
        return reshape(e, value, shape_of(x), [0])
    return e.value(value)


def _product(sizes: list[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return plain(total)


@emits("meshgrid.indexing", "meshgrid")
def _meshgrid(e: Emitter, tensors: list[Any], *, indexing: str = "ij") -> list[Value]:
    count = len(tensors)
    swap = indexing == "xy" and count > 1
    shapes = e.node.meta["val"]
    sizes = [e.size_value(x, 0) if shape_of(x) else e.sizes([1]) for x in tensors]
    order = [1, 0, *range(2, count)] if swap else list(range(count))
    target = e.sizes(
        [
            sizes[i]
            if not isinstance(plain(shapes[0].shape[a]), int)
            else plain(shapes[0].shape[a])
            for a, i in enumerate(order)
        ]
    )
    found = []
    for index, x in enumerate(tensors):
        shape = [-1 if order[axis] == index else 1 for axis in range(count)]
        found.append(e.op("Expand", e.op("Reshape", x, shape), target))
    return found


@emits("pixel_shuffle")
def _pixel_shuffle(e: Emitter, x: Any, factor: int) -> Value:
    return _blocks(e, x, "DepthToSpace", factor)


def _blocks(e: Emitter, x: Any, op_type: str, factor: int) -> Value:
    source = shape_of(x)
    if len(source) == 4:
        return e.op(op_type, x, blocksize=factor, mode="CRD" if op_type == "DepthToSpace" else None)
    value = reshape(e, x, [_product(source[:-3]), *source[-3:]], source)
    value = e.op(
        op_type, value, blocksize=factor, mode="CRD" if op_type == "DepthToSpace" else None
    )
    return reshape(e, value, e.out_shape, [])


@emits("pixel_unshuffle")
def _pixel_unshuffle(e: Emitter, x: Any, factor: int) -> Value:
    source, out = shape_of(x), e.out_shape
    lead, (channels, height, width) = source[:-3], source[-3:]
    if channels == 1:  # else ONNX puts the block in front of the channels, and PyTorch behind them
        return _blocks(e, x, "SpaceToDepth", factor)
    split = [*lead, channels, height // factor, factor, width // factor, factor]
    value = reshape(e, x, split, source)
    n = len(lead)
    value = e.op("Transpose", value, perm=[*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return reshape(e, value, out, source[:n])


@emits("channel_shuffle", "native_channel_shuffle", moves=True)
def _channel_shuffle(e: Emitter, x: Any, groups: int) -> Value:
    source = shape_of(x)
    split = [source[0], groups, source[1] // groups, *source[2:]]
    value = reshape(e, x, split, source)
    value = e.op("Transpose", value, perm=[0, 2, 1, *range(3, len(split))])
    return reshape(e, value, source, split)
