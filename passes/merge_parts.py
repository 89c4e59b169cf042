"""Cut once, and do once to the whole what is done to each of its parts.

Before                                       After
    y = permute(reshape(x, [b, n, 3, h, d]),     y = permute(reshape(x, [b, n, 3·h, d]),
                [2, 0, 3, 1, 4])                             [0, 2, 1, 3])
    q, k, v = y[0], y[1], y[2]                   q, k, v = split(y, [h, h, h], 1)

    q, k = split(x, [c, c], 2)                   y = permute(reshape(x, [b, n, 2·h, d]),
    q = permute(reshape(q, [b, n, h, d]),                    [0, 2, 1, 3])
                [0, 2, 1, 3])                    q, k = split(y, [h, h], 1)
    k = the same of k

Selecting each index of a dimension is splitting: row-major, [3, h] is [3·h], and index i of the 3
is the i-th h of the 3·h. Slices that are all of a dimension are a split, too. A permute of each
part is a permute of the whole, and so is a reshape that leaves each part a run of the whole. All
of them are views; what is saved are calls.

Left alone: indices or slices that leave something out or overlap; a dimension without another one
after it, where splitting would need squeezing; parts that are treated differently, where more would
be added than saved; parts that are outputs, which a caller may write to; symbolic sizes of parts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_tensor, rank_of, same_shape, shape_of

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
_SPLIT, _PERMUTE = aten.split_with_sizes.default, aten.permute.default

Parts = dict[int, list[fx.Node]]  # the nodes that are part number i, or use it


@dataclass(frozen=True)
class MergeParts:
    """Split a tensor once instead of selecting parts of it, and move it before it is split."""

    name: ClassVar[str] = "merge-parts"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Turn selections and slices into splits first: what is done to parts then shows."""
        rewriter = Rewriter(graph)
        for node in list(graph.graph.nodes):
            if not node._erased and is_tensor(node):
                _split_selections(rewriter, node)
                _split_slices(rewriter, node)
        pending = graph.find(_SPLIT)
        while pending and not rewriter.out_of_fuel:
            split = pending.pop()
            moved = _permute_whole(rewriter, split) or _reshape_whole(rewriter, split)
            pending += [moved] if moved is not None else []
        return rewriter.result()


# -- cutting once ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Selections:
    """All that is selected along one dimension of a tensor, which may be permuted before."""

    whole: fx.Node
    dim: int
    parts: Parts

    @property
    def source(self) -> Any:
        """What the permute permutes; the tensor itself without one."""
        return self.whole.args[0] if self.whole.target is _PERMUTE else self.whole

    @property
    def order(self) -> list[Any]:
        """The dimensions of the source, in the order in which the tensor has them."""
        permuted: Any = self.whole.args[1] if self.source is not self.whole else None
        return list(permuted or range(rank_of(self.whole)))

    @property
    def place(self) -> int:
        """The dimension of the source that is selected from; the next one will be joined to it."""
        return int(self.order[self.dim])

    @property
    def kept(self) -> list[int]:
        """How the source is permuted once its two dimensions are one."""
        return [d - (d > self.place) for d in self.order if d != self.place]

    def obstacle(self) -> str | None:
        """Why this shall not be one split; an empty text where that is not worth telling."""
        count, sizes = shape_of(self.whole)[self.dim], shape_of(self.source)
        if not isinstance(count, int) or count < 2 or set(self.parts) != set(range(count)):
            return ""  # most selections take a few of many
        if self.place + 1 == len(sizes) or not isinstance(sizes[self.place + 1], int):
            return "no dimension of known size follows the one that is selected from"
        if 2 + (self.kept != sorted(self.kept)) >= count + self._dying():
            return "splitting would take as many calls as selecting"
        if _spelled(sizes) is None:
            return "its shape has several symbolic sizes"
        return _written(node for nodes in self.parts.values() for node in nodes)

    def _dying(self) -> int:
        """How many calls before the selections go with them."""
        parts = {part for nodes in self.parts.values() for part in nodes}
        alone = all(user in parts or set(user.users) <= parts for user in self.whole.users)
        if not alone or self.source is self.whole:
            return int(alone and self.whole.target in _RESHAPES)
        return 1 + (self.source.target in _RESHAPES and len(self.source.users) == 1)

    def split(self, rewriter: Rewriter) -> None:
        """Join the two dimensions, permute, and split."""
        source, place = self.source, self.place
        sizes: Any = _spelled(shape_of(source))
        size, count = sizes[place + 1], len(self.parts)
        sizes[place : place + 2] = [count * size]
        base = source.args[0] if source.target in _RESHAPES else source
        first = min(node for nodes in self.parts.values() for node in nodes)
        whole = rewriter.insert(aten.reshape.default, base, sizes, before=first, origin=source)
        whole = _permuted(rewriter, whole, self.kept, before=first, origin=self.whole)
        _replace(rewriter, self.parts, whole, [size] * count, self.kept.index(place), first)


