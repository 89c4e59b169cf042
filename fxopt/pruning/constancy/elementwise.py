"""Calls that treat every element alike: run on what is known; and 0 times anything is 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.channels.follower import arguments
from fxopt.pruning.constancy.known import Constancy, Found, Known, call, evaluates, with_zeros
from fxopt.shapes import dtype_of, rank_of

aten = torch.ops.aten


@evaluates(
    "elementwise", aten.hardswish.default, aten.log_sigmoid.default, aten.rsub.Tensor,
    aten.copysign.Tensor, aten.ldexp.Tensor, aten.fake_quantize_per_tensor_affine.default,
    aten.to.dtype,
)  # fmt: skip
def elementwise(seen: Constancy, node: fx.Node) -> Found:
    """Run the call on what is known of all its tensors."""
    operands = {one: seen.of(one) for one in node.all_input_nodes}
    if not operands or None in operands.values():
        return None
    return _run(node, {one: known for one, known in operands.items() if known is not None})


def _run(node: fx.Node, operands: dict[fx.Node, Known]) -> Known:
    """Call an elementwise operator; known is where all operands are."""
    values = call(node, {one: found.values for one, found in operands.items()})
    known = torch.ones((), dtype=torch.bool, device=values.device)
    for found in operands.values():
        known = known & found.known.to(values.device)
    return Known(values, known.expand(values.shape).contiguous())


@evaluates(
    aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
)  # fmt: skip
def _same(seen: Constancy, node: fx.Node) -> Found:
    return seen.of(arguments(node)[0])


@evaluates(aten.dropout.default, aten.feature_dropout.default)
def _dropout(seen: Constancy, node: fx.Node) -> Found:
    """In training, some elements become 0 and the others are scaled: only 0 is sure to stay."""
    x, _, training = arguments(node)
    found = seen.of(x)
    return found if not training or found is None else Known(found.values, found.is_zero)


@evaluates(aten.mul.Tensor)
def _product(seen: Constancy, node: fx.Node) -> Found:
    """0 · x = 0, whatever x is."""
    whole = elementwise(seen, node)
    zero: Any = torch.zeros((), dtype=torch.bool)
    for factor in arguments(node)[:2]:
        found = seen.of(factor)
        if found is not None:
            zero = zero.to(found.known.device) | found.is_zero
        elif isinstance(factor, (int, float)) and factor == 0:
            zero = zero | True
    if whole is not None:
        zero = zero & ~(whole.known & ~torch.isfinite(whole.values))  # a constant is infinite
    return with_zeros(node, whole, zero)


@evaluates(aten.masked_fill.Scalar)
def _masked_fill(seen: Constancy, node: fx.Node) -> Found:
    """The number that is filled in, where the mask is known; or where it stood there before."""
    x, mask, value = arguments(node)
    found, where = seen.of(x), seen.of(mask)
    if not isinstance(value, (int, float)):
        return None
    if where is None:
        if found is None:
            return None
        return Known(found.values, found.known & (found.values == value))
    filled = where.known & where.values.bool()
    if found is None:
        return with_zeros(node, None, filled) if value == 0 else None
    values = torch.where(where.values.bool(), torch.full_like(found.values, value), found.values)
    known = filled | found.known & (where.known | (found.values == value))
    return Known(values, known)


@evaluates(aten.prelu.default)
def _prelu(seen: Constancy, node: fx.Node) -> Found:
    x, slope = seen.of(arguments(node)[0]), seen.of(arguments(node)[1])
    if x is None or slope is None:
        return None
    spread = [1] * x.values.dim()
    spread[min(1, len(spread) - 1)] = -1
    factor, known = slope.values.reshape(spread), slope.known.reshape(spread)
    values = torch.where(x.values >= 0, x.values, x.values * factor)
    return Known(values, x.known & ((x.values >= 0) | known))


@evaluates(aten.glu.default)
def _glu(seen: Constancy, node: fx.Node) -> Found:
    """a · σ(b), where a and b are the halves along a dimension; 0 where a is."""
    x, dim = arguments(node)
    found = seen.of(x)
    if found is None:
        return None
    if found.values.shape[dim] == 1:
        first = second = found
    else:
        halves = zip(found.values.chunk(2, dim), found.known.chunk(2, dim), strict=True)
        first, second = (Known(*half) for half in halves)
    values = first.values * second.values.sigmoid()
    found = Known(values, first.known & second.known)
    return with_zeros(node, found, first.is_zero)


@evaluates(aten.full.default)
def _full(seen: Constancy, node: fx.Node) -> Found:
    value: Any = arguments(node)[1]
    if not isinstance(value, (int, float)):
        return None
    device = node.meta["val"].device
    one = torch.full((1,) * rank_of(node), value, dtype=dtype_of(node), device=device)
    return Known(one, torch.ones_like(one, dtype=torch.bool))
