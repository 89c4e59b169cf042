"""Fuse attention that is written by hand into one scaled dot-product attention.

Before                                        After
    s = matmul(q, permute(k)) * a + bias          y = scaled_dot_product_attention(
    s = masked_fill(s, m, lowest)                     q, k, v, masked_fill(bias, m, lowest),
    y = matmul(dropout(softmax(s)), v)                scale=a)

Both are softmax(a · q·kᵀ + mask) · v. What counts is which axes each product sums over, so matmul,
bmm, baddbmm and einsum are all read as einsum, and q, k, v may stand on either side, in any layout,
of rank 2 to any. The scale may stand on q, on k, on both, or behind the product; a scale per head
or row goes to q. Masks are added, or filled in; several become one, where they are constants at
compile time. Batch and heads may be merged and split again around a mask. A softmax does not change
where one number per row is taken away before it.

Then all attentions, also those that were one call before: a constant mask that hides nothing goes,
a constant triangle becomes `is_causal`, and keys and values whose heads are repeated become
`enable_gqa`.

A float mask is added, so a row that a mask hides with the lowest number stays uniform (its scores,
filled over before, then get a gradient). For a row of scores that is −inf throughout, PyTorch's
kernels give 0, and softmax nan; its fused CPU kernel also gives 0 where all scores of a row are
nan. This pass counts on finite q and k, whose product does not overflow, and checks the masks. The
weights are rounded to half precision later than before.

Left alone: a mask with −inf that may hide a whole row; scores that are filled with a number of
ordinary size, which is another function than adding it; weights or scores that are used elsewhere,
or that a call mixes, bounds or bends in between (talking heads, clamp, tanh); a softmax over what
is not the product of two tensors; masks larger than the scores; training-mode dropout.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_letters
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.constants import Constants
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, rank_of, same_metadata, same_shape, shape_of
from fxopt.text import target_text
from fxopt.values import Place, Value

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_HIDDEN = -1e30  # every score is lost in a number below this: filling it in is adding it
_LOW = -1e8  # hides a key as well, but not where all keys of a query are hidden
_REACH = 24  # how many calls are looked at on each side of a softmax


class _HeldBack(Exception):
    """Why this softmax is not fused, in words."""


@dataclass(frozen=True)
class FuseAttention:
    """Replace two products with a softmax between them by one scaled dot-product attention.

    Constant masks are added up at compile time unless the sum has more than `largest_mask` bytes.
    """

    largest_mask: int = 2**24

    name: ClassVar[str] = "fuse-attention"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fuse around each softmax, then simplify the masks and heads of all attentions."""
        rewriter, bounds = Rewriter(graph), _Bounds(Constants(graph))
        alike: dict[Any, fx.Node] = {}
        for softmax in graph.find(aten.softmax.int):
            if not _feeds_product(softmax):
                continue
            try:
                _fuse(rewriter, bounds, alike, softmax, self.largest_mask)
            except _HeldBack as reason:
                rewriter.discard()
                rewriter.miss(softmax, str(reason))
        constants = Constants(graph)
        for attention in graph.find(_ATTENTION):
            _simplify_mask(rewriter, constants, attention)
            _group_heads(rewriter, attention)
        return rewriter.result()


# -- products ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """A product that sums over axes of two tensors; each axis bears a letter, as in an einsum."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_axes: str
    right_axes: str
    axes: str  # of the result
    scale: float = 1.0
    added: fx.Node | None = None

    def sides(self) -> tuple[tuple[fx.Node, str], tuple[fx.Node, str]]:
        """Return both operands with their axes."""
        return (self.left, self.left_axes), (self.right, self.right_axes)


