"""Building the one call that stands for two products and a softmax."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from typing import Any

import torch
from torch import fx

from fxopt.attention.axes import (
    Layout,
    Side,
    arranged,
    blocks_of,
    last_axes,
    layout_of,
    regrouped,
)
from fxopt.attention.mask_sizes import HIDDEN, SCALINGS, SWALLOWS, MaskSizes, check_rows, is_half
from fxopt.attention.obstacle import HeldBack
from fxopt.attention.products import product_of
from fxopt.attention.scores import Scores, Term, follow_weights, path_from_product
from fxopt.pattern import Match
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_one, same_metadata, shape_of
from fxopt.values import Place, Value

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


def fuse(
    rewriter: Rewriter, sizes: MaskSizes, alike: dict[Any, fx.Node], softmax: fx.Node, limit: int
) -> None:
    """Fuse around one softmax; raise HeldBack where that is not possible.

    `alike` remembers attentions by the metadata of what they take: their own takes long to compute.
    """
    way = path_from_product(softmax.args[0])
    product = product_of(way[0])
    assert product is not None
    scores = Scores(sizes, product, product.axes, product.scale)
    scores.add(product.added, 1.0)
    for before, node in itertools.pairwise((*way, softmax)):
        scores.step(node, before)
    axis: Any = softmax.args[1]
    column = scores.axes[axis]
    second, weights = follow_weights(scores, softmax)
    layout = layout_of(scores, column, second, weights)
    match = Match((second.node,), (second.node, softmax, *reversed(way)), {})
    place = Place(rewriter, match, second.node)
    new = _Builder(scores, layout, place, alike).attention(limit)
    if not same_metadata(new, second.node):
        raise HeldBack("the result would be of another type")
    rewriter.replace(second.node, new)


class _Builder:
    """Builds the one call that stands for two products and a softmax."""

    def __init__(
        self, scores: Scores, layout: Layout, place: Place, alike: dict[Any, fx.Node]
    ) -> None:
        self.scores, self.layout, self.place, self.alike = scores, layout, place, alike
        self.axes = self._grouping()  # of the scores inside of the attention
        self.batch = layout.batch(self.axes)

    def _grouping(self) -> str:
        """Choose how the batch is grouped: as in the first product, if the masks fit that."""
        at, groupings = self.layout, self.scores.groupings
        if at.weight_axes != at.score_axes:
            return at.weight_axes
        for axes in map(self._axes_of, self.scores.terms):
            if axes == at.score_axes or not {at.row, at.column} <= {*axes}:
                continue
            static = all(isinstance(size, int) for size in groupings[axes])
            spreads = any(self._spreads(term, at.score_axes) for term in self.scores.terms)
            if spreads and (len(axes) <= 4 or not static):
                return axes
        return at.score_axes

    def value(self, node: fx.Node) -> Value:
        """Return a node as something to compute with."""
        return Value(node, self.place)

    def attention(self, limit: int) -> fx.Node:
        """Build queries, keys, values and mask, the call, and its axes in their old order."""
        at, scores = self.layout, self.scores
        self._check()
        mask = self._mask(limit)
        q = self._side(at.q, at.score_axes, at.row + at.inner)
        k = self._side(at.k, at.score_axes, at.column + at.inner)
        q, q_scale = self._scaled(q, at.row, at.column)
        k, k_scale = self._scaled(k, at.column, at.row)
        v = self._side(at.v, at.weight_axes, at.column + at.features)
        result = self._call(q, k, v, mask, scores.scale * q_scale * k_scale)
        result = self._to_grouping(result, self.axes, at.weight_axes)
        return arranged(result, at.batch(at.weight_axes) + at.row + at.features, at.out).node

    def _call(self, q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
        fakes = [x.fake for x in (q, k, v, mask) if x is not None]
        key = tuple((str(x.shape), str(x.stride()), x.dtype) for x in fakes)
        new = self.place.rewriter.insert(
            _ATTENTION, q.node, k.node, v.node, None if mask is None else mask.node, 0.0, False,
            scale=scale, enable_gqa=False, before=self.place.before, origin=self.place.match.nodes,
            like=self.alike.get(key),
        )  # fmt: skip
        self.alike[key] = new
        return self.value(new)

    def _check(self) -> None:
        at, dtype = self.layout, self.scores.dtype
        if {dtype_of(node) for node in (at.k.node, at.v.node, self.place.before)} != {dtype}:
            raise HeldBack("queries, keys, values and result are of different types")
        if not dtype.is_floating_point:
            raise HeldBack(f"attention does not take {dtype}")
        if any(self._size(shift, at.column) != 1 for shift in self.scores.shifts):
            raise HeldBack("what is taken away differs between the keys")

    def _side(self, side: Side, axes: str, rest: str) -> Value:
        """Bring q, k or v into the axes of attention."""
        x = arranged(self.value(side.node), side.axes, self.layout.batch(axes) + rest)
        return self._to_grouping(x, axes, self.axes)

    def _to_grouping(self, x: Any, old: str, new: str) -> Any:
        """Regroup the batch of q, k, v or the result."""
        if old == new:
            return x
        ends = {old[-2:], new[-2:]}
        if ends != {self.layout.row + self.layout.column}:
            raise HeldBack("its batch is regrouped, and its keys stand before its queries")
        rest, groupings = list(x.shape[-2:]), self.scores.groupings
        return regrouped(x, [*groupings[old][:-2], *rest], [*groupings[new][:-2], *rest])

    def _scaled(self, x: Value, axis: str, across: str) -> tuple[Value, float]:
        """Take numbers off q or k, for the scale; let tensors that scale their rows do it there."""
        scale, at = 1.0, self.layout
        while x.target in SCALINGS and x.users <= 1:
            inside, number = x.args[0], self.scores.constants.number(x.node.args[1])
            if not isinstance(inside, Value) or number is None or not _same_type(inside, x):
                break
            scale = scale / number if x.target is aten.div.Tensor else scale * number
            x = inside
        for factor, target in self.scores.factors:
            if self.axes != at.score_axes:
                raise HeldBack("its axes are regrouped, and a tensor scales its scores")
            along = [part for part in (axis, across) if self._size(factor, part) != 1]
            if along == [axis] or not along and axis == at.row:
                y = self.value(factor.nodes[0])
                own = last_axes(factor.axes, y.ndim)
                x = target(x, arranged(y, own, self.batch + axis + across))
            elif len(along) == 2:
                raise HeldBack("every score has a factor of its own")
        return x, scale

    def _size(self, term: Term, axis: str) -> Any:
        """Return the size of a tensor along an axis; 1 where it has none."""
        shape = shape_of(term.nodes[0])
        own = last_axes(term.axes, len(shape))
        return shape[own.index(axis)] if axis in own else 1

    # -- the mask ----------------------------------------------------------------------------------

    def _mask(self, limit: int) -> Value | None:
        """Build the sum of all masks; those that are constant are added up now."""
        terms, constants = self.scores.terms, self.scores.constants
        fixed = [term for term in terms if all(map(constants.holds, term.nodes))]
        moving = [term for term in terms if term not in fixed]
        if any(term.largest == math.inf for term in moving):
            raise HeldBack("a mask may hide all keys of a query, and attention is 0 there")
        half = is_half(self.scores.dtype)
        if half and any(SWALLOWS < term.largest < -HIDDEN for term in moving):
            raise HeldBack("a mask swallows the scores in half precision, and attention does not")
        if moving and len([term for term in terms if -HIDDEN < term.largest < math.inf]) > 1:
            raise HeldBack("its masks may add up to -inf")
        parts = [self._sum(fixed, limit)] if fixed else []
        for axes in dict.fromkeys(map(self._axes_of, moving)):
            total = functools.reduce(
                operator.add, [self._value_of(t) for t in moving if self._axes_of(t) == axes]
            )
            parts.append(self._at(total, axes))
        if not parts:
            return None
        mask: Value = functools.reduce(operator.add, parts)
        own = self.scores.dtype
        if torch.promote_types(mask.dtype, own) != own and mask.dtype is not torch.float32:
            raise HeldBack(f"a mask is {mask.dtype}")
        if mask.dtype is not own and torch.promote_types(mask.dtype, own) == own:
            mask = mask.to(own)
        return self._ranked(mask)

    def _ranked(self, mask: Any) -> Any:
        """Give a mask two axes, or all of them."""
        while mask.ndim < 2 or 2 < mask.ndim < len(self.axes):
            mask = mask.unsqueeze(0)
        return mask

    def _value_of(self, term: Term) -> Any:
        """Compute a term in the axes of its grouping."""
        x = term.compute(*map(self.value, term.nodes))
        return self._ordered(term, x)

    def _ordered(self, term: Term, x: Any) -> Any:
        return arranged(x, last_axes(term.axes, x.ndim), self._axes_of(term))

    def _axes_of(self, term: Term) -> str:
        """Return the axes of the grouping in which a term was added."""
        if not self.scores.groupings:
            return self.layout.score_axes
        for axes in self.scores.groupings:
            if {*axes} == {*term.axes}:
                return axes
        raise HeldBack("its axes are regrouped and permuted")

    def _at(self, x: Any, axes: str) -> Any:
        """Bring what has the axes of a grouping into those of attention."""
        if axes != self.axes:
            groupings = self.scores.groupings
            x = regrouped(x, groupings[axes], groupings[self.axes])
        own = last_axes(self.axes, x.ndim)
        return arranged(x, own, self.batch + self.layout.row + self.layout.column)

    def _spreads(self, term: Term, wanted: str) -> bool:
        """Whether a term must be repeated to be brought into another grouping."""
        axes, groupings = self._axes_of(term), self.scores.groupings
        if axes == wanted:
            return False
        with self.scores.constants.graph.info.fake_mode:
            x = self._ordered(term, term.compute(*(node.meta["val"] for node in term.nodes)))
        sizes = [1] * (len(axes) - x.dim()) + list(x.shape)
        for source, _ in blocks_of(groupings[axes], groupings[wanted]):
            real = [axis for axis in source if not is_one(groupings[axes][axis])]
            if len({is_one(sizes[axis]) for axis in real}) > 1:
                return True
        return False

    def _sum(self, terms: list[Term], limit: int) -> Value:
        """Register the sum of constant masks; raise HeldBack where it may hide a whole row."""
        spread = [self._axes_of(term) for term in terms if self._spreads(term, self.axes)]
        axes = spread[0] if spread else self.axes
        dtype, groupings = self.scores.dtype, self.scores.groupings
        sources = [node for term in terms for node in term.nodes]

        def compute(*values: torch.Tensor) -> torch.Tensor:
            rest, parts = iter(values), []
            for term in terms:
                x = self._ordered(term, term.compute(*(_wide(next(rest)) for _ in term.nodes)))
                own = self._axes_of(term)
                parts.append(x if own == axes else regrouped(x, groupings[own], groupings[axes]))
            total: torch.Tensor = functools.reduce(operator.add, parts)
            return total.to(dtype) if spread else self._ranked(self._at(total.to(dtype), axes))

        given = [self.scores.constants.value(node) for node in sources]
        mask = compute(*given)
        check_rows(mask, low=any(term.largest == math.inf for term in terms))
        if len(given) == 1 and mask.dtype == given[0].dtype and torch.equal(mask, given[0]):
            node = sources[0]
        elif mask.nbytes > max(limit, sum(value.nbytes for value in given)):
            return functools.reduce(
                operator.add, [self._at(self._value_of(t), self._axes_of(t)) for t in terms]
            )
        else:
            node = self.place.rewriter.constant_of(
                mask.contiguous(), compute, sources, name=f"{sources[0].target}_mask",
                before=self.place.before, origin=self.place.match.nodes,
            )  # fmt: skip
        return self._at(self.value(node), axes) if spread else self.value(node)


def _same_type(a: Value, b: Value) -> bool:
    return same_metadata(a.node, b.node)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.double() if value.is_floating_point() else value
