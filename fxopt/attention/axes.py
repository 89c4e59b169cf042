"""Which axis of q, k, v, masks and result is which, and how a tensor is brought into an order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.attention.obstacle import HeldBack
from fxopt.attention.products import Product
from fxopt.attention.scores import Scores, fresh_letters
from fxopt.shapes import is_one, same_shape
from fxopt.values import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Side:
    """q, k or v as it stands in its product."""

    node: fx.Node
    axes: str


@dataclass(frozen=True)
class Layout:
    """q, k and v, and their axes: `row` of the queries, `column` of the keys, and one each."""

    q: Side
    k: Side
    v: Side
    row: str
    column: str
    inner: str  # what q and k are summed over
    features: str  # of the values
    out: str  # the axes of the result
    score_axes: str  # behind the first product,
    weight_axes: str  # and in front of the second: another grouping, or the same

    def batch(self, axes: str) -> str:
        """Return those of the axes that are neither queries nor keys."""
        return "".join(x for x in axes if x not in (self.row, self.column))


def layout_of(scores: Scores, column: str, second: Product, weights: fx.Node) -> Layout:
    """Name the axes of both products; raise HeldBack where they are not those of attention."""
    product = scores.product
    left, right = (Side(*side) for side in product.sides())
    if (column in left.axes) == (column in right.axes):
        raise HeldBack("its softmax is not over the keys")
    q, k = (left, right) if column in right.axes else (right, left)
    inner = {*q.axes, *k.axes} - {*product.axes}
    if len(inner) != 1 or not inner <= {*q.axes} & {*k.axes}:
        raise HeldBack("its scores are summed over more than one axis")
    v, out = _named_values(scores, second, weights)
    features = {*v.axes} - {*scores.axes}
    if len(features) != 1 or {*out} != {*scores.axes} - {column} | features:
        raise HeldBack("its values are not summed over the keys alone")
    rows = [x for x in scores.axes if x in q.axes and x not in k.axes + v.axes]
    if not rows:
        raise HeldBack("it has no axis of queries")
    ends = [axes for axes in scores.groupings if {*axes} == {*scores.axes}]
    if scores.groupings and not ends:
        raise HeldBack("its axes are regrouped and permuted")
    return Layout(
        q, k, v, rows[-1], column, inner.pop(), features.pop(), out,
        product.axes, ends[0] if ends else product.axes,
    )  # fmt: skip


def _named_values(scores: Scores, second: Product, weights: fx.Node) -> tuple[Side, str]:
    """Return the values, and the axes of the result, in the letters of the scores."""
    own, other = second.sides() if second.left is weights else reversed(second.sides())
    letters = dict(zip(own[1], scores.axes, strict=True))
    new = [x for x in other[1] if x not in letters]
    letters.update(zip(new, fresh_letters(len(new), scores.letters + scores.axes), strict=True))
    axes, out = ("".join(letters[x] for x in side) for side in (other[1], second.axes))
    return Side(other[0], axes), out


def last_axes(axes: str, rank: int) -> str:
    """Return the axes of a tensor that broadcasts to `axes`."""
    return axes[len(axes) - rank :]


def arranged(x: Any, axes: str, wanted: str) -> Any:
    """Bring the axes of a tensor (or Value) into an order; those it has not get size 1.

    In front, where tensors broadcast anyway, missing axes are left out.
    """
    present = [letter for letter in wanted if letter in axes]
    if not present:
        return x
    x = _permuted(x, [axes.index(letter) for letter in present])
    front = wanted.index(present[0])
    for place, letter in enumerate(wanted[front:]):
        if letter not in axes:
            x = x.unsqueeze(place)
    return x


def _permuted(x: Any, order: list[int]) -> Any:
    if isinstance(x, Value) and x.target is aten.permute.default:
        x, order = x.args[0], [x.args[1][axis] for axis in order]
    return x if order == sorted(order) else x.permute(order)


def regrouped(x: Any, old: Sequence[Any], new: Sequence[Any]) -> Any:
    """Reshape a tensor (or Value) whose sizes are `old`, or 1 where it broadcasts, to `new`."""
    while x.ndim < len(old):
        x = x.unsqueeze(0)
    sizes, wide = [], list(x.shape)
    for source, target in blocks_of(old, new):
        if all(is_one(x.shape[axis]) for axis in source):
            sizes += [1] * len(target)
            continue
        sizes += [new[axis] for axis in target]
        for axis in source:
            wide[axis] = old[axis]
    if not same_shape(wide, x.shape):
        x = x.expand(_spelled(wide))
    return x.reshape(_spelled(sizes))


def _spelled(sizes: Sequence[Any]) -> list[int]:
    """Write a symbolic size as −1, of which there may be one."""
    found = [size if isinstance(size, int) else -1 for size in sizes]
    if found.count(-1) > 1:
        raise HeldBack("several sizes are symbolic")
    return found


def blocks_of(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Pair the runs of axes that have as many elements before and after a reshape.

    One merge: the side with fewer elements so far takes its next axis; where both have as many, a
    pair ends. All axes are one pair where symbolic sizes leave open which side has fewer.
    """
    blocks: list[tuple[list[int], list[int]]] = []
    source: list[int] = []
    target: list[int] = []
    before: Any = 1
    after: Any = 1
    i = j = 0
    while i < len(old) or j < len(new):
        if j == len(new) or i < len(old) and _is_at_most(before, after):
            before, i = before * _expression(old[i]), i + 1
            source.append(i - 1)
        else:
            after, j = after * _expression(new[j]), j + 1
            target.append(j - 1)
        if before == after:
            blocks.append((source, target))
            source, target, before, after = [], [], 1, 1
    return [(list(range(len(old))), list(range(len(new))))] if source or target else blocks


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _is_at_most(count: Any, other: Any) -> bool:
    """Compare two numbers of elements; symbolic ones by whether the first divides the second."""
    if isinstance(count, int) and isinstance(other, int):
        return count <= other
    return bool((other / count).as_numer_denom()[1] == 1)
