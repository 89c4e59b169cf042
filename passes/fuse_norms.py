"""Recognise normalisations that are written out.

Before                                          After
    d = x − mean(x)                                 layer_norm(x, w, b)
    d / √(mean(d²) + ε) · w + b
    x / √(mean(x²) + ε) · w                         rms_norm(x, w)
    reshape(layer_norm(reshape(x))) · w + b         group_norm(x, w, b)

The mean and the variance go over the last dimensions; or over all but the batch and the channels,
which is a group norm with a group for each channel (PyTorch's instance norm is slower than that);
or over the channels of an image, which is a layer norm between two permutes. The variance may be
var, var_mean or a mean of squares, the root sqrt, rsqrt or a power. Then the weight and the bias
are taken in, where their shape is the one that the norm wants.

In half precision a norm rounds once where its pieces round several times. Where squares overflow,
what is written out gives 0 and layer_norm 0 or nan.

Left alone, with the reason: a variance over n − 1; ε outside of the root, or none; E[x²] − E[x]²;
symbolic sizes where a norm needs numbers; an RMS norm over the channels of an image, a layer norm
over few channels, and in half precision on a CPU what an RMS norm does slower than its pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxopt.conditions import constant, fixed, number
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match, any_of, named, optional
from fxopt.rules import RuleSet, Value, apply_rules, new_constant, rule
from fxopt.shapes import same_shape

aten = torch.ops.aten

_FEW_CHANNELS = 64  # with fewer, two permutes cost more than a layer norm saves (measured on CPU)


# -- parts of patterns -----------------------------------------------------------------------------


def _squared(x: Any) -> Any:
    return any_of(x**2, x * x, torch.square(x))


def _centred(x: Any, dims: Any, u: Any, c: Any) -> Any:
    """x − mean(x)"""
    return x - any_of(
        torch.mean(x, dims, True),
        aten.var_mean.dim(x, dims, u, True)[1],
        aten.var_mean.correction(x, dims, correction=c, keepdim=True)[1],
    )


def _variance(x: Any, dims: Any, u: Any, c: Any) -> Any:
    """mean((x − mean(x))²)"""
    return any_of(
        torch.mean(_squared(_centred(x, dims, u, c)), dims, True),
        aten.var.dim(x, dims, u, True),
        aten.var.correction(x, dims, correction=c, keepdim=True),
        aten.var_mean.dim(x, dims, u, True)[0],
        aten.var_mean.correction(x, dims, correction=c, keepdim=True)[0],
    )


def _over_root(x: Any, y: Any) -> Any:
    """x / √y"""
    inverse = any_of(torch.rsqrt(y), y**-0.5, torch.reciprocal(torch.sqrt(y)))
    return any_of(x / any_of(torch.sqrt(y), y**0.5), x * inverse)


# -- norms without weights -------------------------------------------------------------------------


def _number(given: Any) -> float:
    """The number that a number or a constant of one element stands for."""
    while isinstance(given, Value) and not given.is_constant:
        given = given.args[0]  # a copy of the constant
    return float(given.tensor.item() if isinstance(given, Value) else given)


def _unfit(x: Value, eps: Any) -> str | None:
    """Why no norm computes this, in words."""
    if not x.is_floating:
        return f"norms do not take {x.dtype}"
    vanishes = torch.tensor(_number(eps), dtype=x.dtype) == 0
    return f"{_number(eps)} is zero in {x.dtype}, and not inside a norm" if vanishes else None


@rule(
    lambda x, dims, eps, u, c: _over_root(_centred(x, dims, u, c), _variance(x, dims, u, c) + eps),
    eps=fixed, c=number,
)  # fmt: skip
def fuse_layer_norm(x: Value, dims: list[int], eps: Any, u: Any, c: Any, match: Match) -> Any:
    """(x − mean(x)) / √(mean((x − mean(x))²) + ε) = layer_norm(x)"""
    if u or c:
        return "its variance divides by n − 1, and that of a norm by n"
    return match.shared or _unfit(x, eps) or _norm_over(x, dims, _number(eps))


def _norm_over(x: Value, given: list[int] | None, eps: float) -> Any:
    """The layer or group norm over these dimensions, or why there is none."""
    dims = sorted(given or range(x.ndim))
    if dims == [1] and x.ndim > 2:
        return _norm_over_channels(x, eps)
    sizes = _last_sizes(x, dims)
    if isinstance(sizes, str):
        return sizes
    known = all(isinstance(size, int) for size in sizes)
    groups = {1: 1, 2: x.shape[1]}.get(dims[0]) if x.ndim > 2 else None
    if isinstance(groups, int) and (not known or dims[0] == 2 and x.ndim > 3):
        return aten.group_norm(x, groups, None, None, eps)
    return aten.layer_norm(x, sizes, None, None, eps) if known else _SYMBOLIC


_SYMBOLIC = "a norm needs numbers where the sizes are symbolic"


def _last_sizes(x: Value, dims: list[int]) -> list[Any] | str:
    """The sizes of the last dimensions, or why there is no norm over these ones."""
    if dims != list(range(x.ndim))[-len(dims) :]:
        return f"it goes over dimensions {dims}, and a norm goes over the last"
    return [x.shape[dim] for dim in dims]


def _norm_over_channels(x: Value, eps: float) -> Any:
    """permute(layer_norm(permute(x)))"""
    channels = x.shape[1]
    if not isinstance(channels, int) or channels < _FEW_CHANNELS:
        return "it goes over few channels, and two permutes cost more than they save"
    last, first = [0, *range(2, x.ndim), 1], [0, x.ndim - 1, *range(1, x.ndim - 1)]
    return aten.layer_norm(x.permute(last), [channels], None, None, eps).permute(first)


def _outside(x: Any, dims: Any, u: Any, c: Any, eps: Any) -> Any:
    """A standard deviation that is used as it is, or with ε added to it"""
    deviation = any_of(
        torch.sqrt(_variance(x, dims, u, c)),
        aten.std.dim(x, dims, u, True),
        aten.std.correction(x, dims, correction=c, keepdim=True),
    )
    return optional(lambda y: y + eps, deviation)


@rule(lambda x, dims, u, c, eps: _centred(x, dims, u, c) / _outside(x, dims, u, c, eps))
def keep_norm_of_other_eps(u: Any, c: Any) -> str:
    """d / (σ + ε) is not d / √(σ² + ε)"""
    bessel = ", and its variance divides by n − 1" if u or c else ""
    return "it does not add ε to its variance" + bessel


@rule(
    lambda x, dims, eps, u, c: _over_root(
        _centred(x, dims, u, c),
        (torch.mean(_squared(x), dims, True) - _squared(torch.mean(x, dims, True))) + eps,
    ),
)
def keep_norm_of_difference() -> str:
    """E[x²] − E[x]² is E[(x − E[x])²] with another rounding, and may be negative"""
    return "E[x²] − E[x]² loses the digits that a norm keeps"


@rule(
    lambda x, dims, eps: _over_root(x, torch.mean(_squared(x), dims, True) + eps),
    lambda y, x, dims, eps, wide: _over_root(
        optional(lambda same: aten.to.dtype(same, wide, ...), y),
        torch.mean(_squared(named(x, aten.to.dtype(y, wide, ...))), dims, True) + eps,
    ),
    eps=fixed,
)
def fuse_rms_norm(x: Value, dims: list[int], eps: Any, match: Match) -> Any:
    """x / √(mean(x²) + ε) = rms_norm(x)"""
    reason = match.shared or _unfit(x, eps) or _slow(x)
    if reason:
        return reason
    if dims == [1] and x.ndim > 2:
        return "over the channels of an image, rms_norm is slower than its pieces"
    sizes = _last_sizes(x, sorted(dims or range(x.ndim)))
    if isinstance(sizes, str) or not all(isinstance(size, int) for size in sizes):
        return sizes if isinstance(sizes, str) else _SYMBOLIC
    return aten.rms_norm(x, sizes, None, _number(eps))


_HALVES = (torch.float16, torch.bfloat16)


def _slow(x: Value) -> str | None:
    """Why PyTorch's rms_norm is slower than its pieces, in words."""
    slow = x.dtype in _HALVES and x.fake.device.type == "cpu"
    return f"on a CPU, rms_norm computes in float32 what is written in {x.dtype}" if slow else None


