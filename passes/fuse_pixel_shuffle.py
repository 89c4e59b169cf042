"""Fuse reshapes and permutes that shuffle pixels into the one operator that does.

Before                                       After
    y = reshape(x, [n, c, r, r, h, w])           y = pixel_shuffle(x, r)
    y = permute(y, [0, 1, 4, 2, 5, 3])
    y = reshape(y, [n, c, h·r, w·r])

    y = reshape(x, [n, c, h, r, w, r])           y = pixel_unshuffle(x, r)
    y = permute(y, [0, 1, 3, 5, 2, 4])
    y = reshape(y, [n, c·r·r, h, w])

Engines have kernels for both (in ONNX, DepthToSpace is one node).

Left alone: the block in front of the channels instead of behind them; blocks that are no square;
any number of dimensions before the channels but one; empty images; values inside that others use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxopt.conditions import rank
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match, named
from fxopt.rules import RuleSet, Value, apply_rules, rule
from fxopt.shapes import same_shape

aten = torch.ops.aten
_EMPTY = "torch's operator leaves an empty image as it is"


@rule(
    lambda x, mid, y, out: named(y, x.reshape(mid)).permute([0, 1, 4, 2, 5, 3]).reshape(out),
    x=rank(4), y=rank(6),
)  # fmt: skip
def fuse_pixel_shuffle(x: Value, y: Value, match: Match) -> Any:
    """[n, c, r, r, h, w] → [n, c, h, r, w, r] is pixel_shuffle"""
    n, c, r, s, h, w = y.shape
    if not isinstance(r, int) or not same_shape([r], [s]):
        return "its blocks are no squares"
    if not same_shape([n, c * r * r, h, w], x.shape):
        return "it cuts more than channels"
    if not same_shape([n, c, h * r, w * r], match.root.meta["val"].shape):
        return "it does not join blocks with pixels"
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        return _EMPTY
    return match.shared or aten.pixel_shuffle(x, r)


@rule(
    lambda x, mid, y, out: named(y, x.reshape(mid)).permute([0, 1, 3, 5, 2, 4]).reshape(out),
    x=rank(4), y=rank(6),
)  # fmt: skip
def fuse_pixel_unshuffle(x: Value, y: Value, match: Match) -> Any:
    """[n, c, h, r, w, r] → [n, c, r, r, h, w] is pixel_unshuffle"""
    n, c, h, r, w, s = y.shape
    if not isinstance(r, int) or not same_shape([r], [s]):
        return "its blocks are no squares"
    if not same_shape([n, c, h * r, w * r], x.shape):
        return "it cuts more than pixels"
    if not same_shape([n, c * r * r, h, w], match.root.meta["val"].shape):
        return "it does not join blocks with channels"
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        return _EMPTY
    return match.shared or aten.pixel_unshuffle(x, r)


RULES = RuleSet(fuse_pixel_shuffle, fuse_pixel_unshuffle)


@dataclass(frozen=True)
class FusePixelShuffle:
    """Call pixel_shuffle and pixel_unshuffle by their names."""

    name: ClassVar[str] = "fuse-pixel-shuffle"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires."""
        return apply_rules(graph, RULES)
