"""Simplify small chains of calls by exact algebra.

Before                                   After
    a = x * 2 * 3                            c = hardtanh(conv2d(x * 6, w, b), 0, 6)
    b = relu(conv2d(a, w, b))                d = flatten(c, 1)
    c = clamp(b, max=6)
    d = reshape(flatten(c, 2), [n, -1])

Views of views, casts of casts, bounds of bounds and pads of pads become one call; chains of
scalars are computed once; 1 / √x is rsqrt. Each rule states its equation. Rules hold for nan,
infinities and −0.0, and gradients are the same; only relu(clamp(x, max=b)) passes its gradient at
x = b, and hardtanh(x, 0, b) does not.

Scalar chains round once where they rounded twice.

Left alone: a value inside the chain that others use, where the chain would then be computed twice
or nothing be saved; bounds that cross; casts through a narrower type; sums of scalars with
different signs, because (x + 2²³) − 2²³ is how one rounds; scalar products that leave the range of
the dtype; integer division; a single view (flatten stays flatten); views to a shape with several
symbolic sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rules import Value, apply_rules, rule
from fxopt.shapes import dtype_of, same_metadata, same_shape

aten = torch.ops.aten


# -- views of views --------------------------------------------------------------------------------

_RESHAPES = (
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dims,
    aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip


@rule(
    lambda y, size: y.reshape(size),
    lambda y, first, last: torch.flatten(y, first, last),
    lambda y, dim, sizes: aten.unflatten.int(y, dim, sizes),
    lambda y, dims: aten.squeeze.dims(y, dims),
    lambda y, dim: y.unsqueeze(dim),
)
def merge_reshapes(y: Value, match: Match) -> Any:
    """reshape(reshape(x)) = reshape(x), which is x where the shape returns"""
    if y.target not in _RESHAPES:
        return None
    x = y.args[0]
    if same_metadata(x.node, match.root):
        return x
    if y.users > 1:
        return f"{y.node.name} is used elsewhere too"
    sizes = [size if isinstance(size, int) else -1 for size in match.root.meta["val"].shape]
    if sizes.count(-1) > 1 or -1 in sizes and 0 in sizes:
        return None
    return x.reshape(sizes)


_REDUCTIONS = (
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default,
    aten.logsumexp.default,
)  # fmt: skip


@rule(
    lambda y, size: y.reshape(size),
    lambda y, first, last: torch.flatten(y, first, last),
    lambda y, dims: aten.squeeze.dims(y, dims),
)
def drop_kept_dims(y: Value, match: Match) -> Any:
    """reshape(mean(x, dims, keepdim=True)) = mean(x, dims)"""
    if y.target not in _REDUCTIONS or y.args[2] is not True or not y.args[1]:
        return None
    x, dims = y.args[:2]
    rest = [size for axis, size in enumerate(y.shape) if axis not in dims]
    if not same_shape(rest, match.root.meta["val"].shape):
        return None
    if y.users > 1:
        return f"{y.node.name} is used elsewhere too"
    return y.target(x, dims, False, **y.node.kwargs)


@rule(lambda x, first, second: x.expand(first).expand(second))
def merge_expands(x: Value, second: Any, match: Match) -> Any:
    """expand(expand(x, s), t) = expand(x, t)"""
    shape = match.root.meta["val"].shape
    if all(isinstance(size, int) for size in shape):
        second = list(shape)
    if any(isinstance(size, int) and size == -1 for size in second):
        return None  # a symbolic size that only the first expand names
    return match.shared or x.expand(second)


@rule(lambda x, d, a, b, c, e: aten.slice.Tensor(aten.slice.Tensor(x, d, a, b, 1), d, c, e, 1))
def merge_slices(x: Value, d: int, a: int, b: int, c: int, e: int, match: Match) -> Any:
    """x[a:b][c:e] = x[a + c : min(b, a + e)]"""
    if not all(isinstance(place, int) and place >= 0 for place in (a, b, c, e)):
        return None
    return match.shared or aten.slice.Tensor(x, d, a + c, min(b, a + e), 1)


@rule(lambda x, d, a, b, i: torch.select(aten.slice.Tensor(x, d, a, b, 1), d, i))
def merge_select_of_slice(x: Value, d: int, a: int, i: int, match: Match) -> Any:
    """x[a:b][i] = x[a + i]"""
    if not all(isinstance(place, int) and place >= 0 for place in (a, i)):
        return None
    return match.shared or x.select(d, a + i)


@rule(lambda parts, dim: torch.cat(parts, dim))
def merge_cats(parts: list[Value], dim: int) -> Any:
    """cat([cat([a, b]), c]) = cat([a, b, c])"""
    inner = [part for part in parts if part.target is aten.cat.default and part.args[1] == dim]
    inner = [part for part in inner if {p.dtype for p in part.args[0]} == {part.dtype}]
    alone = [part.node for part in inner if part.users == 1]
    if not alone:
        return f"{inner[0].node.name} is used elsewhere too" if inner else None
    flat = [part.args[0] if part.node in alone else [part] for part in parts]
    return aten.cat([part for some in flat for part in some], dim)


# -- casts of casts --------------------------------------------------------------------------------


@rule(lambda x, middle, last: aten.to.dtype(aten.to.dtype(x, middle, ...), last, ...))
def merge_casts(x: Value, middle: torch.dtype, last: torch.dtype, match: Match) -> Any:
    """to(to(x, wider), dtype) = to(x, dtype), which is x where the dtype returns"""
    if not _holds(middle, x.dtype):
        return f"{middle} does not hold every value of {x.dtype}"
    if middle.is_floating_point and _is_integral(last) and not _holds(last, x.dtype):
        return f"what is out of the range of {last} may become another integer"
    if last == x.dtype:
        return x
    return match.shared or aten.to.dtype(x, last)


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of `narrow` is one of `wide`."""
    if wide is narrow or narrow is torch.bool:
        return True
    if _is_integral(narrow):
        values = torch.iinfo(narrow)
        if wide.is_floating_point:
            return values.max <= 2 / torch.finfo(wide).eps
        known = torch.iinfo(wide) if _is_integral(wide) else None
        return known is not None and known.min <= values.min and values.max <= known.max
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return wide in floats[2:] and narrow in floats[: floats.index(wide)]


