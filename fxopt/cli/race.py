"""The compiled model beside the model itself: a race."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from fxopt.capture import bind_inputs
from fxopt.compiled import CompiledModel
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, evaluation, map_tensors


@dataclass(frozen=True)
class Speed:
    """Median latencies of the compiled model and of the model itself, in milliseconds."""

    backend: str
    compiled_ms: float
    eager_ms: float
    rounds: int
    threads: int

    def __str__(self) -> str:
        return (
            f"speed: {self.compiled_ms:.2f} ms on {self.backend}, {self.eager_ms:.2f} ms for the "
            f"model itself in PyTorch: {self.eager_ms / self.compiled_ms:.2f} times as fast "
            f"(medians of {self.rounds} calls each, {self.threads} threads)"
        )


def race(
    model: Any, inputs: Inputs | None, compiled: CompiledModel, *, rounds: int = 30, lap: int = 5
) -> Speed:
    """Measure both by turns, `lap` calls each, so that a busy machine slows both alike."""
    calls = {
        "eager": _eager_call(model, inputs),
        "compiled": _compiled_call(compiled, model, inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    flags = evaluation(model) if isinstance(model, torch.nn.Module) else nullcontext()
    with torch.no_grad(), flags:
        for call in calls.values():
            call()
        for _ in range(0, rounds, lap):
            for name, call in calls.items():
                time.sleep(0.05)  # the other's threads may still spin
                call()  # and the caches are the other's
                for _ in range(lap):
                    started = time.perf_counter()
                    call()
                    times[name].append((time.perf_counter() - started) * 1e3)
    return Speed(
        compiled.backend.name,
        statistics.median(times["compiled"]),
        statistics.median(times["eager"]),
        len(times["eager"]),
        torch.get_num_threads(),
    )


def _eager_call(model: Any, inputs: Inputs | None) -> Callable[[], Any]:
    if isinstance(model, GraphModule):
        return lambda: model.run(*model.info.example_inputs)
    if isinstance(model, ExportedProgram):
        module, (args, kwargs) = model.module(), model.example_inputs or ((), {})
        return lambda: module(*args, **kwargs)
    bound = bind_inputs(model, inputs)
    return lambda: model(*bound.args, **bound.kwargs)


def _compiled_call(compiled: CompiledModel, model: Any, inputs: Inputs | None) -> Callable[[], Any]:
    """Call it with what the model itself gets, in the dtype that it was compiled for."""
    if isinstance(model, (GraphModule, ExportedProgram)):
        assert compiled.graph is not None
        flat = compiled.graph.info.example_inputs
        return lambda: compiled.executable.run(*flat)
    bound = bind_inputs(model, inputs)
    dtypes = {leaf.dtype for leaf in compiled.signature.tensors if leaf.dtype is not None}
    floats = [dtype for dtype in dtypes if dtype.is_floating_point]
    dtype = floats[0] if len(floats) == 1 else None

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    args, kwargs = map_tensors((bound.args, bound.kwargs), cast)
    return lambda: compiled(*args, **kwargs)
