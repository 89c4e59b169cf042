"""Replace what puts rows into another order by one gather.

Before                                       After
    y = roll(x, [−3, −3], [1, 2])                y = reshape(x, [b, 3136, c])
    y = reshape(y, [b, 8, 7, 8, 7, c])           y = index_select(y, 1, rows)
    y = permute(y, [0, 1, 3, 2, 4, 5])           y = reshape(y, [b, 64, 49, c])
    y = reshape(y, [b, 64, 49, c])

    y = reshape(x, [b, 2, c, h, w])              p = index_select(x, 1, rows)
    y = permute(y, [0, 2, 1, 3, 4])              q = index_select(x, 1, more_rows)
    y = reshape(y, [b, 2·c, h, w])
    p, q = split(y, [c, c], 1)

Rolls, channel shuffles, reshapes and permutes that touch neither what stands before certain
dimensions nor what stands after them put rows into another order; a row is what stands after.
Which order is known at compile time: it is what the same calls make of 0, 1, 2, …
A roll over several dimensions copies everything once per dimension, and a window partition once
more; a gather copies each row once.

Left alone: rows of few elements, where copying one by one is slower; orders that take no fewer
calls as a gather; values inside that others use; rows of symbolic number; a roll of all elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import same_shape, shape_of

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
_PERMUTE, _ROLL, _SPLIT = aten.permute.default, aten.roll.default, aten.split_with_sizes.default
_CHANNELS = aten.channel_shuffle.default
_SHORTEST_ROW = 16  # elements; shorter rows are slower to gather than to permute


@dataclass(frozen=True)
class ReplaceShuffles:
    """Gather rows in the order in which rolls and permutes put them."""

    name: ClassVar[str] = "replace-shuffles"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Begin with what moves most dimensions: it includes what moves some of them."""
        rewriter = Rewriter(graph)
        found = [*graph.find(_ROLL), *graph.find(_CHANNELS), *graph.find(_PERMUTE)]
        for node in sorted(found, key=lambda node: -len(_touched(node))):
            if not node._erased:
                _replace_shuffle(rewriter, node)
        return rewriter.result()


@dataclass(frozen=True)
class _Shuffle:
    """Calls that only put rows into another order; rows are counted over a range of dimensions."""

    calls: list[fx.Node]  # from the first to the last
    first: range  # the dimensions of the first call's argument that the rows are counted over
    ranges: list[range]  # the same of each call's result: beside sizes of 1 there is a choice

    @property
    def last(self) -> range:
        """The dimensions of the last call's result that the rows are counted over."""
        return self.ranges[-1]

    @property
    def source(self) -> Any:
        """What is put into another order."""
        return self.calls[0].args[0]

    @property
    def sizes(self) -> list[Any]:
        """The sizes of the dimensions that the rows of the source are counted over."""
        return [shape_of(self.source)[d] for d in self.first]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.sizes)

    @property
    def flat(self) -> list[Any]:
        """The shape of the source with its rows in one dimension."""
        shape = shape_of(self.source)
        return [*shape[: self.first.start], self.rows, *shape[self.first.stop :]]

    def order(self) -> torch.Tensor:
        """Return which row of the source stands where: what the calls make of 0, 1, 2, …"""
        rows = torch.arange(self.rows).reshape(self.sizes)
        for call, dims in zip(self.calls, self.ranges, strict=True):
            if call.target is _ROLL:
                rows = rows.roll(call.args[1], [d - dims.start for d in call.args[2]])  # type: ignore
            elif call.target is _CHANNELS:
                rows = rows.reshape(call.args[1], -1).T.reshape(-1)  # type: ignore
            elif call.target is _PERMUTE:
                rows = rows.permute([call.args[1][d] - dims.start for d in dims])  # type: ignore
            else:
                rows = rows.reshape([shape_of(call)[d] for d in dims])
        return rows.reshape(-1)


def _shuffle_around(node: fx.Node) -> _Shuffle | None:
    """Return the longest shuffle that a roll or permute is a part of; None where it is none."""
    touched = _touched(node)
    if not touched:
        return None
    first = range(min(touched), max(touched) + 1)
    calls, ranges = [node], [first]
    while (above := _only_user_above(calls[0])) is not None:
        dims = _through(above, first, above, above.args[0])
        if dims is None:
            break
        calls, ranges, first = [above, *calls], [first, *ranges], dims
    while (below := _only_user(calls[-1])) is not None:
        dims = _through(below, ranges[-1], below.args[0], below)
        if dims is None:
            break
        calls, ranges = [*calls, below], [*ranges, dims]
    return _Shuffle(calls, first, ranges)


def _touched(node: fx.Node) -> list[int]:
    """Return the dimensions that a call moves something along."""
    order: Any = node.args[1]
    if node.target is _PERMUTE:
        return [d for d, other in enumerate(order) if d != other]
    if node.target is _CHANNELS:
        return [1]
    known = all(isinstance(shift, int) for shift in order)
    return list(node.args[2]) if known else []  # type: ignore[arg-type]


def _only_user_above(call: fx.Node) -> fx.Node | None:
    source: Any = call.args[0]
    return source if source.op == "call_function" and len(source.users) == 1 else None