def _product(node: Any) -> _Product | None:
    """Read a matmul, bmm, mm, baddbmm, addmm or einsum of two tensors."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    args: Any = node.args
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matrices(node, *args)
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        product = _matrices(node, *args[1:])
        beta, alpha = node.kwargs["beta"], node.kwargs["alpha"]
        if product is None or beta not in (0, 1) or not isinstance(alpha, (int, float)):
            return None
        return replace(product, scale=float(alpha), added=args[0] if beta else None)
    if node.target is aten.einsum.default and len(args[1]) == 2:
        return _einsum(node, args[0].replace(" ", ""), *args[1])
    return None


def _matrices(node: fx.Node, left: fx.Node, right: fx.Node) -> _Product | None:
    ranks = rank_of(left), rank_of(right)
    if min(ranks) < 2:
        return None
    batch = ascii_letters[: max(ranks) - 2]
    own = [batch[len(batch) - rank + 2 :] for rank in ranks]
    return _Product(node, left, right, own[0] + "IK", own[1] + "KJ", batch + "IJ")


def _einsum(node: fx.Node, equation: str, left: fx.Node, right: fx.Node) -> _Product | None:
    parts = re.split(",|->", equation)
    if len(parts) != 3:
        return None
    free = "".join(letter for letter in ascii_letters if letter not in equation)
    widths = [rank_of(x) - len(part) + 3 for x, part in zip((left, right), parts, strict=False)]
    dots = [width for width, part in zip(widths, parts, strict=False) if "..." in part]
    widths.append(max(dots, default=0))
    for place, width in enumerate(widths):
        parts[place] = parts[place].replace("...", free[widths[2] - width : widths[2]])
    if any(len(set(part)) < len(part) for part in parts):
        return None  # a diagonal
    return _Product(node, left, right, parts[0], parts[1], parts[2])


# -- from the product to the softmax -------------------------------------------------------------

_VIEWS = (  # what keeps every element, or rounds it
    aten.permute.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dims, aten.to.dtype, aten.clone.default,
    aten.contiguous.default, aten.alias.default,
)  # fmt: skip
_MAXIMA = (aten.amax.default, aten.max.default, aten.max.dim)
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor)
# which arguments of a call may be the scores that it changes element by element
_CHANGES: dict[Any, tuple[int, ...]] = {
    aten.add.Tensor: (0, 1), aten.sub.Tensor: (0,), aten.neg.default: (0,),
    aten.mul.Tensor: (0, 1), aten.div.Tensor: (0,),
    aten.masked_fill.Scalar: (0,), aten.masked_fill.Tensor: (0,), aten.where.self: (1, 2),
    aten.where.ScalarSelf: (2,), aten.where.ScalarOther: (1,),
}  # fmt: skip
_BENDS = (  # what may stand between a product and a softmax, and makes another function of it
    aten.linear.default, aten.conv2d.default, aten.conv1d.default, aten.batch_norm.default,
    aten.clamp.default, aten.hardtanh.default, aten.tanh.default, aten.relu.default,
    aten.sigmoid.default, aten.slice.Tensor, aten.cat.default, aten.layer_norm.default,
    aten.pow.Tensor_Scalar, aten.abs.default, aten.softplus.default, aten.softmax.int,
)  # fmt: skip


def _source(node: Any) -> str:
    """Name what computes a value, or a part of it."""
    parts = (operator.getitem, aten.split_with_sizes.default, aten.unbind.int, aten.select.int)
    while isinstance(node, fx.Node) and node.target in (*_VIEWS, *parts):
        node = node.args[0]
    is_call = isinstance(node, fx.Node) and node.op == "call_function"
    return target_text(node.target) if is_call else str(node)


def _path(node: Any, left: list[int]) -> tuple[fx.Node, ...] | str:
    """Return the nodes from a product to `node`, or why there is no such way.

    `left` counts down how many nodes may still be looked at.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return f"its scores come from {_source(node)}, not from a product of two tensors"
    left[0] -= 1
    if _product(node) is not None:
        return (node,)
    source = f"its scores come from {_source(node)}, not from a product of two tensors"
    bends = node.target in _BENDS
    if left[0] < 0 or not bends and node.target not in _VIEWS and node.target not in _CHANGES:
        return source
    reasons = []
    for place in _CHANGES.get(node.target, (0,)):
        before = node.args[place]
        if isinstance(before, (list, tuple)):
            before = before[0]
        if isinstance(before, fx.Node) and is_tensor(before):
            way = _path(before, left)
            if isinstance(way, tuple) and bends:
                return f"{target_text(node.target)} stands between its product and the softmax"
            if isinstance(way, tuple):
                return (*way, node)
            reasons.append(way)
    return source if bends or not reasons else reasons[0]


@dataclass(frozen=True)
class _Term:
    """A tensor beside the scores; its axes are the last ones of `axes`."""

    nodes: tuple[fx.Node, ...]
    axes: str
    compute: Callable[..., Any]  # from the values of the nodes
    largest: float = 0.0  # a bound of its absolute values; infinite where it may hold −inf

    def scaled(self, factor: float) -> _Term:
        """Return the term times a number."""
        if factor == 1:
            return self

        def compute(*values: Any) -> Any:
            return self.compute(*values) * factor

        return replace(self, compute=compute, largest=abs(factor) * self.largest)


