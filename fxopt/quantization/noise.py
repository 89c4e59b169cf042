"""Which roundings hurt: how much noise each makes by itself, and how it adds up.

    SQNR = 10 · log₁₀(Σ reference² / Σ (found − reference)²)     signal to quantization noise, in dB

6 dB are one bit. `alone` is that of what the model returns when one rounding is left in a graph of
floats: the lowest are what to give more bits, or to keep float. `here` is that of the layer's own
result in the graph with all roundings: where it falls, something upstream is to blame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.errors import PreconditionError
from fxopt.graph_module import GraphModule
from fxopt.interpreter import Interpreter, in_evaluation
from fxopt.progress import bar
from fxopt.quantization.calibration import inputs_for
from fxopt.quantization.fitting import unrounded
from fxopt.quantization.operator import fake_quantize


@dataclass(frozen=True)
class Rounding:
    """One fake-quant: what it rounds, for which layers, and the noise in dB."""

    node: str
    value: str  # the name of the activation, or of the weight
    readers: tuple[str, ...]  # paths of the layers that read it, else names of nodes
    here: float  # at its first reader
    alone: float  # at the model's outputs


@dataclass(frozen=True)
class Noise:
    """All roundings of a graph, those that hurt most first; `total` is with all. Print it."""

    total: float
    rows: tuple[Rounding, ...]

    def table(self, count: int | None = None) -> str:
        """Return a line of text for each of the first `count` roundings."""
        rows = self.rows[:count]
        width = max((len(row.value) for row in rows), default=0)
        return "\n".join(
            f"{row.value:{width}}  alone {row.alone:6.1f} dB  here {row.here:6.1f} dB  "
            f"read by {', '.join(row.readers)}"
            for row in rows
        )

    def __str__(self) -> str:
        return f"with all {len(self.rows)} roundings: {self.total:.1f} dB\n{self.table(12)}"


@torch.no_grad()
def quantization_noise(
    graph: GraphModule, data: Any, *, samples: int = 32, progress: bool = True
) -> Noise:
    """Measure the noise of each rounding of a fake-quantized graph, against its own floats.

    `data` is as for `InsertFakeQuant`; the graph runs on `samples` inputs, once for each rounding.
    Raises PreconditionError for a graph without roundings, else what `InsertFakeQuant` raises.
    """
    roundings = graph.find(fake_quantize)
    if not roundings:
        raise PreconditionError(
            "quantization_noise() needs a graph with roundings; InsertFakeQuant makes one."
        )
    batches = [flat for flat, _ in inputs_for(graph, data, samples)]
    floats = unrounded(graph)
    readers = {node: _reader(node) for node in roundings}
    watched = sorted({node.name for node in readers.values() if node is not None})
    wanted, seen_there = _run(floats, batches, watched)
    found, seen_here = _run(graph, batches, watched)
    here = {name: sqnr(seen_here[name], seen_there[name]) for name in watched}
    rows = []
    with bar("quantization noise", len(roundings), shown=progress) as tick:
        for node in roundings:
            tick(node.name)
            outputs, _ = _run(unrounded(graph, keep=node.name), batches, ())
            reader = readers[node]
            rows.append(Rounding(
                node.name, _value_of(node),
                tuple(user.meta.get("path") or user.name for user in node.users),
                math.inf if reader is None else here[reader.name], sqnr(outputs, wanted),
            ))  # fmt: skip
    return Noise(sqnr(found, wanted), tuple(sorted(rows, key=lambda row: row.alone)))


def _reader(rounding: fx.Node) -> fx.Node | None:
    """Return the first call that reads what is rounded."""
    return next((user for user in rounding.users if user.op == "call_function"), None)


def _value_of(rounding: fx.Node) -> str:
    source = rounding.all_input_nodes[0]
    return str(source.target) if source.op == "get_attr" else source.name


def _run(
    graph: GraphModule, batches: Sequence[list[Any]], watched: Iterable[str]
) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Return the floats that a graph returns, and values of some nodes, in every batch."""
    twin, names = in_evaluation(graph), set(watched)
    twin.own_storage()  # running it may write its state
    values: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    returned: list[torch.Tensor] = []
    for flat in batches:
        interpreter = Interpreter(twin)
        interpreter.args_iter = iter(flat)
        for node in twin.graph.nodes:
            value = interpreter.advance(node)
            if node.name in names:
                values[node.name].append(value)
            if node.op == "output":
                returned += [one for one in value if is_float(one)]
    return returned, values


def is_float(value: Any) -> bool:
    """Whether a value is a tensor of floats."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def sqnr(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the signal-to-quantization-noise ratio over some tensors, in dB."""
    signal = noise = 0.0
    for one, other in zip(found, expected, strict=True):
        signal += float(other.double().square().sum())
        noise += float((one.double() - other.double()).square().sum())
    return 10 * math.log10(signal / noise) if signal and noise else math.inf
