"""Data movement: identities go where the call takes them.

A call that moves along one dimension is run on the vector of identities itself. A reshape is cut
into blocks of dimensions that cover the same elements; within a block, the grid of identities is
reshaped as the tensor is, and read off again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.partition import Ids
from fxopt.graph_module import GraphModule
from fxopt.shapes import is_one, is_tensor, rank_of, shape_of

aten = torch.ops.aten


def _at(along: Along, dim: int, ids: Ids | None) -> Along:
    """Return the dimensions with another vector along one of them."""
    return (*along[:dim], ids, *along[dim + 1 :])


def _moved(
    follow: Follower, node: fx.Node, dim: Any, move: Callable[[torch.Tensor], torch.Tensor]
) -> Along:
    """Run a call on the vector along one dimension."""
    along = follow.of(arguments(node)[0])
    ids = along[dim]
    if ids is None:
        return along
    found = move(torch.from_numpy(ids)).numpy()
    if len(found) == 1:
        follow.freeze(node, found, "the only one that is taken has to stay")
        return _at(along, dim, None)
    return _at(along, dim, found)


# -- order of dimensions, dimensions of size 1 -------------------------------------------------


@follows(aten.permute.default)
def _permute(follow: Follower, node: fx.Node) -> Along:
    x, dims = arguments(node)
    along = follow.of(x)
    return tuple(along[dim] for dim in dims)


@follows(aten.unsqueeze.default)
def _unsqueeze(follow: Follower, node: fx.Node) -> Along:
    x, dim = arguments(node)
    along = follow.of(x)
    return (*along[:dim], None, *along[dim:])


@follows(aten.squeeze.dims)
def _squeeze(follow: Follower, node: fx.Node) -> Along:
    x, dims = arguments(node)
    return tuple(ids for dim, ids in enumerate(follow.of(x)) if dim not in dims)


# -- along one dimension -----------------------------------------------------------------------


@follows(aten.slice.Tensor)
def _slice(follow: Follower, node: fx.Node) -> Along:
    _, dim, start, end, step = arguments(node)
    along = follow.of(arguments(node)[0])
    if not all(isinstance(one, int) for one in (start, end, step)):
        follow.freeze(node, along[dim], "a slice takes a number of them that the inputs decide")
        return _at(along, dim, None)
    return _moved(follow, node, dim, lambda ids: ids[start:end:step])


@follows(aten.select.int)
def _select(follow: Follower, node: fx.Node) -> Along:
    x, dim, index = arguments(node)
    along = follow.of(x)
    ids = along[dim]
    if ids is not None:
        taken = ids[index : index + 1] if isinstance(index, int) else ids
        follow.freeze(node, taken, "one of them is taken by its place")
    return (*along[:dim], *along[dim + 1 :])


@follows(aten.unbind.int)
def _unbind(follow: Follower, node: fx.Node) -> list[Along]:
    x, dim = arguments(node)
    along = follow.of(x)
    follow.freeze(node, along[dim], "each of them is taken by its place")
    return [(*along[:dim], *along[dim + 1 :])] * len(node.meta["val"])


@follows(aten.flip.default)
def _flip(follow: Follower, node: fx.Node) -> Along:
    along = follow.of(arguments(node)[0])
    dims: Any = arguments(node)[1]
    return tuple(
        ids if ids is None or dim not in dims else ids[::-1].copy()
        for dim, ids in enumerate(along)
    )


@follows(aten.roll.default)
def _roll(follow: Follower, node: fx.Node) -> Along:
    x, shifts, dims = arguments(node)
    along = list(follow.of(x))
    if not dims:
        return follow.unknown(node, "a roll over all dimensions at once mixes them")
    for shift, dim in zip(shifts, dims, strict=True):
        ids = along[dim]
        if ids is not None:
            if isinstance(shift, int):
                along[dim] = np.roll(ids, shift)
            else:
                follow.freeze(node, ids, "a roll moves them by a number that the inputs decide")
    return tuple(along)


@follows(aten.split_with_sizes.default)
def _split(follow: Follower, node: fx.Node) -> list[Along]:
    x, sizes, dim = arguments(node)
    along = follow.of(x)
    ids = along[dim]
    if ids is None or not all(isinstance(size, int) for size in sizes):
        follow.freeze(node, ids, "a split takes a number of them that the inputs decide")
        return [_at(along, dim, None)] * len(sizes)
    ends = np.cumsum(sizes)
    found = []
    for part in np.split(ids, ends[:-1]):
        if len(part) == 1:
            follow.freeze(node, part, "it is the only channel of a part")
        found.append(_at(along, dim, part if len(part) > 1 else None))
    return found


@follows(operator.getitem)
def _getitem(follow: Follower, node: fx.Node) -> Along:
    values, index = arguments(node)
    picked = follow.along[values][index]
    assert isinstance(picked, tuple)
    return picked


@follows(aten.cat.default)
def _cat(follow: Follower, node: fx.Node) -> Along:
    parts: Any = [part for part in arguments(node)[0] if rank_of(part) == rank_of(node)]
    dim: Any = arguments(node)[1]
    alongs = [follow.of(part) for part in parts]
    found = [
        None if d == dim else follow.join(node, *[along[d] for along in alongs])
        for d in range(rank_of(node))
    ]
    if all(along[dim] is None for along in alongs):
        return tuple(found)
    if not isinstance(shape_of(node)[dim], int):
        for along in alongs:
            follow.freeze(node, along[dim], "they stand beside a dimension of unknown size")
        return tuple(found)
    found[dim] = np.concatenate([
        _or_frozen(follow, node, along[dim], shape_of(part)[dim])
        for part, along in zip(parts, alongs, strict=True)
    ])  # fmt: skip
    return tuple(found)


@follows(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(follow: Follower, node: fx.Node) -> Along:
    """x, with a part along one dimension written anew."""
    x, part, dim, *places = arguments(node)
    along, written = follow.of(x), list(follow.of(part))
    ids = along[dim]
    if not all(isinstance(place, int) for place in places):
        follow.freeze(node, ids, "a part is written whose place the inputs decide")
        ids = None
    if node.target is aten.select_scatter.default:
        if ids is not None:
            follow.freeze(node, ids[places[0] : places[0] + 1], "it is written by its place")
        written.insert(dim, None)
    elif ids is None or places[2] != 1:
        for one in (ids, written[dim]):
            follow.freeze(node, one, "some are written into others, by their places")
    else:
        follow.join(node, ids[slice(*places)], written[dim])
    joined = [
        ids if d == dim else follow.join(node, along[d], written[d]) for d in range(len(along))
    ]
    return tuple(joined)


def _or_frozen(follow: Follower, node: fx.Node, ids: Ids | None, size: int) -> Ids:
    """Return identities for a dimension; ones that may not go where it has none."""
    if ids is None:
        ids = follow.partition.fresh(size)
        follow.freeze(node, ids, "they stand for values from which nothing can go")
    return ids


@follows(aten.stack.default)
def _stack(follow: Follower, node: fx.Node) -> Along:
    parts: Any = arguments(node)[0]
    dim: Any = arguments(node)[1]
    alongs = [follow.of(part) for part in parts]
    joined = [follow.join(node, *[along[d] for along in alongs]) for d in range(len(alongs[0]))]
    return (*joined[:dim], None, *joined[dim:])


@follows(aten.pad.default)
def _pad(follow: Follower, node: fx.Node) -> Along:
    """Channels of padding are like any others: they may go with those that they meet."""
    x, pads, mode = arguments(node)[:3]
    along = list(follow.of(x))
    for pair in range(len(pads) // 2):
        dim = len(along) - 1 - pair
        before, after = pads[2 * pair : 2 * pair + 2]
        ids = along[dim]
        if before == 0 and after == 0 or ids is None:
            continue
        if mode != "constant" or not (isinstance(before, int) and isinstance(after, int)):
            follow.freeze(node, ids, "a padding reads some of them by their places")
            along[dim] = None
            continue
        ids = ids[max(-before, 0) : len(ids) - max(-after, 0)]
        new = follow.partition.fresh(max(before, 0)), follow.partition.fresh(max(after, 0))
        along[dim] = np.concatenate([new[0], ids, new[1]])
    return tuple(along)


# -- repetition, and values that are all alike -------------------------------------------------


@follows(aten.expand.default)
def _expand(follow: Follower, node: fx.Node) -> Along:
    """A dimension of size 1 that is repeated may have any size, so anything may go from it."""
    x = arguments(node)[0]
    along, shape = follow.of(x), shape_of(node)
    added = len(shape) - len(along)
    return tuple(
        along[dim - added]
        if dim >= added and not is_one(shape_of(x)[dim - added])
        else follow.fresh(size)
        for dim, size in enumerate(shape)
    )


@follows(aten.expand_as.default)
def _expand_as(follow: Follower, node: fx.Node) -> Along:
    x, other = arguments(node)
    along, like = follow.of(x), follow.of(other)
    added = len(like) - len(along)
    found = []
    for dim, ids in enumerate(like):
        own = dim - added
        if own >= 0 and not is_one(shape_of(x)[own]):
            found.append(follow.join(node, along[own], ids))
        else:
            found.append(ids)
    return tuple(found)


@follows(aten.full.default)
def _full(follow: Follower, node: fx.Node) -> Along:
    return tuple(map(follow.fresh, shape_of(node)))


@follows(aten.repeat.default)
def _repeat(follow: Follower, node: fx.Node) -> Along:
    x, times = arguments(node)
    along = follow.of(x)
    added = len(times) - len(along)
    found: list[Ids | None] = []
    for dim, (size, count) in enumerate(zip(shape_of(node), times, strict=True)):
        own = dim - added
        if own < 0 or is_one(shape_of(x)[own]):
            found.append(follow.fresh(size))
        elif (ids := along[own]) is None or count == 1:
            found.append(ids)
        elif isinstance(count, int):
            found.append(np.tile(ids, count))
        else:
            follow.freeze(node, ids, "they are repeated as often as the inputs decide")
            found.append(None)
    return tuple(found)


@follows(aten.repeat_interleave.self_int)
def _repeat_each(follow: Follower, node: fx.Node) -> Along:
    x, count, dim = arguments(node)[:3]
    along = follow.of(x)
    if not isinstance(dim, int) or not isinstance(count, int):
        return follow.unknown(node, "a repetition over all dimensions at once mixes them")
    if is_one(shape_of(x)[dim]):
        return _at(along, dim, follow.fresh(shape_of(node)[dim]))
    ids = along[dim]
    return along if ids is None else _at(along, dim, np.repeat(ids, count))


# -- picking by index --------------------------------------------------------------------------


@follows(aten.index_select.default)
def _index_select(follow: Follower, node: fx.Node) -> Along:
    x, dim, index = arguments(node)
    return _picked(follow, node, follow.of(x), dim, index)


@follows(aten.index.Tensor)
def _index(follow: Follower, node: fx.Node) -> Along:
    x, indices = arguments(node)
    along = follow.of(x)
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if len(given) == 1 and not _is_mask(indices[given[0]]):
        return _picked(follow, node, along, given[0], indices[given[0]])
    for dim in given:
        follow.freeze(node, along[dim], "they are picked by an index")
    if given != list(range(given[0], given[-1] + 1)) or any(_is_mask(indices[d]) for d in given):
        return follow.unknown(node, "it is not known how channels pass through this index")
    inner = rank_of(node) - (len(along) - len(given))
    return (*along[: given[0]], *[None] * inner, *along[given[-1] + 1 :])


def _is_mask(index: Any) -> bool:
    return is_tensor(index) and index.meta["val"].dtype in (torch.bool, torch.uint8)


def _picked(follow: Follower, node: fx.Node, along: Along, dim: Any, index: Any) -> Along:
    """Pick along one dimension: known places move identities, others freeze them."""
    ids, places = along[dim], known_indices(follow.graph, index)
    if ids is None:
        picked: Ids | None = None
    elif places is None or len(places) < 2:
        follow.freeze(node, ids, "they are picked by an index that is known only when it runs")
        picked = None
    else:
        picked = ids[places]
    inner = (None,) * rank_of(index) if picked is None else (picked,)
    return (*along[:dim], *inner, *along[dim + 1 :])


def known_indices(graph: GraphModule, index: Any) -> Ids | None:
    """Return the places of a one-dimensional index that is a constant; None where it is not."""
    source = index_source(index)
    if source is None or source.target in graph.info.mutated or rank_of(index) != 1:
        return None
    places = graph.value(source).detach()
    if places.dtype not in (torch.int64, torch.int32):
        return None
    return np.asarray(places.cpu().numpy(), np.int64)


def index_source(index: Any) -> fx.Node | None:
    """Return the constant that an index is, or is a copy of."""
    copies = (aten.clone.default, aten.alias.default, aten.contiguous.default, aten.detach.default)
    while isinstance(index, fx.Node) and index.target in copies:
        index = index.args[0]
    return index if isinstance(index, fx.Node) and index.op == "get_attr" else None


# -- reshapes ----------------------------------------------------------------------------------


@follows(
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
    aten.reshape_as.default,
)  # fmt: skip
def _reshape(follow: Follower, node: fx.Node) -> Along:
    x = arguments(node)[0]
    assert isinstance(x, fx.Node)
    along, before, after = follow.of(x), _hints(x), _hints(node)
    if before is None or after is None or 0 in before:
        return follow.unknown(node, "the sizes of a reshape are known only when it runs")
    if not _holds_for_all_sizes(x, node, before, after):
        return follow.unknown(node, "a reshape mixes them with a dimension of unknown size")
    found: list[Ids | None] = [None] * len(after)
    for number, (inner, outer) in enumerate(blocks(before, after)):
        tracked = [dim for dim in inner if along[dim] is not None]
        if not tracked:
            continue
        if len(inner) + len(outer) > 2 and not _is_static(x, node, inner, outer):
            for dim in tracked:
                text = "a reshape merges them with a dimension of unknown size"
                follow.freeze(node, along[dim], text)
            continue
        dim = _most_channels(follow, node, tracked, along)
        grid = _grid(along[dim], [before[d] for d in inner], inner.index(dim))
        grid = grid.reshape([after[d] for d in outer])
        axis, ids = _read_off(follow, node, f"block {number}", grid)
        if axis is not None and isinstance(shape_of(node)[outer[axis]], int):
            found[outer[axis]] = ids
        elif axis is not None:
            follow.freeze(node, ids, "a reshape merges them with a dimension of unknown size")
    return tuple(found)


def _grid(ids: Ids | None, sizes: list[int], axis: int) -> Ids:
    """Return a grid of these sizes that holds identities along one axis, repeated along others."""
    assert ids is not None
    spread = [size if place == axis else 1 for place, size in enumerate(sizes)]
    return np.ascontiguousarray(np.broadcast_to(ids.reshape(spread), sizes))


def blocks(before: list[int], after: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Cut two shapes into the shortest runs of dimensions that cover the same elements."""
    i, j = 0, 0
    while i < len(before) or j < len(after):
        inner: list[int] = []
        outer: list[int] = []
        a = b = 1
        while a != b or not (inner or outer):
            if (a <= b and i < len(before)) or j >= len(after):
                inner.append(i)
                a, i = a * before[i], i + 1
            else:
                outer.append(j)
                b, j = b * after[j], j + 1
        yield inner, outer


