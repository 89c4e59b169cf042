"""Compute layers that read the same value as one layer, and deal its channels out.

Before                                   After
    q = linear(x, w, b)                      y = linear(x, [w, v], [b, c])
    k = linear(x, v, c)                      q, k = split_with_sizes(y, [n, m], -1)

Every number is computed as before; what is saved is the start of a kernel and the reading of x.
The parts are views, no copies. A layer without a bias beside one with a bias gets −0.

This is for engines that start a kernel per layer and split without a copy, as PyTorch does; it is
not in the default pipeline, since ONNX Runtime copies in a Split, and gained nothing. Convolutions
of one input and geometry are always merged: the time of the merged layer over that of the separate
ones, with two threads, was 0.50 to 0.78 for 1×1 as in Inception (7² to 56² positions).

Linear layers stay by default. Up to 2²² multiplications and 2¹⁹ weights the ratio was, with the
users of the parts, on one thread

    q, k, v and attention               0.79 to 1.09, median 0.90
    q, k, v of grouped queries          0.58 to 1.03, median 0.81
    silu(gate) · up                     0.85 to 1.04, median 0.94

and 0.93 to 0.98 in the median beyond. But with two threads on a busy machine, 3 of 39 such shapes
took over a hundred times as long when merged: presumably a larger product is shared between
threads, and waits for them. `limit` is the number of multiplications up to which linear layers are
merged; more than 2¹⁹ weights never are.

Left alone: linear layers beyond the limit, or for a number of rows that is not known;
convolutions that differ in kernel, stride, padding or dilation; groups, whose channels would have
to be dealt out anew; weights that are not constant; a layer whose result is an output of the graph,
or is read in a way that needs its own memory layout: a part would have to be copied.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.kernels import LAYERS, Kernel, insert, kernel_of, stacked
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_static_shape, shape_of

aten = torch.ops.aten

_LARGEST_WEIGHT = 2**19  # elements: for a few rows, reading more than this is what takes the time


@dataclass(frozen=True)
class MergeParallelLayers:
    """Compute convolutions of the same input as one, and on request linear layers."""

    limit: int = 0  # multiplications of linear layers of one input; convolutions have no limit

    name: ClassVar[str] = "merge-parallel-layers"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Merge each set of layers with the same input and geometry, at the place of the first."""
        rewriter = Rewriter(graph)
        alike: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.find(*LAYERS):
            alike[node.args[0]].append(node)
        for nodes in alike.values():
            if len(nodes) > 1:
                self._merge(rewriter, nodes)
        return rewriter.result()

    def _merge(self, rewriter: Rewriter, nodes: list[fx.Node]) -> None:
        """Merge those of the layers with one input that have the same geometry."""
        sets: dict[Any, list[tuple[fx.Node, Kernel]]] = defaultdict(list)
        for node in nodes:
            kernel = kernel_of(rewriter.graph, node)
            if isinstance(kernel, Kernel):
                sets[kernel.axes, kernel.groups > 1].append((node, kernel))
            elif kernel is not None:
                rewriter.miss(node, kernel)
        for together in sets.values():
            reason = self._obstacle([kernel for _, kernel in together])
            free = []
            for node, kernel in together if len(together) > 1 else ():
                why = reason or _layout_obstacle(node, kernel)
                if why is None:
                    free.append((node, kernel))
                else:
                    rewriter.miss(node, why)
            if len(free) > 1:
                _stack(rewriter, free)

    def _obstacle(self, kernels: list[Kernel]) -> str | None:
        """Why computing these layers as one would gain nothing, or cannot be done."""
        if kernels[0].groups > 1:
            return "its groups would have to be dealt out anew"
        if kernels[0].axes:
            return None
        if not is_static_shape(kernels[0].x):
            return "how many rows there are is not known"
        weights = sum(kernel.work for kernel in kernels)
        rows = math.prod(shape_of(kernels[0].x)[:-1])
        if weights * rows > self.limit:
            return f"{rows} rows times {weights} weights are more than the limit, {self.limit}"
        if weights > _LARGEST_WEIGHT:
            return f"reading {weights} weights takes longer than starting the layers"
        return None


def _stack(rewriter: Rewriter, layers: list[tuple[fx.Node, Kernel]]) -> None:
    """Insert one layer at the place of the first, and let its parts replace all."""
    nodes = tuple(node for node, _ in layers)
    kernel = stacked(tuple(kernel for _, kernel in layers))
    place: dict[str, Any] = {"before": nodes[0], "origin": nodes}
    whole = insert(rewriter, kernel, word="stacked", **place)
    sizes = [kernel.outputs for _, kernel in layers]
    split = rewriter.insert(
        aten.split_with_sizes.default, whole, sizes, kernel.channel_axis, **place
    )
    rewriter.replace({
        node: rewriter.insert(operator.getitem, split, index, before=nodes[0], origin=node)
        for index, node in enumerate(nodes)
    })


# -- memory --------------------------------------------------------------------------------------

_VIEWS = (
    aten.permute.default, aten.unsqueeze.default, aten.squeeze.dims, aten.unflatten.int,
    aten.slice.Tensor, aten.select.int, aten.split_with_sizes.default, aten.unbind.int,
    aten.expand.default, operator.getitem,
)  # fmt: skip
_RESHAPES = (
    aten.reshape.default, aten.flatten.using_ints, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip


def _layout_obstacle(node: fx.Node, kernel: Kernel) -> str | None:
    """Why a part of a larger tensor cannot stand for `node` without a copy."""
    for user in _readers(node):
        if user.op == "output":
            return "it is an output, and a caller may count on its memory layout"
        if user.target in _RESHAPES and user.args[0] is node and not _is_view(kernel, user):
            return f"{user.name} would have to copy a part of a larger tensor"
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield what reads the memory of a node, directly or through views."""
    pending = [node]
    for value in pending:
        for user in value.users:
            yield user
            if user.target in (*_VIEWS, *_RESHAPES) and user.args[0] is value:
                pending.append(user)


def _is_view(kernel: Kernel, reshape: fx.Node) -> bool:
    """Whether a reshape of a part of the channels needs no copy."""
    whole: Any = reshape.args[0]
    if not (is_static_shape(whole) and is_static_shape(reshape)):
        return False
    sizes = list(shape_of(whole))
    sizes[kernel.channel_axis] *= 2
    part = torch.empty(sizes, device="meta").narrow(kernel.channel_axis, 0, kernel.outputs)
    return part.reshape(shape_of(reshape))._is_view()