# -- group norm ------------------------------------------------------------------------------------


def _reshaped(x: Any, size: Any, dim: Any, sizes: Any) -> Any:
    return any_of(torch.reshape(x, size), aten.unflatten.int(x, dim, sizes))


def _normalised(y: Any, n: Any, eps: Any, value: Any) -> Any:
    """A norm without weights of a value that is called y"""
    norms = (aten.layer_norm.default, aten.group_norm.default)
    return any_of(*(norm(named(y, value), n, None, None, eps, ...) for norm in norms))


@rule(
    lambda x, y, n, eps, size, dim, sizes: any_of(
        aten.reshape.default(_normalised(y, n, eps, _reshaped(x, size, dim, sizes)), ...),
        aten.flatten.using_ints(_normalised(y, n, eps, _reshaped(x, size, dim, sizes)), ...),
    )
)
def fuse_group_norm(x: Value, y: Value, n: Any, eps: float, match: Match) -> Any:
    """reshape(normalised(reshape(x))) = group_norm(x) where y has a dimension for the groups"""
    if x.ndim < 3 or y.ndim < 3 or not same_shape(x.shape, match.root.meta["val"].shape):
        return None
    channels, groups = x.shape[1], y.shape[1]
    normalised = [*y.shape[2:]] if isinstance(n, list) else groups
    if not (isinstance(channels, int) and isinstance(groups, int) and n == normalised):
        return None
    if channels % groups or not same_shape(x.shape[:1], y.shape[:1]):
        return None
    return match.shared or aten.group_norm(x, groups, None, None, eps)