def _selections(whole: fx.Node) -> list[_Selections]:
    """Return what is selected from a tensor, by dimension."""
    found: dict[Any, Parts] = {}
    for user in whole.users:
        picked: list[tuple[Any, fx.Node]] = []
        if user.target is aten.unbind.int:
            picked = [(part.args[1], part) for part in user.users]
        elif user.target is aten.select.int and isinstance(user.args[2], int):
            picked = [(user.args[2], user)]
        for index, part in picked:
            found.setdefault(user.args[1], {}).setdefault(index, []).append(part)
    return [_Selections(whole, dim, parts) for dim, parts in found.items()]


def _split_selections(rewriter: Rewriter, whole: fx.Node) -> None:
    """whole[0], whole[1], … = split(whole with two dimensions joined)"""
    for selections in _selections(whole):
        reason = selections.obstacle()
        if reason is None:
            selections.split(rewriter)
            return
        if reason:
            rewriter.miss(whole, reason)


def _split_slices(rewriter: Rewriter, whole: fx.Node) -> None:
    """whole[:a], whole[a:b], … = split(whole, [a, b − a, …])"""
    slices: dict[Any, dict[Any, list[fx.Node]]] = {}
    for user in whole.users:
        if user.target is aten.slice.Tensor and user.args[0] is whole and user.args[4] == 1:
            slices.setdefault(user.args[1], {}).setdefault(user.args[2], []).append(user)
    for dim, found in slices.items():
        if len(found) < 2 or not all(isinstance(start, int) for start in found):
            continue
        starts = sorted(found)
        sizes = [shape_of(found[start][0])[dim] for start in starts]
        nodes = [node for start in starts for node in found[start]]
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        if [*starts, shape_of(whole)[dim]] != [0, *ends] or len(nodes) != len(starts):
            continue
        reason = _written(nodes)
        if reason is None:
            parts = {index: [node] for index, node in enumerate(nodes)}
            _replace(rewriter, parts, whole, sizes, dim, min(nodes))
            return
        rewriter.miss(whole, reason)


def _replace(
    rewriter: Rewriter, parts: Parts, whole: fx.Node, sizes: list[int], dim: int, before: fx.Node
) -> fx.Node:
    """Let the parts of a new split stand for nodes, by number: one rewrite. Return the split."""
    nodes = [node for same in parts.values() for node in same]
    split = rewriter.insert(_SPLIT, whole, sizes, dim, before=before, origin=nodes)
    new = {}
    for index, same in parts.items():
        part = rewriter.insert(getitem, split, index, before=before, origin=same)
        new.update(dict.fromkeys(same, part))
    rewriter.replace(new)
    return split


# -- moving the whole ------------------------------------------------------------------------------


def _users_of_parts(split: fx.Node) -> Parts:
    """Return what uses part i of a split."""
    users: Parts = {}
    for part in split.users:
        users.setdefault(part.args[1], []).extend(part.users)  # type: ignore[arg-type]
    return {index: nodes for index, nodes in sorted(users.items()) if nodes}


