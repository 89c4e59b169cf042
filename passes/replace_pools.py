"""Write pools over whole maps, and means of means, as one call in one form.

Before                                       After
    a = flatten(adaptive_avg_pool2d(x, 1), 1)    a = mean(x, [2, 3])
    b = mean(mean(x, [3]), [2])                  b = mean(x, [2, 3])
    c = mean(flatten(x, 2), [2])                 c = mean(x, [2, 3])
    d = mean(x, [2, 3], keepdim=True)            d = adaptive_avg_pool2d(x, [1, 1])
    e = avg_pool2d(x, [7, 7])  # of 7 × 7        e = adaptive_avg_pool2d(x, [1, 1])
    f = adaptive_avg_pool2d(x, [7, 7])  # 14²    f = avg_pool2d(x, [2, 2], [2, 2])

All groups of a mean of means have one size, so it is the mean of all; sums, maxima and minima join
alike. Where the dimensions of size 1 stay, the form is the pool (engines keep their own layout
through one); where they go, it is the mean. An adaptive pool whose windows are all alike is a plain
one. Sums are added up in another order.

Left alone: maximum pools, whose gradient goes to one of several equal elements where that of amax
is shared; a pool or mean that others use, where nothing would be saved; means in another dtype;
windows that overlap, pad or count otherwise; sizes that are symbolic and have to be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fxopt.conditions import every, floating, rank
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rules import RuleSet, Value, apply_rules, rule
from fxopt.shapes import same_shape

aten = torch.ops.aten

_GLOBAL = {
    aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}  # fmt: skip
_REDUCTIONS = (
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default,
)  # fmt: skip


@rule(
    lambda y, size: y.reshape(size),
    lambda y, first, last: torch.flatten(y, first, last),
    lambda y, dims: aten.squeeze.dims(y, dims),
)
def replace_flat_pool(y: Value, match: Match) -> Any:
    """flatten(adaptive_avg_pool2d(x, 1)) = mean(x, [2, 3])"""
    count = _GLOBAL.get(y.target)
    if count is None or any(size != 1 for size in y.args[1]):
        return None
    if not same_shape(y.shape[: y.ndim - count], match.root.meta["val"].shape):
        return None
    if y.users > 1:
        return f"{y.node.name} is used elsewhere too"
    return aten.mean.dim(y.args[0], [*range(y.ndim - count, y.ndim)], False)


@rule(lambda x, dims: aten.mean.dim(x, dims, True), x=every(floating, rank(4)), dims=[2, 3])
def replace_kept_mean(x: Value) -> Any:
    """mean(x, [2, 3], keepdim=True) = adaptive_avg_pool2d(x, 1)"""
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        return "a pool does not take empty maps"
    return aten.adaptive_avg_pool2d(x, [1, 1])


@rule(
    lambda x, kernel, stride: aten.avg_pool1d(x, kernel, stride, [0], ...),
    lambda x, kernel, stride: aten.avg_pool2d(x, kernel, stride, [0, 0], ..., ..., None),
    lambda x, kernel, stride: aten.avg_pool3d(x, kernel, stride, [0, 0, 0], ..., ..., None),
    x=floating,
)
def replace_whole_window(x: Value, kernel: list[int]) -> Any:
    """avg_pool(x, size of x) = adaptive_avg_pool(x, 1)"""
    count = len(kernel)
    if not same_shape(kernel, x.shape[x.ndim - count :]):
        return None
    return _ADAPTIVE[count](x, [1] * count)


@rule(
    lambda x, size: F.adaptive_avg_pool1d(x, size),
    lambda x, size: F.adaptive_avg_pool2d(x, size),
    lambda x, size: F.adaptive_avg_pool3d(x, size),
)
def replace_even_windows(x: Value, size: list[Any]) -> Any:
    """adaptive_avg_pool(x, n / k) = avg_pool(x, k, stride=k) where k divides n"""
    given = list(x.shape[x.ndim - len(size) :])
    if all(isinstance(n, int) and n == 1 for n in size) or same_shape(size, given):
        return None
    if not all(isinstance(n, int) for n in (*given, *size)):
        return "its sizes are not known"
    if 0 in x.shape or any(n % m for n, m in zip(given, size, strict=True)):
        return f"windows of {given} to {size} overlap"
    window = [n // m for n, m in zip(given, size, strict=True)]
    return _PLAIN[len(size)](x, window, window)


_ADAPTIVE = {1: aten.adaptive_avg_pool1d, 2: aten.adaptive_avg_pool2d, 3: aten.adaptive_avg_pool3d}
_PLAIN = {1: aten.avg_pool1d, 2: aten.avg_pool2d, 3: aten.avg_pool3d}


@rule(lambda x, f, a, b, keep: f(f(x, a, keep), b, keep), family={"f": _REDUCTIONS})
def merge_reductions(x: Value, f: Any, a: list[int], b: list[int], keep: bool, match: Match) -> Any:
    """mean(mean(x, [3]), [2]) = mean(x, [2, 3]), and so sums, maxima and minima"""
    if not a or not b:
        return None  # no dimensions means all of them
    left = range(x.ndim) if keep else [d for d in range(x.ndim) if d not in a]
    return match.shared or f(x, sorted({*a, *(left[d] for d in b)}), keep)


@rule(lambda y, f, dims: f(y, dims, False), family={"f": _REDUCTIONS})
def merge_flat_reduction(y: Value, f: Any, dims: list[int]) -> Any:
    """mean(flatten(x, 2), [2]) = mean(x, [2, 3])"""
    if y.target not in (aten.flatten.using_ints, aten.reshape.default):
        return None
    x = y.args[0]
    joined = _joined(x.shape, y.shape)
    if joined is None or joined not in dims:
        return None
    if y.users > 1:
        return f"{y.node.name} is used elsewhere too"
    more = x.ndim - y.ndim
    others = [d if d < joined else d + more for d in dims if d != joined]
    return f(x, sorted([*range(joined, joined + more + 1), *others]), False)


def _joined(before: Sequence[Any], after: Sequence[Any]) -> int | None:
    """Return the dimension into which a reshape joined several that follow each other, if one."""
    more = len(before) - len(after)
    for d in range(len(after)) if more > 0 else ():
        if same_shape(before[:d], after[:d]) and same_shape(before[d + more + 1 :], after[d + 1 :]):
            return d
    return None


RULES = RuleSet(
    replace_flat_pool,
    replace_kept_mean,
    replace_whole_window,
    replace_even_windows,
    merge_reductions,
    merge_flat_reduction,
)


@dataclass(frozen=True)
class ReplacePools:
    """Give pools over whole maps one form, and join reductions of reductions."""

    name: ClassVar[str] = "replace-pools"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