@dataclass
class _Scores:
    """What a value on the way from the first product to the second is.

    It has the axes `axes`, and is `scale` · product · `factors` + Σ `terms`. Where a view splits or
    merges axes, `groupings` has the sizes of all axes before and after, by their letters.
    """

    bounds: _Bounds
    product: _Product
    axes: str
    scale: float
    terms: list[_Term] = field(default_factory=list)
    factors: list[tuple[_Term, Any]] = field(default_factory=list)  # with mul or div
    shifts: list[_Term] = field(default_factory=list)  # row maxima that were taken away
    groupings: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def constants(self) -> Constants:
        """What is known of the graph's constants."""
        return self.bounds.constants

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of q and k."""
        return dtype_of(self.product.left)

    def step(self, node: fx.Node, before: fx.Node) -> None:
        """Follow one call; raise _HeldBack where the scores get lost in it."""
        for user in before.users:
            if user is not node and not _is_maximum_for(user, node):
                raise _HeldBack(f"{before.name} is used elsewhere too")
        self._check_dtype(node)
        same = same_shape(shape_of(node), shape_of(before))
        if node.target is aten.permute.default:
            order: Any = node.args[1]
            self.axes = "".join(self.axes[axis] for axis in order)
        elif node.target in _ELEMENTWISE and not same:
            raise _HeldBack(f"{node.name} is larger than the scores")
        elif node.target in _ELEMENTWISE:
            _ELEMENTWISE[node.target](self, node, before)
        elif not same:
            self._regroup(node, before)

    def _check_dtype(self, node: fx.Node) -> None:
        found = dtype_of(node)
        if torch.promote_types(found, self.dtype) != found:
            raise _HeldBack(f"{node.name} rounds to {found}")

    def _regroup(self, node: fx.Node, before: fx.Node) -> None:
        """Follow a view that splits or merges axes."""
        old, new = shape_of(before), shape_of(node)
        groupings = self.groupings
        if groupings and self.axes not in groupings:
            raise _HeldBack("its axes are regrouped, permuted and regrouped")
        groupings[self.axes] = old
        known = [axes for axes, sizes in groupings.items() if same_shape(sizes, new)]
        if not known and len(groupings) > 1:
            raise _HeldBack(f"{node.name} groups the axes in a third way")
        if known:
            self.axes = known[0]
            return
        kept = self.axes[-2:] if same_shape(old[-2:], new[-2:]) else ""
        self.axes = _fresh(len(new) - len(kept), self.letters) + kept
        groupings[self.axes] = new

    @property
    def letters(self) -> str:
        """All letters in use."""
        return "".join((*self.groupings, self.product.left_axes, self.product.right_axes))

    def times(self, factor: float) -> None:
        """Scale everything so far."""
        self.scale *= factor
        self.terms = [term.scaled(factor) for term in self.terms]

    def add(self, other: Any, factor: float) -> None:
        """Add a tensor; a number added to every score leaves the softmax as it is."""
        if isinstance(other, (int, float)) and not math.isfinite(other):
            raise _HeldBack(f"{other} is added to its scores")
        if isinstance(other, fx.Node) and is_tensor(other):
            largest = self.bounds.of(other)
            self.terms.append(_Term((other,), self.axes, _same, largest).scaled(factor))


def _same(x: Any) -> Any:
    return x


def _fresh(count: int, used: str) -> str:
    return "".join([letter for letter in ascii_letters if letter not in used][:count])


def _is_maximum_for(node: fx.Node, end: fx.Node) -> bool:
    """Whether a call takes maxima that only `end` uses."""
    while node.target in _MAXIMA or node.target in _VIEWS or node.target is operator.getitem:
        users = list(node.users)
        if len(users) != 1 or users[0] is end:
            return users == [end]
        node = users[0]
    return False


def _other(node: fx.Node, before: fx.Node) -> Any:
    """Return the operand of a call of two that is not the scores."""
    first, second = node.args[:2]
    if first is second:
        raise _HeldBack(f"{node.name} takes the scores twice")
    return second if first is before else first


def _follow_add(scores: _Scores, node: fx.Node, before: fx.Node) -> None:
    alpha: Any = node.kwargs["alpha"]
    if not isinstance(alpha, (int, float)):
        raise _HeldBack(f"{node.name} has a symbolic factor")
    if node.args[0] is not before:
        scores.times(alpha)
        alpha = 1.0
    scores.add(_other(node, before), alpha)


def _follow_sub(scores: _Scores, node: fx.Node, before: fx.Node) -> None:
    other, alpha = _other(node, before), node.kwargs["alpha"]
    if not isinstance(alpha, (int, float)):
        raise _HeldBack(f"{node.name} has a symbolic factor")
    source = other
    while isinstance(source, fx.Node) and (source.target in (*_VIEWS, operator.getitem)):
        source = source.args[0]
    if isinstance(source, fx.Node) and source.target in _MAXIMA and source.args[0] is before:
        scores.shifts.append(_Term((other,), scores.axes, _same))
    else:
        scores.add(other, -alpha)


def _follow_scaling(scores: _Scores, node: fx.Node, before: fx.Node) -> None:
    other = _other(node, before)
    divides = node.target is aten.div.Tensor
    number = scores.constants.number(other)
    if number is not None and math.isfinite(number) and number != 0:
        scores.times(1 / number if divides else number)
    elif not is_tensor(other):
        raise _HeldBack(f"{node.name} scales by {other}")
    elif scores.terms:
        raise _HeldBack(f"{node.name} scales scores and mask by a tensor")
    else:
        scores.factors.append((_Term((other,), scores.axes, _same), node.target))


def _follow_neg(scores: _Scores, node: fx.Node, before: fx.Node) -> None:
    scores.times(-1.0)


def _follow_fill(scores: _Scores, node: fx.Node, before: fx.Node) -> None:
    """masked_fill(s + b, m, c) = s + masked_fill(b, m, c) where s is lost in c"""
    args: Any = node.args
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        condition, fill, kept = args[1], args[2], False
    else:
        condition, kept = args[0], args[1] is before
        fill = args[2] if kept else args[1]
    number = scores.constants.number(fill)
    if number is None:
        raise _HeldBack(f"{node.name} fills in what is computed")
    if number > _LOW or math.isnan(number):
        raise _HeldBack(f"{node.name} fills in {number:g}, and scores may be lower")
    if any(term.axes != scores.axes for term in scores.terms):
        raise _HeldBack(f"{node.name} fills in between masks of different layouts")
    terms, dtype = list(scores.terms), dtype_of(node)

    def compute(condition: Any, *values: Any) -> Any:
        rest = _total(terms, values) if terms else condition.new_zeros([], dtype=dtype)
        return torch.where(condition, *((rest, number) if kept else (number, rest)))

    nodes = (condition, *(node for term in terms for node in term.nodes))
    uniform = -math.inf < number < _HIDDEN  # the weights of a row that is hidden throughout
    largest = max(-number if uniform else math.inf, *(term.largest for term in terms), 0.0)
    scores.terms = [_Term(nodes, scores.axes, compute, largest)]


def _total(terms: Sequence[_Term], values: Sequence[Any]) -> Any:
    """Add up terms, given the values of all their nodes in order."""
    rest = iter(values)
    parts = [term.compute(*(next(rest) for _ in term.nodes)) for term in terms]
    return functools.reduce(operator.add, parts)


_ELEMENTWISE: dict[Any, Callable[[_Scores, fx.Node, fx.Node], None]] = {
    aten.add.Tensor: _follow_add, aten.sub.Tensor: _follow_sub, aten.neg.default: _follow_neg,
    aten.mul.Tensor: _follow_scaling, aten.div.Tensor: _follow_scaling,
    aten.masked_fill.Scalar: _follow_fill, aten.masked_fill.Tensor: _follow_fill,
    aten.where.self: _follow_fill, aten.where.ScalarSelf: _follow_fill,
    aten.where.ScalarOther: _follow_fill,
}  # fmt: skip


# -- from the softmax to the second product --------------------------------------------------------


def _feeds_product(softmax: fx.Node) -> bool:
    """Whether a product of two tensors lies behind a softmax, maybe past what mixes its weights."""
    pending = [softmax]
    for node in pending:
        for user in node.users:
            if _product(user) is not None:
                return True
            through = user.target in _VIEWS or user.target in _BENDS or user.target in _ELEMENTWISE
            if (through or user.target is aten.dropout.default) and len(pending) < _REACH:
                pending.append(user)
    return False


def _follow_weights(scores: _Scores, softmax: fx.Node) -> tuple[_Product, fx.Node]:
    """Return the product that takes the weights, and the operand that they are."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise _HeldBack("its weights are used elsewhere too")
        (user,) = users
        product = _product(user)
        if product is not None:
            if product.added is not None or product.scale != 1:
                raise _HeldBack(f"{user.name} does more than multiply weights and values")
            if product.left is product.right:
                raise _HeldBack(f"{user.name} multiplies the weights with themselves")
            return product, node
        if user.target in _VIEWS:
            scores.step(user, node)
        elif user.target is aten.dropout.default and user.args[2] is not False:
            raise _HeldBack("a dropout of its weights is in training mode")
        elif user.target is not aten.dropout.default:
            raise _HeldBack(f"{target_text(user.target)} stands between the softmax and the values")
        node = user


