"""Fold two layers in a row, with nothing between them, into one where that is no more work.

Before                                   After
    h = linear(x, w, b)                      y = linear(x, v · w, v · b + c)
    y = linear(h, v, c)

    h = conv2d(x, w, b, padding=1)           y = conv2d(x, v · w, Σ v · b + c, padding=1)
    y = conv2d(h, v, c)         (1×1)

Two linear maps are one. Its weight is computed in float64 and stored in the layers' dtype
(`fxopt.kernels` has the algebra). Chains of any length fold, pair by pair.

Handled: linear layers; 1d, 2d and 3d convolutions, grouped, strided and dilated, of which along
each axis one has a single tap: k×k and then 1×1, 1×1 and then k×k, 1×k and then k×1.

Left alone: a narrow layer between two wide ones, since the product has more weights than the two
(someone factorized it); a convolution that pads with zeros behind one that has a bias, several
taps or a stride, since what it pads is not the input; a value between the two that others use;
weights that are not constant, or that other layers share: they would stay beside the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.kernels import LAYERS, Kernel, chained, insert, kernel_of
from fxopt.rewrite import Rewriter


@dataclass(frozen=True)
class FoldLinearChains:
    """Fold layers that follow each other with nothing between them."""

    name: ClassVar[str] = "fold-linear-chains"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fold each layer into the one before it, and what results into the next before it."""
        rewriter = Rewriter(graph)
        misses: dict[fx.Node, str] = {}
        for node in graph.find(*LAYERS):
            while (first := _before(node)) is not None:
                kernel = _product(graph, first, node)
                if isinstance(kernel, str):
                    misses[node] = kernel
                    break
                place: dict[str, Any] = {"before": node, "origin": (node, first), "like": node}
                product = insert(rewriter, kernel, word="product", **place)
                if not rewriter.replace(node, product):
                    break
                node = product
        for node, reason in misses.items():
            if not node._erased:
                rewriter.miss(node, reason)
        return rewriter.result()


def _before(layer: fx.Node) -> fx.Node | None:
    """Return the layer whose result a layer reads, if it is one."""
    first: Any = layer.args[0]
    return first if first.target in LAYERS else None


def _product(graph: GraphModule, first: fx.Node, second: fx.Node) -> Kernel | str:
    """Return the product of two layers, or why they stay two."""
    inner, outer = kernel_of(graph, first), kernel_of(graph, second)
    if not (isinstance(inner, Kernel) and isinstance(outer, Kernel)):
        reasons = [reason for reason in (inner, outer) if isinstance(reason, str)]
        return "; ".join(reasons)
    if len(first.users) > 1:
        return f"{first.name} is used elsewhere too"
    if any(len(source.users) > 1 for source in (*inner.sources, *outer.sources)):
        return "a weight is used elsewhere too, and would stay beside the product"
    product = chained(outer, inner)
    if isinstance(product, str):
        return product
    if any(2 * axis.padding > axis.dilation * (axis.taps - 1) for axis in outer.axes):
        return f"{second.name} has more positions than {first.name}"
    size = math.prod(product.shape)
    if size > product.work:
        return f"the product has {size} weights, and the two have {inner.work} + {outer.work}"
    return product
