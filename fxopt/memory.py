"""What no rule may change: the type of a value, and memory that somebody else may write to."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.effects import training_flag
from fxopt.shapes import is_tensor, same_metadata
from fxopt.text import type_text

aten = torch.ops.aten


def same_call(a: fx.Node, b: fx.Node) -> bool:
    """Whether two calls are written alike."""
    return (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)


def type_obstacle(root: fx.Node, new: fx.Node) -> str | None:
    """Why `new` is not the same kind of value as `root`, in words."""
    if not is_tensor(root) or same_metadata(root, new):
        return None
    old_type, new_type = (type_text(node.meta.get("val")) for node in (root, new))
    if old_type == new_type:
        return f"the result would be on another device than {root.name}"
    return f"the result would be {new_type}, and {root.name} is {old_type}"


_LAYOUT_READERS = (aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default)
_LAYOUT_MAKERS = (aten.contiguous.default, aten.clone.default)


def memory_obstacle(root: fx.Node, new: fx.Node, built: Collection[fx.Node]) -> str | None:
    """Why readers of `root` must not be given the memory behind `new`, in words.

    A caller may write to an output, and the graph writes its state back at its end. So an output
    that was a copy must not become an input, a constant, or a part of another output; and what
    state is written back must not be read from state that is overwritten before.
    """
    owner = _owner(new)
    if owner in built or owner is _owner(root, certainly=True):
        return None  # memory as new as before, or the same as before
    outside = owner.op in ("placeholder", "get_attr")
    moved = not _same_layout(root, new)
    for user in _readers(root):
        if user.op == "output":
            if outside:
                return f"the output would be {owner.name} itself, which a caller may write to"
            if any(reader.op == "output" for reader in _readers(owner, beside=root)):
                return "two outputs would share their memory"
            if moved and root.target in _LAYOUT_MAKERS:
                return "a caller may count on the memory layout of the output"
        elif user.target is aten.copy_.default:
            if any(u.target is aten.copy_.default and u.args[0] is owner for u in owner.users):
                return f"{owner.name} is overwritten at the end of the graph"
        elif moved and reads_layout(user):
            return f"{user.name} depends on the memory layout"
    return None


def _shares(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory a call's result shares, or may share; None without one."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    dropout = training_flag(node.target) == 2 and node.args[2] is not True
    shares = node.target is operator.getitem or dropout or _is_view(node.target)
    return node.args[0] if shares else None


@functools.cache
def _is_view(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return any(returned.alias_info is not None for returned in target._schema.returns)


def _owner(node: fx.Node, certainly: bool = False) -> fx.Node:
    """Return the node whose memory `node` may share; only through sure views where `certainly`."""
    while (source := _shares(node)) is not None:
        if certainly and node.target is aten.contiguous.default:
            break
        node = source
    return node


def _readers(node: fx.Node, beside: fx.Node | None = None) -> Iterator[fx.Node]:
    """Yield the users of `node`'s memory, except those through `beside`."""
    pending = [node]
    for value in pending:
        for user in value.users:
            if user is not beside:
                yield user
                if _shares(user) is value:
                    pending.append(user)


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    if not (is_tensor(a) and is_tensor(b)):
        return True
    p, q = a.meta["val"].stride(), b.meta["val"].stride()
    return all(isinstance(step, int) for step in (*p, *q)) and p == q


def reads_layout(node: fx.Node) -> bool:
    """Whether a call's result, or whether it runs at all, depends on strides."""
    if not isinstance(node.target, OpOverload):
        return node.target is not operator.getitem
    custom = node.target.namespace not in ("aten", "prims", "torchvision")
    return custom or node.target in _LAYOUT_READERS