# -- which axis is which ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """q, k or v as it stands in its product."""

    node: fx.Node
    axes: str


@dataclass(frozen=True)
class _Layout:
    """q, k and v, and their axes: `row` of the queries, `column` of the keys, and one each."""

    q: _Side
    k: _Side
    v: _Side
    row: str
    column: str
    inner: str  # what q and k are summed over
    features: str  # of the values
    out: str  # the axes of the result
    first: str  # the axes of the scores behind the first product,
    last: str  # and of the weights in front of the second: another grouping, or the same

    def batch(self, axes: str) -> str:
        """Return those of the axes that are neither queries nor keys."""
        return "".join(x for x in axes if x not in (self.row, self.column))


def _layout(scores: _Scores, column: str, last: _Product, weights: fx.Node) -> _Layout:
    """Name the axes of both products; raise _HeldBack where they are not those of attention."""
    product = scores.product
    left, right = (_Side(*side) for side in product.sides())
    if (column in left.axes) == (column in right.axes):
        raise _HeldBack("its softmax is not over the keys")
    q, k = (left, right) if column in right.axes else (right, left)
    inner = {*q.axes, *k.axes} - {*product.axes}
    if len(inner) != 1 or not inner <= {*q.axes} & {*k.axes}:
        raise _HeldBack("its scores are summed over more than one axis")
    v, out = _named_values(scores, last, weights)
    features = {*v.axes} - {*scores.axes}
    if len(features) != 1 or {*out} != {*scores.axes} - {column} | features:
        raise _HeldBack("its values are not summed over the keys alone")
    rows = [x for x in scores.axes if x in q.axes and x not in k.axes + v.axes]
    if not rows:
        raise _HeldBack("it has no axis of queries")
    ends = [axes for axes in scores.groupings if {*axes} == {*scores.axes}]
    if scores.groupings and not ends:
        raise _HeldBack("its axes are regrouped and permuted")
    return _Layout(
        q, k, v, rows[-1], column, inner.pop(), features.pop(), out,
        product.axes, ends[0] if ends else product.axes,
    )  # fmt: skip