# -- bounds and signs ------------------------------------------------------------------------------


@rule(
    lambda y: F.relu(y),
    lambda y, low, high: F.hardtanh(y, low, high),
    lambda y, low, high: torch.clamp(y, low, high),
)
def merge_bounds(y: Value, match: Match) -> Any:
    """clamp(clamp(x, a, b), c, d) = clamp(x, max(a, c), min(b, d)); so with relu and hardtanh"""
    inner, outer = _bounds(y.node), _bounds(match.root)
    if inner is None or outer is None or y.dtype != dtype_of(match.root):
        return None
    low, high = max(inner[0], outer[0]), min(inner[1], outer[1])
    if not all(a[0] <= b[0] for a, b in (inner, outer, (low, high))):
        return "the bounds cross"
    if y.dtype in _UNSIGNED and min(inner[0], outer[0])[0] < 0:
        return "a negative bound is a large one to unsigned integers"
    if (low, high) == inner:
        return y
    if y.users > 1:
        return f"{y.node.name} is used elsewhere too"
    return _bounded(y.args[0], low, high)


# A bound is (number, flag), such that max and min choose the right one of two. Where the number is
# reached exactly, relu and hardtanh stop the gradient (they are strict) and clamp lets it pass; the
# flag of a lower bound says that it is strict, that of an upper bound that it is not.
_Bound = tuple[float, bool]
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def _bounds(node: fx.Node) -> tuple[_Bound, _Bound] | None:
    """Return the lower and upper bound that a call gives to its argument; None for other calls."""
    if node.target is aten.relu.default:
        return (0, True), (math.inf, True)
    if node.target not in (aten.hardtanh.default, aten.clamp.default):
        return None
    strict = node.target is aten.hardtanh.default
    low, high = node.args[1:]
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float))):
        return None
    return (low, strict), (high, not strict)


def _bounded(x: Value, low: _Bound, high: _Bound) -> Any:
    """Build the one call that bounds x, or say why there is none."""
    if x.is_floating and low == (0, True) and high[0] == math.inf:
        return x.relu()
    if x.is_floating and low[1] and math.isfinite(low[0]) and math.isfinite(high[0]):
        return aten.hardtanh(x, low[0], high[0])
    if x.is_floating and (low[1] or not high[1]):
        return "no single call has this gradient at the bounds"
    ends = (None if math.isinf(number) else number for number, _ in (low, high))
    return x.clamp(*ends)


_NOT_NEGATIVE = (
    aten.sigmoid.default, aten.softmax.int, aten.exp.default, aten.abs.default,
    aten.hardsigmoid.default, aten.square.default,
)  # fmt: skip


@rule(lambda y: F.relu(y), lambda y: torch.abs(y))
def remove_relu_of_positive(y: Value) -> Value | None:
    """relu(y) = |y| = y where y ≥ 0, and so is its gradient where y = 0"""
    return y if y.is_floating and y.target in _NOT_NEGATIVE else None


@rule(
    lambda x: torch.neg(torch.neg(x)),
    lambda x: torch.logical_not(torch.logical_not(x)),
    lambda x: torch.bitwise_not(torch.bitwise_not(x)),
)
def remove_double_negation(x: Value) -> Value:
    """−(−x) = x"""
    return x


@rule(lambda x: torch.abs(torch.neg(x)))
def merge_abs_of_neg(x: Value, match: Match) -> Any:
    """|−x| = |x|"""
    if not x.dtype.is_signed:
        return f"−x wraps around in {x.dtype}"
    return match.shared or x.abs()


_ROUNDINGS = (aten.floor.default, aten.ceil.default, aten.round.default, aten.trunc.default)


