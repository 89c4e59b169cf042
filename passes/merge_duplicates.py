"""Merge calls that compute the same, and constants that are the same.

Before                                   After
    a = permute(x, [1, 0])                   a = permute(x, [1, 0])
    b = permute(x, [1, 0])                   y = matmul(a, a)
    y = matmul(a, b)

Two calls are the same when operator and arguments are, down to the type and the sign of zero of
every literal (1, 1.0 and True differ). Two constants are the same when shape, dtype, device and
every byte are; bytes are compared only where a small sample agrees.

Left alone: calls with an effect (two random draws are two draws), batch norms and dropouts that
training switches on, parameters, and buffers of the model's state: training or new weights
may change one of them and not the other. What follows from those is left alone, too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.difference import bytes_of
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter


@dataclass(frozen=True)
class MergeDuplicates:
    """Keep one of several equal calls, and one of several equal constants that never change."""

    name: ClassVar[str] = "merge-duplicates"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Merge constants first: equal constants make more calls equal."""
        rewriter = Rewriter(graph)
        _merge_constants(rewriter, graph)
        first: dict[Any, fx.Node] = {}
        for node in list(graph.graph.nodes):
            if node.op != "call_function" or "switch" in node.meta or not is_pure(node):
                continue
            key = (node.target, _key(node.args), _key(node.kwargs))
            kept = first.setdefault(key, node)
            if kept is not node:
                rewriter.replace(node, kept)
        return rewriter.result()


def _merge_constants(rewriter: Rewriter, graph: GraphModule) -> None:
    alike: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in graph.graph.find_nodes(op="get_attr"):
        if "val" in node.meta and graph.fixed_tensor(str(node.target)) is not None:
            alike[_sample(graph.value(node))].append(node)
    for nodes in alike.values():
        if len(nodes) == 1:
            continue
        kept: dict[bytes, fx.Node] = {}
        for node in nodes:
            first = kept.setdefault(bytes_of(graph.value(node)), node)
            if first is not node:
                rewriter.replace(node, first)


def _sample(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two equal constants must share, at the cost of a few elements."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // 8)
    return (tensor.shape, tensor.dtype, tensor.device, bytes_of(flat[::step][:8]))


def _key(value: Any) -> Any:
    """Return a hashable stand-in for an argument that tells apart all that behaves differently."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    if isinstance(value, (fx.Node, torch.dtype)):
        return value
    return type(value), repr(value)
