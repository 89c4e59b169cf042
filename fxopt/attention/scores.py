"""What happens to the scores of an attention, from the first product to the second."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from string import ascii_letters
from typing import Any

import torch
from torch import fx

from fxopt.attention.mask_sizes import HIDDEN, LOW, REACH, MaskSizes
from fxopt.attention.obstacle import HeldBack
from fxopt.attention.products import Product, product_of
from fxopt.constants import Constants
from fxopt.shapes import dtype_of, is_tensor, same_shape, shape_of
from fxopt.text import target_text

aten = torch.ops.aten

# -- from the product to the softmax ---------------------------------------------------------------

VIEWS = (  # what keeps every element, or rounds it
    aten.permute.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int,
    aten.unsqueeze.default, aten.squeeze.dims, aten.to.dtype, aten.clone.default,
    aten.contiguous.default, aten.alias.default,
)  # fmt: skip
_MAXIMA = (aten.amax.default, aten.max.default, aten.max.dim)
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
    while isinstance(node, fx.Node) and node.target in (*VIEWS, *parts):
        node = node.args[0]
    is_call = isinstance(node, fx.Node) and node.op == "call_function"
    return target_text(node.target) if is_call else str(node)


def path_from_product(end: Any) -> tuple[fx.Node, ...]:
    """Return the nodes from a product to `end`; raise HeldBack where there is no such way."""
    return _PathSearch().to(end)


@dataclass
class _PathSearch:
    """Goes from a softmax back to a product, through what changes scores one by one."""

    left: int = REACH  # how many nodes may still be looked at

    def to(self, node: Any) -> tuple[fx.Node, ...]:
        """Return the nodes from a product to `node`, or raise HeldBack."""
        source = _source(node)
        nothing = HeldBack(f"its scores come from {source}, not from a product of two tensors")
        if not isinstance(node, fx.Node) or node.op != "call_function":
            raise nothing
        self.left -= 1
        if product_of(node) is not None:
            return (node,)
        bends = node.target in _BENDS
        passes_on = bends or node.target in VIEWS or node.target in _CHANGES
        if self.left < 0 or not passes_on:
            raise nothing
        reasons = []
        for operand in _operands(node):
            try:
                way = self.to(operand)
            except HeldBack as reason:
                reasons.append(reason)
                continue
            if bends:
                name = target_text(node.target)
                raise HeldBack(f"{name} stands between its product and the softmax")
            return (*way, node)
        raise nothing if bends or not reasons else reasons[0]


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the tensors that may be the scores which a call changes."""
    for place in _CHANGES.get(node.target, (0,)):
        operand: Any = node.args[place]
        if isinstance(operand, (list, tuple)):
            operand = operand[0]
        if isinstance(operand, fx.Node) and is_tensor(operand):
            yield operand


@dataclass(frozen=True)
class Term:
    """A tensor beside the scores; its axes are the last ones of `axes`."""

    nodes: tuple[fx.Node, ...]
    axes: str
    compute: Callable[..., Any]  # from the values of the nodes
    largest: float = 0.0  # a bound of its absolute values; infinite where it may hold −inf

    def scaled(self, factor: float) -> Term:
        """Return the term times a number."""
        if factor == 1:
            return self

        def compute(*values: Any) -> Any:
            return self.compute(*values) * factor

        return replace(self, compute=compute, largest=abs(factor) * self.largest)


