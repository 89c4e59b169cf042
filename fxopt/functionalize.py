"""Writes through views, turned into values: which tensors alias which, and how a write spreads.

Every tensor of the captured program gets a `Ref`. References to one storage form a tree: its root
owns the storage, each child is a view of its parent. A write replaces the value of the root by
scattering the new value up the chain of views; a view that is read after a write to its storage is
computed again from its parent. The result has no in-place operator left, whatever was written.

A view without a scatter of its own (unfold, or a part of an expanded tensor) is written through the
positions of its elements: the same views of an `arange` say where each of them lies in the base.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import fx

from fxopt.errors import CaptureError
from fxopt.normalize import Call
from fxopt.shapes import describe

aten = torch.ops.aten
Emit = Callable[..., fx.Node]  # emit(target, *args, **kwargs): a new node in canonical spelling


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
    view: Callable[[Any], Any] | None = None  # (parent value) -> value
    scatter: Callable[[Any, Any], fx.Node] | None = None  # (parent, new) -> parent
    is_whole: bool = False  # it shows its parent unchanged

    def read(self) -> Any:
        """Return the node that holds the current value."""
        if self.version != self.storage.version:
            if self.parent is not None and self.view is not None:
                self.value = self.view(self.parent.read())
            self.version = self.storage.version
        return self.value

    def write(self, value: fx.Node, emit: Emit, where: str) -> None:
        """Replace the value, and with it that of every other reference to the storage."""
        chain = [self]
        while chain[-1].parent is not None:
            chain.append(chain[-1].parent)
        lacking = [i for i, ref in enumerate(chain[:-1]) if ref.scatter is None]
        if lacking:
            views, top = chain[lacking[-1] :: -1], chain[lacking[-1] + 1]
            written = _scatter_by_position(top.read(), views, value, emit, where)
            top.write(written, emit, where)
        elif self.parent is None or self.scatter is None:
            self.storage.version += 1
        else:
            self.parent.write(self.scatter(self.parent.read(), value), emit, where)
        self.value = value
        self.version = self.storage.version


def _scatter_by_position(
    base: fx.Node, views: Sequence[Ref], value: fx.Node, emit: Emit, where: str
) -> fx.Node:
    """Return `base` with `value` in the places that `views`, applied in turn, show of it."""
    if any(ref.value.meta["val"].dtype != base.meta["val"].dtype for ref in views):
        raise CaptureError(
            f"A write through a view of another dtype that fxopt cannot follow. {where} Write to "
            "the tensor itself, or to a clone of the view."
        )
    sizes = sizes_of(base, emit)
    flat = emit(aten.reshape.default, base, [-1])
    positions = emit(
        aten.arange.default, sizes_of(flat, emit)[0], device=base.meta["val"].device
    )
    positions = emit(aten.reshape.default, positions, sizes)
    for ref in views:
        if ref.view is not None and not ref.is_whole:
            positions = ref.view(positions)
    positions = emit(aten.reshape.default, positions, [-1])
    values = emit(aten.reshape.default, value, [-1])
    return emit(aten.reshape.default, emit(aten.scatter.src, flat, 0, positions, values), sizes)


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
        source, other = (describe(argument) for argument in node.args[:2])
        same = source.dtype == other.dtype and source.device == other.device
        return _node(node.args[0]) if same else None
    storages = _storages(node.meta.get("val"))
    if not storages:
        return None
    for argument in node.all_input_nodes:
        if _storages(argument.meta.get("val")) & storages:
            return argument
    return None


def returns_argument(node: fx.Node) -> bool:
    """Whether the model got the very tensor object that it gave, not another view of it."""
    if alias_of(node) is None:
        return False
    if node.target in _RETURN_ARGUMENT_OF_SAME_RANK:
        return bool(node.meta["val"].dim() == describe(node.args[0]).dim())
    return node.target in _HIDDEN_ALIASES or node.target in _RETURN_ARGUMENT


def _node(argument: Any) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata} if torch._C._has_storage(value) else set()
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


def is_whole(call: Call) -> bool:
    """Whether a view shows the same elements in the same shape."""
    return call.target is None or call.target in _IDENTITIES or call.target in _HIDDEN_ALIASES


def inverse(call: Call, emit: Emit) -> Callable[[Any, Any], fx.Node] | None:
    """Return how a write to the view `call` changes its base, or None where nobody knows.

    The answer takes the base's node and the view's new value, and returns the base's new value.
    """
    target, args = call.target, call.args
    if target is operator.getitem:
        return _inverse_of_part(args[0], args[1], emit)
    rest = args[1:]
    if is_whole(call):
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
    if target is aten.real.default:
        return lambda base, new: emit(aten.complex.default, new, emit(aten.imag.default, base))
    if target is aten.imag.default:
        return lambda base, new: emit(aten.complex.default, emit(aten.real.default, base), new)
    return None


_RETURN_ARGUMENT = {
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
}
_RETURN_ARGUMENT_OF_SAME_RANK = {
    aten.atleast_1d.default,
    aten.atleast_2d.default,
    aten.atleast_3d.default,
    aten.flatten.using_ints,
}
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
}


def _inverse_of_part(
    parts: fx.Node, index: int, emit: Emit
) -> Callable[[Any, Any], fx.Node] | None:
    """The inverse of one output of a split or an unbind."""
    if parts.target is aten.unbind.int:
        dim = parts.args[1]
        return lambda base, new: emit(aten.select_scatter.default, base, new, dim, index)
    if parts.target is aten.split_with_sizes.default:
        sizes: Any = parts.args[1]
        dim = parts.args[2]
        ends = list(accumulate(sizes))
        start = ends[index] - sizes[index]
        return lambda base, new: emit(
            aten.slice_scatter.default, base, new, dim, start, ends[index], 1
        )
    return None


def fill_diagonal(x: fx.Node, value: Any, wrap: bool = False, *, emit: Emit) -> fx.Node:
    """Return what `x.fill_diagonal_(value, wrap)` leaves in `x`, by the positions it fills."""
    sizes = sizes_of(x, emit)
    if len(sizes) == 2 and not wrap:
        diagonal = emit(aten.diagonal.default, x, 0, 0, 1)
        filled = emit(aten.full_like.default, diagonal, value)
        return emit(aten.diagonal_scatter.default, x, filled, 0, 0, 1)
    step = sum(prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    count = prod(sizes) if wrap else min(sizes) * step
    flat = emit(aten.reshape.default, x, [-1])
    part = emit(aten.slice.Tensor, flat, 0, 0, count, step)
    filled = emit(aten.full_like.default, part, value)
    flat = emit(aten.slice_scatter.default, flat, filled, 0, 0, count, step)
    return emit(aten.reshape.default, flat, sizes)


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
    arguments = [a for a in schema.arguments if a.alias_info is not None]
    written = [a.name for a in arguments if a.alias_info.is_write]
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
