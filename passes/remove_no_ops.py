"""Remove calls that change nothing.

Before                                   After
    a = dropout(x, 0.5, False)               c = relu(x)
    b = permute(permute(a, p), p⁻¹)
    c = relu(b * 1)

Dropout in evaluation, copies and casts to what a value already is, views to the shape it already
has (a symbolic size only where it is the same expression), pads and rolls by nothing, upsampling of
the nearest pixel to the same size, arithmetic with a neutral number, permutations that cancel or
compose, and pairs that undo each other: split and cat, unbind and stack. A removed dropout cannot
be switched on for training any more.

Adding 0, and averaging one element, turn −0.0 into 0.0; here it stays −0.0. Everything else keeps
every bit.

Left alone: what changes shape or dtype (an integer tensor times 1.0); dropout in training; copies
whose going would make an output share memory with an input, a constant or another output, or let
state be read after it is overwritten; a copy into another memory layout than the default; `detach`
of what carries gradient; complex arithmetic (∞ · 1 is ∞ + nan·j there); upsampling that
interpolates (0 · ∞ is nan, also where the size stays). Nothing depends on the values of parameters
and buffers, which training may change; only on literals and `full`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rules import Value, apply_rules, rule
from fxopt.shapes import dtype_of, is_tensor, same_metadata

aten = torch.ops.aten


# -- copies and casts ------------------------------------------------------------------------------


@rule(
    lambda x, p: F.dropout(x, p, False),
    lambda x, p: aten.feature_dropout(x, p, False),
    lambda x, p: aten.alpha_dropout(x, p, False),
    lambda x, p: aten.feature_alpha_dropout(x, p, False),
)
def remove_dropout(x: Value) -> Value:
    """dropout(x) = x in evaluation"""
    return x


@rule(
    lambda x, layout: aten.clone(x, memory_format=layout),
    lambda x, layout: aten.contiguous(x, memory_format=layout),
)
def remove_copy(x: Value, layout: Any) -> Value | str:
    """clone(x) = contiguous(x) = x"""
    if layout in (None, 0, torch.preserve_format, torch.contiguous_format):  # 0: in the schema
        return x
    return f"it asks for the memory layout {layout}"


@rule(
    lambda x: aten.alias(x),
    lambda x: aten.positive(x),
    lambda x, dtype: aten.to.dtype(x, dtype, ...),
    lambda x, device, dtype: aten.to.device(x, device, dtype, ...),
)
def remove_cast(x: Value, match: Match) -> Value | None:
    """to(x, dtype of x, device of x) = x"""
    return x if same_metadata(x.node, match.root) else None


@rule(lambda x: x.detach())
def remove_detach(x: Value) -> Value | str:
    """detach(x) = x where no gradient flows"""
    if _carries_gradient(x):
        return f"it stops the gradient of {x.node.name}"
    return x


def _carries_gradient(value: Value) -> bool:
    """Whether a value depends, through floating-point tensors, on an input or a trained weight."""
    pending, seen = [value.node], {value.node}
    while pending:
        node = pending.pop()
        if node.target is aten.detach.default or is_tensor(node) and not _is_inexact(node):
            continue
        if node.op == "placeholder":
            return True
        if node.op == "get_attr" and getattr(value.graph.value(node), "requires_grad", False):
            return True
        pending += [source for source in node.all_input_nodes if source not in seen]
        seen.update(pending)
    return False


def _is_inexact(node: fx.Node) -> bool:
    return dtype_of(node).is_floating_point or dtype_of(node).is_complex


# -- views to the same shape -----------------------------------------------------------------------


@rule(
    lambda x, size: x.reshape(size),
    lambda x, size: x.expand(size, ...),
    lambda x, first, last: torch.flatten(x, first, last),
    lambda x, dim, sizes: aten.unflatten.int(x, dim, sizes),
    lambda x, other: x.expand_as(other),
    lambda x, other: x.view_as(other),
    lambda x, other: x.reshape_as(other),
    lambda x, sizes: x.repeat(sizes),
    lambda x, sizes: x.tile(sizes),
    lambda x, dim, start, end, step: aten.slice.Tensor(x, dim, start, end, step),
    lambda x: aten.atleast_1d(x),
    lambda x: aten.atleast_2d(x),
    lambda x: aten.atleast_3d(x),
    lambda x, size: F.adaptive_avg_pool1d(x, size),
    lambda x, size: F.adaptive_avg_pool2d(x, size),
    lambda x, size: F.adaptive_avg_pool3d(x, size),
)
def remove_reshape(x: Value, match: Match) -> Value | None:
    """f(x) = x where f keeps the order of elements, and here the shape"""
    return x if same_metadata(x.node, match.root) else None


@rule(lambda x, pads: aten.pad(x, pads, ...))
def remove_pad(x: Value, pads: Any) -> Value | None:
    """pad(x, 0) = x; pads of 1 and −1 keep the shape too, but move the elements"""
    return x if _are_zero(pads) else None


@rule(lambda x, shifts, dims: torch.roll(x, shifts, dims))
def remove_roll(x: Value, shifts: Any) -> Value | None:
    """roll(x, 0) = x"""
    return x if _are_zero(shifts) else None


@rule(lambda x, dims: torch.flip(x, dims))
def remove_flip(x: Value, dims: Any) -> Value | None:
    """flip(x, []) = x, and so along dimensions of size 1"""
    sizes = [x.shape[dim] for dim in dims]
    return x if all(isinstance(size, int) and size == 1 for size in sizes) else None


@rule(lambda x, dims: x.permute(dims))
def remove_permute(x: Value, dims: Any) -> Value | None:
    """permute(x, [0, 1, 2…]) = x"""
    return x if list(dims) == sorted(dims) else None


@rule(lambda x, first, second: x.permute(first).permute(second))
def merge_permutes(x: Value, first: Any, second: Any) -> Value:
    """permute(permute(x, p), q) = permute(x, p[q]), which is x where q undoes p"""
    dims = [first[axis] for axis in second]
    return x if dims == sorted(dims) else x.permute(dims)


@rule(
    lambda x, size, scales: aten.upsample_nearest1d.vec(x, size, scales),
    lambda x, size, scales: aten.upsample_nearest2d.vec(x, size, scales),
    lambda x, size, scales: aten.upsample_nearest3d.vec(x, size, scales),
    lambda x, size, scales: aten._upsample_nearest_exact1d.vec(x, size, scales),
    lambda x, size, scales: aten._upsample_nearest_exact2d.vec(x, size, scales),
    lambda x, size, scales: aten._upsample_nearest_exact3d.vec(x, size, scales),
)
def remove_upsample(x: Value, scales: Any, match: Match) -> Value | str | None:
    """upsample(x) = x to the same size, where the scale is not another one that rounds to it"""
    if not same_metadata(x.node, match.root):
        return None
    if any(scale != 1 for scale in scales or ()):
        return f"its scale is {scales}, which may read other pixels"
    return x


@rule(
    lambda x, size, corners, scales: aten.upsample_linear1d.vec(x, size, corners, scales),
    lambda x, size, corners, scales: aten.upsample_bilinear2d.vec(x, size, corners, scales),
    lambda x, size, corners, scales: aten.upsample_trilinear3d.vec(x, size, corners, scales),
    lambda x, size, corners, scales: aten.upsample_bicubic2d.vec(x, size, corners, scales),
)
def keep_smooth_upsample(x: Value, match: Match) -> str | None:
    """0 · ∞ is nan: what interpolates answers nan beside infinities, also at the same size."""
    same = same_metadata(x.node, match.root)
    return "beside an infinite pixel it answers nan" if same else None


def _are_zero(numbers: Any) -> bool:
    return all(isinstance(number, int) and number == 0 for number in numbers)


# -- arithmetic with a neutral number --------------------------------------------------------------


@rule(
    lambda x: aten.add(x, 0, ...),
    lambda x: aten.sub(x, 0, ...),
    lambda x, size: aten.add(x, aten.full(size, 0, ...), ...),
    lambda x, size: aten.sub(x, aten.full(size, 0, ...), ...),
    lambda x, y: aten.add(x, aten.full_like(y, 0, ...), ...),
    lambda x, y: aten.sub(x, aten.full_like(y, 0, ...), ...),
)
def remove_zero(x: Any) -> Value | None:
    """x + 0 = x − 0 = x"""
    return x if isinstance(x, Value) else None


@rule(
    lambda x: x * 1,
    lambda x: x / 1,
    lambda x: x**1,
    lambda x, size: x * aten.full(size, 1, ...),
    lambda x, size: x / aten.full(size, 1, ...),
    lambda x, y: x * aten.full_like(y, 1, ...),
    lambda x, y: x / aten.full_like(y, 1, ...),
)
def remove_one(x: Any) -> Value | str | None:
    """x · 1 = x / 1 = x¹ = x"""
    if isinstance(x, Value) and x.dtype.is_complex:
        return "complex infinities times 1 have nan parts"
    return x if isinstance(x, Value) else None


# -- pairs that undo each other --------------------------------------------------------------------


@rule(lambda parts, dim: torch.cat(parts, dim))
def remove_single_cat(parts: list[Value]) -> Value | None:
    """cat([x]) = x"""
    return parts[0] if len(parts) == 1 else None


@rule(lambda parts, dim: torch.stack(parts, dim))
def remove_single_stack(parts: list[Value], dim: int) -> Any:
    """stack([x], d) = unsqueeze(x, d)"""
    return parts[0].unsqueeze(dim) if len(parts) == 1 else None


@rule(
    lambda x, sizes, dim, i: aten.split_with_sizes(x, sizes, dim)[i],
    lambda x, size, dim, i: aten.split.Tensor(x, size, dim)[i],
    lambda x, count, dim, i: aten.chunk(x, count, dim)[i],
)
def remove_single_split(x: Value, match: Match) -> Value | None:
    """split(x)[0] = x where it is the only part"""
    return x if len(match.nodes[1].meta["val"]) == 1 else None


@rule(lambda parts, sizes, dim, i: aten.split_with_sizes(torch.cat(parts, dim), sizes, dim)[i])
def remove_split_of_cat(parts: list[Value], sizes: Any, dim: int, i: int) -> Value | str:
    """split(cat([a, b…]), sizes of a, b…)[i] = [a, b…][i]"""
    found = [part.shape[dim] if dim < part.ndim else None for part in parts]
    if not all(isinstance(size, int) for size in (*found, *sizes)) or found != list(sizes):
        return "the parts are not known to have the sizes of what was put together"
    return parts[i]


@rule(lambda parts, dim, i: torch.unbind(torch.stack(parts, dim), dim)[i])
def remove_unbind_of_stack(parts: list[Value], i: int) -> Value:
    """unbind(stack([a, b…]))[i] = [a, b…][i]"""
    return parts[i]


@rule(lambda parts, dim: torch.cat(parts, dim), lambda parts, dim: torch.stack(parts, dim))
def remove_cat_of_split(parts: list[Value], dim: int, match: Match) -> fx.Node | str | None:
    """cat(split(x)) = x and stack(unbind(x)) = x, with all parts in their order"""
    split = parts[0].node.args[0] if parts[0].node.target is getitem else None
    if not isinstance(split, fx.Node) or split.target not in _UNDOES[match.root.target]:
        return None
    if [part.node.args for part in parts] != [(split, i) for i in range(len(split.meta["val"]))]:
        return "it does not put all parts together in their order"
    if split.args[-1] != dim:
        return "it puts the parts together along another dimension"
    return split.all_input_nodes[0]


_UNDOES: dict[Any, tuple[Any, ...]] = {
    aten.cat.default: (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default),
    aten.stack.default: (aten.unbind.int,),
}

RULES = (
    remove_dropout,
    remove_copy,
    remove_cast,
    remove_detach,
    remove_reshape,
    remove_pad,
    remove_roll,
    remove_flip,
    remove_permute,
    merge_permutes,
    remove_upsample,
    keep_smooth_upsample,
    remove_zero,
    remove_one,
    remove_single_cat,
    remove_single_stack,
    remove_single_split,
    remove_split_of_cat,
    remove_unbind_of_stack,
    remove_cat_of_split,
)


@dataclass(frozen=True)
class RemoveNoOps:
    """Remove calls that return what they were given, and pairs of calls that undo each other."""

    name: ClassVar[str] = "remove-no-ops"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