def _named_values(scores: _Scores, last: _Product, weights: fx.Node) -> tuple[_Side, str]:
    """Return the values, and the axes of the result, in the letters of the scores."""
    own, other = last.sides() if last.left is weights else reversed(last.sides())
    letters = dict(zip(own[1], scores.axes, strict=True))
    new = [x for x in other[1] if x not in letters]
    letters.update(zip(new, _fresh(len(new), scores.letters + scores.axes), strict=True))
    axes, out = ("".join(letters[x] for x in side) for side in (other[1], last.axes))
    return _Side(other[0], axes), out


def _arranged(x: Any, axes: str, wanted: str) -> Any:
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


def _regrouped(x: Any, old: Sequence[Any], new: Sequence[Any]) -> Any:
    """Reshape a tensor (or Value) whose sizes are `old`, or 1 where it broadcasts, to `new`."""
    while x.ndim < len(old):
        x = x.unsqueeze(0)
    sizes, wide = [], list(x.shape)
    for source, target in _blocks(old, new):
        if all(_is_one(x.shape[axis]) for axis in source):
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
        raise _HeldBack("several sizes are symbolic")
    return found


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _blocks(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Pair the runs of axes that have as many elements before and after a reshape."""
    blocks: list[tuple[list[int], list[int]]] = []
    source: list[int] = []
    target: list[int] = []
    before: Any = 1
    after: Any = 1
    i = j = 0
    while i < len(old) or j < len(new):
        if j == len(new) or i < len(old) and _divides(before, after):
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


def _divides(divisor: Any, number: Any) -> bool:
    if isinstance(divisor, int) and isinstance(number, int):
        return divisor <= number
    return bool((number / divisor).as_numer_denom()[1] == 1)


# -- building --------------------------------------------------------------------------------------


def _fuse(
    rewriter: Rewriter, bounds: _Bounds, alike: dict[Any, fx.Node], softmax: fx.Node, limit: int
) -> None:
    """Fuse around one softmax; raise _HeldBack where that is not possible.

    `alike` remembers attentions by the metadata of what they take: their own takes long to compute.
    """
    way = _path(softmax.args[0], [_REACH])
    if isinstance(way, str):
        raise _HeldBack(way)
    product = _product(way[0])
    assert product is not None
    scores = _Scores(bounds, product, product.axes, product.scale)
    scores.add(product.added, 1.0)
    for before, node in itertools.pairwise((*way, softmax)):
        scores.step(node, before)
    axis: Any = softmax.args[1]
    column = scores.axes[axis]
    last, weights = _follow_weights(scores, softmax)
    layout = _layout(scores, column, last, weights)
    match = Match((last.node,), (last.node, softmax, *reversed(way)), {})
    place = Place(rewriter, match, last.node)
    new = _Builder(scores, layout, place, alike).attention(limit)
    if not same_metadata(new, last.node):
        raise _HeldBack("the result would be of another type")
    rewriter.replace(last.node, new)


class _Builder:
    """Builds the one call that stands for two products and a softmax."""

    def __init__(
        self, scores: _Scores, layout: _Layout, place: Place, alike: dict[Any, fx.Node]
    ) -> None:
        self.scores, self.layout, self.place, self.alike = scores, layout, place, alike
        self.axes = self._grouping()  # of the scores inside of the attention
        self.batch = layout.batch(self.axes)

    def _grouping(self) -> str:
        """Choose how the batch is grouped: as in the first product, if the masks fit that."""
        at, groupings = self.layout, self.scores.groupings
        if at.last != at.first:
            return at.last
        for axes in map(self._axes_of, self.scores.terms):
            if axes == at.first or not {at.row, at.column} <= {*axes}:
                continue
            static = all(isinstance(size, int) for size in groupings[axes])
            spreads = any(self._spreads(term, at.first) for term in self.scores.terms)
            if spreads and (len(axes) <= 4 or not static):
                return axes
        return at.first

    def value(self, node: fx.Node) -> Value:
        """Return a node as something to compute with."""
        return Value(node, self.place)

    def attention(self, limit: int) -> fx.Node:
        """Build queries, keys, values and mask, the call, and its axes in their old order."""
        at, scores = self.layout, self.scores
        self._check()
        mask = self._mask(limit)
        q, first = self._scaled(self._side(at.q, at.first, at.row + at.inner), at.row, at.column)
        k, second = self._scaled(
            self._side(at.k, at.first, at.column + at.inner), at.column, at.row
        )
        v = self._side(at.v, at.last, at.column + at.features)
        result = self._call(q, k, v, mask, scores.scale * first * second)
        result = self._to_grouping(result, self.axes, at.last)
        return _arranged(result, at.batch(at.last) + at.row + at.features, at.out).node

    def _call(self, q: Value, k: Value, v: Value, mask: Value | None, scale: float) -> Value:
        fakes = [x.fake for x in (q, k, v, mask) if x is not None]
        key = tuple((str(x.shape), str(x.stride()), x.dtype) for x in fakes)
        new = self.place.rewriter.insert(
            _ATTENTION, q.node, k.node, v.node, mask and mask.node, 0.0, False, scale=scale,
            enable_gqa=False, before=self.place.before, origin=self.place.match.nodes,
            like=self.alike.get(key),
        )  # fmt: skip
        self.alike[key] = new
        return self.value(new)

    def _check(self) -> None:
        at, dtype = self.layout, self.scores.dtype
        if {dtype_of(node) for node in (at.k.node, at.v.node, self.place.before)} != {dtype}:
            raise _HeldBack("queries, keys, values and result are of different types")
        if not dtype.is_floating_point:
            raise _HeldBack(f"attention does not take {dtype}")
        if any(self._size(shift, at.column) != 1 for shift in self.scores.shifts):
            raise _HeldBack("what is taken away differs between the keys")

    def _side(self, side: _Side, axes: str, rest: str) -> Value:
        """Bring q, k or v into the axes of attention."""
        x = _arranged(self.value(side.node), side.axes, self.layout.batch(axes) + rest)
        return self._to_grouping(x, axes, self.axes)

    def _to_grouping(self, x: Any, old: str, new: str) -> Any:
        """Regroup the batch of q, k, v or the result."""
        if old == new:
            return x
        ends = {old[-2:], new[-2:]}
        if ends != {self.layout.row + self.layout.column}:
            raise _HeldBack("its batch is regrouped, and its keys stand before its queries")
        rest, groupings = list(x.shape[-2:]), self.scores.groupings
        return _regrouped(x, [*groupings[old][:-2], *rest], [*groupings[new][:-2], *rest])

    def _scaled(self, x: Value, axis: str, across: str) -> tuple[Value, float]:
        """Take numbers off q or k, for the scale; let tensors that scale their rows do it there."""
        scale, at = 1.0, self.layout
        while x.target in _SCALINGS and x.users <= 1:
            inside, number = x.args[0], self.scores.constants.number(x.node.args[1])
            if not isinstance(inside, Value) or number is None or not _same_type(inside, x):
                break
            scale = scale / number if x.target is aten.div.Tensor else scale * number
            x = inside
        for factor, target in self.scores.factors:
            if self.axes != at.first:
                raise _HeldBack("its axes are regrouped, and a tensor scales its scores")
            along = [part for part in (axis, across) if self._size(factor, part) != 1]
            if along == [axis] or not along and axis == at.row:
                y = self.value(factor.nodes[0])
                own = factor.axes[len(factor.axes) - y.ndim :]
                x = target(x, _arranged(y, own, self.batch + axis + across))
            elif len(along) == 2:
                raise _HeldBack("every score has a factor of its own")
        return x, scale

    def _size(self, term: _Term, axis: str) -> Any:
        """Return the size of a tensor along an axis; 1 where it has none."""
        shape = shape_of(term.nodes[0])
        own = term.axes[len(term.axes) - len(shape) :]
        return shape[own.index(axis)] if axis in own else 1

    # -- the mask ----------------------------------------------------------------------------------

    def _mask(self, limit: int) -> Value | None:
        """Build the sum of all masks; those that are constant are added up now."""
        terms, constants = self.scores.terms, self.scores.constants
        fixed = [term for term in terms if all(map(constants.holds, term.nodes))]
        moving = [term for term in terms if term not in fixed]
        if any(term.largest == math.inf for term in moving):
            raise _HeldBack("a mask may hide all keys of a query, and attention is 0 there")
        if moving and len([term for term in terms if -_HIDDEN < term.largest < math.inf]) > 1:
            raise _HeldBack("its masks may add up to -inf")
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
            raise _HeldBack(f"a mask is {mask.dtype}")
        if mask.dtype is not own and torch.promote_types(mask.dtype, own) == own:
            mask = mask.to(own)
        return self._ranked(mask)

    def _ranked(self, mask: Any) -> Any:
        """Give a mask two axes, or all of them."""
        while mask.ndim < 2 or 2 < mask.ndim < len(self.axes):
            mask = mask.unsqueeze(0)
        return mask

    def _value_of(self, term: _Term) -> Any:
        """Compute a term in the axes of its grouping."""
        x = term.compute(*map(self.value, term.nodes))
        return self._ordered(term, x)

    def _ordered(self, term: _Term, x: Any) -> Any:
        return _arranged(x, term.axes[len(term.axes) - x.ndim :], self._axes_of(term))

    def _axes_of(self, term: _Term) -> str:
        """Return the axes of the grouping in which a term was added."""
        if not self.scores.groupings:
            return self.layout.first
        for axes in self.scores.groupings:
            if {*axes} == {*term.axes}:
                return axes
        raise _HeldBack("its axes are regrouped and permuted")

    def _at(self, x: Any, axes: str) -> Any:
        """Bring what has the axes of a grouping into those of attention."""
        if axes != self.axes:
            groupings = self.scores.groupings
            x = _regrouped(x, groupings[axes], groupings[self.axes])
        own = self.axes[len(self.axes) - x.ndim :]
        return _arranged(x, own, self.batch + self.layout.row + self.layout.column)

    def _spreads(self, term: _Term, wanted: str) -> bool:
        """Whether a term must be repeated to be brought into another grouping."""
        axes, groupings = self._axes_of(term), self.scores.groupings
        if axes == wanted:
            return False
        with self.scores.constants.graph.info.fake_mode:
            x = self._ordered(term, term.compute(*(node.meta["val"] for node in term.nodes)))
        sizes = [1] * (len(axes) - x.dim()) + list(x.shape)
        for source, _ in _blocks(groupings[axes], groupings[wanted]):
            real = [axis for axis in source if not _is_one(groupings[axes][axis])]
            if len({_is_one(sizes[axis]) for axis in real}) > 1:
                return True
        return False

    def _sum(self, terms: list[_Term], limit: int) -> Value:
        """Register the sum of constant masks; raise _HeldBack where it may hide a whole row."""
        spread = [self._axes_of(term) for term in terms if self._spreads(term, self.axes)]
        axes = spread[0] if spread else self.axes
        dtype, groupings = self.scores.dtype, self.scores.groupings
        sources = [node for term in terms for node in term.nodes]

        def compute(*values: torch.Tensor) -> torch.Tensor:
            rest, parts = iter(values), []
            for term in terms:
                x = self._ordered(term, term.compute(*(_wide(next(rest)) for _ in term.nodes)))
                own = self._axes_of(term)
                parts.append(x if own == axes else _regrouped(x, groupings[own], groupings[axes]))
            total: torch.Tensor = functools.reduce(operator.add, parts)
            return total.to(dtype) if spread else self._ranked(self._at(total.to(dtype), axes))

        given = [self.scores.constants.value(node) for node in sources]
        mask = compute(*given)
        _check_rows(mask, low=any(term.largest == math.inf for term in terms))
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


def _check_rows(mask: torch.Tensor, low: bool) -> None:
    """Raise _HeldBack where a constant mask hides all keys of a query, or is not a number."""
    hidden = mask <= (_LOW if low else -math.inf)
    if bool(hidden.all(-1).any()):
        raise _HeldBack("its mask hides all keys of a query, and attention is 0 there")
    if not bool((mask < math.inf).all()):
        raise _HeldBack("its mask is not finite")


# -- what a mask may hold --------------------------------------------------------------------------

_SELECTS = (
    aten.permute.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.index.Tensor,
    aten.index_select.default, aten.gather.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.to.dtype, aten.neg.default, aten.clone.default,
    aten.contiguous.default, aten.repeat.default, aten.embedding.default, aten.detach.default,
    aten.tril.default, aten.triu.default, aten.expand_as.default, aten.roll.default,
    aten.repeat_interleave.self_int, aten.view_as.default, aten.flip.default, aten.abs.default,
)  # fmt: skip
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.maximum.default)
_CHOICES: dict[Any, tuple[int, ...]] = {
    aten.where.self: (1, 2), aten.where.ScalarSelf: (1, 2), aten.where.ScalarOther: (1, 2),
    aten.where.Scalar: (1, 2), aten.masked_fill.Scalar: (0, 2), aten.masked_fill.Tensor: (0, 2),
    aten.full.default: (1,), aten.full_like.default: (1,),
}  # fmt: skip
_LOGARITHMS = (aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default)


class _Bounds:
    """Estimates how large masks can be."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self._found: dict[fx.Node, float] = {}

    def of(self, x: Any, depth: int = 0) -> float:
        """Estimate the largest absolute value; infinite where a mask may hold −inf.

        That is where a float input or a constant with −inf is selected from, added or multiplied.
        What is computed from activations counts as 1, and so do 0/1 masks: it is no sooner infinite
        than the scores.
        """
        if not isinstance(x, fx.Node):
            return abs(float(x)) if isinstance(x, (int, float)) else 1.0
        if not is_tensor(x) or not dtype_of(x).is_floating_point:
            return 1.0
        if self.constants.holds(x):
            value = self.constants.value(x)
            largest = float(value.abs().max()) if value.numel() else 0.0
            return math.inf if math.isnan(largest) else largest
        if x.op != "call_function" or x.target in _LOGARITHMS or depth > _REACH:
            return math.inf
        if x not in self._found:
            self._found[x] = self._of_call(x, depth + 1)
        return self._found[x]

    def _of_call(self, node: fx.Node, depth: int) -> float:
        args: Any = node.args
        if node.target in (*_SELECTS, *_SUMS, *_CHOICES):
            places = _CHOICES.get(node.target, (0, 1) if node.target in _SUMS else (0,))
            return max(self.of(args[place], depth) for place in places)
        if node.target in (aten.cat.default, aten.stack.default):
            return max(self.of(part, depth) for part in args[0])
        if node.target in _SCALINGS:
            first, second = (self.of(arg, depth) for arg in args[:2])
            if node.target is aten.div.Tensor and second > 0:
                second = 1 / second
            return math.inf if math.inf in (first, second) else first * second
        return 1.0


# -- attention as it stands ------------------------------------------------------------------------


def _simplify_mask(rewriter: Rewriter, constants: Constants, attention: fx.Node) -> None:
    """Take away a constant mask that hides nothing, or only what comes after each query."""
    args: Any = attention.args
    mask, causal = args[3], args[5]
    if causal or not constants.fixes(mask):
        return
    value = constants.value(mask)
    shown = value if value.dtype is torch.bool else value == 0
    hidden = ~shown if value.dtype is torch.bool else value < _HIDDEN
    if bool(shown.all()):
        rewriter.update(attention, (*args[:3], None, args[4], False))
    elif _is_triangle(attention, shown) and bool((shown | hidden).all()):
        rewriter.update(attention, (*args[:3], None, args[4], True))


def _is_triangle(attention: fx.Node, shown: torch.Tensor) -> bool:
    """Whether each query sees itself and the keys before it, counted from the first."""
    query, key = attention.args[:2]
    rows, columns = shape_of(query)[-2], shape_of(key)[-2]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return False
    if tuple(shown.shape[-2:]) != (rows, columns):
        return False
    return bool((shown == torch.ones_like(shown[..., :, :]).tril()).all())


def _group_heads(rewriter: Rewriter, attention: fx.Node) -> None:
    """attention(q, repeat(k), repeat(v)) = attention(q, k, v, enable_gqa=True)"""
    query, *sides = attention.args[:3]
    if attention.kwargs["enable_gqa"] or any(rank_of(x) != 4 for x in (query, *sides)):
        return
    heads = shape_of(query)[1]
    key, value = map(_before_repeats, sides)
    few, same = shape_of(key)[1], shape_of(value)[1]
    if not (isinstance(heads, int) and isinstance(few, int)) or few != same or few >= heads:
        return
    if few > 1 and (key is sides[0] or value is sides[1]):
        return  # not all of them are repeated, or the shapes of this attention are wrong
    new = rewriter.insert(
        _ATTENTION, query, key, value, *attention.args[3:],
        scale=attention.kwargs["scale"], enable_gqa=True, before=attention, like=attention,
    )  # fmt: skip
    rewriter.replace(attention, new)


def _before_repeats(node: Any) -> fx.Node:
    """Return (B, h, N, D) where `node` repeats each of its heads some times in a row."""
    found = node
    if node.target is aten.repeat_interleave.self_int and node.args[2] == 1:
        found = node.args[0]
    elif node.target is aten.reshape.default and node.args[0].target is aten.expand.default:
        spread = node.args[0].args[0]
        if spread.target is aten.unsqueeze.default and spread.args[1] == 2:
            found = spread.args[0]
    if rank_of(found) != 4:
        return node
    old, new = shape_of(found), shape_of(node)
    kept = same_shape((old[0], *old[2:]), (new[0], *new[2:]))
    return found if kept and isinstance(old[1], int) else node
