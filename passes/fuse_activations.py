"""Recognise activation functions that are written out.

Before                                          After
    0.5 · x · (1 + erf(x / √2))                     gelu(x)
    0.5 · x · (1 + tanh(√(2/π) (x + 0.044715 x³)))  gelu(x, approximate="tanh")
    x · σ(x),   x / (1 + exp(−x))                   silu(x)
    1 / (1 + exp(−x))                               sigmoid(x)
    relu6(x + 3) / 6,   clamp(x / 6 + ½, 0, 1)      hardsigmoid(x)
    x · relu6(x + 3) / 6                            hardswish(x)
    where(x > 0, x, a · x)                          leaky_relu(x, a), prelu(x, a)
    where(x > 0, x, a · expm1(x))                   elu(x, a)
    a · σ(b)   with a, b = halves of x              glu(x)
    exp(x − max x) / Σ exp(x − max x)               softmax(x)
    softmax(x − max x)                              softmax(x)

Factors and terms may stand in any order. A constant may be off by no more than the dtype's own
rounding: 0.70710678 is √½ in float32 and not in float64, 0.7071 is √½ in half precision alone.

Values agree for nan, infinities and −0.0, with two exceptions at the end of the range: where
PyTorch leaves gelu to oneDNN, it is nan at ∞ and ∞ just before; hardswish overflows a factor of 6
earlier than x · hardsigmoid(x). Gradients agree, but that clamp passes its own at x = ±3, which
hardsigmoid does not, and that they are finite where what is written gives nan for large x.

Left alone: a value inside that others use; an activation with another value or gradient at 0, −∞ or
nan, with the reason; mish, tanhshrink and softsign, which PyTorch computes no faster as one call;
x · σ(1.702 x), for which it has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fxopt.conditions import constant, number
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.normalize import INT_MAX
from fxopt.pattern import Match, any_of, named, near, optional
from fxopt.rules import RuleSet, Value, apply_rules, new_constant, rule

aten = torch.ops.aten

# -- parts of patterns -----------------------------------------------------------------------------


def _about(symbol: Any, value: float) -> Any:
    """A constant that looks like the value; the rule asks `_inexact` whether it is."""
    return named(symbol, near(value, 1e-2))


def _inexact(x: Value, given: Any, *exact: float) -> str | None:
    """Why a constant is none of the exact ones in x's dtype, in words."""
    while isinstance(given, Value) and not given.is_constant:
        given = given.args[0]  # a copy of the constant
    found = given.tensor.item() if isinstance(given, Value) else given
    wanted = min(exact, key=lambda number: abs(number - found))
    if abs(found - wanted) <= torch.finfo(x.dtype).eps * wanted:
        return None
    return f"{found:.12g} is not {wanted:.17g} to the precision of {x.dtype}"


def _divided(x: Any, number: float) -> Any:
    return any_of(x / number, x * (1 / number))


def _product_over(number: float, x: Any, y: Any) -> Any:
    """x · y / number, in any order"""
    return any_of(_divided(x * y, number), _divided(x, number) * y, x * _divided(y, number))


def _square(x: Any) -> Any:
    return any_of(x * x, x**2, torch.square(x))


def _bounded(x: Any, low: float, high: float) -> Any:
    return any_of(F.hardtanh(x, low, high), torch.clamp(x, low, high))


def _maximum(x: Any, dim: Any) -> Any:
    """The largest along a dimension, which no gradient needs to pass"""
    largest = any_of(torch.amax(x, [dim], True), torch.max(x, dim, True)[0])
    return optional(torch.detach, largest)


# -- gelu ------------------------------------------------------------------------------------------


def _half_of(x: Any, y: Any) -> Any:
    """½ · x · (1 + y)"""
    return any_of(_product_over(2, x, y + 1), x * (_divided(y, 2) + 0.5))


@rule(
    lambda x, c: _half_of(
        x, torch.erf(any_of(x / _about(c, math.sqrt(2)), x * _about(c, math.sqrt(0.5))))
    )
)
def fuse_gelu(x: Value, c: Any, match: Match) -> Any:
    """½ · x · (1 + erf(x / √2)) = gelu(x)"""
    if not x.is_floating:
        return f"gelu does not take {x.dtype}"
    return _inexact(x, c, math.sqrt(2), math.sqrt(0.5)) or match.shared or aten.gelu(x)


_KAPPA, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def _argument(x: Any, k: Any, a: Any) -> Any:
    """√(2/π) · (x + 0.044715 x³),   √(2/π) · x · (1 + 0.044715 x²)"""
    k, a = _about(k, _KAPPA), _about(a, _CUBIC)
    square = any_of(a * _square(x), (a * x) * x)
    cube = any_of(a * x**3, a * (x * _square(x)), square * x, (a * x) * _square(x))
    even = square + 1
    return any_of(k * (x + cube), (k * x) * even, k * (x * even), x * (k * even))


