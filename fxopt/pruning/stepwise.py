"""Pruning in one line, at once or in steps with training between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxopt.compile import optimize
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.pruning.record import PruningRecord
from fxopt.pruning.selection import check_overrides
from fxopt.registry import classes, make
from fxopt.story import Story

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
    between: Callable[[GraphModule], Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> GraphModule:
    """Return a pruned graph of a model or of a captured graph; both stay as they are.

    `example_inputs` and `dynamic_shapes` are those of `fxopt.capture`, `options` those of
    `fxopt.passes.PruneChannels`. With several `steps` the ratio is reached bit by bit, and channels
    are scored anew at each: after a part `p` of the steps `ratio · schedule(p)` is gone, where the
    schedule is "linear", "cubic" or a function of your own, from 0 to schedule(1) = 1. Shares in
    `overrides` rise alike; all of them are shares of the widths before the first step. `between` is
    called with the graph after each step, and may train it in place, or return a trained one, or
    what `fxopt.finetune` returns.

    What was pruned, what was frozen and why, is in `.report`, and in `.story.steps[…].details`.
    Raises OptionError for options that cannot be meant, CaptureError for a model that cannot be
    captured, VerifyError where a result is not proven.
    """
    rise = _schedule(schedule, steps)
    _check(ratio, between)
    graph: Any = model_or_graph
    left, stories = 1.0, []
    widths: dict[str, int] = {}
    for step in range(1, steps + 1):
        part = rise(step / steps)
        share = _share(ratio * part, left, options.get("of", "channels"))
        scaled = {key: one * part for key, one in _overrides(options).items()}
        told = {**options, "ratio": share, "overrides": scaled, "widths": widths}
        one = make(classes("passes")["prune-channels"], told)
        graph = optimize(graph, example_inputs, passes=[one], dynamic_shapes=dynamic_shapes)
        example_inputs, dynamic_shapes = None, None
        stories.append(graph.story)
        left *= _left(graph, options.get("of", "channels"), 1 - share)
        widths = widths or _widths(graph)
        if between is not None:
            graph = _graph(graph, between(graph))
    graph.info.story = _joined(stories)
    assert isinstance(graph, GraphModule)
    return graph


def pruning_record(graph: GraphModule) -> PruningRecord:
    """Return what the last pruning of a graph did; of steps, the last one in which channels went.

    Raises OptionError where there was none.
    """
    steps = graph.info.story.steps if graph.info.story is not None else []
    records = [one.details for one in steps if isinstance(one.details, PruningRecord)]
    busy = [one for one in records if one.channels[0] > one.channels[1]]
    if records:
        return (busy or records)[-1]
    raise OptionError("This graph was not pruned: fxopt.prune(model, inputs) does.")


def _share(gone: float, left: float, of: str) -> float:
    """Return the ratio for one step: channels are counted in whole widths, costs in what is left.
    """
    if of == "channels" or left == 1.0:
        return gone
    return max(1.0 - (1.0 - gone) / left, 0.0)


def _left(graph: GraphModule, of: str, wished: float) -> float:
    """Return the share of the cost that a step left; where it is not counted, the wish."""
    details = graph.story.steps[-1].details
    if not isinstance(details, PruningRecord):
        return 1.0
    pairs = {"macs": details.macs, "params": details.parameters, "bytes": details.parameters}
    before, after = pairs.get(of, (0, 0))
    return after / before if before else wished


def _widths(graph: GraphModule) -> dict[str, int]:
    """Return the widths before the step that was just done."""
    details = graph.story.steps[-1].details
    return {w.name: w.before for w in details.widths} if details is not None else {}


def _overrides(options: Mapping[str, Any]) -> Mapping[str, float]:
    overrides = options.get("overrides", {})
    check_overrides(overrides)
    assert isinstance(overrides, Mapping)
    return overrides


def _joined(stories: Sequence[Story]) -> Story:
    """Return one story of all steps."""
    last = stories[-1]
    first = stories[0]
    last.captured, last.capture_seconds = first.captured, first.capture_seconds
    last.steps[:0] = [step for story in stories[:-1] for step in story.steps]
    return last


def _schedule(schedule: Any, steps: Any) -> Callable[[float], float]:
    if not (isinstance(steps, int) and steps >= 1):
        raise OptionError(f"steps must be a whole number from 1 on, not {steps!r}.")
    if not callable(schedule) and schedule not in SCHEDULES:
        known = ", ".join(map(repr, SCHEDULES))
        raise OptionError(f"schedule must be one of {known} or a function, not {schedule!r}.")
    rise: Callable[[float], float] = schedule if callable(schedule) else SCHEDULES[schedule]
    values = [rise(step / steps) for step in range(1, steps + 1)]
    if not all(0.0 <= value <= 1.0 for value in values) or abs(values[-1] - 1.0) > 1e-6:
        raise OptionError(f"A schedule rises from 0 to schedule(1) = 1; this one gives {values}.")
    return rise


def _check(ratio: Any, between: Any) -> None:
    if not (isinstance(ratio, (int, float)) and 0.0 <= ratio <= 1.0):
        raise OptionError(f"ratio must be a share between 0 and 1, not {ratio!r}.")
    if between is not None and not callable(between):
        raise OptionError(f"between must be a function of the graph, not {between!r}.")


def _graph(before: GraphModule, trained: Any) -> GraphModule:
    """Return what `between` left, in evaluation mode."""
    graph = before if trained is None else getattr(trained, "model", trained)
    if not isinstance(graph, GraphModule):
        raise OptionError(
            f"between= returned a {type(trained).__name__}: it must train the graph that it gets, "
            "or return a graph made from it."
        )
    return graph.eval()
