"""Calls that treat every element alike: identities that meet are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.groups import Role
from fxopt.channels.partition import Ids
from fxopt.shapes import is_one, is_tensor, rank_of, shape_of

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
    tensors = [one for one in node.all_input_nodes if is_tensor(one)]
    return broadcast(follow, node, *((shape_of(one), follow.of(one)) for one in tensors))


@follows(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
    aten.to.dtype, aten.to.device, aten.to.other, aten.full_like.default,
)  # fmt: skip
def _same(follow: Follower, node: fx.Node) -> Along:
    """The first operand, element by element."""
    return follow.of(arguments(node)[0])


def broadcast(follow: Follower, node: fx.Node, *operands: tuple[Sequence[Any], Along]) -> Along:
    """Unite what stands along dimensions that meet, from the last one on.

    Each operand is its sizes and what stands along them. One of size 1 is repeated to meet others.
    """
    rank = max((len(along) for _, along in operands), default=0)
    found: list[Ids | None] = []
    for back in range(rank, 0, -1):
        meeting = [(sizes[-back], along[-back]) for sizes, along in operands if back <= len(along)]
        wide = [ids for size, ids in meeting if not is_one(size)]
        found.append(follow.join(node, *wide))
    return tuple(found)


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
