"""Fold batch norm into the convolution or linear layer before it, else into those behind it.

Before                                   After
    y = conv2d(x, w, b)                      z = conv2d(x, w', b')
    z = batch_norm(y, γ, β, μ, σ²)

In inference a batch norm is a scale and a shift per channel, and so is the end of a convolution:
    s = γ / √(σ² + ε),   t = β − μ · s,   w' = w · s,   b' = b · s + t
In front of a layer it goes into the input side of the weights (`fxopt.affine` has the algebra):
    z = conv2d(batch_norm(y), w, b)          z = conv2d(y, w · s, b + Σ w · t)
All of it is computed in float64 and stored in w's dtype.

Handled: 1d, 2d and 3d convolutions and transposed convolutions, grouped or not, and linear layers;
an instance norm that uses running statistics; calls between the two that only move elements, take
some, or average over positions (flatten, permute, reshape_as, split, dropout in evaluation, mean).

Left alone: a convolution whose output has another user; a batch norm that uses batch statistics;
one whose channels are not the layer's (Linear, then BatchNorm1d, on (N, L, C)); weights that are
not constants, or that the graph writes; a cast in between; in front of a layer, zero padding and
transposed convolutions, since the padding has no shift, and any other user of the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import Affine, fold_all, is_constant, wide
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import rank_of, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseConvBn:
    """Fold inference batch norms into the weights before or behind them."""

    name: ClassVar[str] = "fuse-conv-bn"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fold the norms behind a layer, then those in front of one."""
        rewriter = Rewriter(graph)
        norms = (aten.batch_norm.default, aten.instance_norm.default)
        fold_all(rewriter, norms, lambda norm: _affine(graph, norm))
        return rewriter.result()


def _affine(graph: GraphModule, norm: fx.Node) -> Affine:
    """s = γ / √(σ² + ε),  t = β − μ · s"""
    args: Any = norm.args
    x, gamma, beta, mean, variance, _, _, epsilon, _ = args
    obstacle = _obstacle(graph, norm)
    if obstacle is not None:
        return Affine(norm, x, obstacle=obstacle)
    shape = (int(shape_of(mean)[0]),) + (1,) * (rank_of(norm) - 2)
    scaled, shifted = gamma is not None, beta is not None

    def scale(mean: torch.Tensor, variance: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        precision = torch.rsqrt(wide(variance) + epsilon)
        gamma = wide(weights[0]) if scaled else torch.ones_like(precision)
        return (gamma * precision).reshape(shape)

    def shift(mean: torch.Tensor, variance: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        moved = -wide(mean).reshape(shape) * scale(mean, variance, *weights)
        return moved + wide(weights[-1]).reshape(shape) if shifted else moved

    sources = tuple(node for node in (mean, variance, gamma, beta) if node is not None)
    return Affine(norm, x, shape, sources, scale, shift)


def _obstacle(graph: GraphModule, norm: fx.Node) -> str | None:
    """Why this norm is not a constant scale and shift per channel, or None."""
    args: Any = norm.args
    _, gamma, beta, mean, variance, batch_statistics, *_ = args
    if batch_statistics is not False or mean is None or variance is None:
        return "it uses batch statistics"
    named = {"weight": gamma, "bias": beta, "running mean": mean, "running variance": variance}
    for name, node in named.items():
        if node is not None and not is_constant(graph, node):
            return f"its {name} is not a constant"
    return None
