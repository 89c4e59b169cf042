"""What a model costs, node by node and module by module: counted from shapes, and measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.capture import capture
from fxopt.compiled import CompiledModel, DeferredModel
from fxopt.cost import live_bytes, peak
from fxopt.cost.call import tensors_in
from fxopt.errors import OptionError, ShapeError
from fxopt.graph_module import GraphModule
from fxopt.inputs import as_inputs
from fxopt.profiling.dimensions import dimensions_of
from fxopt.profiling.machine import Machine, measure_machine
from fxopt.profiling.measure import Timing
from fxopt.profiling.measure import measure as measure_nodes
from fxopt.profiling.result import Profile
from fxopt.profiling.rows import Module, Row, row_of

__all__ = ["Machine", "Module", "Profile", "Row", "Timing", "measure_machine", "profile"]


def profile(
    model: Any,
    example_inputs: Any = None,
    *,
    rounds: int = 10,
    measure: bool = True,
    dynamic_shapes: Any = None,
) -> Profile:
    """Count what each node of a model costs, and measure how long it takes.

    `model` is a model (captured as it is, with no pass run), a graph or a compiled model;
    `example_inputs` and `dynamic_shapes` as in `fxopt.capture`. Milliseconds are the median of
    `rounds` runs of the whole graph, node by node, in PyTorch; the model stays as it is.

    Raises CaptureError, ShapeError for inputs that do not fit, and OptionError.
    """
    graph, notes = _graph_of(model, example_inputs, dynamic_shapes)
    flat = _flat_inputs(graph, example_inputs, strict=dynamic_shapes is None)
    timings = measure_nodes(graph, flat, rounds=rounds) if measure else {}
    dimensions = dimensions_of(graph, flat)
    nodes = list(graph.graph.nodes)
    live = [dimensions.named(size) for size in live_bytes(nodes, symbolic=True)]
    rows = tuple(
        row_of(node, size, dimensions, timings.get(node.name))
        for node, size in zip(nodes, live, strict=True)
        if _is_listed(node)
    )
    device, dtype = _home(graph)
    return Profile(
        graph.info.model_name, rows, peak(live), dimensions, graph.info.modules, device, dtype,
        (*notes, *_uncounted(rows)),
    )  # fmt: skip


def _graph_of(
    model: Any, example_inputs: Any, dynamic_shapes: Any
) -> tuple[GraphModule, tuple[str, ...]]:
    """Return the graph to profile, and what must be said about it."""
    if not isinstance(model, (CompiledModel, DeferredModel)):
        return capture(model, example_inputs, dynamic_shapes=dynamic_shapes), ()
    if dynamic_shapes is not None:
        raise OptionError("dynamic_shapes cannot change a compiled model; compile it with them.")
    if model.graph is None:
        raise OptionError(
            f"This model was loaded from a file that holds what {model.backend.name} runs, not the "
            "graph. Profile the model itself, or one that was compiled here."
        )
    name = model.backend.name
    note = f"ms: PyTorch ran the optimized graph node by node, not the backend '{name}'"
    return model.graph, () if name == "eager" else (note,)


def _flat_inputs(graph: GraphModule, example_inputs: Any, *, strict: bool) -> Sequence[Any]:
    """Return the inputs to measure with: the user's, or the graph's own.

    Where dimensions may vary (not `strict`), the graph may be captured with other examples, and not
    admit the user's size 1.
    """
    signature = graph.info.signature
    if example_inputs is None or signature is None:
        return graph.info.example_inputs
    given = as_inputs(example_inputs)
    try:
        flat = signature.flatten(given.args, given.kwargs)
        signature.check(flat)
    except ShapeError:
        if strict:
            raise
        return graph.info.example_inputs
    return flat


def _is_listed(node: fx.Node) -> bool:
    """Whether a node is a call that makes tensors: no getitem, no arithmetic on sizes."""
    if isinstance(node.target, HigherOrderOperator):
        return True
    made = next(tensors_in(node.meta.get("val")), None)
    return isinstance(node.target, OpOverload) and made is not None


def _home(graph: GraphModule) -> tuple[torch.device, torch.dtype]:
    """Return where the model lives, and the dtype that it computes in."""
    tensors = [*graph.constants().values(), *graph.info.example_inputs]
    floating = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not floating:
        return torch.device("cpu"), torch.float32
    largest = max(floating, key=torch.Tensor.numel)
    return largest.device, largest.dtype


def _uncounted(rows: Sequence[Row]) -> Iterator[str]:
    names = sorted({row.op for row in rows if not row.counted})
    if names:
        yield (
            f"no formula is known for {', '.join(names)}, whose FLOPs count as 0: register one "
            "with fxopt.cost.formula"
        )
