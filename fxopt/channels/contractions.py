"""Contractions: a weight's columns are the channels that it reads, its rows those it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.groups import Role
from fxopt.channels.partition import Ids
from fxopt.shapes import rank_of, shape_of

aten = torch.ops.aten

TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}
CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1, aten.conv1d.padding: 1,
    aten.conv2d.default: 2, aten.conv2d.padding: 2,
    aten.conv3d.default: 3, aten.conv3d.padding: 3,
    **TRANSPOSED,
}  # fmt: skip
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default)


def groups_position(node: fx.Node) -> int:
    """Return which argument of a convolution holds its groups."""
    target: Any = node.target
    return [argument.name for argument in target._schema.arguments].index("groups")


# -- convolutions ------------------------------------------------------------------------------


@follows(*CONVOLUTIONS)
def _convolution(follow: Follower, node: fx.Node) -> Along:
    x, weight, bias = arguments(node)[:3]
    space = CONVOLUTIONS[node.target]
    along = list(follow.of(x))
    channel = len(along) - space - 1
    first, second, *kernel = follow.of(weight)
    for ids in along[channel + 1 :]:
        follow.freeze(node, ids, "a convolution slides over them")
    for ids in kernel:
        follow.freeze(node, ids, "they are places in a kernel")
    made, read = (second, first) if node.target in TRANSPOSED else (first, second)
    follow.mark(made, Role.OUTPUT, weight=weight)
    follow.mark(read, Role.INPUT, weight=weight)
    follow.contract(node, 0, channel)
    groups: Any = arguments(node)[groups_position(node)]
    if groups == 1:
        follow.join(node, along[channel], read)
    elif node.target in TRANSPOSED:
        entering = follow.join(node, along[channel], read)
        made = _grouped_transposed(follow, node, groups, entering, made)
    else:
        _grouped(follow, node, groups, along[channel], read, made)
    if bias is not None:
        shift = follow.of(bias)[0]
        follow.mark(shift, Role.SHIFT, weight=bias)
        made = follow.join(node, made, shift)
    follow.compute(node, channel, made)
    return (*along[:channel], made, *[None] * space)


def _grouped(
    follow: Follower, node: fx.Node, groups: int, entering: Ids | None, read: Ids | None, made: Any
) -> None:
    """Of g groups, whole ones may go, or the same channels of each: `read` stands along one group's
    inputs, `entering` and `made` along those, and the outputs, of all groups.
    """
    inputs, outputs = shape_of(arguments(node)[1])[1], shape_of(arguments(node)[1])[0] // groups
    axis = _choose_groups(follow, node, groups, inputs, outputs)
    if axis == 0:
        follow.freeze(node, read, "whole groups of the convolution go, not parts of them")
        before = _across(follow, entering, (groups, inputs), 0)
        after = _across(follow, made, (groups, outputs), 0)
        chosen = [follow.join(node, before, after)]
    else:
        before = _within(follow, node, entering, (groups, inputs))
        chosen = [follow.join(node, before, read), _within(follow, node, made, (groups, outputs))]
    _note_groups(follow, node, groups, inputs, outputs, axis, chosen)


def _grouped_transposed(
    follow: Follower, node: fx.Node, groups: int, entering: Ids | None, made: Ids | None
) -> Ids | None:
    """The same where rows of the weight stand for inputs, and `made` along one group's outputs."""
    inputs, outputs = shape_of(arguments(node)[1])[0] // groups, shape_of(arguments(node)[1])[1]
    axis = _choose_groups(follow, node, groups, inputs, outputs)
    if axis == 0:
        follow.freeze(node, made, "whole groups of the convolution go, not parts of them")
        whole = _across(follow, entering, (groups, inputs), 0)
        leaving = None if whole is None else np.repeat(whole, outputs)
        chosen = [whole]
    else:
        leaving = None if made is None else np.tile(made, groups)
        chosen = [_within(follow, node, entering, (groups, inputs)), made]
    _note_groups(follow, node, groups, inputs, outputs, axis, chosen)
    return leaving


def _choose_groups(
    follow: Follower, node: fx.Node, groups: int, inputs: int, outputs: int
) -> int:
    width = max(inputs, outputs)
    axes = (0,) if width == 1 else (0, 1)
    return follow.choose(node, "groups", (groups, width), axes)


def _note_groups(
    follow: Follower,
    node: fx.Node,
    groups: int,
    inputs: int,
    outputs: int,
    axis: int,
    chosen: list[Ids | None],
) -> None:
    known = [ids for ids in chosen if ids is not None]
    width = max(inputs, outputs)
    axes = (0,) if width == 1 else (0, 1)
    ids = np.concatenate(known) if known else np.zeros(0, np.int64)
    follow.note_site(node, "groups", (groups, width), axes, axis, ids)


def _across(follow: Follower, ids: Ids | None, sizes: tuple[int, int], axis: int) -> Ids | None:
    return None if ids is None else follow.unite_across(ids, sizes, axis)


