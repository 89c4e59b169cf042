"""Data movement: identities go where the call takes them.

A call that moves along one dimension is run on the vector of identities itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.partition import Ids
from fxopt.shapes import is_one, rank_of, shape_of

aten = torch.ops.aten


def at(along: Along, dim: int, ids: Ids | None) -> Along:
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
        return at(along, dim, None)
    return at(along, dim, found)


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
        return at(along, dim, None)
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
        return [at(along, dim, None)] * len(sizes)
    ends = np.cumsum(sizes)
    found = []
    for part in np.split(ids, ends[:-1]):
        if len(part) == 1:
            follow.freeze(node, part, "it is the only channel of a part")
        found.append(at(along, dim, part if len(part) > 1 else None))
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
        return at(along, dim, follow.fresh(shape_of(node)[dim]))
    ids = along[dim]
    return along if ids is None else at(along, dim, np.repeat(ids, count))
