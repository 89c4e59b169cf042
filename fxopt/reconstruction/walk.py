"""Walk through the smaller graph, and fit each layer to what the original's returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.interpreter import Interpreter
from fxopt.objective import ObjectiveError, flat_inputs_of
from fxopt.reconstruction.layers import Layer, layers_of
from fxopt.reconstruction.least_squares import Solution, solve
from fxopt.reconstruction.record import Fit, Reconstruction
from fxopt.reconstruction.rows import position_count, read, returned

Pick = Callable[[fx.Node, torch.Tensor], torch.Tensor]

ROWS_PER_UNKNOWN = 20
LEAST_ROWS = 16384
_EXACT = 1e-9  # errors below are rounding: such a layer stays as it is


def reconstruct(
    smaller: GraphModule, original: GraphModule, pick: Pick, batches: Sequence[Any]
) -> Reconstruction:
    """Fit the layers of `smaller`, in place, to what those of the same names in `original` return.

    `pick(node, value)` takes from the value of a node of the original what is left of it in
    `smaller`. Both run in evaluation mode on `batches`: inputs, or pairs (inputs, targets), of
    which those before the last eighth are fit to. All of them are held in memory, with every value
    that is alive between two nodes. Layers are convolutions and linear layers with weights of their
    own; a layer that others share weights with stays, as do transposed convolutions.

    He, Zhang and Sun: Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017,
    section 3.1, equation 5, where each layer is fit to the original's outputs on what the pruned
    layers before it give, from the first to the last; here for all kinds of layers, weights and
    biases, and near the weights that there are.

    Raises ObjectiveError for batches that the graph does not take, and values that are nan or
    infinite. Weights may have changed by then.
    """
    layers, skipped = layers_of(smaller, original)
    flat = [flat_inputs_of(original, batch) for batch in batches]
    wanted = _wanted(original, pick, layers, flat)
    fits = []
    walk = _Walk(smaller, flat)
    for node in smaller.graph.nodes:
        layer = layers.get(node.name)
        if layer is not None:
            found = _fit(layer, node, smaller, wanted.pop(node.name), walk)
            if isinstance(found, str):
                skipped.append((layer.path, found))
            elif found is not None:
                fits.append(found)
        walk.run(node)
    return Reconstruction(tuple(fits), tuple(skipped))


@dataclass
class _Sample:
    """What the original's layer returned in one batch, at some positions, flat."""

    positions: torch.Tensor
    y: torch.Tensor  # [positions, groups, outputs of a group], with what the layer is added to


def _wanted(
    original: GraphModule, pick: Pick, layers: dict[str, Layer], flat: Sequence[list[Any]]
) -> dict[str, list[_Sample]]:
    """Run the original batch by batch; return samples of what each layer's original returns."""
    generator = torch.Generator().manual_seed(0)
    named = {node.name: node for node in original.graph.nodes}
    samples: dict[str, list[_Sample]] = {name: [] for name in layers}
    for inputs in flat:
        walk = _Walk(original, [inputs])
        for node in walk.graph.graph.nodes:
            (value,) = walk.run(node)
            layer = layers.get(node.name)
            if layer is None:
                continue
            kernel, space = layer.kernel, len(layer.kernel.axes)
            y = pick(node, value)
            count = position_count(y.shape, space)
            unknowns = math.prod(kernel.shape[1:])
            most = -(-max(ROWS_PER_UNKNOWN * unknowns, LEAST_ROWS) // len(flat))
            positions = torch.randperm(count, generator=generator)[:most].to(y.device)
            rows = returned(y, kernel.groups, space, positions)
            if layer.sum is not None:
                other = named[layer.sum.other]
                rows += _others(layer, pick(other, walk.values(other.name)[0]), positions)
            samples[node.name].append(_Sample(positions, rows))
    return samples


def _fit(
    layer: Layer, node: fx.Node, graph: GraphModule, samples: list[_Sample], walk: _Walk
) -> Fit | str | None:
    """Give a layer the weights that fit; return the errors, or why not; None where it is exact."""
    source: Any = node.args[0]
    x = torch.cat([
        read(value, layer.kernel, sample.positions)
        for value, sample in zip(walk.values(source.name), samples, strict=True)
    ])  # fmt: skip
    y = torch.cat([sample.y for sample in samples])
    if layer.sum is not None:
        others = walk.values(layer.sum.other)
        y -= torch.cat([
            _others(layer, value, sample.positions)
            for value, sample in zip(others, samples, strict=True)
        ])  # fmt: skip
    if len(x) < 2:
        return "it computes at one position only"
    for what, rows in (("reads", x), ("returns in the original", y)):
        if not bool(rows.isfinite().all()):
            raise ObjectiveError(
                f"What {layer.path} {what} is nan or infinite for some of the data: nothing can be "
                "fit to that. Look at the data, or at the model in float32."
            )
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = graph.constant(layer.weight)
    bias = None if layer.bias is None else graph.constant(layer.bias)
    groups = layer.kernel.groups
    with torch.no_grad():
        solution = solve(
            x.to(wide), y.to(wide),
            weight.reshape(groups, weight.shape[0] // groups, -1),
            None if bias is None else bias.reshape(groups, -1),
        )  # fmt: skip
        if solution.before < _EXACT:
            return None
        _write(solution, weight, bias)
    return Fit(layer.path, node.name, solution.before, solution.after)


def _others(layer: Layer, value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return what a layer is added to at some positions, in units of the layer's own output."""
    assert layer.sum is not None
    scale = layer.sum.scale
    if scale is not None:
        value = torch.where(scale == 0, 0, value / scale.to(value))
    return returned(value, layer.kernel.groups, len(layer.kernel.axes), positions)


def _write(solution: Solution, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if solution.weight is None:
        return
    weight.copy_(solution.weight.reshape(weight.shape))
    if bias is not None and solution.bias is not None:
        bias.copy_(solution.bias.reshape(bias.shape))


class _Walk:
    """Runs a graph on several batches, one node at a time; values go when nothing needs them.

    The graph is a copy in evaluation mode that shares the weights.
    """

    def __init__(self, graph: GraphModule, flat: Sequence[list[Any]]) -> None:
        self.graph = graph.copy().train(False)
        self._nodes = {node.name: node for node in self.graph.graph.nodes}
        self._runs = [Interpreter(self.graph) for _ in flat]
        for run, inputs in zip(self._runs, flat, strict=True):
            run.args_iter = iter(inputs)

    def run(self, node: fx.Node) -> list[Any]:
        """Run the node of that name; return its value in every batch."""
        own = self._nodes[node.name]
        with torch.no_grad():
            return [run.advance(own) for run in self._runs]

    def values(self, name: str) -> list[Any]:
        """Return the value of the node of that name in every batch."""
        return [run.env[self._nodes[name]] for run in self._runs]