def _within(
    follow: Follower, node: fx.Node, ids: Ids | None, sizes: tuple[int, int]
) -> Ids | None:
    """Unite the same channel of every group; a single one per group has to stay."""
    if sizes[1] == 1:
        follow.freeze(node, ids, "each group of the convolution has only this one channel")
        return None
    return _across(follow, ids, sizes, 1)


# -- products of matrices ----------------------------------------------------------------------


@follows(aten.linear.default)
def _linear(follow: Follower, node: fx.Node) -> Along:
    x, weight, bias = arguments(node)
    if rank_of(weight) != 2 or (bias is not None and rank_of(bias) != 1):
        found = follow.unknown(node, "it is not known how channels pass through such a linear")
        assert isinstance(found, tuple)
        return found
    *outer, entering = follow.of(x)
    made, read = follow.of(weight)
    follow.mark(made, Role.OUTPUT, weight=weight)
    follow.mark(read, Role.INPUT, weight=weight)
    follow.contract(node, 0, len(outer))
    follow.join(node, entering, read)
    if bias is not None:
        shift = follow.of(bias)[0]
        follow.mark(shift, Role.SHIFT, weight=bias)
        made = follow.join(node, made, shift)
    follow.compute(node, len(outer), made)
    return (*outer, made)


@follows(*_PRODUCTS)
def _product(follow: Follower, node: fx.Node) -> Along:
    return _matmul(follow, node, 0, 1)


@follows(aten.addmm.default, aten.baddbmm.default)
def _sum_of_product(follow: Follower, node: fx.Node) -> Along:
    """addmm(b, x, w) = b + x · w"""
    made = list(_matmul(follow, node, 1, 2))
    shift: Any = arguments(node)[0]
    for dim in range(rank_of(shift)):
        mine, own = len(made) - 1 - dim, rank_of(shift) - 1 - dim
        if shape_of(shift)[own] != 1 or shape_of(node)[mine] == 1:
            follow.mark(follow.of(shift)[own], Role.SHIFT, weight=shift)
            made[mine] = follow.join(node, made[mine], follow.of(shift)[own])
    return tuple(made)


def _matmul(follow: Follower, node: fx.Node, left: int, right: int) -> Along:
    """a · b: the last dimension of a meets the last but one of b; those before are a batch."""
    a, b = arguments(node)[left], arguments(node)[right]
    of_a, of_b = follow.of(a), follow.of(b)
    inner_b = max(len(of_b) - 2, 0)
    follow.contract(node, left, len(of_a) - 1)
    follow.contract(node, right, inner_b)
    meeting = follow.join(node, of_a[-1], of_b[inner_b])
    rows = of_a[-2:-1]
    columns = of_b[inner_b + 1 :]
    follow.mark(of_a[-1], Role.INPUT, weight=a)
    follow.mark(of_b[inner_b], Role.INPUT, weight=b)
    for ids, weight in ((rows, a), (columns, b)):
        if ids:
            follow.mark(ids[0], Role.OUTPUT, weight=weight)
    batch = _batch(follow, node, (a, of_a[:-2]), (b, of_b[:inner_b]))
    made = (*batch, *rows, *columns)
    for operand, dim, ids in ((a, len(batch), rows), (b, len(made) - 1, columns)):
        if ids and follow.is_weight(operand):
            follow.compute(node, dim, ids[0])
    if not (follow.is_weight(a) or follow.is_weight(b)):
        _prefer(follow, batch, (meeting, *rows, *columns))
    return made


def _batch(
    follow: Follower, node: fx.Node, first: tuple[Any, Along], second: tuple[Any, Along]
) -> Along:
    """Unite the dimensions of a batch, which broadcast from the last one on."""
    (a, of_a), (b, of_b) = first, second
    found: list[Ids | None] = []
    for back in range(1, max(len(of_a), len(of_b)) + 1):
        meeting = []
        for operand, along in ((a, of_a), (b, of_b)):
            if back <= len(along):
                spread = shape_of(operand)[len(along) - back] == 1
                meeting += [] if spread else [along[-back]]
        found.append(follow.join(node, *meeting))
    return tuple(reversed(found))


def _prefer(follow: Follower, batch: Along, matrix: Along) -> None:
    """The batch of a product of two activations is attention's heads; its matrices are their width.

    Which of them may go is the user's choice.
    """
    follow.batches += [ids for ids in batch if ids is not None]
    for ids in matrix if follow.heads == "heads" else batch:
        follow.dislike(ids)


