"""Formulas of recurrent layers."""

from __future__ import annotations

import math
from typing import Any

from fxopt.cost.call import Call, Size
from fxopt.cost.formula import Work, formula

# Operations per hidden unit and step: sums of the two products (one per gate), activations, state.
_UNIT = {
    "lstm": 4 + 3 * 4 + 2 + 4,  # three sigmoids, two tanh; f·c + i·g, o·tanh(c)
    "gru": 3 + 2 * 4 + 1 + 4,  # two sigmoids, one tanh; r·h, (1 − z)·n + z·h in three
    "rnn_tanh": 1 + 1,
    "rnn_relu": 1 + 1,
}
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@formula("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent_layers(call: Call) -> Work:
    """Steps × batch × the elements of all weight matrices. Operations per hidden unit and step:
    LSTM 22, GRU 16, plain 2, and two more per gate where there are biases.
    """
    weights = [call.sizes(weight) for weight in call["params"]]
    steps = _positions(call)
    return _recurrent(call, call.name, weights, steps)


@formula("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent_cell(call: Call) -> Work:
    """As one step of the layer."""
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    weights = [call.sizes(call[name]) for name in names if call[name] is not None]
    return _recurrent(call, call.name.removesuffix("_cell"), weights, call.shape("input")[0])


def _recurrent(call: Call, kind: str, weights: list[Any], steps: Size) -> Work:
    matrices = [shape for shape in weights if len(shape) == 2]
    biases = sum(shape[0] for shape in weights if len(shape) == 1)
    recurrent = matrices[1 :: 3 if _projected(call) else 2]
    units = sum(shape[0] // _GATES[kind] for shape in recurrent)
    macs = steps * sum(map(math.prod, matrices))
    return Work(macs, steps * (units * _UNIT[kind] + biases))


def _projected(call: Call) -> bool:
    """Whether an LSTM has a third matrix, which makes its hidden state smaller."""
    if call.name != "lstm":
        return False
    directions = 2 if call["bidirectional"] else 1
    per_layer = len(call["params"]) // (directions * call["num_layers"])
    return bool(per_layer in (3, 5))


def _positions(call: Call) -> Size:
    """Return steps × batch: those of a packed sequence are its data's rows."""
    data = call["data"] if call["batch_sizes"] is not None else call["input"]
    return math.prod(call.sizes(data)[:-1])
