"""Walk through the smaller graph, and fit each layer to what the original's returned."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.interpreter import Interpreter, in_evaluation
from fxopt.kernels import Kernel
from fxopt.objective import ObjectiveError, flat_inputs_of
from fxopt.reconstruction.layers import Layer, layers_of
from fxopt.reconstruction.least_squares import Linear, Rows, fit
from fxopt.reconstruction.record import Fit, Reconstruction
from fxopt.reconstruction.rows import position_count, read, returned

Pick = Callable[[str, torch.Tensor], torch.Tensor]

# a layer is looked at in so many positions at most, over all batches: for each weight of an output,
# and where that is little
ROWS_PER_UNKNOWN, ROWS = 20, 16384
HELD_OUT = 8  # of so many inputs one is not fit to
LEAST_HELD_OUT = 32  # rows: of fewer, chance would decide
_EXACT = 1e-9  # errors below are rounding: such a layer stays as it is


def reconstruct(
    smaller: GraphModule, original: GraphModule, pick: Pick, batches: Sequence[Any]
) -> Reconstruction:
    """Fit the layers of `smaller`, in place, to what those of the same names in `original` return.

    `pick(name, value)` takes from the value of that node of the original what is left of it in
    `smaller`. Both run in evaluation mode on `batches`: inputs, or pairs (inputs, targets). All of
    them are held in memory, with every value of `smaller` that is alive between two nodes, and the
    rows of all layers (`ROWS_PER_UNKNOWN`) that the original returns. Layers are convolutions and
    linear layers with parameters of their own.

    A layer is fit to `y + (other of the original − other) / scale`, where y is what the original's
    returned, and `other` what the output goes on to be added to, times a batch norm's scale; else
    to y alone.

    He, Zhang and Sun: Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017,
    sections 3.1 and 3.2, equations 5 and 6: each layer is fit to the original's outputs on what
    the pruned layers before it give, from the first to the last, and to residual sums. Here for
    all kinds of layers, weights and biases, near the weights that there are.

    Raises ObjectiveError for batches that the graph does not take, and values that are nan or
    infinite. Weights may have changed by then.
    """
    layers, skipped = layers_of(smaller, original)
    flat = [flat_inputs_of(original, batch) for batch in batches]
    samples = sampled(original, pick, layers, flat)
    fits = []
    walk = Walk(in_evaluation(smaller), flat)
    for node in smaller.graph.nodes:
        layer = layers.get(node.name)
        if layer is not None:
            found = _fit(layer, node, smaller, samples.pop(node.name), walk)
            if isinstance(found, str):
                skipped.append((layer.path, found))
            elif found is not None:
                fits.append(found)
        walk.run(node)
    fitted = {layers[one.node] for one in fits if one.changed}
    names = {name for layer in fitted for name in (layer.weight, layer.bias) if name is not None}
    smaller.info.fitted |= names
    return Reconstruction(tuple(fits), tuple(skipped))


@dataclass
class Sample:
    """What the original returned in one batch at some positions: [positions, groups, outputs]."""

    positions: torch.Tensor
    held_out: torch.Tensor  # which of them are not fit to
    y: torch.Tensor
    other: torch.Tensor | None  # what y was to be added to, also per scale


def sampled(
    original: GraphModule, pick: Pick, layers: dict[str, Layer], flat: Sequence[list[Any]]
) -> dict[str, list[Sample]]:
    """Run the original batch by batch; return what the originals of layers return."""
    draw = Draw(len(flat))
    found: dict[str, list[Sample]] = {name: [] for name in layers}
    evaluated = in_evaluation(original)
    for inputs in flat:
        walk = Walk(evaluated, [inputs])
        for node in evaluated.graph.nodes:
            (value,) = walk.run(node)
            if node.name not in layers:
                continue
            layer = layers[node.name]
            y, other = pick(node.name, value), None
            positions, held_out = draw(node.name, layer.kernel, y)
            if layer.sum is not None:
                (added,) = walk.values(layer.sum.other)
                other = _scaled(layer, pick(layer.sum.other, added), positions)
            rows = returned(y, layer.kernel.groups, len(layer.kernel.axes), positions)
            found[node.name].append(Sample(positions, held_out, rows, other))
    return found


class Draw:
    """Draws positions of layers, and says which of them belong to inputs held out."""

    def __init__(self, batches: int) -> None:
        self._batches = batches
        self._generator = torch.Generator().manual_seed(0)
        self._seen: Counter[str] = Counter()  # inputs, by layer

    def __call__(
        self, name: str, kernel: Kernel, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return positions of what a layer returned for a batch, and which are held out."""
        space = len(kernel.axes)
        count = position_count(y.shape, space)
        inputs = y.shape[0] if y.dim() > space + 1 else 1
        most = max(ROWS_PER_UNKNOWN * math.prod(kernel.shape[1:]), ROWS)
        positions = torch.randperm(count, generator=self._generator)
        positions = positions[: math.ceil(most / self._batches)]
        number = self._seen[name] + positions // max(count // max(inputs, 1), 1)
        self._seen[name] += inputs
        held_out = number % HELD_OUT == HELD_OUT - 1
        return positions.to(y.device), held_out.to(y.device)