def _most_channels(follow: Follower, node: fx.Node, tracked: list[int], along: Along) -> int:
    """Of several dimensions that are merged, only that with the most channels may lose some."""

    def free(dim: int) -> int:
        ids = along[dim]
        assert ids is not None
        return len(np.unique(follow.partition.roots(ids[~follow.partition.is_frozen(ids)])))

    kept = max(tracked, key=free)
    for dim in tracked:
        if dim != kept:
            follow.freeze(node, along[dim], "a reshape merges them with channels of another kind")
    return kept


def _read_off(
    follow: Follower, node: fx.Node, place: str, grid: Ids
) -> tuple[int | None, Ids | None]:
    """Return along which axis of a grid its identities vary, and those along it.

    Where they vary along several, one is chosen, and they are tied along the others.
    """
    roots = follow.partition.roots(grid)
    varies = [axis for axis in range(grid.ndim) if _differs(roots, axis)]
    if not varies:
        follow.freeze(node, grid.reshape(-1), "they go together, and one has to stay")
        return None, None
    seen = grid[tuple(slice(None) if axis in varies else slice(1) for axis in range(grid.ndim))]
    if len(varies) == 1:
        return varies[0], np.ascontiguousarray(seen).reshape(-1)
    return follow.split(node, place, np.ascontiguousarray(seen).reshape(-1), seen.shape)


