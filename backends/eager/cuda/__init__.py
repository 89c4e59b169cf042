"""What the eager backend does where a graph computes on CUDA; docs/cuda.md tells it in order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fxopt.backends.eager.cuda.obstacles import device_of, recording_obstacle
from fxopt.backends.eager.cuda.recorder import CudaRecorder
from fxopt.backends.eager.cuda.replays import LIMIT, Replays
from fxopt.backends.eager.cuda.use_channels_last import UseChannelsLast
from fxopt.backends.eager.program import Function
from fxopt.contract import Pass
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule
from fxopt.timings import Timings


def cuda_passes(timings: Timings | None) -> tuple[Pass, ...]:
    """Return the passes in order; without `timings` each chooses by rule."""
    return (UseChannelsLast(timings),)


def cuda_function(
    function: Function, graph: GraphModule, cuda_graphs: bool | None
) -> tuple[Function, str]:
    """Return what runs the program of a graph, and what the report says about that.

    `cuda_graphs`: whether calls are replayed from CUDA graphs; None for where that is right.
    Raises LoweringError, with the reason, where it is True and not right.
    """
    plain = _without_autocast(function)
    if cuda_graphs is False:
        return plain, "eager: no CUDA graphs, as asked for (cuda_graphs=False)."
    why = recording_obstacle(graph)
    if why is None:
        make = partial(CudaRecorder, device_of(graph))
        replays = Replays(plain, make, required=cuda_graphs is True)
        return replays, f"eager: repeated calls replay CUDA graphs, one per shape, at most {LIMIT}."
    if cuda_graphs is True:
        raise LoweringError(
            f"cuda_graphs=True is not possible: {why}. Leave cuda_graphs out to run such a model "
            "without a CUDA graph."
        )
    return plain, f"eager: no CUDA graphs: {why}."


def _without_autocast(function: Callable[..., Any]) -> Function:
    """Return a function that computes in its own dtypes under `torch.autocast`, too."""

    def run(*flat: Any) -> Any:
        with torch._C._DisableAutocast():
            return function(*flat)

    return run
