"""The layers of a graph that can be fit, and the sums that their outputs go into."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.kernels import Kernel, Scaling, kernel_of, scaling_of
from fxopt.shapes import is_tensor, same_metadata

aten = torch.ops.aten


@dataclass(frozen=True)
class Sum:
    """`scale · layer + shift + other`, where `other` is known before the layer runs."""

    other: str
    scale: torch.Tensor | None  # [channels] and dimensions of size 1; None is 1


@dataclass(frozen=True)
class Layer:
    """A layer whose weights nothing else uses; `sum` is the residual sum that it goes into."""

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
    uses = _uses(smaller)
    found, skipped = {}, []
    for node in smaller.graph.nodes:
        kernel = kernel_of(smaller, node) if node.name in known else None
        path = str(node.meta.get("path") or node.name)
        if isinstance(kernel, str):
            skipped.append((path, kernel))
        if not isinstance(kernel, Kernel):
            continue
        names = [str(argument.target) for argument in kernel.sources]
        shared = [name for name in names if uses[name] > 1]
        if shared:
            skipped.append((path, f"something else uses '{shared[0]}', too"))
            continue
        into = _sum(smaller, node)
        if into is not None and (into[0].name not in known or order[into[0]] > order[node]):
            into = None
        found[node.name] = Layer(
            path, kernel, names[0], names[1] if len(names) > 1 else None,
            None if into is None else Sum(into[0].name, into[1]),
        )  # fmt: skip
    return found, skipped


def _uses(graph: GraphModule) -> Counter[str]:
    """Return how many calls use each constant, bodies of control flow included."""
    uses: Counter[str] = Counter()
    for one in (graph, *graph.subgraphs()):
        for node in one.graph.find_nodes(op="get_attr"):
            uses[str(node.target)] += len(node.users)
    return uses


def _sum(graph: GraphModule, layer: fx.Node) -> tuple[fx.Node, torch.Tensor | None] | None:
    """Return what is added to a layer's output, and the scale of a batch norm before that."""
    node, scale = layer, None
    user = _only_user(node)
    if user is not None and user.target is aten.batch_norm.default:
        scaling = scaling_of(graph, user)
        if not isinstance(scaling, Scaling):
            return None
        scale = scaling.scale(*(graph.value(source).detach() for source in scaling.sources))
        node, user = user, _only_user(user)
    if user is None or user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return None
    args: Any = user.args
    other = args[1] if args[0] is node else args[0]
    if other is node or not is_tensor(other) or not same_metadata(other, node):
        return None
    return other, scale


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