def _is_static(x: fx.Node, node: fx.Node, inner: list[int], outer: list[int]) -> bool:
    """Whether all sizes of a block are plain integers."""
    sizes = [shape_of(x)[d] for d in inner] + [shape_of(node)[d] for d in outer]
    return all(isinstance(size, int) for size in sizes)


def _holds_for_all_sizes(
    x: fx.Node, node: fx.Node, before: list[int], after: list[int]
) -> bool:
    """Whether the blocks of the example's sizes are those of any: their products are the same."""
    return all(
        sympy.expand(
            sympy.Mul(*(_expression(shape_of(x)[d]) for d in inner))
            - sympy.Mul(*(_expression(shape_of(node)[d]) for d in outer))
        )
        == 0
        for inner, outer in blocks(before, after)
        if not _is_static(x, node, inner, outer)
    )


def _expression(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _differs(roots: Ids, axis: int) -> bool:
    """Whether identities are not all alike along an axis."""
    first = roots.take([0], axis)
    return bool((roots != first).any())


def _hints(node: fx.Node) -> list[int] | None:
    """Return the sizes of the example; None where one depends on data."""
    found = []
    for size in shape_of(node):
        if isinstance(size, int):
            found.append(size)
        elif size.node.hint is not None:
            found.append(int(size.node.hint))
        else:
            return None
    return found


# -- between channels and places ---------------------------------------------------------------


@follows(aten.pixel_shuffle.default)
def _pixel_shuffle(follow: Follower, node: fx.Node) -> Along:
    """[c · r · r, h, w] → [c, h · r, w · r]"""
    x, factor = arguments(node)
    *batch, ids, _, _ = follow.of(x)
    for places in follow.of(x)[-2:]:
        follow.freeze(node, places, "they are places of an image")
    if ids is not None:
        channels = shape_of(node)[-3]
        square = int(factor) ** 2
        if channels > 1:
            ids = follow.unite_across(ids, (channels, square), 0)
        else:
            follow.freeze(node, ids, "together they are the one channel of an image")
            ids = None
    return (*batch, ids, None, None)


@follows(aten.pixel_unshuffle.default)
def _pixel_unshuffle(follow: Follower, node: fx.Node) -> Along:
    """[c, h · r, w · r] → [c · r · r, h, w]"""
    x, factor = arguments(node)
    *batch, ids, _, _ = follow.of(x)
    for places in follow.of(x)[-2:]:
        follow.freeze(node, places, "they are places of an image")
    square = int(factor) ** 2
    return (*batch, None if ids is None else np.repeat(ids, square), None, None)


@follows(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def _channel_shuffle(follow: Follower, node: fx.Node) -> Along:
    """[g · c, …] → [c · g, …]"""
    x, groups = arguments(node)
    along = follow.of(x)
    ids = along[1]
    if ids is None:
        return along
    sizes = (int(groups), len(ids) // int(groups))
    if min(sizes) > 1:
        follow.split(node, "shuffle", ids, sizes)
    return _at(along, 1, np.ascontiguousarray(ids.reshape(sizes).T).reshape(-1))


@follows(aten.im2col.default)
def _im2col(follow: Follower, node: fx.Node) -> Along:
    """[c, h, w] → [c · k · k, places]"""
    along, shape = follow.of(arguments(node)[0]), shape_of(node)
    for ids in along[-2:]:
        follow.freeze(node, ids, "they are places of an image")
    ids = along[-3]
    if ids is not None:
        ids = np.repeat(ids, shape[-2] // len(ids))
    return (*along[:-3], ids, None)


@follows(aten.col2im.default)
def _col2im(follow: Follower, node: fx.Node) -> Along:
    """[c · k · k, places] → [c, h, w]"""
    along, channels = follow.of(arguments(node)[0]), shape_of(node)[-3]
    follow.freeze(node, along[-1], "they are places of an image")
    ids = along[-2]
    if ids is not None:
        if channels > 1:
            ids = follow.unite_across(ids, (channels, len(ids) // channels), 0)
        else:
            follow.freeze(node, ids, "together they are the one channel of an image")
            ids = None
    return (*along[:-2], ids, None, None)


@follows(aten.unfold.default)
def _unfold(follow: Follower, node: fx.Node) -> Along:
    """Windows along one dimension, whose places become the last one."""
    x, dim = arguments(node)[:2]
    along = follow.of(x)
    follow.freeze(node, along[dim], "a window slides over them")
    return (*_at(along, dim, None), None)
