"""The layers of a graph that can be fit, and the sums that their outputs go into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.channels.contractions import TRANSPOSED
from fxopt.graph_module import GraphModule
from fxopt.kernels import Kernel, Scaling, kernel_of, scaling_of
from fxopt.shapes import is_tensor, same_metadata

aten = torch.ops.aten
_RECURRENT = (
    aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input,
)  # fmt: skip
_LEAST_SCALE = 1e-3  # of the largest of a batch norm


@dataclass(frozen=True)
class Sum:
    """The layer's output, times `scale` and shifted, plus `other`, which is known before it runs.

    The shift is the same in both graphs, so it does not matter. `scale` is 1 where it is None, and
    0 where a batch norm leaves so little of a channel that the layer cannot make anything good.
    """

    other: str
    scale: torch.Tensor | None  # [channels] and dimensions of size 1


@dataclass(frozen=True)
class Layer:
    """A layer with parameters that nothing else uses, and the sum that its output goes into."""

    path: str
    kernel: Kernel
    weight: str
    bias: str | None
    sum: Sum | None


def layers_of(
    smaller: GraphModule, original: GraphModule
) -> tuple[dict[str, Layer], list[tuple[str, str]]]:
    """Return the layers that can be fit, by the names of their nodes, and why others cannot."""
    known = {node.name for node in original.graph.nodes}
    order = {node: place for place, node in enumerate(smaller.graph.nodes)}
    uses, bodies = _uses(smaller), _bodies(smaller)
    found: dict[str, Layer] = {}
    skipped = []
    for node in smaller.graph.nodes:
        path = str(node.meta.get("path") or node.name)
        kernel = _kernel(smaller, node, uses)
        if not bodies.isdisjoint(node.all_input_nodes):
            kernel = "what it branches to or repeats is not looked into"
        if isinstance(kernel, str):
            skipped.append((path, kernel))
        elif kernel is not None and node.name in known:
            weight, *bias = (str(source.target) for source in kernel.sources)
            into = _sum(smaller, node, order)
            if into is not None and into.other not in known:
                into = None
            found[node.name] = Layer(path, kernel, weight, bias[0] if bias else None, into)
    return found, skipped


def _kernel(graph: GraphModule, node: fx.Node, uses: Mapping[str, int]) -> Kernel | str | None:
    """Read a layer; return why it cannot be fit, or None for another call."""
    if node.target in TRANSPOSED or node.target in _RECURRENT:
        return "only convolutions that are not transposed, and linear layers, are"
    kernel = kernel_of(graph, node)
    if not isinstance(kernel, Kernel):
        return kernel
    for source in kernel.sources:
        name = str(source.target)
        if not isinstance(graph.constant(name), torch.nn.Parameter):
            return f"'{name}' is no parameter"
        if uses[name] > 1:
            return f"something else uses '{name}', too"
    return kernel


def _bodies(graph: GraphModule) -> set[fx.Node]:
    """Return the nodes that stand for bodies of control flow."""
    return {
        node for node in graph.graph.find_nodes(op="get_attr")
        if isinstance(graph.value(node), GraphModule)
    }  # fmt: skip


def _uses(graph: GraphModule) -> Counter[str]:
    """Return how many calls use each constant, bodies of control flow included."""
    uses: Counter[str] = Counter()
    for one in (graph, *graph.subgraphs()):
        for node in one.graph.find_nodes(op="get_attr"):
            uses[str(node.target)] += len(node.users)
    return uses


def _sum(graph: GraphModule, layer: fx.Node, order: Mapping[fx.Node, int]) -> Sum | None:
    """Return the sum that a layer's output goes into, at once or behind a batch norm."""
    node, scale = layer, None
    user = _only_user(node)
    if user is not None and user.target is aten.batch_norm.default:
        scaling = scaling_of(graph, user)
        if not isinstance(scaling, Scaling):
            return None
        scale = scaling.scale(*(graph.value(source).detach() for source in scaling.sources))
        scale = torch.where(scale.abs() < _LEAST_SCALE * scale.abs().max(), 0, scale)
        node, user = user, _only_user(user)
    if user is None or user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return None
    args: Any = user.args
    other = args[1] if args[0] is node else args[0]
    if other is node or not is_tensor(other) or not same_metadata(other, node):
        return None
    return Sum(other.name, scale) if order[other] < order[layer] else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