def _permute_whole(rewriter: Rewriter, split: fx.Node) -> fx.Node | None:
    """permute(split(x)[i]) = split(permute(x))[i], with the permute that most parts have"""
    x, sizes, dim = split.args
    users = _users_of_parts(split)
    permutes = [user for nodes in users.values() for user in nodes if user.target is _PERMUTE]
    counts = Counter(tuple(permute.args[1]) for permute in permutes)  # type: ignore[arg-type]
    if not counts:
        return None
    order, saved = counts.most_common(1)[0]
    back = [i for i, nodes in users.items() if any(n.target is not _PERMUTE for n in nodes)]
    if saved <= 1 + len(back):
        return None
    reason = _written(permutes)
    if reason is not None:
        rewriter.miss(split, reason)
        return None
    whole = rewriter.insert(_PERMUTE, x, list(order), before=split, origin=permutes)
    new = rewriter.insert(_SPLIT, whole, sizes, order.index(dim), before=split, origin=split)
    pairs: dict[fx.Node, fx.Node] = {}
    for index, nodes in users.items():
        part = rewriter.insert(getitem, new, index, before=split, origin=nodes)
        for user in nodes:
            permuted = user.target is _PERMUTE
            old: Any = user if permuted else user.args[0]
            dims: Any = user.args[1] if permuted else range(len(order))
            if old not in pairs:
                turn = [order.index(d) for d in dims]
                pairs[old] = _permuted(rewriter, part, turn, before=split, origin=old)
    rewriter.replace(pairs)
    return new


def _reshape_whole(rewriter: Rewriter, split: fx.Node) -> fx.Node | None:
    """reshape(split(x)[i]) = split(reshape(x))[i], where one new dimension tells parts apart"""
    x, sizes, dim = split.args
    users = _users_of_parts(split)
    nodes = [user for same in users.values() for user in same]
    if len(users) < max(2, len(sizes)) or not all(n.target in _RESHAPES for n in nodes):  # type: ignore
        return None
    shapes = [shape_of(same[0]) for same in users.values()]
    if not all(same_shape(shape_of(n), shape_of(same[0])) for same in users.values() for n in same):
        return None
    place = _telling(shapes, shape_of(x)[: int(dim)])  # type: ignore[arg-type]
    if place is None:
        rewriter.miss(split, "its parts get shapes that no split has")
        return None
    wanted = [*shapes[0]]
    wanted[place] = sum(shape[place] for shape in shapes)
    spelled, reason = _spelled(wanted), _written(nodes)
    if spelled is None or reason is not None:
        rewriter.miss(split, reason or "its shape has several symbolic sizes")
        return None
    whole = rewriter.insert(aten.reshape.default, x, spelled, before=split, origin=nodes)
    return _replace(rewriter, users, whole, [shape[place] for shape in shapes], place, split)


def _telling(shapes: Sequence[Sequence[Any]], before: Sequence[Any]) -> int | None:
    """Return the dimension that tells parts of these shapes apart; None where there is none.

    What stands before it are the sizes before the dimension that is split, grouped in any way.
    """
    if len({len(shape) for shape in shapes}) > 1:
        return None
    for place in range(len(shapes[0])):
        rest = [[*shape[:place], *shape[place + 1 :]] for shape in shapes]
        alike = all(same_shape(rest[0], other) for other in rest)
        known = all(isinstance(shape[place], int) for shape in shapes)
        if alike and known and same_shape([math.prod(shapes[0][:place])], [math.prod(before)]):
            return place
    return None


# -- both ------------------------------------------------------------------------------------------


def _written(nodes: Iterable[fx.Node]) -> str | None:
    """Which of the nodes a caller, or the graph at its end, may write to or read late."""
    for node in nodes:
        if any(user.op == "output" or user.target is aten.copy_.default for user in node.users):
            return f"{node.name} is an output"
    return None


def _spelled(shape: Sequence[Any]) -> list[int] | None:
    """Return a shape with its symbolic size as −1; None where there are several."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return None if sizes.count(-1) > 1 or -1 in sizes and 0 in sizes else sizes


def _permuted(
    rewriter: Rewriter, x: fx.Node, dims: list[int], *, before: fx.Node, origin: Any
) -> fx.Node:
    if dims == sorted(dims):
        return x
    return rewriter.insert(_PERMUTE, x, dims, before=before, origin=origin)
