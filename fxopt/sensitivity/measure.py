"""Measuring sensitivity: one family of channels is pruned at a time, and the model evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.capture import bind_inputs, capture
from fxopt.channels.analysis import Channels
from fxopt.channels.groups import Family
from fxopt.compile import unwrapped
from fxopt.errors import FxoptError, OptionError, unknown_name
from fxopt.graph_module import GraphModule
from fxopt.inputs import infer_inputs
from fxopt.progress import bar
from fxopt.pruning.computed_weights import analysed
from fxopt.pruning.importance import importance_of, score
from fxopt.pruning.removal import remove_proven
from fxopt.pruning.selection import gone_of
from fxopt.sensitivity.result import Row, Sensitivity
from fxopt.sensitivity.state import State

Evaluate = Callable[[GraphModule], float]


def sensitivity(
    model: Any,
    ratios: Sequence[float],
    evaluate: Evaluate,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    importance: Any = "l2",
    layers: Sequence[str] | None = None,
    state: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure how much a model suffers when one family of channels at a time is pruned.

    A family holds the channels of a layer, and of those that a residual sum ties to it. For each
    one and each of `ratios` (between 0 and 1), the least important channels by `importance` are
    really removed from a copy, the rest stays, and `evaluate` gets that graph, which is called
    like the model, in evaluation mode. It returns a number, the larger the better: an accuracy, or
    minus a loss. Ratios that remove the same number of channels are measured once.

    `layers` are name patterns of what is measured (None: everything). With `state`, what was
    measured is kept in that file after each evaluation, and a run that was ended goes on from
    there. `progress` shows a bar on stderr.

    Raises OptionError for options that cannot be, and where `state` holds the measurements of
    another model or of other settings; CaptureError; FxoptError where `evaluate` returns no number.
    """
    wanted = _checked_ratios(ratios)
    if not callable(evaluate):
        raise OptionError(f"evaluate must be a function of the model, not {evaluate!r}.")
    graph = _captured(model, example_inputs, dynamic_shapes)
    chosen = importance_of(importance)
    channels, _ = analysed(graph, heads="heads", reduced=False)
    families = channels.families
    measured = _matching(families, layers)
    kept = State.open(state, graph, chosen, evaluate)
    if not kept.orders:
        found = score(chosen, channels.graph, families)
        kept.orders = {
            family.name: torch.argsort(one, stable=True).tolist()
            for family, one in zip(families, found, strict=True)
        }
        kept.write()
    jobs = _jobs(measured, wanted, kept)
    with bar("sensitivity", len(jobs) + (kept.baseline is None), shown=progress) as tick:
        if kept.baseline is None:
            tick("unpruned")
            kept.baseline = _value(evaluate(graph.copy()), "the model as it is")
            kept.write()
        for family, count in jobs:
            tick(f"{family.name} −{count}")
            pruned = _without(channels, family, kept.orders[family.name], count)
            where = f"the model without {count} channels of '{family.name}'"
            kept.values.setdefault(family.name, {})[count] = _value(evaluate(pruned), where)
            kept.write()
    rows = tuple(_row(family, wanted, kept) for family in measured)
    assert kept.baseline is not None
    return Sensitivity(graph.info.model_name, chosen.name, kept.baseline, wanted, rows)


# -- pruning one family ----------------------------------------------------------------------------


def _without(
    channels: Channels, family: Family, order: Sequence[int], count: int
) -> GraphModule:
    """Return a copy of a graph without the first `count` channels, in this order, of one family."""
    masks = [np.zeros(one.channels, np.bool_) for one in channels.families]
    names = [one.name for one in channels.families]
    masks[names.index(family.name)][list(order[:count])] = True
    pruned = channels.graph.copy()
    remove_proven(pruned, channels, masks, gone_of(channels, masks), "sensitivity")
    return pruned


def _removed(family: Family, ratio: float) -> int:
    """Return how many channels a ratio removes: the nearest number; one always stays."""
    return min(int(ratio * family.channels + 0.5), family.channels - 1)


def _jobs(
    families: Sequence[Family], ratios: Sequence[float], state: State
) -> list[tuple[Family, int]]:
    """Return what is still to be measured, each number of channels once."""
    jobs = {
        (family.name, count): (family, count)
        for family in families
        for count in (_removed(family, ratio) for ratio in ratios)
        if count and count not in state.values.get(family.name, {})
    }
    return list(jobs.values())


def _row(family: Family, ratios: Sequence[float], state: State) -> Row:
    counts = tuple(_removed(family, ratio) for ratio in ratios)
    known = {0: state.baseline, **state.values.get(family.name, {})}
    values = tuple(float(known[count] or 0.0) for count in counts)
    return Row(family.name, family.layers, family.channels, counts, values)


# -- what was asked for ----------------------------------------------------------------------------


def _checked_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    if not isinstance(ratios, (list, tuple)) or not ratios:
        raise OptionError(f"ratios must be a list of shares, such as [0.25, 0.5], not {ratios!r}.")
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
            raise OptionError(f"ratios: {ratio!r} is no share between 0 and 1, both excluded.")
    return tuple(sorted({float(ratio) for ratio in ratios}))


def _captured(model: Any, example_inputs: Any, dynamic_shapes: Any) -> GraphModule:
    model = unwrapped(model)
    if isinstance(model, GraphModule):
        return model.copy().train(False)  # type: ignore[return-value, unused-ignore]
    inputs = infer_inputs(model) if example_inputs is None else bind_inputs(model, example_inputs)
    if inputs is None:
        raise OptionError("The model does not say what it takes: pass example_inputs=.")
    return capture(model, inputs, dynamic_shapes=dynamic_shapes)


def _matching(families: Sequence[Family], layers: Sequence[str] | None) -> list[Family]:
    """Return the families that a pattern names; raise OptionError for one that names none."""
    if isinstance(layers, str):
        raise OptionError(f"layers={layers!r} is one text; write layers=[{layers!r}].")
    if not families:
        raise OptionError("No layer of this model has channels that may go.")
    if layers is None:
        return list(families)
    found: dict[str, Family] = {}
    for pattern in layers:
        fitting = [family for family in families if _fits(family, pattern)]
        if not fitting:
            names = {name for family in families for name in (family.name, *family.layers)}
            raise unknown_name("layer with channels that may go", pattern, names)
        found.update((family.name, family) for family in fitting)
    return [family for family in families if family.name in found]


def _fits(family: Family, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (family.name, *family.layers))


def _value(returned: Any, where: str) -> float:
    """Return what `evaluate` said; only a pruned model may be worth nothing finite."""
    try:
        value = float(returned)
    except (TypeError, ValueError, RuntimeError):
        raise FxoptError(
            f"evaluate returned {type(returned).__name__} for {where}; it must return a number, "
            "the larger the better."
        ) from None
    if value != value and where == "the model as it is":
        raise FxoptError("evaluate returned nan for the model as it is: nothing can be compared.")
    return value