@rule(lambda x, k, a: _half_of(x, torch.tanh(_argument(x, k, a))))
def fuse_gelu_tanh(x: Value, k: Any, a: Any, match: Match) -> Any:
    """½ · x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) = gelu(x, approximate="tanh")"""
    if not x.is_floating:
        return f"gelu does not take {x.dtype}"
    reason = _inexact(x, k, _KAPPA) or _inexact(x, a, _CUBIC) or match.shared
    return reason or aten.gelu(x, approximate="tanh")


@rule(lambda x: x * aten.special_ndtr(x))
def keep_x_times_ndtr() -> str:
    """x · Φ(x) is gelu(x), and more precise far below zero than gelu's kernel"""
    return "far below zero it keeps digits that gelu loses in 1 + erf"


# -- sigmoid and what is made of it ----------------------------------------------------------------


@rule(lambda x: torch.reciprocal(torch.exp(-x) + 1))
def fuse_sigmoid(x: Value, match: Match) -> Any:
    """1 / (1 + exp(−x)) = σ(x)"""
    return match.shared or (x.sigmoid() if x.is_floating else None)


@rule(lambda x: x * torch.sigmoid(x), lambda x: x / (torch.exp(-x) + 1))
def fuse_silu(x: Value, match: Match) -> Any:
    """x · σ(x) = silu(x)"""
    if not x.is_floating:
        return f"silu does not take {x.dtype}"
    return match.shared or aten.silu(x)


@rule(
    lambda x, sizes, dim: (
        aten.split_with_sizes(x, sizes, dim)[0]
        * torch.sigmoid(aten.split_with_sizes(x, sizes, dim)[1])
    ),
    lambda x, n, dim: (
        aten.slice.Tensor(x, dim, 0, n, 1) * torch.sigmoid(aten.slice.Tensor(x, dim, n, INT_MAX, 1))
    ),
    n=number,
)
def fuse_glu(x: Value, sizes: list[int] | None, n: int, dim: int, match: Match) -> Any:
    """a · σ(b) = glu(x) where a and b are the halves of x"""
    whole = x.shape[dim]
    if not (x.is_floating and isinstance(whole, int) and [whole / 2] * 2 == (sizes or [n, n])):
        return None
    return match.shared or aten.glu(x, dim)


@rule(
    lambda x: _divided(_bounded(x + 3, 0, 6), 6),
    lambda x: _bounded(_divided(x, 6) + 0.5, 0, 1),
)
def fuse_hardsigmoid(x: Value, match: Match) -> Any:
    """relu6(x + 3) / 6 = hardsigmoid(x)"""
    return match.shared or (aten.hardsigmoid(x) if x.is_floating else None)


@rule(lambda x: any_of(x * F.hardsigmoid(x), _product_over(6, x, _bounded(x + 3, 0, 6))))
def fuse_hardswish(x: Value, match: Match) -> Any:
    """x · hardsigmoid(x) = hardswish(x)"""
    return match.shared or (aten.hardswish(x) if x.is_floating else None)


# -- one function above zero, another below --------------------------------------------------------


def _at_zero_below(x: Any, below: Any) -> Any:
    """`below` where x ≤ 0, x above"""
    return any_of(torch.where(x > 0, x, below), torch.where(x <= 0, below, x))


def _at_zero_above(x: Any, below: Any) -> Any:
    """`below` where x < 0, x above"""
    return any_of(torch.where(x >= 0, x, below), torch.where(x < 0, below, x))


@rule(lambda x, a: _at_zero_below(x, x * a), a=number)
def fuse_leaky_relu(x: Value, a: float, match: Match) -> Any:
    """where(x > 0, x, a · x) = leaky_relu(x, a)"""
    if not x.is_floating:
        return f"leaky_relu does not take {x.dtype}"
    return match.shared or aten.leaky_relu(x, a)


@rule(lambda x, a: any_of(_at_zero_above(x, x * a), torch.maximum(x, x * a)), a=number)
def keep_leaky_relu_of_other_gradient() -> str:
    """where(x ≥ 0, x, a · x) has another gradient at 0 than leaky_relu(x, a)"""
    return "at x = 0 its gradient is not a, as that of leaky_relu is"


@rule(lambda x, w: _at_zero_below(x, x * w), w=constant)
def fuse_prelu(x: Value, w: Value, match: Match) -> Any:
    """where(x > 0, x, w · x) = prelu(x, w) where w varies along the channels alone"""
    shape = (1,) * (x.ndim - w.ndim) + tuple(w.shape)
    if not x.is_floating or x.dtype != w.dtype or x.ndim < 2:
        return None
    if w.tensor.numel() != 1 and shape != (1, x.shape[1]) + (1,) * (x.ndim - 2):
        return "the slope does not vary along dimension 1 alone"
    return match.shared or aten.prelu(x, new_constant(lambda t: t.reshape(-1), w))


