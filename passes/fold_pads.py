"""Fold pads and crops into the convolution or pooling beside them.

Before                                   After
    y = pad(x, [1, 0, 1, 0])                 z = conv2d(x, w, b, stride=2, padding=1)
    z = conv2d(y, w, b, stride=2)

    y = pad(x, [0, 1, 0, 1], value=−∞)       z = max_pool2d(x, 3, 2, ceil_mode=True)
    z = max_pool2d(y, 3, 2)

    y = conv2d(x, w, b, padding=2)           z = conv2d(x, w, b, padding=1)
    z = y[:, :, 1:-1, 1:-1]

A kernel meets only what padding its last output reads. So the sides need not be padded alike: where
padding both as the left one gives as many outputs, each of them reads the same, as what lies to the
right of the input is zero in both. A maximum ignores −∞, and so may read less.

Left alone: pads whose right side needs more than the left one (there is no such convolution), of
channels, of the batch, by other numbers, or that cut; padding of more than half a pooling's kernel;
an average that does not count its padding; a crop of less than the padding on one side, and one of
a value that others use; sizes that are not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rules import Value, apply_rules, rule

aten = torch.ops.aten


@rule(
    lambda x, p, w, b, s, q, d, g: F.conv1d(F.pad(x, p, "constant", 0.0), w, b, s, q, d, g),
    lambda x, p, w, b, s, q, d, g: F.conv2d(F.pad(x, p, "constant", 0.0), w, b, s, q, d, g),
    lambda x, p, w, b, s, q, d, g: F.conv3d(F.pad(x, p, "constant", 0.0), w, b, s, q, d, g),
)
def fold_pad_into_conv(
    x: Value, p: Any, w: Value, b: Any, s: Any, q: Any, d: Any, g: int, match: Match
) -> Any:
    """conv(pad(x, [l, r]), padding=q) = conv(x, padding=l + q), of as many outputs"""
    padding = _padding(p, q)
    if isinstance(padding, str):
        return padding
    reason = _other_sizes(match, x, w.shape[2:], s, padding, d)
    return reason or match.root.target(x, w, b, s, padding, d, g)  # type: ignore[operator]


@rule(
    lambda x, p, v, k, s, q, d, c: F.max_pool1d(F.pad(x, p, "constant", v), k, s, q, d, c),
    lambda x, p, v, k, s, q, d, c: F.max_pool2d(F.pad(x, p, "constant", v), k, s, q, d, c),
    lambda x, p, v, k, s, q, d, c: F.max_pool3d(F.pad(x, p, "constant", v), k, s, q, d, c),
)
def fold_pad_into_max_pool(
    x: Value, p: Any, v: Any, k: Any, s: Any, q: Any, d: Any, match: Match
) -> Any:
    """max_pool(pad(x, [l, r], −∞), padding=q) = max_pool(x, padding=l + q), of as many outputs"""
    if v != -math.inf:
        return "it pads with a number that may be the maximum"
    padding = _padding(p, q)
    if isinstance(padding, str):
        return padding
    if any(2 * pad > size for pad, size in zip(padding, k, strict=True)):
        return "it pads more than half of the kernel"
    for ceil in (False, True):
        reason = _other_sizes(match, x, k, s, padding, d, ceil)
        if reason is None:
            return match.root.target(x, k, s, padding, d, ceil)  # type: ignore[operator]
    return reason


@rule(
    lambda x, p, k, s, q, i: F.avg_pool1d(F.pad(x, p, "constant", 0.0), k, s, q, False, i),
    lambda x, p, k, s, q, i, n: F.avg_pool2d(F.pad(x, p, "constant", 0.0), k, s, q, False, i, n),
    lambda x, p, k, s, q, i, n: F.avg_pool3d(F.pad(x, p, "constant", 0.0), k, s, q, False, i, n),
)
def fold_pad_into_avg_pool(
    x: Value, p: Any, k: Any, s: Any, q: Any, i: bool, n: Any, match: Match
) -> Any:
    """avg_pool(pad(x, [l, r]), padding=q) = avg_pool(x, padding=l + q), of as many outputs"""
    padding = _padding(p, q)
    if isinstance(padding, str):
        return padding
    if any(q) and not i:
        return "the average does not count its own padding"
    if any(2 * pad > size for pad, size in zip(padding, k, strict=True)):
        return "it pads more than half of the kernel"
    rest = () if match.root.target is aten.avg_pool1d.default else (n,)
    reason = _other_sizes(match, x, k, s, padding, [1] * len(k))
    return reason or match.root.target(  # type: ignore[operator]
        x, k, s, padding, False, True, *rest
    )


@rule(
    lambda x, w, b, s, q, d, g, i, m, n: aten.slice.Tensor(
        F.conv1d(x, w, b, s, q, d, g), i, m, n, 1
    ),
    lambda x, w, b, s, q, d, g, i, m, n: aten.slice.Tensor(
        F.conv2d(x, w, b, s, q, d, g), i, m, n, 1
    ),
    lambda x, w, b, s, q, d, g, i, m, n: aten.slice.Tensor(
        F.conv3d(x, w, b, s, q, d, g), i, m, n, 1
    ),
)
def fold_crop_into_conv(
    x: Value, w: Value, b: Any, s: Any, q: Any, d: Any, g: int, i: int, m: Any, match: Match
) -> Any:
    """conv(x, padding=q)[m:n] = conv(x, padding=q − s · m), of as many outputs"""
    axis = i - (x.ndim - len(q))
    if axis < 0:
        return None
    if match.shared:
        return match.shared
    if not isinstance(m, int) or m < 0 or m * s[axis] > q[axis]:
        return "it crops more than the padding"
    padding = [pad - s[axis] * m * (a == axis) for a, pad in enumerate(q)]
    reason = _other_sizes(match, x, w.shape[2:], s, padding, d)
    return reason or match.nodes[1].target(x, w, b, s, padding, d, g)  # type: ignore[operator]


# -- sizes -----------------------------------------------------------------------------------------


def _padding(pad: Any, padding: Any) -> list[int] | str:
    """Return the padding of each axis with the left side of a pad added, or why there is none."""
    if not all(isinstance(size, int) and size >= 0 for size in pad):
        return "a pad is negative, and cuts"
    axes = len(padding)
    if any(pad[2 * axes :]):
        return "it pads channels, or the batch"
    left = [*pad[: 2 * axes : 2], *[0] * axes][:axes][::-1]  # the last dimension comes first
    return [a + b for a, b in zip(left, padding, strict=True)]


def _other_sizes(
    match: Match, x: Value, kernel: Any, strides: Any, padding: Any, dilations: Any,
    ceil: bool = False,
) -> str | None:
    """Why a call with this padding has not as many outputs as the one that it would replace."""
    axes = len(padding)
    sizes, wanted = x.shape[-axes:], match.root.meta["val"].shape[-axes:]
    if not all(isinstance(size, int) for size in (*sizes, *wanted)):
        return "the size is not known"
    found = list(_sizes(sizes, kernel, strides, padding, dilations, ceil))
    if found != list(wanted):
        return f"with the left padding on both sides it has {found} outputs, not {list(wanted)}"
    return None


def _sizes(
    sizes: Any, kernel: Any, strides: Any, padding: Any, dilations: Any, ceil: bool
) -> Iterator[int]:
    """Yield ⌊(n + 2p − d (k − 1) − 1) / s⌋ + 1; rounded up where `ceil`, if that starts inside."""
    for n, k, s, p, d in zip(sizes, kernel, strides, padding, dilations, strict=True):
        room = n + 2 * p - d * (k - 1) - 1
        steps = room // s
        if ceil and room % s and (steps + 1) * s < n + p:
            steps += 1
        yield steps + 1 if room >= 0 else 0


RULES = (
    fold_pad_into_conv,
    fold_pad_into_max_pool,
    fold_pad_into_avg_pool,
    fold_crop_into_conv,
)


@dataclass(frozen=True)
class FoldPads:
    """Let convolutions and poolings pad by themselves, and compute no more than is read."""

    name: ClassVar[str] = "fold-pads"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
