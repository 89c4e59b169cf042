"""Norms, softmax, pools and other reductions: over channels they hold them, over places not."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.groups import Role
from fxopt.channels.partition import Ids
from fxopt.cost.call import Call, operator_name
from fxopt.shapes import shape_of

aten = torch.ops.aten


@follows(aten.batch_norm.default, aten.instance_norm.default)
def _per_channel_norm(follow: Follower, node: fx.Node) -> Along:
    x, *coefficients = arguments(node)[:5]
    along = list(follow.of(x))
    roles = (Role.SCALE, Role.SHIFT, Role.STATISTIC, Role.STATISTIC)
    for one, role in zip(coefficients, roles, strict=True):
        if one is not None:
            ids = follow.of(one)[0]
            follow.mark(ids, role, weight=one)
            along[1] = follow.join(node, along[1], ids)
    if node.target is aten.instance_norm.default:
        for ids in along[2:]:
            follow.reduce(node, ids, "an instance norm reduces over them")
    elif arguments(node)[5]:
        for ids in (along[0], *along[2:]):
            follow.reduce(node, ids, "a batch norm in training reduces over them")
    return tuple(along)


@follows(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(follow: Follower, node: fx.Node) -> Along:
    x, shape, *coefficients = arguments(node)[:4]
    along = list(follow.of(x))
    start = len(along) - len(shape)
    tensors = [one for one in coefficients if isinstance(one, fx.Node)]
    for offset in range(len(shape)):
        for one, role in zip(tensors, (Role.SCALE, Role.SHIFT), strict=False):
            ids = follow.of(one)[offset]
            follow.mark(ids, role, weight=one)
            along[start + offset] = follow.join(node, along[start + offset], ids)
        follow.reduce(node, along[start + offset], "a layer norm reduces over them")
    return tuple(along)


@follows(aten.group_norm.default)
def _group_norm(follow: Follower, node: fx.Node) -> Along:
    """Whole groups may go: each is normalised by itself."""
    x, groups, *coefficients = arguments(node)[:4]
    along = list(follow.of(x))
    for one, role in zip(coefficients, (Role.SCALE, Role.SHIFT), strict=True):
        if one is not None:
            assert isinstance(one, fx.Node)
            ids = follow.of(one)[0]
            follow.mark(ids, role, weight=one)
            along[1] = follow.join(node, along[1], ids)
    width = shape_of(x)[1] // groups
    if along[1] is not None and width > 1:
        _norm_groups(follow, node, along[1], groups, width)
    for ids in along[2:]:
        follow.reduce(node, ids, "a group norm reduces over them")
    return tuple(along)


def _norm_groups(follow: Follower, node: fx.Node, ids: Ids, groups: int, width: int) -> None:
    if groups == 1:
        follow.reduce(node, ids, "a group norm reduces over them")
    elif follow.reduced:
        axis, _ = follow.split(node, "groups", ids, (groups, width))
        if axis == 1:
            follow.reduce(node, ids, "a group norm reduces over them")
    else:
        whole = follow.unite_across(ids, (groups, width), 0)
        follow.note_site(node, "groups", (groups, width), (0,), 0, whole)


@follows(aten.softmax.int, aten.log_softmax.int, aten.cumsum.default, aten.cumprod.default)
def _along_one(follow: Follower, node: fx.Node) -> Along:
    x, dim = arguments(node)[:2]
    along = follow.of(x)
    text = f"a {operator_name(node.target)} over them is another function without some of them"
    follow.freeze(node, along[dim] if along else None, text)
    return along


@follows(
    aten.mean.dim, aten.mean.default, aten.var.correction, aten.std.correction, aten.var.dim,
    aten.std.dim, aten.var.default, aten.std.default,
)  # fmt: skip
def _mean(follow: Follower, node: fx.Node) -> Along:
    """A mean divides by how many there are."""
    return _reduced(follow, node, "a {} over them is another function without some", True)


@follows(
    aten.amax.default, aten.amin.default, aten.prod.dim_int, aten.logsumexp.default,
    aten.linalg_vector_norm.default, aten.any.dim, aten.all.dim, aten.argmax.default,
    aten.argmin.default, aten.max.default, aten.min.default, aten.prod.default,
)  # fmt: skip
def _extremes(follow: Follower, node: fx.Node) -> Along:
    return _reduced(follow, node, "{} over them is another function without some", False)


@follows(
    aten.sort.default, aten.sort.stable, aten.topk.default, aten.cummax.default,
    aten.cummin.default, aten.argsort.default, aten.argsort.stable,
)  # fmt: skip
def _ordered(follow: Follower, node: fx.Node) -> Any:
    """Values (and their places) in another order along one dimension."""
    along, dim = follow.of(arguments(node)[0]), Call(node)["dim"]
    follow.freeze(node, along[dim], f"{operator_name(node.target)} over them needs all of them")
    kept = (*along[:dim], None, *along[dim + 1 :])
    value = node.meta["val"]
    return kept if isinstance(value, torch.Tensor) else [kept] * len(value)


@follows(aten.max.dim, aten.min.dim)
def _extreme_and_place(follow: Follower, node: fx.Node) -> list[Along]:
    return [_reduced(follow, node, "{} over them is another function without some", False)] * 2


def _reduced(follow: Follower, node: fx.Node, text: str, may_be_approximate: bool) -> Along:
    """Drop the dimensions that are reduced, or leave size 1 in their places."""
    along, dims = follow.of(arguments(node)[0]), Call(node)["dim"]
    text = text.format(operator_name(node.target))
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(along)))
    for dim in dims:
        if may_be_approximate:
            follow.reduce(node, along[dim], text)
        else:
            follow.freeze(node, along[dim], text)
    value = node.meta["val"]
    result = value[0] if isinstance(value, (list, tuple)) else value
    if result.dim() == len(along):
        return tuple(None if dim in dims else ids for dim, ids in enumerate(along))
    return tuple(ids for dim, ids in enumerate(along) if dim not in dims)


def _over_places(dims: int) -> Any:
    """Return what a call does that looks at the last dimensions alone."""

    def follow_places(follow: Follower, node: fx.Node) -> Any:
        along = follow.of(arguments(node)[0])
        for ids in along[len(along) - dims :]:
            follow.freeze(node, ids, "they are places that a pool or a resize reads together")
        kept = (*along[: len(along) - dims], *[None] * dims)
        value = node.meta["val"]
        return [kept] * len(value) if isinstance(value, (list, tuple)) else kept

    return follow_places


for _dims, _names in {
    1: (
        "max_pool1d.default", "avg_pool1d.default", "adaptive_avg_pool1d.default",
        "adaptive_max_pool1d.default", "max_pool1d_with_indices.default", "upsample_linear1d.vec",
        "upsample_nearest1d.vec", "upsample_linear1d.default", "upsample_nearest1d.default",
    ),
    2: (
        "max_pool2d.default", "avg_pool2d.default", "adaptive_avg_pool2d.default",
        "adaptive_max_pool2d.default", "max_pool2d_with_indices.default", "upsample_bilinear2d.vec",
        "upsample_nearest2d.vec", "upsample_bicubic2d.vec", "upsample_bilinear2d.default",
        "upsample_nearest2d.default", "upsample_bicubic2d.default", "_upsample_bilinear2d_aa.vec",
        "_upsample_bicubic2d_aa.vec", "_upsample_nearest_exact2d.vec",
    ),
    3: (
        "max_pool3d.default", "avg_pool3d.default", "adaptive_avg_pool3d.default",
        "adaptive_max_pool3d.default", "upsample_trilinear3d.vec", "upsample_nearest3d.vec",
    ),
}.items():  # fmt: skip
    for _name in _names:
        _packet, _, _overload = _name.partition(".")
        follows(getattr(getattr(aten, _packet), _overload))(_over_places(_dims))


@follows(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def _grid_sample(follow: Follower, node: fx.Node) -> Along:
    x, grid = arguments(node)[:2]
    along = follow.of(x)
    for ids in (*along[2:], *follow.of(grid)):
        follow.freeze(node, ids, "they are places that a grid sample reads")
    return (along[0], along[1], *[None] * (len(along) - 2))
