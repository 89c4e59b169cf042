"""Calls that treat every element alike: identities that meet are one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.groups import Role
from fxopt.shapes import is_tensor, rank_of, shape_of

aten = torch.ops.aten


_UNTAGGED = (  # element by element, though PyTorch does not say so
    aten.hardswish.default, aten.log_sigmoid.default, aten.rsub.Tensor, aten.masked_fill.Tensor,
    aten.floor_divide.default, aten.fill.Scalar,
    aten.fake_quantize_per_tensor_affine.default, aten.complex.default, aten.real.default,
    aten.imag.default, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar,
)  # fmt: skip


@follows("pointwise", *_UNTAGGED)
def _pointwise(follow: Follower, node: fx.Node) -> Along:
    """Operands broadcast against one another, from the last dimension on."""
    return broadcast(follow, node, [n for n in node.all_input_nodes if is_tensor(n)])


@follows(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.to.dtype, aten.to.device, aten.to.other, aten.full_like.default,
)  # fmt: skip
def _same(follow: Follower, node: fx.Node) -> Along:
    """The first operand, element by element."""
    return follow.of(arguments(node)[0])


def broadcast(follow: Follower, node: fx.Node, operands: list[Any]) -> Along:
    """Unite what stands along the dimensions that broadcast against one another."""
    shape = shape_of(node)
    joined = []
    for dim, size in enumerate(shape):
        meeting = []
        for operand in operands:
            own = dim - len(shape) + rank_of(operand)
            if own >= 0 and not _is_spread(shape_of(operand)[own], size):
                meeting.append(follow.of(operand)[own])
        joined.append(follow.join(node, *meeting))
    return tuple(joined)


def _is_spread(own: Any, size: Any) -> bool:
    """Whether a dimension of size 1 is repeated to meet a larger one."""
    return isinstance(own, int) and own == 1 and not (isinstance(size, int) and size == 1)


@follows(aten.prelu.default)
def _prelu(follow: Follower, node: fx.Node) -> Along:
    x, slope = arguments(node)
    along = list(follow.of(x))
    channel = min(1, len(along) - 1)
    ids = follow.of(slope)[0] if rank_of(slope) else None
    if ids is not None:
        along[channel] = follow.join(node, along[channel], ids)
        follow.mark(ids, Role.SCALE, weight=slope)
    return tuple(along)


@follows(aten.glu.default)
def _glu(follow: Follower, node: fx.Node) -> Along:
    """glu(x) = a · σ(b), where a and b are the halves of x along a dimension."""
    x, dim = arguments(node)
    along = list(follow.of(x))
    ids = along[dim]
    if ids is not None:
        half = len(ids) // 2
        along[dim] = follow.join(node, ids[:half], ids[half:]) if half > 1 else None
        if half == 1:
            follow.freeze(node, ids, "one channel must stay")
    return tuple(along)
