"""How large the numbers in a mask can be: whether it may hide all keys of a query."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.attention.obstacle import HeldBack
from fxopt.constants import Constants

aten = torch.ops.aten

HIDDEN = -1e30  # every score is lost in a number below this: filling it in is adding it
LOW = -1e8  # hides a key as well, but not where all keys of a query are hidden
SWALLOWS = 256.0  # in half precision, scores lose digits beside a mask as large as this
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
_MIXES = (  # what is computed from many numbers is no sooner infinite than the scores are
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.einsum.default, aten.conv1d.default, aten.conv2d.default,
    aten.conv3d.default, aten.layer_norm.default, aten.group_norm.default, aten.rms_norm.default,
    aten.batch_norm.default, aten.softmax.int, aten.scaled_dot_product_attention.default,
    aten.sigmoid.default, aten.tanh.default,
)  # fmt: skip
SCALINGS = (aten.mul.Tensor, aten.div.Tensor)
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.maximum.default)
_LISTS = (aten.cat.default, aten.stack.default)
_CHOICES: dict[Any, tuple[int, ...]] = {
    aten.where.self: (1, 2), aten.where.ScalarSelf: (1, 2), aten.where.ScalarOther: (1, 2),
    aten.where.Scalar: (1, 2), aten.masked_fill.Scalar: (0, 2), aten.masked_fill.Tensor: (0, 2),
    aten.full.default: (1,), aten.full_like.default: (1,),
}  # fmt: skip
_POLES = (  # infinite at 0
    aten.log.default, aten.log2.default, aten.log10.default, aten.log1p.default,
    aten.reciprocal.default, aten.rsqrt.default, aten.pow.Tensor_Tensor, aten.pow.Scalar,
)  # fmt: skip


class MaskSizes:
    """Estimates how large the numbers in masks are."""

    def __init__(self, constants: Constants) -> None:
        self.constants = constants
        self._found: dict[fx.Node, float] = {}

    def of(self, x: Any) -> float:
        """Estimate the largest absolute value; infinite where a mask may hold −inf.

        That is where a float input or a constant with −inf goes into it, or what may be divided by
        0. What is computed from activations counts as 1, and so do 0/1 masks: it is no sooner
        infinite than the scores.
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
        if not _is_floating(node):
            return 1.0
        if self.constants.holds(node):
            value = self.constants.value(node)
            largest = float(value.abs().max()) if value.numel() else 0.0
            return math.inf if math.isnan(largest) else largest
        if node.op != "call_function" or _has_pole(node):
            return math.inf
        sizes = [self._known(x) for x in _arguments(node)]
        if node.target is aten.mul.Tensor:
            return math.inf if math.inf in sizes else math.prod(sizes)
        if node.target is aten.div.Tensor:
            smallest = self._smallest(node.args[1])
            return sizes[0] / smallest if smallest > 0 else math.inf
        if node.target in (*_SELECTS, *_SUMS, *_CHOICES, *_LISTS):
            return max(sizes, default=1.0)
        return math.inf if math.inf in sizes else 1.0

    def _smallest(self, divisor: Any) -> float:
        """Return the smallest absolute value of a divisor, if it is known; else 0."""
        if isinstance(divisor, fx.Node):
            value = self.constants.value(divisor) if self.constants.holds(divisor) else None
            return float(value.abs().min()) if value is not None and value.numel() else 0.0
        return abs(float(divisor)) if isinstance(divisor, (int, float)) else 0.0


def _passed_on(node: fx.Node) -> list[fx.Node]:
    """Return the tensors of numbers that a call passes on, or computes with."""
    return [x for x in _arguments(node) if isinstance(x, fx.Node)] if _is_floating(node) else []


def _is_floating(node: fx.Node) -> bool:
    """Whether a node's value, or each of its values, is a tensor of floating-point numbers."""
    fake = node.meta.get("val")
    first = fake[0] if isinstance(fake, (list, tuple)) and fake else fake
    return isinstance(first, torch.Tensor) and first.dtype.is_floating_point


def _has_pole(node: fx.Node) -> bool:
    """Whether a call is infinite where its argument is 0."""
    if node.target is aten.pow.Tensor_Scalar:
        exponent: Any = node.args[1]
        return not isinstance(exponent, (int, float)) or exponent < 0
    return node.target in _POLES


def _arguments(node: fx.Node) -> list[Any]:
    """Return those arguments whose numbers may stand in the result of a call, or scale it."""
    args: Any = node.args
    if node.target in _LISTS:
        return list(args[0])
    if node.target in (*_SUMS, *SCALINGS):
        return list(args[:2])
    if node.target in _CHOICES:
        return [args[place] for place in _CHOICES[node.target]]
    if node.target in _MIXES:
        return []
    return [args[0]] if node.target in _SELECTS else list(node.all_input_nodes)


def is_half(dtype: torch.dtype) -> bool:
    """Whether a dtype has so few digits that a mask swallows the scores that it is added to."""
    return dtype in (torch.float16, torch.bfloat16)


def check_rows(mask: torch.Tensor, low: bool) -> None:
    """Raise HeldBack where a constant mask hides all keys of a query, or is not a number."""
    limit = -SWALLOWS if is_half(mask.dtype) else LOW if low else -math.inf
    hidden = mask <= limit
    if bool(hidden.all(-1).any()):
        raise HeldBack("its mask hides all keys of a query, and attention is 0 there")
    if not bool((mask < math.inf).all()):
        raise HeldBack("its mask is not finite")
