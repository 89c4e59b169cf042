"""Contractions: a weight's columns are the channels that it reads, its rows those it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.elementwise import broadcast
from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.groups import Role
from fxopt.channels.partition import Ids
from fxopt.shapes import is_one, rank_of, shape_of

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
    shift = arguments(node)[0]
    made = _matmul(follow, node, 1, 2)
    for ids in follow.of(shift):
        follow.mark(ids, Role.SHIFT, weight=shift)
    return broadcast(follow, node, (shape_of(node), made), (shape_of(shift), follow.of(shift)))


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
    batch = broadcast(
        follow, node,
        (shape_of(a)[:-2], of_a[:-2]), (shape_of(b)[:inner_b], of_b[:inner_b]),
    )  # fmt: skip
    made = (*batch, *rows, *columns)
    for operand, dim, ids in ((a, len(batch), rows), (b, len(made) - 1, columns)):
        if ids and follow.is_weight(operand):
            follow.compute(node, dim, ids[0])
    if not (follow.is_weight(a) or follow.is_weight(b)):
        _prefer(follow, batch, (meeting, *rows, *columns))
    return made


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
    batches = [(shape_of(query)[:-2], q[:-2]), _heads(node, key, k), _heads(node, value, v)]
    if mask is not None:
        *of_mask, rows, places = follow.of(mask)
        follow.freeze(node, places, "they are the places of an attention's keys")
        batches.append((shape_of(mask)[:-2], tuple(of_mask)))
        if not is_one(shape_of(mask)[-2]):
            follow.join(node, q[-2], rows)
    batch = broadcast(follow, node, *batches)
    _prefer(follow, batch, (width, v[-1]))
    return (*batch, q[-2], v[-1])


def _heads(node: fx.Node, operand: Any, along: Along) -> tuple[Sequence[Any], Along]:
    """Return the batch of keys or values, whose heads several heads of queries may share."""
    sizes, batch = list(shape_of(operand)[:-2]), along[:-2]
    heads = shape_of(arguments(node)[0])[-3:-2]
    if node.kwargs.get("enable_gqa") and batch and batch[-1] is not None:
        batch = (*batch[:-1], np.repeat(batch[-1], heads[0] // sizes[-1]))
        sizes[-1] = heads[0]
    return sizes, batch


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
            if not is_one(size):
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

