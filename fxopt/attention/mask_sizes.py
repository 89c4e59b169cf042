"""How large the numbers in a mask can be: whether it may hide all keys of a query."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.attention.obstacle import HeldBack
from fxopt.constants import Constants
from fxopt.shapes import dtype_of, is_tensor

aten = torch.ops.aten

HIDDEN = -1e30  # every score is lost in a number below this: filling it in is adding it
LOW = -1e8  # hides a key as well, but not where all keys of a query are hidden
REACH = 24  # how many calls are looked at on each side of a softmax

_SELECTS = (
    aten.permute.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.index.Tensor,
    aten.index_select.default, aten.gather.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.to.dtype, aten.neg.default, aten.clone.default,
    aten.contiguous.default, aten.repeat.default, aten.embedding.default, aten.detach.default,
    aten.tril.default, aten.triu.default, aten.expand_as.default, aten.roll.default,
    aten.repeat_interleave.self_int, aten.view_as.default, aten.flip.default, aten.abs.default,
)  # fmt: skip
SCALINGS = (aten.mul.Tensor, aten.div.Tensor)
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.maximum.default)
_CHOICES: dict[Any, tuple[int, ...]] = {
    aten.where.self: (1, 2), aten.where.ScalarSelf: (1, 2), aten.where.ScalarOther: (1, 2),
    aten.where.Scalar: (1, 2), aten.masked_fill.Scalar: (0, 2), aten.masked_fill.Tensor: (0, 2),
    aten.full.default: (1,), aten.full_like.default: (1,),
}  # fmt: skip
_LOGARITHMS = (aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default)


class MaskSizes:
    """Estimates how large the numbers in masks are."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self._found: dict[fx.Node, float] = {}

    def of(self, x: Any) -> float:
        """Estimate the largest absolute value; infinite where a mask may hold −inf.

        That is where a float input or a constant with −inf is selected from, added or multiplied.
        What is computed from activations counts as 1, and so do 0/1 masks: it is no sooner infinite
        than the scores.
        """
        pending = [x] if isinstance(x, fx.Node) else []
        while pending:  # no recursion: a mask may come a long way
            node = pending[-1]
            missing = [source for source in _passed_on(node) if source not in self._found]
            if missing:
                pending += missing
            else:
                self._found[pending.pop()] = self._of_node(node)
        return self._known(x)

    def _known(self, x: Any) -> float:
        if isinstance(x, fx.Node):
            return self._found[x]
        return abs(float(x)) if isinstance(x, (int, float)) else 1.0

    def _of_node(self, node: fx.Node) -> float:
        if not is_tensor(node) or not dtype_of(node).is_floating_point:
            return 1.0
        if self.constants.holds(node):
            value = self.constants.value(node)
            largest = float(value.abs().max()) if value.numel() else 0.0
            return math.inf if math.isnan(largest) else largest
        if node.op != "call_function" or node.target in _LOGARITHMS:
            return math.inf
        sizes = [self._known(x) for x in _arguments(node)]
        if node.target in SCALINGS:
            first, second = sizes
            if node.target is aten.div.Tensor and second > 0:
                second = 1 / second
            return math.inf if math.inf in (first, second) else first * second
        return max(sizes, default=1.0)


def _passed_on(node: fx.Node) -> list[fx.Node]:
    """Return the tensors of numbers that a call passes on, or computes with."""
    floating = is_tensor(node) and dtype_of(node).is_floating_point
    return [x for x in _arguments(node) if isinstance(x, fx.Node)] if floating else []


def _arguments(node: fx.Node) -> list[Any]:
    """Return those arguments whose numbers may stand in the result of a call, or scale it."""
    args: Any = node.args
    if node.target in (aten.cat.default, aten.stack.default):
        return list(args[0])
    if node.target in (*_SUMS, *SCALINGS):
        return list(args[:2])
    places = _CHOICES.get(node.target, (0,) if node.target in _SELECTS else ())
    return [args[place] for place in places]


def check_rows(mask: torch.Tensor, low: bool) -> None:
    """Raise HeldBack where a constant mask hides all keys of a query, or is not a number."""
    hidden = mask <= (LOW if low else -math.inf)
    if bool(hidden.all(-1).any()):
        raise HeldBack("its mask hides all keys of a query, and attention is 0 there")
    if not bool((mask < math.inf).all()):
        raise HeldBack("its mask is not finite")