@dataclass
class Scores:
    """What a value on the way from the first product to the second is.

    It has the axes `axes`, and is `scale` · product · `factors` + Σ `terms`. Where a view splits or
    merges axes, `groupings` has the sizes of all axes before and after, by their letters.
    """

    sizes: MaskSizes
    product: Product
    axes: str
    scale: float
    terms: list[Term] = field(default_factory=list)
    factors: list[tuple[Term, Any]] = field(default_factory=list)  # with mul or div
    shifts: list[Term] = field(default_factory=list)  # row maxima that were taken away
    groupings: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def constants(self) -> Constants:
        """What is known of the graph's constants."""
        return self.sizes.constants

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of q and k."""
        return dtype_of(self.product.left)

    def step(self, node: fx.Node, before: fx.Node) -> None:
        """Follow one call; raise HeldBack where the scores get lost in it."""
        for user in before.users:
            if user is not node and not _is_maximum_for(user, node):
                raise HeldBack(f"{before.name} is used elsewhere too")
        self._check_dtype(node)
        same = same_shape(shape_of(node), shape_of(before))
        if node.target is aten.permute.default:
            order: Any = node.args[1]
            self.axes = "".join(self.axes[axis] for axis in order)
        elif node.target in _ELEMENTWISE and not same:
            raise HeldBack(f"{node.name} is larger than the scores")
        elif node.target in _ELEMENTWISE:
            _ELEMENTWISE[node.target](self, node, before)
        elif not same:
            self._regroup(node, before)

    def _check_dtype(self, node: fx.Node) -> None:
        found = dtype_of(node)
        if torch.promote_types(found, self.dtype) != found:
            raise HeldBack(f"{node.name} rounds to {found}")

    def _regroup(self, node: fx.Node, before: fx.Node) -> None:
        """Follow a view that splits or merges axes."""
        old, new = shape_of(before), shape_of(node)
        groupings = self.groupings
        if groupings and self.axes not in groupings:
            raise HeldBack("its axes are regrouped, permuted and regrouped")
        groupings[self.axes] = old
        known = [axes for axes, sizes in groupings.items() if same_shape(sizes, new)]
        if not known and len(groupings) > 1:
            raise HeldBack(f"{node.name} groups the axes in a third way")
        if known:
            self.axes = known[0]
            return
        kept = self.axes[-2:] if same_shape(old[-2:], new[-2:]) else ""
        self.axes = fresh_letters(len(new) - len(kept), self.letters) + kept
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
            raise HeldBack(f"{other} is added to its scores")
        if isinstance(other, fx.Node) and is_tensor(other):
            largest = self.sizes.of(other)
            self.terms.append(Term((other,), self.axes, _same, largest).scaled(factor))


def _same(x: Any) -> Any:
    return x


def fresh_letters(count: int, used: str) -> str:
    """Return letters for axes that have none yet."""
    return "".join([letter for letter in ascii_letters if letter not in used][:count])


def _is_maximum_for(node: fx.Node, end: fx.Node) -> bool:
    """Whether a call takes maxima that only `end` uses."""
    while node.target in _MAXIMA or node.target in VIEWS or node.target is operator.getitem:
        users = list(node.users)
        if len(users) != 1 or users[0] is end:
            return users == [end]
        node = users[0]
    return False


def _other(node: fx.Node, before: fx.Node) -> Any:
    """Return the operand of a call of two that is not the scores."""
    first, second = node.args[:2]
    if first is second:
        raise HeldBack(f"{node.name} takes the scores twice")
    return second if first is before else first


def _follow_add(scores: Scores, node: fx.Node, before: fx.Node) -> None:
    alpha: Any = node.kwargs["alpha"]
    if not isinstance(alpha, (int, float)):
        raise HeldBack(f"{node.name} has a symbolic factor")
    if node.args[0] is not before:
        scores.times(alpha)
        alpha = 1.0
    scores.add(_other(node, before), alpha)


def _follow_sub(scores: Scores, node: fx.Node, before: fx.Node) -> None:
    other, alpha = _other(node, before), node.kwargs["alpha"]
    if not isinstance(alpha, (int, float)):
        raise HeldBack(f"{node.name} has a symbolic factor")
    source = other
    while isinstance(source, fx.Node) and (source.target in (*VIEWS, operator.getitem)):
        source = source.args[0]
    if isinstance(source, fx.Node) and source.target in _MAXIMA and source.args[0] is before:
        scores.shifts.append(Term((other,), scores.axes, _same))
    else:
        scores.add(other, -alpha)


def _follow_scaling(scores: Scores, node: fx.Node, before: fx.Node) -> None:
    other = _other(node, before)
    divides = node.target is aten.div.Tensor
    number = scores.constants.number(other)
    if number is not None and math.isfinite(number) and number != 0:
        scores.times(1 / number if divides else number)
    elif not is_tensor(other):
        raise HeldBack(f"{node.name} scales by {other}")
    elif scores.terms:
        raise HeldBack(f"{node.name} scales scores and mask by a tensor")
    else:
        scores.factors.append((Term((other,), scores.axes, _same), node.target))


def _follow_neg(scores: Scores, node: fx.Node, before: fx.Node) -> None:
    scores.times(-1.0)


def _follow_fill(scores: Scores, node: fx.Node, before: fx.Node) -> None:
    """masked_fill(s + b, m, c) = s + masked_fill(b, m, c) where s is lost in c"""
    args: Any = node.args
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        condition, fill, kept = args[1], args[2], False
    else:
        condition, kept = args[0], args[1] is before
        fill = args[2] if kept else args[1]
    number = scores.constants.number(fill)
    if number is None:
        raise HeldBack(f"{node.name} fills in what is computed")
    if number > LOW or math.isnan(number):
        raise HeldBack(f"{node.name} fills in {number:g}, and scores may be lower")
    if any(term.axes != scores.axes for term in scores.terms):
        raise HeldBack(f"{node.name} fills in between masks of different layouts")
    terms, dtype = list(scores.terms), dtype_of(node)

    def compute(condition: Any, *values: Any) -> Any:
        rest = _total(terms, values) if terms else condition.new_zeros([], dtype=dtype)
        return torch.where(condition, *((rest, number) if kept else (number, rest)))

    nodes = (condition, *(node for term in terms for node in term.nodes))
    uniform = -math.inf < number < HIDDEN  # the weights of a row that is hidden throughout
    largest = max(-number if uniform else math.inf, *(term.largest for term in terms), 0.0)
    scores.terms = [Term(nodes, scores.axes, compute, largest)]


def _total(terms: Sequence[Term], values: Sequence[Any]) -> Any:
    """Add up terms, given the values of all their nodes in order."""
    rest = iter(values)
    parts = [term.compute(*(next(rest) for _ in term.nodes)) for term in terms]
    return functools.reduce(operator.add, parts)


_ELEMENTWISE: dict[Any, Callable[[Scores, fx.Node, fx.Node], None]] = {
    aten.add.Tensor: _follow_add, aten.sub.Tensor: _follow_sub, aten.neg.default: _follow_neg,
    aten.mul.Tensor: _follow_scaling, aten.div.Tensor: _follow_scaling,
    aten.masked_fill.Scalar: _follow_fill, aten.masked_fill.Tensor: _follow_fill,
    aten.where.self: _follow_fill, aten.where.ScalarSelf: _follow_fill,
    aten.where.ScalarOther: _follow_fill,
}  # fmt: skip


# -- from the softmax to the second product --------------------------------------------------------


def feeds_product(softmax: fx.Node) -> bool:
    """Whether a product of two tensors lies behind a softmax, maybe past what mixes its weights."""
    pending = [softmax]
    for node in pending:
        for user in node.users:
            if product_of(user) is not None:
                return True
            through = user.target in VIEWS or user.target in _BENDS or user.target in _ELEMENTWISE
            if (through or user.target is aten.dropout.default) and len(pending) < REACH:
                pending.append(user)
    return False


def follow_weights(scores: Scores, softmax: fx.Node) -> tuple[Product, fx.Node]:
    """Return the product that takes the weights, and the operand that they are."""
    node = softmax
    while True:
        users = list(node.users)
        if len(users) != 1:
            raise HeldBack("its weights are used elsewhere too")
        (user,) = users
        product = product_of(user)
        if product is not None:
            if product.added is not None or product.scale != 1:
                raise HeldBack(f"{user.name} does more than multiply weights and values")
            if product.left is product.right:
                raise HeldBack(f"{user.name} multiplies the weights with themselves")
            return product, node
        if user.target in VIEWS:
            scores.step(user, node)
        elif user.target is aten.dropout.default and user.args[2] is not False:
            raise HeldBack("a dropout of its weights is in training mode")
        elif user.target is not aten.dropout.default:
            raise HeldBack(f"{target_text(user.target)} stands between the softmax and the values")
        node = user
