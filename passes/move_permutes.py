"""Move permutes past linear layers, to where they meet others.

Before                                       After
    y = linear(permute(x, [1, 0, 2]), w)         y = permute(linear(x, w), [1, 0, 2])
    h = permute(reshape(y, …), …)                h = permute(reshape(y, …), …)

    z = linear(reshape(permute(h, …), …), v)     z = permute(reshape(permute(h, …), …), [1, 0, 2])
    o = permute(z, [1, 0, 2])                    o = linear(z, v)

A linear layer computes each row alone, so the rows may as well be put into another order behind it,
or before it. A permute between two layers is a copy; one beside another permute becomes part of it,
and that is another pass's work. So nn.MultiheadAttention, which wants its sequence first, loses
what a model with the batch first puts around it.

Left alone: permutes that move the features; permutes that others read too; places where no other
permute is near: nothing would be saved; permutes in front of a roll, which are one shuffle with it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rules import Match, Value, apply_rules, rule
from fxopt.shapes import same_shape

aten = torch.ops.aten
_RESHAPES = (
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dims,
    aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
_PERMUTE = aten.permute.default
_MOVES = (*_RESHAPES, _PERMUTE, aten.split_with_sizes.default, operator.getitem)
_REACH = 4  # how many reshapes and splits may stand between two permutes


@rule(lambda x, dims, w, b: F.linear(x.permute(dims), w, b))
def move_permute_behind_linear(x: Value, dims: list[int], w: Value, b: Any, match: Match) -> Any:
    """linear(permute(x)) = permute(linear(x)) where the features stay last"""
    if dims[-1] != len(dims) - 1 or x.target in (*_RESHAPES, _PERMUTE):
        return None
    if not all(_leads_to(_PERMUTE, user) for user in match.root.users):
        return "no permute follows that it could be merged with"
    return match.shared or aten.linear(x, w, b).permute(dims)


@rule(lambda y, dims, w, b: F.linear(y, w, b).permute(dims))
def move_permute_before_linear(y: Value, dims: list[int], w: Value, b: Any, match: Match) -> Any:
    """permute(linear(y)) = linear(permute(y)) where the features stay last"""
    if dims[-1] != len(dims) - 1 or not _comes_from_permute(y):
        return None
    if _leads_to(aten.roll.default, match.root):
        return "a roll follows: both are one shuffle"
    return match.shared or aten.linear(y.permute(dims), w, b)


@rule(
    lambda y, w, b, size: F.linear(y, w, b).reshape(size),
    lambda y, w, b, dim, sizes: aten.unflatten.int(F.linear(y, w, b), dim, sizes),
)
def move_reshape_before_linear(y: Value, w: Value, b: Any, match: Match) -> Any:
    """reshape(linear(y)) = linear(reshape(y)) where the features stay last, and as many"""
    linear, shape = match.nodes[1], match.root.meta["val"].shape
    if not same_shape(shape[-1:], linear.meta["val"].shape[-1:]) or not _comes_from_permute(y):
        return None
    if not all(user.target is _PERMUTE for user in match.root.users):
        return None
    if _leads_to(aten.roll.default, match.root):
        return "a roll follows: both are one shuffle"
    sizes = [size if isinstance(size, int) else -1 for size in shape[:-1]]
    if sizes.count(-1) > 1 or -1 in sizes and 0 in shape:
        return "its shape has several symbolic sizes"
    return match.shared or aten.linear(y.reshape([*sizes, y.shape[-1]]), w, b)


def _leads_to(target: Any, node: Any) -> bool:
    """Whether a call of `target` is what follows a call, behind reshapes, splits and permutes."""
    for _ in range(_REACH):
        if node.target is target or node.target not in _MOVES or not node.users:
            break
        node = next(iter(node.users))
    return node.target is target


def _comes_from_permute(y: Value) -> bool:
    """Whether a value is a permute, or made of one by reshapes."""
    for _ in range(_REACH):
        if y.target not in _RESHAPES or y.users > 1:
            break
        y = y.args[0]
    return y.target is _PERMUTE


RULES = (move_permute_behind_linear, move_permute_before_linear, move_reshape_before_linear)


@dataclass(frozen=True)
class MovePermutes:
    """Move permutes of rows past linear layers, next to other permutes."""

    name: ClassVar[str] = "move-permutes"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
