"""Recurrent layers: hidden units are channels, which the layer itself reads at the next step.

Every layer and direction has the same hidden width, since their states are one tensor: unit i of
one goes with unit i of all others. Its rows are one in each gate's block of the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.follower import Along, Follower, arguments, follows
from fxopt.channels.groups import Role
from fxopt.channels.partition import Ids
from fxopt.shapes import rank_of

aten = torch.ops.aten

GATES: dict[Any, int] = {
    aten.lstm.input: 4, aten.gru.input: 3, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1,
}  # fmt: skip


@follows(*GATES)
def _recurrent(follow: Follower, node: fx.Node) -> Any:
    x, state, weights, has_biases, layers, _, _, is_bidirectional, _ = arguments(node)
    directions = 2 if is_bidirectional else 1
    per_layer = 4 if has_biases else 2
    states = state if isinstance(state, (list, tuple)) else [state]
    if len(weights) != per_layer * layers * directions:
        return follow.unknown(node, "it is not known how channels pass through a projected LSTM")
    unit = _unit(follow, node, weights[1])
    for one in states:
        *batch, own = follow.of(one)
        for ids in batch:
            follow.freeze(node, ids, "they are samples, or layers, of a recurrent layer's state")
        unit = follow.join(node, unit, own)
    entering = follow.of(x)[-1]
    for layer in range(layers):
        start = layer * directions * per_layer
        for first in range(start, start + directions * per_layer, per_layer):
            _direction(follow, node, weights, range(first, first + per_layer), entering, unit)
        entering = _side_by_side(unit, directions)
    made = next((user for user in node.users if arguments(user)[1] == 0), None)
    if made is not None and not all(map(follow.is_weight, node.all_input_nodes)):
        follow.compute(made, rank_of(made) - 1, entering)
    outer = follow.of(x)[:-1]
    for ids in outer:
        follow.freeze(node, ids, "they are steps, or samples, of a sequence")
    output: Along = (*[None] * len(outer), entering)
    hidden: Along = (*[None] * (rank_of(states[0]) - 1), unit)
    return [output, *[hidden] * len(states)]


def _unit(follow: Follower, node: fx.Node, recurrent: fx.Node) -> Ids | None:
    """Return the hidden units: what a recurrent weight [gates · hidden, hidden] reads."""
    ids = follow.of(recurrent)[1]
    follow.mark(ids, Role.INPUT, weight=recurrent)
    return ids


def _direction(
    follow: Follower,
    node: fx.Node,
    weights: Any,
    places: range,
    entering: Ids | None,
    unit: Ids | None,
) -> None:
    """One direction of one layer: w_ih, w_hh and perhaps b_ih, b_hh stand at these places."""
    for number, place in enumerate(places):
        weight = weights[place]
        along = follow.of(weight)
        follow.mark(along[0], Role.OUTPUT if number < 2 else Role.SHIFT, weight=weight)
        follow.join(node, _of_unit(follow, node, along[0]), unit)
        if number < 2:
            follow.mark(along[1], Role.INPUT, weight=weight)
            follow.join(node, along[1], entering if number == 0 else unit)
            follow.contract(node, place, 1)


def _of_unit(follow: Follower, node: fx.Node, rows: Ids | None) -> Ids | None:
    """Tie the rows of a unit in every gate's block."""
    gates = GATES[node.target]
    if rows is None or len(rows) == gates:
        follow.freeze(node, rows, "a recurrent layer keeps its one unit")
        return None
    return follow.unite_across(rows, (gates, len(rows) // gates), 1)


def _side_by_side(unit: Ids | None, directions: int) -> Ids | None:
    return None if unit is None else np.tile(unit, directions)

