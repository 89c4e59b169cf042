"""Calibration: which numbers each value holds, seen on the user's data, a batch at a time.

The graph runs in evaluation, node by node; a value is counted in its histogram and let go of, so
that memory does not grow with the data. A graph that was captured for batches of one size gets the
data in such batches: larger ones are cut, and what is left over is filled up with its own rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.errors import OptionError, ShapeError
from fxopt.graph_module import GraphModule
from fxopt.interpreter import Interpreter, in_evaluation
from fxopt.objective import device_of, each_batch, inputs_of
from fxopt.progress import bar
from fxopt.quantization.errors import CalibrationError
from fxopt.quantization.histogram import Histogram
from fxopt.signature import Signature

_RANDOM_BATCHES = 8


@torch.no_grad()
def calibrate(
    graph: GraphModule,
    nodes: Sequence[fx.Node],
    data: Any,
    *,
    samples: int,
    progress: bool = False,
) -> tuple[dict[fx.Node, Histogram], int]:
    """Count the numbers of some nodes' values on up to `samples` inputs; return how many it saw.

    `data`: batches as for `fxopt.finetune`, pairs (inputs, targets) or inputs alone; targets are
    not looked at. "random" stands for random inputs: for speed tests, never for accuracy.

    Raises CalibrationError where a value is NaN or infinite, ObjectiveError where there is no
    batch, or one of a form that nobody knows, ShapeError where it does not fit the graph.
    """
    found = {node: Histogram() for node in nodes}
    wanted = {node.name: histogram for node, histogram in found.items()}
    twin = in_evaluation(graph)
    twin.own_storage()  # running it may write its state
    interpreter = Interpreter(twin)
    seen = 0
    with bar("calibration", None, shown=progress) as tick:
        for number, (flat, rows) in enumerate(inputs_for(graph, data, samples)):
            tick(f"{seen} of {samples} samples")
            _observe(interpreter, flat, wanted, number)
            seen += rows
    return found, seen


def _observe(
    interpreter: Interpreter, flat: Sequence[Any], wanted: dict[str, Histogram], batch: int
) -> None:
    """Run a graph on a batch, and count what comes by."""
    interpreter.env.clear()
    interpreter.args_iter = iter(flat)
    nodes: Iterable[fx.Node] = interpreter.module.graph.nodes  # type: ignore[union-attr, assignment]
    for node in nodes:
        if node.op == "output":
            break
        value = interpreter.advance(node)
        if node.name not in wanted:
            continue
        try:
            wanted[node.name].add(value)
        except CalibrationError as error:
            path = node.meta.get("path")
            where = f"'{node.name}'" + (f" (of '{path}')" if path else "")
            raise CalibrationError(f"In batch {batch}, at {where}: {error}") from None


# -- batches --------------------------------------------------------------------------------------


def inputs_for(
    graph: GraphModule, data: Any, samples: int
) -> Iterator[tuple[list[Any], int]]:
    """Yield flat inputs as the graph takes them, and how many samples each holds.

    `data` and errors are those of `calibrate`; it ends with the batch that holds sample `samples`.
    """
    signature = graph.info.signature
    assert signature is not None
    if data is None:
        raise OptionError(
            "Calibration needs data: pass calibration= some batches of what the model will see, "
            "such as a DataLoader; or calibration='random', which says nothing about accuracy."
        )
    if isinstance(data, str):
        if data != "random":
            raise OptionError(f"calibration={data!r}: it is an iterable of batches, or 'random'.")
        batches: Iterable[list[Any]] = _random(graph)
    else:
        batches = _flat(graph, signature, data)
    left = samples
    for flat in batches:
        for part, rows in _fitted(signature, flat):
            yield part, rows
            left -= rows
            if left <= 0:
                return


def _flat(graph: GraphModule, signature: Signature, data: Any) -> Iterator[list[Any]]:
    device = device_of(graph)
    for batch in each_batch(data, "calibration"):
        inputs = inputs_of(batch)
        flat = signature.flatten(inputs.args, inputs.kwargs)
        # copies: the model may write to what it is given
        yield [x.to(device, copy=True) if isinstance(x, torch.Tensor) else x for x in flat]


def _random(graph: GraphModule) -> Iterator[list[Any]]:
    """Yield inputs like the example's: normal numbers of its mean and deviation; integers stay."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(_RANDOM_BATCHES):
        yield [_drawn(value, generator) for value in graph.info.example_inputs]


def _drawn(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.numel():
        return value
    mean, deviation = value.double().mean(), value.double().std(correction=0)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
    return (mean + deviation * noise).to(value.dtype)


def _fitted(signature: Signature, flat: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Yield a batch as it is where it fits the graph, else cut into batches that do."""
    given = _rows(flat)
    try:
        signature.check(flat)
    except ShapeError:
        wanted = _captured_rows(signature)
        if not wanted or not given or given == wanted:
            raise
        for start in range(0, given, wanted):
            rows = torch.arange(start, start + wanted) % given
            part = [x[rows.to(x.device)] if isinstance(x, torch.Tensor) else x for x in flat]
            signature.check(part)
            yield part, min(wanted, given - start)
        return
    yield flat, given or 1


def _rows(flat: Sequence[Any]) -> int | None:
    """Return the size of the first dimension that all tensors have in common."""
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    sizes = {x.shape[0] if x.dim() else None for x in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def _captured_rows(signature: Signature) -> int | None:
    """Return the fixed size of the first dimension that all of a graph's inputs share."""
    sizes: set[Any] = {leaf.shape[0] if leaf.shape else None for leaf in signature.tensors}
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) else None

