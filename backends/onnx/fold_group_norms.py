"""Fold the weights of a group norm into the layers behind it.

Before                                   After
    n = group_norm(x, g, γ, β)               n = group_norm(x, g)
    y = conv2d(n, w, b)                      y = conv2d(n, w · γ, b + Σ w · β)

A group norm ends with a scale and a shift per channel. In ONNX they are a Mul and an Add of their
own, and a layer that follows can do both.

Left alone: a norm that something else than layers reads; a shift in front of a layer that pads with
zeros, which have no shift; one group per channel, which ONNX has a node for, weights included.
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
class FoldGroupNorms:
    """Let layers behind a group norm do its scale and shift."""

    name: ClassVar[str] = "fold-group-norms"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fold each group norm that only layers read."""
        rewriter = Rewriter(graph)
        fold_all(rewriter, [aten.group_norm.default], lambda node: _read(graph, node))
        return rewriter.result()


def _read(graph: GraphModule, node: fx.Node) -> Affine | None:
    """normalized(x) · γ + β, one number per channel"""
    args: Any = node.args
    x, groups, gamma, beta, *rest = args
    channels = shape_of(x)[1]
    weights = tuple(weight for weight in (gamma, beta) if weight is not None)
    constant = all(is_constant(graph, weight) for weight in weights)
    if not weights or not constant or channels == groups and rank_of(x) > 2:
        return None

    def shift(*values: torch.Tensor) -> torch.Tensor:
        return per_channel(values[-1])

    def per_channel(value: torch.Tensor) -> torch.Tensor:
        return wide(value).reshape(shape)

    shape = (channels,) + (1,) * (rank_of(x) - 2)
    return Affine(
        node, x, shape, weights,
        scale=None if gamma is None else lambda *values: per_channel(values[0]),
        shift=None if beta is None else shift,
        bare=(x, groups, None, None, *rest),
    )  # fmt: skip