@follows(aten.scaled_dot_product_attention.default)
def _attention(follow: Follower, node: fx.Node) -> Along:
    """softmax(q · kᵀ · scale + mask) · v, where q, k, v are [..., heads, length, width]"""
    query, key, value, mask, _, is_causal, *_ = arguments(node)
    q, k, v = follow.of(query), follow.of(key), follow.of(value)
    for ids, meaning in ((q[-2], "queries"), (k[-2], "keys"), (v[-2], "values")):
        if ids is not None and meaning != "queries":
            follow.freeze(node, ids, f"they are the places of an attention's {meaning}")
    if is_causal:
        follow.freeze(node, q[-2], "a causal attention counts its queries")
    width = follow.join(node, q[-1], k[-1])
    follow.contract(node, 0, len(q) - 1)
    follow.contract(node, 1, len(k) - 1)
    batch = _batch(follow, node, (query, q[:-2]), (key, _per_query(node, k[:-2])))
    batch = _batch_of(follow, node, batch, value, _per_query(node, v[:-2]))
    if mask is not None:
        follow.freeze(node, follow.of(mask)[-1], "they are the places of an attention's keys")
        batch = _batch_of(follow, node, batch, mask, follow.of(mask)[:-2])
        rows = follow.of(mask)[-2]
        if shape_of(mask)[-2] != 1:
            follow.join(node, q[-2], rows)
    _prefer(follow, batch, (width, v[-1]))
    return (*batch, q[-2], v[-1])


def _per_query(node: fx.Node, batch: Along) -> Along:
    """Repeat the heads of keys and values where several heads of queries share one of them."""
    heads, shared = shape_of(arguments(node)[0])[-3:-2], shape_of(arguments(node)[1])[-3:-2]
    if not node.kwargs.get("enable_gqa") or not batch or heads == shared or batch[-1] is None:
        return batch
    return (*batch[:-1], np.repeat(batch[-1], heads[0] // shared[0]))


def _batch_of(
    follow: Follower, node: fx.Node, batch: Along, operand: Any, own: Along
) -> Along:
    """Unite an operand's batch with that found so far."""
    found = list(batch)
    for back in range(1, min(len(own), len(found)) + 1):
        size = shape_of(node)[len(found) - back]
        if shape_of(operand)[len(own) - back] != 1 or size == 1:
            found[-back] = follow.join(node, found[-back], own[-back])
    return tuple(found)


@follows(aten.einsum.default)
def _einsum(follow: Follower, node: fx.Node) -> Along:
    """Each letter is a dimension: unite what bears the same one."""
    equation, operands = str(arguments(node)[0]).replace(" ", ""), arguments(node)[1]
    assert isinstance(operands, (list, tuple))
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    if "." in equation or not arrow:
        found = follow.unknown(node, "it is not known how channels pass through this einsum")
        assert isinstance(found, tuple)
        return found
    meeting: dict[str, list[Ids | None]] = {}
    for term, operand in zip(letters, operands, strict=True):
        for letter, size, ids in zip(term, shape_of(operand), follow.of(operand), strict=True):
            if size != 1:
                meeting.setdefault(letter, []).append(ids)
    found = {letter: follow.join(node, *ids) for letter, ids in meeting.items()}
    for position, (term, operand) in enumerate(zip(letters, operands, strict=True)):
        elsewhere = set("".join(letters[:position] + letters[position + 1 :]))
        for dim, (letter, ids) in enumerate(zip(term, follow.of(operand), strict=True)):
            if letter not in result:
                follow.contract(node, position, dim)
                follow.mark(ids, Role.INPUT, weight=operand)
            elif letter not in elsewhere:
                follow.mark(ids, Role.OUTPUT, weight=operand)
                if follow.is_weight(operand):
                    follow.compute(node, result.index(letter), found.get(letter))
    if not any(map(follow.is_weight, operands)):
        everywhere = [letter for letter in result if all(letter in term for term in letters)]
        batch = tuple(found.get(letter) for letter in everywhere)
        _prefer(follow, batch, tuple(found.get(one) for one in found if one not in everywhere))
    return tuple(found.get(letter) for letter in result)


# -- tables ------------------------------------------------------------------------------------


@follows(aten.embedding.default)
def _embedding(follow: Follower, node: fx.Node) -> Along:
    table, indices = arguments(node)[:2]
    rows, made = follow.of(table)
    follow.freeze(node, rows, "an embedding looks them up")
    follow.mark(made, Role.OUTPUT, weight=table)
    follow.compute(node, rank_of(node) - 1, made)
    return (*[None] * rank_of(indices), made)


@follows(aten.outer.default)
def _outer(follow: Follower, node: fx.Node) -> Along:
    a, b = arguments(node)
    return (follow.of(a)[0], follow.of(b)[0])


@follows(aten.sum.dim_IntList, aten.sum.default)
def _sum(follow: Follower, node: fx.Node) -> Along:
    """A sum reads channels like a contraction whose weights are 1."""
    x, *rest = arguments(node)
    along = follow.of(x)
    dims = (rest[0] if rest else None) or range(len(along))
    for dim in dims:
        follow.contract(node, 0, dim)
    keeps = len(rest) > 1 and bool(rest[1])
    kept = [None if dim in dims else ids for dim, ids in enumerate(along)]
    return tuple(ids for dim, ids in enumerate(kept) if keeps or dim not in dims)

