"""Fold a batch norm, or a factor per channel, of a sum of layers into all of the layers.

Before                                   After
    z = batch_norm(conv2d(x, w, b)           z = conv2d(x, w · s, b · s + t)
                   + conv2d(y, v, c))            + conv2d(y, v · s, c · s)

With s = γ / √(σ² + ε) and t = β − μ · s it is (w ∗ x + v ∗ y) · s + t; a factor is s alone. Weights
are computed in float64 and stored in the layers' dtype (`fxopt.kernels` has the algebra).

Left alone: a sum with a term that is not a layer (it would need a product of its own); a sum or a
layer that others use; weights that are not constant; batch norms that use batch statistics; factors
that vary along other axes than the channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.kernels import (
    LAYERS,
    SUMS,
    Kernel,
    Scaling,
    Summand,
    insert,
    insert_sum,
    kernel_of,
    scaled,
    scaling_of,
    summands,
)
from fxopt.rewrite import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldScaledSums:
    """Fold batch norms and factors of sums of layers into the layers."""

    name: ClassVar[str] = "fold-scaled-sums"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fold each scaling whose input is a sum of layers."""
        rewriter = Rewriter(graph)
        for node in graph.find(aten.batch_norm.default, aten.mul.Tensor):
            for x in node.args[:2]:
                terms = _layers(x)
                if terms:
                    _fold(rewriter, node, terms)
                    break
        return rewriter.result()


def _layers(x: Any) -> list[Summand]:
    """Return the terms of a sum with one user if all are layers with one user, else none."""
    if not isinstance(x, fx.Node) or x.target not in SUMS or len(x.users) > 1:
        return []
    terms = summands(x)
    alone = all(node.target in LAYERS and len(node.users) == 1 for _, node in terms)
    return terms if alone else []


def _fold(rewriter: Rewriter, node: fx.Node, terms: list[Summand]) -> None:
    """Scale all layers; the first also takes the shift (the factor of a first term is one)."""
    scaling = scaling_of(rewriter.graph, node)
    if not isinstance(scaling, Scaling):
        if scaling is not None:
            rewriter.miss(node, scaling)
        return
    kernels: list[Kernel] = []
    for _, layer in terms:
        kernel = kernel_of(rewriter.graph, layer)
        if not isinstance(kernel, Kernel):
            rewriter.miss(node, str(kernel))
            return
        new = scaled(kernel, replace(scaling, shift=None) if kernels else scaling)
        if new is None:
            rewriter.miss(node, f"it varies along other axes than the channels of {layer.name}")
            return
        kernels.append(new)
    parts: list[Summand] = []
    for (factor, layer), kernel in zip(terms, kernels, strict=True):
        place: dict[str, Any] = {"before": layer, "origin": (layer, node), "like": layer}
        parts.append((factor, insert(rewriter, kernel, word="scaled", **place)))
    rewriter.replace(node, insert_sum(rewriter, parts, node))
