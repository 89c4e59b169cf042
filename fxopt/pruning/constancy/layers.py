"""Contractions: known where all weights are 0 that meet something unknown."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.channels.contractions import CONVOLUTIONS, TRANSPOSED, groups_position
from fxopt.channels.follower import arguments
from fxopt.pruning.constancy.known import Constancy, Found, Known, evaluates, with_zeros
from fxopt.shapes import dtype_of, rank_of, shape_of

aten = torch.ops.aten
LAYERS = (aten.linear.default, *CONVOLUTIONS)


def channel_dim(node: fx.Node) -> int:
    """Return the dimension of a layer's input, and of its result, that holds the channels."""
    return rank_of(node) - 1 - CONVOLUTIONS.get(node.target, 0)


def in_groups(node: fx.Node, weight: torch.Tensor) -> torch.Tensor:
    """Return a layer's weight as [groups, outputs per group, inputs per group, taps]."""
    if node.target is aten.linear.default:
        return weight[None, :, :, None]
    groups: Any = arguments(node)[groups_position(node)]
    apart = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return apart.transpose(1, 2) if node.target in TRANSPOSED else apart


def sees_all_taps(node: fx.Node) -> bool:
    """Whether every output of a layer reads each tap of its kernel inside of the input.

    Only then does an input channel that is c everywhere add Σ w · c to every output.
    """
    if node.target is aten.linear.default:
        return True
    if node.target in TRANSPOSED:
        return False
    padding: Any = arguments(node)[4]
    if padding == "valid" or padding != "same" and not any(padding):
        return True
    return padding == "same" and all(size == 1 for size in shape_of(arguments(node)[1])[2:])


@evaluates(*LAYERS)
def _layer(seen: Constancy, node: fx.Node) -> Found:
    """b + Σ w · x is known where all x are whose w is not 0."""
    x, weight, bias = arguments(node)[:3]
    given, shift = seen.of(weight), None if bias is None else seen.of(bias)
    if given is None or given.values.dim() < 2 or not given.is_whole:
        return None
    if bias is not None and shift is None:
        return None
    apart = in_groups(node, given.values)
    entering = seen.of(x)
    total = None
    if entering is None:
        known = _zero_rows(apart)
        if known is None:
            return None
    else:
        c = inputs_of(entering, node, apart)
        unknown = (~c.known).reshape(apart.shape[0], 1, -1)
        if not bool(_may_be_known(apart, unknown.squeeze(1)).any()):
            return None
        known = ~((apart != 0).any(-1) & unknown).any(-1).reshape(-1)
        if bool(known.any()) and bool((c.values != 0).any()):
            total = added_by(apart, c.values)
    if total is None:
        total = torch.zeros(known.shape, dtype=torch.float64, device=known.device)
    if shift is not None:
        total = total + shift.values
        known = known & shift.known
    spread = [1] * rank_of(node)
    spread[channel_dim(node)] = -1
    return Known(total.to(dtype_of(node)).reshape(spread), known.reshape(spread))


def _may_be_known(apart: torch.Tensor, unknown: torch.Tensor) -> torch.Tensor:
    """Return which outputs do not listen to the first unknown input of their group."""
    group = torch.arange(len(apart), device=apart.device)
    first = unknown.to(torch.uint8).argmax(1)
    return (apart[group, :, first] == 0).all(-1) | ~unknown.any(1, keepdim=True)


def inputs_of(entering: Found, node: fx.Node, apart: torch.Tensor) -> Known:
    """Return the constant that a layer reads at each input channel: 0, or one it can add up.

    What is unknown has the value 0, in float64.
    """
    count = apart.shape[0] * apart.shape[2]
    if entering is None:
        nothing = torch.zeros(count, dtype=torch.float64, device=apart.device)
        return Known(nothing, nothing != 0)
    found = entering.along(channel_dim(node))
    values, known = found.values.expand(count), found.known.expand(count)
    if not sees_all_taps(node):
        known = known & (values == 0)
    return Known(torch.where(known, values.double(), 0.0), known)


def added_by(apart: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return Σ w · c over the kernel and all inputs, for each output, in float64."""
    at_inputs = values.reshape(apart.shape[0], -1)
    some = at_inputs.any(0).nonzero().flatten()
    weights = apart[:, :, some].double().sum(-1)
    return torch.einsum("goi,gi->go", weights, at_inputs[:, some]).reshape(-1)


def _zero_rows(apart: torch.Tensor) -> torch.Tensor | None:
    """Return which outputs have no weight but 0; None where there are none."""
    rows = apart.reshape(apart.shape[0] * apart.shape[1], -1)
    maybe = (rows[:, 0] == 0).nonzero().flatten()  # most layers have none, and cost no more
    zero = maybe[(rows[maybe] == 0).all(1)]
    if not len(zero):
        return None
    found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    found[zero] = True
    return found


@evaluates(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(seen: Constancy, node: fx.Node) -> Found:
    """Rows of zeros give rows of zeros, and columns columns."""
    left, right = arguments(node)[:2]
    if rank_of(left) < 2 or rank_of(right) < 2:
        return None
    rows, columns = seen.of(left), seen.of(right)
    zero: Any = torch.zeros((), dtype=torch.bool)
    if rows is not None:
        zero = zero.to(rows.known.device) | rows.is_zero.all(-1, keepdim=True)
    if columns is not None:
        zero = zero.to(columns.known.device) | columns.is_zero.all(-2, keepdim=True)
    return with_zeros(node, None, zero)


@evaluates(aten.scaled_dot_product_attention.default)
def _attention(seen: Constancy, node: fx.Node) -> Found:
    """A weighted mean of equal values is that value, and 0 also where a mask hides all of them."""
    query, _, value, mask, dropout = arguments(node)[:5]
    found = seen.of(value)
    if found is None or found.values.shape[-2] != 1:
        return None
    if rank_of(query) != rank_of(value) or node.kwargs.get("enable_gqa"):
        return None
    return found if mask is None and dropout == 0.0 else Known(found.values, found.is_zero)


@evaluates(aten.embedding.default)
def _embedding(seen: Constancy, node: fx.Node) -> Found:
    """A column of the table that is 0."""
    table, indices = seen.of(arguments(node)[0]), arguments(node)[1]
    if table is None or not table.is_whole:
        return None
    zero = table.values[0] == 0
    if not bool(zero.any()):
        return None
    places = zero.nonzero().flatten()
    zero[places] = (table.values[:, places] == 0).all(0)
    return with_zeros(node, None, zero.reshape(*[1] * rank_of(indices), -1))
