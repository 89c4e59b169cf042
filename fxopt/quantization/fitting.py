"""Walk through a fake-quantized graph, and choose the integers of each layer's weights together.

    graph of floats ── runs on the data ──▶ what each layer returned, at sampled positions
    rounded graph   ── runs node by node, all batches at once; at each layer:
                          integers, and a bias, for which what it reads gives nearly that

So a layer makes good what the rounding of its own weights and of everything before it has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.interpreter import in_evaluation
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.rounding import Grid, round_together
from fxopt.reconstruction.layers import Layer, layers_of
from fxopt.reconstruction.least_squares import Linear, Rows, products
from fxopt.reconstruction.record import Fit, Reconstruction
from fxopt.reconstruction.walk import Sample, Walk, rows_of, sampled, spread_of

STRENGTHS = (1e-2, 1e-1)  # λ: of several, each output takes what is best on rows held out


@dataclass(frozen=True)
class Rounded:
    """What a layer's weight and bias become: numbers on the grid, in their own shapes."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@torch.no_grad()
def fit_rounding(
    graph: GraphModule, batches: Sequence[list[Any]]
) -> tuple[dict[fx.Node, Rounded], Reconstruction]:
    """Return new weights for the layers of a fake-quantized graph, and the errors they make.

    `batches` are flat inputs, all of which are held in memory. The graph stays as it is. Layers
    whose weight something else reads, too, are left out, and named in the record.
    """
    floats = unrounded(graph)
    layers, skipped = layers_of(floats, floats)
    own = {node.name: node for node in graph.graph.nodes}
    layers = {name: layer for name, layer in layers.items() if _is_rounded(own[name])}
    samples = sampled(floats, lambda name, value: value, layers, batches)
    walk = Walk(in_evaluation(graph), batches)
    found: dict[fx.Node, Rounded] = {}
    fits = []
    for node in graph.graph.nodes:
        if node.name in layers:
            layer = layers[node.name]
            fitted = _fit(layer, node, graph, samples.pop(node.name), walk)
            if isinstance(fitted, str):
                skipped.append((layer.path, fitted))
            else:
                errors, found[node] = fitted
                fits.append(errors)
                args: Any = node.args
                walk.replace(args[1].name, found[node].weight)
                if found[node].bias is not None:
                    walk.replace(args[2].name, found[node].bias)
        walk.run(node)
    return found, Reconstruction(tuple(fits), tuple(skipped))


def unrounded(graph: GraphModule, keep: str | None = None) -> GraphModule:
    """Return a copy of a graph without its fake-quants: the graph of floats that it came from.

    `keep` is the name of the one that stays, if any.
    """
    copy = graph.copy()
    for node in copy.find(fake_quantize):
        if node.name == keep:
            continue
        value, *parameters = node.all_input_nodes
        node.replace_all_uses_with(value)
        copy.graph.erase_node(node)
        for one in parameters:
            if not one.users:
                copy.graph.erase_node(one)
    copy.recompile()
    return copy


def _is_rounded(layer: fx.Node) -> bool:
    weight: Any = layer.args[1]
    return weight.target is fake_quantize and len(weight.users) == 1


def _fit(
    layer: Layer, node: fx.Node, graph: GraphModule, samples: Sequence[Sample], walk: Walk
) -> tuple[Fit, Rounded] | str:
    """Return the weights of a layer, with the errors before and after; or why it stays as it is."""
    reads: Any = node.args[0]
    adds = () if layer.sum is None else _added(node, layer, walk)
    rows = rows_of(layer, walk.values(reads.name), adds, samples)
    if isinstance(rows, str):
        return rows
    given, judged = rows
    weight, bias = graph.constant(layer.weight), layer.bias and graph.constant(layer.bias)
    old = _linear(layer, weight, bias if isinstance(bias, torch.Tensor) else None)
    grid = _grid(graph, node.args[1], weight, old)
    best = Linear(grid.nearest(old.weight), old.bias)
    least = best.errors(judged)
    spread = spread_of(judged.y)
    before = float(least.sum()) / spread
    for one in _solutions(given, old, grid):
        errors = one.errors(judged)
        better = errors < least
        best, least = one.where(better, best), torch.where(better, errors, least)
    shaped = Rounded(
        best.weight.reshape(weight.shape),
        None if best.bias is None else best.bias.reshape(-1),
    )
    return Fit(layer.path, node.name, before, float(least.sum()) / spread), shaped


def _solutions(rows: Rows, old: Linear, grid: Grid) -> list[Linear]:
    """Return weights on the grid: for each λ, and the old ones with the bias that suits them."""
    x_mean = y_mean = torch.zeros((), dtype=torch.float64, device=rows.x.device)
    if old.bias is not None:
        x_mean, y_mean = (part.mean(0, dtype=torch.float64) for part in (rows.x, rows.y))
    gram, mixed = products(rows, x_mean, y_mean)
    unit = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    wide = old.weight.double()
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    weights = [grid.nearest(wide)]
    for strength in STRENGTHS:
        hessian = gram + (strength * unit).clamp(min=1e-30) * identity
        pulled = mixed + strength * unit * wide.mT
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed.any()):
            target = torch.cholesky_solve(pulled, factor).mT
            weights.append(round_together(target, hessian, grid))
    found = []
    for weight in weights:
        bias = None if old.bias is None else y_mean - (weight @ x_mean[..., None])[..., 0]
        found.append(Linear(weight, bias).to(old.weight.dtype))
    return found


def _linear(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """Return a layer's weight and bias by its groups."""
    groups = layer.kernel.groups
    return Linear(
        weight.detach().reshape(groups, weight.shape[0] // groups, -1),
        None if bias is None else bias.detach().reshape(groups, -1),
    )


def _grid(graph: GraphModule, rounded: Any, weight: torch.Tensor, like: Linear) -> Grid:
    """Return the numbers that a layer's weight can become."""
    _, scale, zero_point, qmin, qmax = rounded.args
    values = [
        graph.value(node).detach().expand_as(weight).reshape(like.weight.shape)
        for node in (scale, zero_point)
    ]
    return Grid(values[0], values[1], qmin, qmax)


def _added(node: fx.Node, layer: Layer, walk: Walk) -> list[Any]:
    """Return what a layer's output is added to in the rounded graph; rounded, if that is known."""
    assert layer.sum is not None
    while node.target is not torch.ops.aten.add.Tensor:
        (node,) = node.users
    for operand in node.all_input_nodes:
        if operand.target is fake_quantize and walk.knows(operand.name):
            if operand.all_input_nodes[0].name == layer.sum.other:
                return walk.values(operand.name)
    return walk.values(layer.sum.other)
