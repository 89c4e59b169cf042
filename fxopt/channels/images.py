"""Between channels and places: pixel shuffles, channel shuffles, and windows."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.moves import at
from fxopt.shapes import shape_of

aten = torch.ops.aten


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
    return at(along, 1, np.ascontiguousarray(ids.reshape(sizes).T).reshape(-1))


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
    return (*at(along, dim, None), None)