def _only_user(call: fx.Node) -> fx.Node | None:
    user = next(iter(call.users), None)
    return user if len(call.users) == 1 and user is not None and user.op != "output" else None


def _through(call: fx.Node, dims: range, here: Any, there: Any) -> range | None:
    """Return the dimensions of rows on the other side of a call; None where it does more."""
    if call.target in _RESHAPES:
        return _same_range(shape_of(here), dims, shape_of(there))
    if call.target is _PERMUTE:
        order: Any = call.args[1]
        return dims if all(d in dims for d, other in enumerate(order) if d != other) else None
    if call.target is _ROLL and call.args[2]:
        rolled: Any = call.args[2]
        return dims if all(d in dims for d in rolled) else None
    return None


def _same_range(here: Sequence[Any], dims: range, there: Sequence[Any]) -> range | None:
    """Return the range of dimensions in another shape that has as many elements on either side."""
    before, after = math.prod(here[: dims.start]), math.prod(here[dims.stop :])
    rank = len(there)
    starts = [d for d in range(rank) if same_shape([math.prod(there[:d])], [before])]
    stops = [d for d in range(1, rank + 1) if same_shape([math.prod(there[d:])], [after])]
    if not starts or not stops or stops[0] <= starts[-1]:
        return None
    return range(starts[-1], stops[0])


def _replace_shuffle(rewriter: Rewriter, node: fx.Node) -> None:
    """f(x) = x[order] where f puts rows into another order; split(f(x))[i] = x[part of order]"""
    shuffle = _shuffle_around(node)
    if shuffle is None or not all(isinstance(n, int) and n > 0 for n in shuffle.sizes):
        return
    end = shuffle.calls[-1]
    results = _parts(shuffle) or {end: (0, shuffle.rows)}
    reason = _obstacle(shuffle, results)
    if reason is not None:
        if reason:
            rewriter.miss(node, reason)
        return
    source, dim, order = shuffle.source, shuffle.first.start, shuffle.order()
    if torch.equal(order, torch.arange(len(order))):
        return  # only sizes of 1 move, which a reshape does
    origin = shuffle.calls
    if not same_shape(shuffle.flat, shape_of(source)):
        flat = _spelled(shuffle.flat)
        source = rewriter.insert(aten.reshape.default, source, flat, before=end, origin=origin)
    device = source.meta["val"].device
    new = {}
    for result, (start, stop) in results.items():
        rows = order[start:stop].to(device)
        index = rewriter.constant(
            lambda rows=rows: rows, [], name=f"{node.name}_rows", before=end, origin=origin
        )
        part = rewriter.insert(
            aten.index_select.default, source, dim, index, before=end, origin=origin
        )
        if not same_shape(shape_of(part), shape_of(result)):
            shape = _spelled(shape_of(result))
            part = rewriter.insert(aten.reshape.default, part, shape, before=end, origin=origin)
        new[result] = part
    rewriter.replace(new)


def _parts(shuffle: _Shuffle) -> dict[fx.Node, tuple[int, int]]:
    """Return the parts that the result is split into, with their rows; none where it is not."""
    split = _only_user(shuffle.calls[-1])
    if split is None or split.target is not _SPLIT or len(shuffle.last) > 1:
        return {}
    sizes: Any = split.args[1]
    if split.args[2] != shuffle.last.start or not all(part.users for part in split.users):
        return {}
    ends = list(accumulate(sizes))
    starts = [end - size for end, size in zip(ends, sizes, strict=True)]
    return {part: (starts[part.args[1]], ends[part.args[1]]) for part in split.users}  # type: ignore


def _obstacle(shuffle: _Shuffle, results: dict[fx.Node, tuple[int, int]]) -> str | None:
    """Why this shall not be a gather; an empty text where that is not worth telling."""
    end = shuffle.calls[-1]
    calls = sum(_weight(call) for call in shuffle.calls) + (end not in results)
    flatten = not same_shape(shuffle.flat, shape_of(shuffle.source))
    kept = shape_of(end)[: shuffle.last.start], shape_of(end)[shuffle.last.stop :]
    source = shape_of(shuffle.source)
    given = source[: shuffle.first.start], source[shuffle.first.stop :]
    reshape = len(shuffle.last) > 1 or not all(map(same_shape, kept, given))
    if flatten + len(results) * (1 + reshape) >= calls:
        return ""
    row = math.prod(given[1])
    if not isinstance(row, int) or row < _SHORTEST_ROW:
        return f"its rows have {row} elements, too few to be gathered one by one"
    if _spelled(shuffle.flat) is None or _spelled(shape_of(end)) is None:
        return "its shape has several symbolic sizes"
    return None


def _weight(call: fx.Node) -> int:
    """How many calls a call stands for: a roll cuts and joins once per dimension."""
    if call.target is _CHANNELS:
        return 3
    return 2 * len(call.args[2]) if call.target is _ROLL else 1  # type: ignore[arg-type]


def _spelled(shape: Sequence[Any]) -> list[int] | None:
    """Return a shape with its symbolic size as −1; None where there are several."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return None if sizes.count(-1) > 1 or -1 in sizes and 0 in sizes else sizes
