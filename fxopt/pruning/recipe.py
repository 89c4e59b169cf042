"""Pruning in one line, at once or in steps with training between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.compile import optimize
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.pruning.record import PruningRecord
from fxopt.registry import classes, make

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cubic": lambda progress: 1 - (1 - progress) ** 3,  # Zhu and Gupta 2017, equation 1
}


def prune(
    model_or_graph: Any,
    example_inputs: Any = None,
    *,
    ratio: float = 0.5,
    steps: int = 1,
    schedule: str | Callable[[float], float] = "linear",
    between: Callable[[GraphModule], torch.nn.Module | None] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> GraphModule:
    """Return a pruned graph of a model or of a captured graph; both stay as they are.

    `options` are those of `fxopt.passes.PruneChannels`. With several `steps` the ratio is reached
    bit by bit, and channels are scored anew at each: the share reached after a part `p` of the
    steps is `ratio · schedule(p)`, where the schedule is "linear", "cubic" or a function of your
    own with schedule(1) = 1. `between` is called with the graph after each step and may train it in
    place, or return a trained one (as `fxopt.finetune(…).model` is).

    What was pruned, what was frozen and why, is in `.story`. Raises OptionError for options that
    cannot be meant.
    """
    if steps < 1:
        raise OptionError(f"steps must be a whole number from 1 on, not {steps!r}.")
    rise = _schedule(schedule)
    graph, left = model_or_graph, 1.0  # the share that is left
    for step in range(1, steps + 1):
        goal = 1.0 - ratio * rise(step / steps)
        share = 1.0 - goal / left if left > goal else 0.0
        one = make(classes("passes")["prune-channels"], {**options, "ratio": share})
        graph = optimize(graph, example_inputs, passes=[one], dynamic_shapes=dynamic_shapes)
        left *= _left(graph, options.get("of", "channels"), goal / left)
        example_inputs, dynamic_shapes = None, None
        trained = between(graph) if between is not None else None
        graph = graph if trained is None else _graph(trained)
    assert isinstance(graph, GraphModule)
    return graph


def record_of(graph: GraphModule) -> PruningRecord:
    """Return what the last pruning of a graph did. Raises OptionError where there was none."""
    steps = graph.info.story.steps if graph.info.story is not None else []
    for step in reversed(steps):
        if isinstance(step.details, PruningRecord):
            return step.details
    raise OptionError("This graph was not pruned: fxopt.prune(model, inputs) does.")


def _left(graph: GraphModule, of: str, wished: float) -> float:
    """Return the share that the last step left, after rounding; where it is not counted, the wish.
    """
    details = graph.story.steps[-1].details
    if not isinstance(details, PruningRecord):
        return 1.0
    pairs = {"channels": details.channels, "macs": details.macs, "params": details.parameters}
    before, after = pairs.get(of, (0, 0))
    return after / before if before else wished


def _schedule(schedule: str | Callable[[float], float]) -> Callable[[float], float]:
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise OptionError(f"schedule must be one of {known} or a function, not {schedule!r}.")
    return SCHEDULES[schedule]


def _graph(trained: torch.nn.Module) -> GraphModule:
    if not isinstance(trained, GraphModule):
        raise OptionError(
            f"between= returned a {type(trained).__name__}: it must train the graph that it gets, "
            "or return a graph made from it."
        )
    return trained
