"""Reshapes: cut into blocks of dimensions that cover the same elements.

Within a block, the grid of identities is reshaped as the tensor is, and read off again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.partition import Ids
from fxopt.shapes import shape_of

aten = torch.ops.aten


@follows(
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
    aten.reshape_as.default,
)  # fmt: skip
def _reshape(follow: Follower, node: fx.Node) -> Along:
    x = arguments(node)[0]
    assert isinstance(x, fx.Node)
    along, before, after = follow.of(x), _hints(x), _hints(node)
    if before is None or after is None or 0 in before:
        return follow.unknown(node, "the sizes of a reshape are known only when it runs")
    if not _holds_for_all_sizes(x, node, before, after):
        return follow.unknown(node, "a reshape mixes them with a dimension of unknown size")
    found: list[Ids | None] = [None] * len(after)
    for number, (inner, outer) in enumerate(blocks(before, after)):
        tracked = [dim for dim in inner if along[dim] is not None]
        if not tracked:
            continue
        if len(inner) + len(outer) > 2 and not _is_static(x, node, inner, outer):
            for dim in tracked:
                text = "a reshape merges them with a dimension of unknown size"
                follow.freeze(node, along[dim], text)
            continue
        dim = _most_channels(follow, node, tracked, along)
        grid = _grid(along[dim], [before[d] for d in inner], inner.index(dim))
        grid = grid.reshape([after[d] for d in outer])
        axis, ids = _read_off(follow, node, f"block {number}", grid)
        if axis is not None and isinstance(shape_of(node)[outer[axis]], int):
            found[outer[axis]] = ids
        elif axis is not None:
            follow.freeze(node, ids, "a reshape merges them with a dimension of unknown size")
    return tuple(found)


def _grid(ids: Ids | None, sizes: list[int], axis: int) -> Ids:
    """Return a grid of these sizes that holds identities along one axis, repeated along others."""
    assert ids is not None
    spread = [size if place == axis else 1 for place, size in enumerate(sizes)]
    return np.ascontiguousarray(np.broadcast_to(ids.reshape(spread), sizes))


def blocks(before: list[int], after: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Cut two shapes into the shortest runs of dimensions that cover the same elements."""
    i, j = 0, 0
    while i < len(before) or j < len(after):
        inner: list[int] = []
        outer: list[int] = []
        a = b = 1
        while a != b or not (inner or outer):
            if (a <= b and i < len(before)) or j >= len(after):
                inner.append(i)
                a, i = a * before[i], i + 1
            else:
                outer.append(j)
                b, j = b * after[j], j + 1
        yield inner, outer


def _most_channels(follow: Follower, node: fx.Node, tracked: list[int], along: Along) -> int:
    """Of several dimensions that are merged, only that with the most channels may lose some."""

    def free(dim: int) -> int:
        ids = along[dim]
        assert ids is not None
        return len(np.unique(follow.partition.roots(ids[~follow.partition.is_frozen(ids)])))

    kept = max(tracked, key=free)
    for dim in tracked:
        if dim != kept:
            follow.freeze(node, along[dim], "a reshape merges them with channels of another kind")
    return kept


def _read_off(
    follow: Follower, node: fx.Node, place: str, grid: Ids
) -> tuple[int | None, Ids | None]:
    """Return along which axis of a grid its identities vary, and those along it.

    Where they vary along several, one is chosen, and they are tied along the others.
    """
    roots = follow.partition.roots(grid)
    varies = [axis for axis in range(grid.ndim) if _differs(roots, axis)]
    if not varies:
        follow.freeze(node, grid.reshape(-1), "they go together, and one has to stay")
        return None, None
    seen = grid[tuple(slice(None) if axis in varies else slice(1) for axis in range(grid.ndim))]
    if len(varies) == 1:
        return varies[0], np.ascontiguousarray(seen).reshape(-1)
    return follow.split(node, place, np.ascontiguousarray(seen).reshape(-1), seen.shape)


def _is_static(x: fx.Node, node: fx.Node, inner: list[int], outer: list[int]) -> bool:
    """Whether all sizes of a block are plain integers."""
    sizes = [shape_of(x)[d] for d in inner] + [shape_of(node)[d] for d in outer]
    return all(isinstance(size, int) for size in sizes)


def _holds_for_all_sizes(
    x: fx.Node, node: fx.Node, before: list[int], after: list[int]
) -> bool:
    """Whether the blocks of the example's sizes are those of any: their products are the same."""
    return all(
        sympy.expand(
            sympy.Mul(*(_expression(shape_of(x)[d]) for d in inner))
            - sympy.Mul(*(_expression(shape_of(node)[d]) for d in outer))
        )
        == 0
        for inner, outer in blocks(before, after)
        if not _is_static(x, node, inner, outer)
    )


def _expression(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def _differs(roots: Ids, axis: int) -> bool:
    """Whether identities are not all alike along an axis."""
    first = roots.take([0], axis)
    return bool((roots != first).any())


def _hints(node: fx.Node) -> list[int] | None:
    """Return the sizes of the example; None where one depends on data."""
    found = []
    for size in shape_of(node):
        if isinstance(size, int):
            found.append(size)
        elif size.node.hint is not None:
            found.append(int(size.node.hint))
        else:
            return None
    return found