@rule(
    lambda x, a: _at_zero_below(x, optional(lambda y: y * a, torch.expm1(x))),
    lambda x: _at_zero_above(x, torch.expm1(x)),
)
def fuse_elu(x: Value, a: Any, match: Match) -> Any:
    """where(x > 0, x, a · expm1(x)) = elu(x, a)"""
    if not x.is_floating or not isinstance(a, (int, float, type(None))):
        return None
    return match.shared or aten.elu(x, 1 if a is None else a)


@rule(lambda x, a: any_of(
    _at_zero_below(x, optional(lambda y: y * a, torch.exp(x) - 1)),
    _at_zero_above(x, optional(lambda y: y * a, torch.exp(x) - 1)),
))  # fmt: skip
def keep_elu_without_expm1() -> str:
    """exp(x) − 1 is 0.0 at −0.0, and elu(x) is −0.0"""
    return "exp(x) − 1 has lost what elu keeps near zero: write torch.expm1(x)"


@rule(
    lambda x, c: any_of(
        aten.where.ScalarSelf(aten.lt.Scalar(x, c), c, x),
        aten.masked_fill.Scalar(x, aten.lt.Scalar(x, c), c),
    ),
    lambda x, d: any_of(
        aten.where.ScalarSelf(aten.gt.Scalar(x, d), d, x),
        aten.masked_fill.Scalar(x, aten.gt.Scalar(x, d), d),
    ),
    c=number, d=number,
)  # fmt: skip
def fuse_clamp(x: Value, c: Any, d: Any, match: Match) -> Any:
    """where(x < c, c, x) = clamp(x, min=c),   where(x > d, d, x) = clamp(x, max=d)"""
    return match.shared or (aten.clamp(x, c, d) if x.is_floating else None)


@rule(
    lambda x: x * (x > 0),
    lambda x: torch.where(x > 0, x, 0),
    lambda x: torch.where(x >= 0, x, 0),
)
def keep_relu_of_other_nan() -> str:
    """x · (x > 0) is nan at −∞, and where(x > 0, x, 0) is 0 at nan"""
    return "it is not what relu is for nan or −∞: write torch.relu"


# -- softmax ---------------------------------------------------------------------------------------


@rule(lambda x, dim: (
    torch.exp(x - _maximum(x, dim)) / torch.sum(torch.exp(x - _maximum(x, dim)), [dim], True)
))  # fmt: skip
def fuse_softmax(x: Value, dim: int, match: Match) -> Any:
    """exp(x − max x) / Σ exp(x − max x) = softmax(x)"""
    return match.shared or (x.softmax(dim) if x.is_floating else None)


@rule(lambda x, dim: torch.exp(x) / torch.sum(torch.exp(x), [dim], True))
def keep_softmax_that_overflows(x: Value) -> str | None:
    """exp(x) / Σ exp(x) is nan where exp(x) overflows, and softmax(x) is not"""
    if x.target is aten.sub.Tensor:
        return None  # by something else than its maximum, but who knows
    return "exp(x) overflows where softmax does not: write F.softmax"


@rule(
    lambda x, dim, dtype: torch.softmax(x - _maximum(x, dim), dim, dtype),
    lambda x, dim, dtype: torch.log_softmax(x - _maximum(x, dim), dim, dtype),
)
def remove_shift_of_softmax(x: Value, dim: int, dtype: Any, match: Match) -> Any:
    """softmax(x − max x) = softmax(x)"""
    if not x.is_floating:
        return None
    softmax: Any = match.root.target
    return match.shared or softmax(x, dim, dtype)


@rule(lambda x: torch.log(aten.softmax.int(x, ...)), lambda x: torch.log(torch.sigmoid(x)))
def keep_log_of_underflow() -> str:
    """log(softmax(x)) and log(σ(x)) are −∞ where the inner function underflows"""
    return "it is −∞ where what is inside underflows: write log_softmax or logsigmoid"


@rule(lambda x: any_of(torch.log(torch.exp(x) + 1), torch.log1p(torch.exp(x))))
def keep_softplus_that_overflows() -> str:
    """log(1 + exp(x)) is ∞ where exp(x) overflows, and softplus(x) is x"""
    return "exp(x) overflows where softplus does not: write F.softplus"


RULES = RuleSet(
    fuse_gelu,
    fuse_gelu_tanh,
    keep_x_times_ndtr,
    fuse_sigmoid,
    fuse_silu,
    fuse_glu,
    fuse_hardsigmoid,
    fuse_hardswish,
    fuse_leaky_relu,
    keep_leaky_relu_of_other_gradient,
    fuse_prelu,
    fuse_elu,
    keep_elu_without_expm1,
    fuse_clamp,
    keep_relu_of_other_nan,
    fuse_softmax,
    keep_softmax_that_overflows,
    remove_shift_of_softmax,
    keep_log_of_underflow,
    keep_softplus_that_overflows,
)


@dataclass(frozen=True)
class FuseActivations:
    """Replace activation functions that are written out by the one call that each is."""

    name: ClassVar[str] = "fuse-activations"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