@rule(lambda x, s, eps, w: aten.layer_norm(x, s, None, None, eps, ...) * w, w=constant)
def replace_layer_norm_by_group_norm(
    x: Value, s: list[int], eps: float, w: Value, match: Match
) -> Any:
    """layer_norm(x) · w = group_norm(x) · w where w varies along the channels of x"""
    if x.ndim < 3 or len(s) not in (x.ndim - 1, x.ndim - 2) or not isinstance(x.shape[1], int):
        return None
    if x.shape[1] == 1 or _lined_up(w, x) != [1, x.shape[1]] + [1] * (x.ndim - 2):
        return None
    groups = 1 if len(s) == x.ndim - 1 else x.shape[1]
    return match.shared or aten.group_norm(x, groups, None, None, eps) * w


# -- weights and biases ----------------------------------------------------------------------------


def _lined_up(w: Value, x: Value) -> list[Any]:
    """The shape of w with as many dimensions as x has."""
    return [1] * (x.ndim - w.ndim) + list(w.shape)


def _vector(norm: Value, dims: list[int] | None, w: Value) -> Value | None:
    """w as a weight or a bias of a norm (whose result is permuted to dims), or None."""
    x, over = norm.args[:2]
    shape = _lined_up(w, x)
    for place, dim in enumerate(dims or ()):
        shape[dim] = _lined_up(w, x)[place]
    channels = norm.target is aten.group_norm.default
    wanted = [x.shape[1]] if channels else list(over)
    before = 1 if channels else x.ndim - len(over)
    expected = [1] * before + wanted + [1] * (x.ndim - before - len(wanted))
    if not same_shape(shape, expected) or w.dtype != norm.dtype:
        return None
    return w if list(w.shape) == wanted else new_constant(lambda t: t.reshape(wanted), w)


def _moved(norm: Any, dims: Any) -> Any:
    return optional(lambda y: torch.permute(y, dims), norm)


@rule(
    lambda y, x, s, eps, dims, w: (
        _moved(named(y, aten.layer_norm(x, s, None, None, eps, ...)), dims) * w
    ),
    lambda y, x, s, eps, w: named(y, aten.group_norm(x, s, None, None, eps, ...)) * w,
    lambda y, x, s, eps, w: named(y, aten.rms_norm(x, s, None, eps)) * w,
    w=constant,
)
def fuse_weight(y: Value, dims: list[int] | None, w: Value, match: Match) -> Any:
    """norm(x) · w = norm(x, w)"""
    weight = _vector(y, dims, w)
    if weight is None:
        return None
    slow = _slow(y) if y.target is aten.rms_norm.default else None
    return match.shared or slow or _permuted(y.target(*y.args[:2], weight, *y.args[3:]), dims)


@rule(
    lambda y, x, s, w, eps, dims, b: (
        _moved(named(y, aten.layer_norm(x, s, w, None, eps, ...)), dims) + b
    ),
    lambda y, x, s, w, eps, b: named(y, aten.group_norm(x, s, w, None, eps, ...)) + b,
    b=constant,
)
def fuse_bias(y: Value, dims: list[int] | None, b: Value, match: Match) -> Any:
    """norm(x, w) + b = norm(x, w, b)"""
    bias = _vector(y, dims, b)
    if bias is None:
        return None
    if y.target is aten.group_norm.default and y.args[2] is None:
        return "PyTorch's group_norm has no gradient with a bias and no weight"
    return match.shared or _permuted(y.target(*y.args[:3], bias, *y.args[4:]), dims)


def _permuted(y: Value, dims: list[int] | None) -> Any:
    return y if dims is None else y.permute(dims)


@rule(
    lambda x, y, wide, s, eps, dtype: aten.to.dtype(
        named(y, aten.layer_norm(aten.to.dtype(x, wide, ...), s, None, None, eps, ...)), dtype, ...
    ),
    lambda x, y, wide, s, eps, dtype: aten.to.dtype(
        named(y, aten.rms_norm(aten.to.dtype(x, wide, ...), s, None, eps)), dtype, ...
    ),
)
def remove_casts_around_norm(x: Value, y: Value, dtype: torch.dtype, match: Match) -> Any:
    """to(norm(to(x, float32)), half) = norm(x), which computes in float32 by itself"""
    if x.dtype not in _HALVES or y.dtype is not torch.float32 or dtype is not x.dtype:
        return None
    return match.shared or y.target(x, *y.args[1:])


RULES = RuleSet(
    fuse_layer_norm,
    keep_norm_of_other_eps,
    keep_norm_of_difference,
    fuse_rms_norm,
    fuse_group_norm,
    replace_layer_norm_by_group_norm,
    fuse_weight,
    fuse_bias,
    remove_casts_around_norm,
)


@dataclass(frozen=True)
class FuseNorms:
    """Replace normalisations that are written out by the one call that each is."""

    name: ClassVar[str] = "fuse-norms"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
