"""Replace slices that are put together again by one call for all of them.

Before                                       After
    a = x[:, 0::2, 0::2]                         y = reshape(x, [b, h/2, 2, w/2, 2, c])
    b = x[:, 1::2, 0::2]                         y = permute(y, [0, 1, 3, 4, 2, 5])
    c = x[:, 0::2, 1::2]                         y = reshape(y, [b, h/2, w/2, 4·c])
    d = x[:, 1::2, 1::2]
    y = cat([a, b, c, d], 3)

    y = cat([x[:, 1:3], x[:, 3:5], z], 1)        y = cat([x[:, 1:5], z], 1)

Every s-th row from row i on, for each i < s, is index i of the second dimension of [n / s, s]. That
is the way from space to depth in patch merging. Slices that follow each other are one slice.

Left alone: strides along the last dimensions (a focus layer on channels first), since moving single
elements is slower than slicing; strides that do not divide a size, or a size that is symbolic;
offsets that are missing, or come in an order that no permute has; slices that others use, where
nothing would be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import rank_of, shape_of

aten = torch.ops.aten
INT_MAX = 9223372036854775807  # how a slice says "to the end"
_SHORTEST_ROW = 16  # elements; shorter rows are slower to permute than to slice


@dataclass(frozen=True)
class ReplaceSlices:
    """Read with one call what several slices read for one concatenation."""

    name: ClassVar[str] = "replace-slices"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Look at each concatenation once."""
        rewriter = Rewriter(graph)
        for cat in graph.find(aten.cat.default):
            if not _replace_strided(rewriter, cat):
                _join_neighbours(rewriter, cat)
        return rewriter.result()


# -- from space to depth ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Strided:
    """x[a::s, b::t, …]: its source, (offset, stride) by dimension, and the slices that make it."""

    source: fx.Node
    reads: dict[int, tuple[int, int]]
    slices: tuple[fx.Node, ...]


def _strided(node: fx.Node) -> _Strided | None:
    """Return a value as strided reads of a tensor; None where it is something else."""
    reads: dict[int, tuple[int, int]] = {}
    slices = []
    while node.target is aten.slice.Tensor:
        source, dim, start, end, step = node.args
        whole = isinstance(start, int) and isinstance(step, int) and end == INT_MAX
        if not whole or step == 1 or dim in reads:
            break
        reads[dim] = (start, step)  # type: ignore[index, assignment]
        slices.append(node)
        node = source  # type: ignore[assignment]
    return _Strided(node, reads, tuple(slices)) if slices else None


def _replace_strided(rewriter: Rewriter, cat: fx.Node) -> bool:
    """cat([x[0::2], x[1::2]]) = reshape(permute(reshape(x)))"""
    pieces: Any = cat.args[0]
    parts: Any = [_strided(piece) for piece in pieces]
    if len(parts) < 2 or None in parts or len({part.source for part in parts}) > 1:
        return False
    source, strides = parts[0].source, {d: step for d, (_, step) in parts[0].reads.items()}
    if any({d: step for d, (_, step) in part.reads.items()} != strides for part in parts):
        return False
    sizes = shape_of(source)
    if not all(isinstance(sizes[d], int) and sizes[d] % s == 0 for d, s in strides.items()):
        rewriter.miss(cat, "a stride is not known to divide the size it goes along")
        return False
    row = math.prod(sizes[max(strides) + 1 :])
    if not isinstance(row, int) or row < _SHORTEST_ROW:
        rewriter.miss(cat, f"its rows have {row} elements, too few to be moved one by one")
        return False
    order = _order([{d: start for d, (start, _) in part.reads.items()} for part in parts], strides)
    if order is None:
        rewriter.miss(cat, "it does not put all offsets together in the order of a permute")
        return False
    if len(_dying({n for part in parts for n in part.slices}, cat)) < 3:
        rewriter.miss(cat, "a slice of it is used elsewhere too")
        return False
    return _write_strided(rewriter, cat, source, strides, order)


def _order(offsets: Sequence[dict[int, int]], strides: dict[int, int]) -> list[int] | None:
    """Return the strided dimensions, the one whose offset changes most slowly first."""
    for dims in permutations(strides):
        every = product(*(range(strides[dim]) for dim in dims))
        if [dict(zip(dims, at, strict=True)) for at in every] == list(offsets):
            return list(dims)
    return None


def _dying(slices: set[fx.Node], cat: fx.Node) -> set[fx.Node]:
    """Return the slices that go with the cat: nothing else uses them, nor a slice that stays."""
    left = set(slices)
    for node in sorted(slices, reverse=True):
        if not set(node.users) <= left | {cat}:
            left.discard(node)
    return left


def _write_strided(
    rewriter: Rewriter, cat: fx.Node, source: fx.Node, strides: dict[int, int], order: list[int]
) -> bool:
    split: list[Any] = []
    place, offset = {}, {}  # where a dimension and its offset stand once they are two
    for d, size in enumerate(shape_of(source)):
        place[d] = len(split)
        split.append(size // strides[d] if d in strides else size)
        if d in strides:
            offset[d] = len(split)
            split.append(strides[d])
    dims = []
    for d in range(rank_of(source)):
        dims += [offset[o] for o in order] if d == cat.args[1] else []
        dims.append(place[d])
    spelled = [_spelled(shape) for shape in (split, shape_of(cat))]
    if None in spelled:
        rewriter.miss(cat, "its shape has several symbolic sizes")
        return False
    origin = [cat, *cat.args[0]]  # type: ignore[misc]
    new = rewriter.insert(aten.reshape.default, source, spelled[0], before=cat, origin=origin)
    new = rewriter.insert(aten.permute.default, new, dims, before=cat, origin=origin)
    new = rewriter.insert(aten.reshape.default, new, spelled[1], before=cat, origin=origin)
    rewriter.replace(cat, new)
    return True


def _spelled(shape: Sequence[Any]) -> list[int] | None:
    """Return a shape with its symbolic size as −1; None where there are several."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return None if sizes.count(-1) > 1 or -1 in sizes and 0 in sizes else sizes


# -- neighbours ------------------------------------------------------------------------------------


def _join_neighbours(rewriter: Rewriter, cat: fx.Node) -> None:
    """cat([x[a:b], x[b:c], y]) = cat([x[a:c], y])"""
    dim: Any = cat.args[1]
    runs: list[list[fx.Node]] = []
    for part in cat.args[0]:  # type: ignore[union-attr]
        if runs and _follows(part, runs[-1][-1], cat):  # type: ignore[arg-type]
            runs[-1].append(part)  # type: ignore[arg-type]
        else:
            runs.append([part])  # type: ignore[list-item]
    if all(len(run) == 1 for run in runs):
        return
    parts = []
    for run in runs:
        first, last = run[0], run[-1]
        if first is not last:
            ends = (first.args[2], last.args[3])
            first = rewriter.insert(
                aten.slice.Tensor, first.args[0], dim, *ends, 1, before=cat, origin=run
            )
        parts.append(first)
    rewriter.replace(cat, rewriter.insert(aten.cat.default, parts, dim, before=cat))


def _follows(part: fx.Node, last: fx.Node, cat: fx.Node) -> bool:
    """Whether one slice begins where the other ends, and only `cat` uses both."""
    if not all(n.target is aten.slice.Tensor and len(n.users) == 1 for n in (part, last)):
        return False
    source, dim, _, end, step = last.args
    if (source, dim, end, step) != (*part.args[:3], part.args[4]) or not isinstance(end, int):
        return False
    return bool(step == 1 and dim == cat.args[1])
