"""Writes through views, turned into values: which tensors alias which, and how a write spreads.

Every tensor of the captured program gets a `Ref`. References to one storage form a tree: its root
owns the storage, each child is a view of its parent. A write replaces the value of the root by
scattering the new value up the chain of views; a view that is read after a write to its storage is
computed again from its parent. The result has no in-place operator left, whatever was written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from fxopt.errors import CaptureError
from fxopt.normalize import Call

aten = torch.ops.aten
Emit = Callable[..., fx.Node]  # emit(target, *args): a new node in canonical spelling


@dataclass(eq=False)
class Storage:
    """One piece of memory; `version` counts the writes to it."""

    origin: fx.Node | None = None  # the placeholder or get_attr that owns it outside the graph
    version: int = 0


@dataclass(eq=False)
class Ref:
    """One tensor: the node that holds its value, and how it follows from its parent."""

    storage: Storage
    value: Any
    version: int = 0
    parent: Ref | None = None
    replay: Callable[[], Any] | None = None  # compute the value again from the parent's
    scatter: Callable[[Any, Any], fx.Node] | None = None  # (parent value, new value) -> parent value

    def read(self) -> Any:
        """Return the node that holds the current value."""
        if self.version != self.storage.version:
            if self.parent is not None and self.replay is not None:
                self.value = self.replay()
            self.version = self.storage.version
        return self.value

    def write(self, value: fx.Node, where: str) -> None:
        """Replace the value, and with it that of every other reference to the storage."""
        if self.parent is None:
            self.storage.version += 1
        else:
            parent = self.parent.read()
            if self.scatter is None:
                raise CaptureError(
                    f"A write through a view that fxopt cannot follow. {where} Write to the tensor "
                    "itself, or to a clone of the view."
                )
            self.parent.write(self.scatter(parent, value), where)
        self.value = value
        self.version = self.storage.version


# Operators that return their argument itself in some cases, which their schema does not say.
_HIDDEN_ALIASES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}


# Operators whose result never shares memory, though a fake tensor may say so.
_COPIES = {aten.clone.default, aten.lift_fresh_copy.default, aten._to_copy.default}


def alias_of(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory `node`'s value shares, or None for memory of its own."""
    if node.target in _COPIES:
        return None
    if node.target in _HIDDEN_ALIASES:
        return None if node.args[2] is True else _node(node.args[0])
    if node.target is aten.type_as.default:
        source, other = node.args[0].meta["val"], node.args[1].meta["val"]
        same = source.dtype == other.dtype and source.device == other.device
        return _node(node.args[0]) if same else None
    storages = _storages(node.meta.get("val"))
    if not storages:
        return None
    for argument in node.all_input_nodes:
        if _storages(argument.meta.get("val")) & storages:
            return argument
    return None


def _node(argument: Any) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata}
    if isinstance(value, (list, tuple)):
        return set().union(*map(_storages, value)) if value else set()
    return set()


def sizes_of(node: fx.Node, emit: Emit) -> list[Any]:
    """Return the sizes of a node as integers, and as sym_size nodes where they are symbolic."""
    shape = node.meta["val"].shape
    return [
        size if isinstance(size, int) else emit(aten.sym_size.int, node, axis, val=size)
        for axis, size in enumerate(shape)
    ]


def inverse(call: Call, emit: Emit) -> Callable[[Any, Any], fx.Node] | None:
    """Return how a write to the view `call` changes its base, or None where nobody knows.

    The answer takes the base's node and the view's new value, and returns the base's new value.
    """
    target, args = call.target, call.args
    if target is operator.getitem:
        return _inverse_of_part(args[0], args[1], emit)
    rest = args[1:]
    if target is None or target in _IDENTITIES or target in _HIDDEN_ALIASES:
        return lambda base, new: new
    if target in _RESHAPES:
        return lambda base, new: emit(aten.reshape.default, new, sizes_of(base, emit))
    if target is aten.permute.default:
        dims = list(rest[0])
        back = [dims.index(axis) for axis in range(len(dims))]
        return lambda base, new: emit(aten.permute.default, new, back)
    scatter = _SCATTERS.get(target)
    if scatter is not None:
        return lambda base, new: emit(scatter, base, new, *rest)
    if target is aten.view.dtype:
        return lambda base, new: emit(aten.view.dtype, new, base.meta["val"].dtype)
    if target is aten.view_as_real.default:
        return lambda base, new: emit(aten.view_as_complex.default, new)
    if target is aten.view_as_complex.default:
        return lambda base, new: emit(aten.view_as_real.default, new)
    return None


_IDENTITIES = {
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.device,
}
_RESHAPES = {
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dims,
    aten.reshape_as.default,
    aten.view_as.default,
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
}
_SCATTERS = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
    aten.as_strided.default: aten.as_strided_scatter.default,
}


def _inverse_of_part(
    parts: fx.Node, index: int, emit: Emit
) -> Callable[[Any, Any], fx.Node] | None:
    """The inverse of one output of a split or an unbind."""
    if parts.target is aten.unbind.int:
        dim = parts.args[1]
        return lambda base, new: emit(aten.select_scatter.default, base, new, dim, index)
    if parts.target is aten.split_with_sizes.default:
        sizes, dim = parts.args[1], parts.args[2]
        ends = list(accumulate(sizes))
        start = ends[index] - sizes[index]
        return lambda base, new: emit(
            aten.slice_scatter.default, base, new, dim, start, ends[index], 1
        )
    return None


_BY_HAND = {
    aten.normal_.default: aten.normal_functional.default,
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.zero_.default: aten.fill.Scalar,
}


def functional(target: Any) -> tuple[Any, str] | None:
    """Return the operator that computes what an in-place one writes, and the argument written.

    None where there is none: `set_`, `resize_` and custom operators that write.
    """
    schema = target._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if len(written) != 1 or target.namespace != "aten":
        return None
    if target in _BY_HAND:
        return _BY_HAND[target], written[0]
    name = schema.name.removeprefix("aten::")
    plain = getattr(aten, name.removesuffix("_"), None)
    if plain is None or name in ("set_", "resize_", "resize_as_"):
        return None
    wanted = [str(a.type) for a in schema.arguments if not a.is_out]
    for overload in plain.overloads():
        candidate = getattr(plain, overload)
        found = [str(a.type) for a in candidate._schema.arguments]
        if found == wanted and not candidate._schema.is_mutable:
            return candidate, written[0]
    return None
