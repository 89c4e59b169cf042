"""A quick look at weights: is there a row, a column or a scale of zeros at all?"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.channels.follower import arguments
from fxopt.graph_module import GraphModule
from fxopt.pruning.constancy.layers import LAYERS, in_groups
from fxopt.pruning.readings import PRODUCTS

aten = torch.ops.aten


def may_have_any(graph: GraphModule) -> bool:
    """Whether some weight makes a channel constant or leaves it without a listener; quickly.

    Of a weight without zeros in its first row and column, nothing else is read.
    """
    return any(_starts_some(graph, node) for node in graph.graph.nodes)


def _starts_some(graph: GraphModule, node: fx.Node) -> bool:
    args = arguments(node)
    if node.target in LAYERS:
        weight = _constant(graph, args[1])
        return (
            weight is not None and weight.dim() > 1 and _has_empty_line(in_groups(node, weight))
        )
    if node.target in (aten.batch_norm.default, aten.group_norm.default):
        scale = _constant(graph, args[1 if node.target is aten.batch_norm.default else 2])
        return scale is not None and bool((scale == 0).any())
    if node.target is aten.masked_fill.Scalar:
        mask = _constant(graph, args[1]) if args[2] == 0 else None
        return mask is not None and bool(mask.any())
    if node.target is aten.mul.Tensor:
        if 0 in [one for one in args if isinstance(one, (int, float))]:
            return True
        factors = [_constant(graph, one) for one in args]
        return any(one is not None and bool((one == 0).any()) for one in factors)
    if node.target in (*PRODUCTS, aten.embedding.default):
        weights = [_constant(graph, one) for one in args[:3]]
        return any(
            one is not None and one.dim() == 2 and _has_empty_line(one[None, :, :, None])
            for one in weights
        )
    return False


def _constant(graph: GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = None if node.target in graph.info.mutated else graph.value(node)
    return value.detach() if isinstance(value, torch.Tensor) else None


def _has_empty_line(apart: torch.Tensor) -> bool:
    """Whether a weight, [groups, outputs, inputs, taps], has a row or a column of zeros."""
    if apart.numel() == 0:
        return False
    for lines in (apart, apart.transpose(1, 2)):
        group, line = (lines[:, :, 0, 0] == 0).nonzero(as_tuple=True)
        if len(line) and bool((lines[group, line] == 0).flatten(1).all(1).any()):
            return True
    return False