def rows_of(
    layer: Layer, reads: Sequence[Any], adds: Sequence[Any], samples: Sequence[Sample]
) -> tuple[Rows, Rows] | str:
    """Return what a layer reads and should return, to fit to and held out; or why that is too few.

    `reads` and `adds` are, in every batch, what it is given, and what its output is added to.
    """
    x = torch.cat([
        _wide(read(value, layer.kernel, sample.positions))
        for value, sample in zip(reads, samples, strict=True)
    ])  # fmt: skip
    y = torch.cat([_wide(sample.y) for sample in samples])
    if layer.sum is not None:
        y += torch.cat([
            _lacks(sample.other, _scaled(layer, value, sample.positions))
            for value, sample in zip(adds, samples, strict=True)
            if sample.other is not None
        ])  # fmt: skip
    for what, rows in (("reads", x), ("should return", y)):
        if not bool(rows.isfinite().all()):
            raise ObjectiveError(
                f"What '{layer.path}' {what} is nan or infinite for some of the data: nothing can "
                "be fit to that. Look at the data, and at the precision of the model."
            )
    held_out = torch.cat([sample.held_out for sample in samples])
    if min(int(held_out.sum()), int((~held_out).sum())) < LEAST_HELD_OUT:
        return f"{int(held_out.sum())} positions in every eighth input are too few to judge by"
    return Rows(x[~held_out], y[~held_out]), Rows(x[held_out], y[held_out])


def _fit(
    layer: Layer, node: fx.Node, graph: GraphModule, samples: list[Sample], walk: Walk
) -> Fit | str | None:
    """Give a layer the weights that fit; return the errors, or why not; None where it is exact."""
    source: Any = node.args[0]
    adds = () if layer.sum is None else walk.values(layer.sum.other)
    rows = rows_of(layer, walk.values(source.name), adds, samples)
    if isinstance(rows, str):
        return rows
    given, judged = rows
    weight = graph.constant(layer.weight)
    bias = None if layer.bias is None else graph.constant(layer.bias)
    groups = layer.kernel.groups
    old = Linear(
        weight.detach().reshape(groups, weight.shape[0] // groups, -1),
        None if bias is None else bias.detach().reshape(groups, -1),
    )
    spread = spread_of(judged.y)
    before = float(old.errors(judged).sum()) / spread
    if before < _EXACT:
        return None
    new = fit(given, judged, old)
    with torch.no_grad():
        weight.copy_(new.weight.reshape(weight.shape))
        if bias is not None and new.bias is not None:
            bias.copy_(new.bias.reshape(bias.shape))
    return Fit(layer.path, node.name, before, float(new.errors(judged).sum()) / spread)


def _scaled(layer: Layer, value: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return what a layer is added to at some positions, in units of the layer's own output."""
    assert layer.sum is not None
    rows = _wide(returned(value, layer.kernel.groups, len(layer.kernel.axes), positions))
    if layer.sum.scale is None:
        return rows
    scale = layer.sum.scale.reshape(rows.shape[1:]).to(rows)
    return torch.where(scale == 0, 0, rows / scale)


def _lacks(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return wanted − found: 0 where both are the same infinity, as in a mask."""
    return torch.where(wanted == found, 0, wanted - found)


def spread_of(y: torch.Tensor) -> float:
    """Return Σ (y − its mean)², or Σ y² where y is constant."""
    wide = y.double()
    whole = float(wide.square().sum())
    spread = float((wide - wide.mean(0)).square().sum())
    return (spread if spread > _EXACT * whole else whole) or 1.0


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Walk:
    """Runs a graph on several batches: every node once, in order.

    A value goes when no later node needs it.
    """

    def __init__(self, graph: GraphModule, flat: Sequence[list[Any]]) -> None:
        self._nodes = {node.name: node for node in graph.graph.nodes}
        self._runs = [Interpreter(graph) for _ in flat]
        for run, inputs in zip(self._runs, flat, strict=True):
            run.args_iter = iter(inputs)

    def run(self, node: fx.Node) -> list[Any]:
        """Run the node of that name, the next one; return its value in every batch."""
        own = self._nodes[node.name]
        with torch.no_grad():
            return [run.advance(own) for run in self._runs]

    def replace(self, name: str, value: Any) -> None:
        """Let the node of that name, which has run, have another value in every batch."""
        for run in self._runs:
            run.env[self._nodes[name]] = value

    def knows(self, name: str) -> bool:
        """Whether the node of that name has run, and its value is still needed."""
        return self._nodes[name] in self._runs[0].env

    def values(self, name: str) -> list[Any]:
        """Return the value of the node of that name in every batch."""
        return [run.env[self._nodes[name]] for run in self._runs]