@rule(
    lambda y: torch.floor(y),
    lambda y: torch.ceil(y),
    lambda y: torch.round(y),
    lambda y: torch.trunc(y),
)
def merge_roundings(y: Value) -> Value | None:
    """⌊y⌋ = ⌈y⌉ = y where y is whole"""
    return y if y.target in _ROUNDINGS else None


@rule(lambda x, y: x + torch.neg(y), lambda x, y: x - torch.neg(y))
def merge_neg_into_sum(x: Any, y: Value, match: Match) -> Any:
    """x + (−y) = x − y,   x − (−y) = x + y"""
    if not isinstance(x, Value):
        return None
    if not (y.is_floating or y.dtype == dtype_of(match.root)):
        return f"−y wraps around in {y.dtype}"
    if match.shared:
        return match.shared
    return x - y if match.root.target is aten.add.Tensor else x + y


# -- scalars ---------------------------------------------------------------------------------------


@rule(
    lambda x, a, b: (x + a) + b,
    lambda x, a, b: (x + a) - b,
    lambda x, a, b: (x - a) + b,
    lambda x, a, b: (x - a) - b,
)
def merge_scalar_sums(x: Any, a: Any, b: Any, match: Match) -> Any:
    """(x + a) + b = x + (a + b)"""
    if not _are_scalars(x, match, a, b):
        return None
    root, inner = match.nodes
    first = -a if inner.target is aten.sub.Tensor else a
    second = -b if root.target is aten.sub.Tensor else b
    if x.is_floating and first * second < 0:
        return "adding a number and taking one away is how one rounds"
    return match.shared or _out_of_range(x.dtype, first + second) or x + (first + second)


@rule(
    lambda x, a, b: (x * a) * b,
    lambda x, a, b: (x * a) / b,
    lambda x, a, b: (x / a) * b,
    lambda x, a, b: (x / a) / b,
)
def merge_scalar_products(x: Any, a: Any, b: Any, match: Match) -> Any:
    """(x · a) · b = x · (a · b), and so with division"""
    if not _are_scalars(x, match, a, b):
        return None
    if not x.is_floating:
        return match.shared or _out_of_range(x.dtype, a * b) or x * (a * b)
    reason = match.shared or _vanishes(x.dtype, a, b)
    if reason:
        return reason
    root, inner = (node.target is aten.div.Tensor for node in match.nodes)
    factor = a * b if root == inner else a / b if root else b / a
    return _vanishes(x.dtype, factor) or (x / factor if root and inner else x * factor)


def _are_scalars(x: Any, match: Match, *numbers: Any) -> bool:
    """Whether x is a tensor in whose dtype these numbers are added or multiplied."""
    if not isinstance(x, Value) or x.dtype != dtype_of(match.root):
        return False
    kind = (int, float) if x.is_floating else int if _is_integral(x.dtype) else ()
    return all(isinstance(n, kind) and not isinstance(n, bool) for n in numbers)


def _out_of_range(dtype: torch.dtype, *numbers: float) -> str | None:
    """Which of the numbers the dtype cannot hold."""
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    beyond = [number for number in numbers if not limits.min <= number <= limits.max]
    return f"{beyond[0]} is out of the range of {dtype}" if beyond else None


def _vanishes(dtype: torch.dtype, *factors: float) -> str | None:
    """Which of the factors is zero, infinite or less than exact in the dtype."""
    limits = torch.finfo(dtype)
    wrong = [factor for factor in factors if not limits.tiny <= abs(factor) <= limits.max]
    return f"{wrong[0]} is out of the normal range of {dtype}" if wrong else None


@rule(lambda x: torch.reciprocal(torch.sqrt(x)), lambda x: torch.sqrt(x) ** -1)
def fuse_rsqrt(x: Value, match: Match) -> Any:
    """1 / √x = rsqrt(x)"""
    return match.shared or (x.rsqrt() if x.is_floating else None)


# -- padding ---------------------------------------------------------------------------------------


@rule(lambda x, p, q, v: F.pad(F.pad(x, p, "constant", v), q, "constant", v))
def merge_pads(x: Value, p: list[int], q: list[int], v: float, match: Match) -> Any:
    """pad(pad(x, p), q) = pad(x, p + q)"""
    if not all(isinstance(pad, int) and pad >= 0 for pad in (*p, *q)):
        return "a pad is negative, and cuts"
    total = [a + b for a, b in zip_longest(p, q, fillvalue=0)]
    return match.shared or aten.pad(x, total, "constant", v)


RULES = (
    merge_reshapes,
    drop_kept_dims,
    merge_expands,
    merge_slices,
    merge_select_of_slice,
    merge_cats,
    merge_casts,
    merge_bounds,
    remove_relu_of_positive,
    remove_double_negation,
    merge_abs_of_neg,
    merge_roundings,
    merge_neg_into_sum,
    merge_scalar_sums,
    merge_scalar_products,
    fuse_rsqrt,
    merge_pads,
)


@dataclass(frozen=True)
class Simplify:
    """Replace small chains of calls by fewer calls that compute the same."""

    name: ClassVar[str] = "simplify"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
