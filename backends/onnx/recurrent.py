"""Recurrent networks: LSTM, GRU and plain ones, of any number of layers and both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits

# The order in which ONNX keeps the gates, as positions in PyTorch's order.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


@emits("lstm.input")
def _lstm(
    e: Emitter,
    x: Any,
    state: list[Any],
    weights: list[Any],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Value]:
    return _network(
        e,
        "LSTM",
        x,
        state,
        weights,
        biases,
        layers,
        bidirectional,
        batch_first,
        random=train and dropout > 0 and layers > 1,
    )


@emits("gru.input", "rnn_tanh.input", "rnn_relu.input")
def _gru(
    e: Emitter,
    x: Any,
    state: Any,
    weights: list[Any],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[Value]:
    kind = "GRU" if "gru" in e.called else "RNN"
    return _network(
        e,
        kind,
        x,
        [state],
        weights,
        biases,
        layers,
        bidirectional,
        batch_first,
        random=train and dropout > 0 and layers > 1,
    )


def _network(
    e: Emitter,
    kind: str,
    x: Any,
    states: list[Any],
    weights: list[Any],
    biases: bool,
    layers: int,
    bidirectional: bool,
    batch_first: bool,
    *,
    random: bool,
) -> list[Value]:
    if random:
        e.fail("dropout between its layers is random", "Call model.eval() before compiling.")
    directions, width = (2 if bidirectional else 1), (4 if biases else 2)
    if len(weights) != layers * directions * width:
        e.fail("a recurrent network with projections (proj_size)")
    value: Any = e.op("Transpose", x, perm=[1, 0, 2]) if batch_first else e.value(x)
    ends: list[list[Value]] = [[] for _ in states]
    parts = [_parts(e, state, layers, directions) for state in states]
    for layer in range(layers):
        at = layer * directions * width
        rows = [weights[at + d * width : at + (d + 1) * width] for d in range(directions)]
        outputs = _layer(e, kind, value, [part[layer] for part in parts], rows, bidirectional)
        value = _joined(e, outputs[0], rows[0][1], directions)
        for end, final in zip(ends, outputs[1:], strict=True):
            end.append(final)
    if batch_first:
        value = e.op("Transpose", value, perm=[1, 0, 2])
    finals = [end[0] if layers == 1 else e.op("Concat", *end, axis=0) for end in ends]
    return [value, *finals]


def _parts(e: Emitter, state: Any, layers: int, directions: int) -> Sequence[Value]:
    if layers == 1:
        return [e.value(state)]
    return e.ops("Split", state, [directions] * layers, outputs=layers, axis=0)


def _layer(
    e: Emitter, kind: str, x: Value, states: list[Value], rows: list[Any], bidirectional: bool
) -> Sequence[Value]:
    gates = _GATES[kind]
    inner = [_stacked(e, [[row[i] for row in rows]], gates) for i in (0, 1)]
    bias = None
    if len(rows[0]) == 4:
        bias = _stacked(e, [[row[i] for row in rows] for i in (2, 3)], gates)
    directions = 2 if bidirectional else 1
    activation = None
    if kind == "RNN":
        name = "Relu" if "rnn_relu" in e.called else "Tanh"
        activation = [name] * directions
    return e.ops(
        kind,
        x,
        *inner,
        bias,
        None,
        *states,
        outputs=1 + len(states),
        hidden_size=shape_of(rows[0][1])[1],
        direction="bidirectional" if bidirectional else "forward",
        linear_before_reset=1 if kind == "GRU" else None,
        activations=activation,
    )


def _stacked(e: Emitter, parts: list[list[Any]], gates: tuple[int, ...]) -> Value:
    """Return the parts side by side, each the weights of all directions, gates in ONNX's order."""
    weights = [weight for part in parts for weight in part]
    if all(e.tensor(weight) is not None for weight in weights):

        def compute(*tensors: torch.Tensor) -> torch.Tensor:
            turned = [_in_order(tensor, gates) for tensor in tensors]
            width = len(parts[0])
            rows = [torch.stack(turned[i : i + width]) for i in range(0, len(turned), width)]
            return torch.cat(rows, dim=1)

        return e.weights(weights, "gates", compute)
    found = [
        _joined_on(e, [_reordered(e, weight, gates) for weight in part], axis=0) for part in parts
    ]
    return _joined_on(e, found, axis=1)


def _joined_on(e: Emitter, values: list[Value], axis: int) -> Value:
    return values[0] if len(values) == 1 else e.op("Concat", *values, axis=axis)


def _in_order(tensor: torch.Tensor, gates: tuple[int, ...]) -> torch.Tensor:
    blocks = tensor.chunk(len(gates), dim=0)
    return torch.cat([blocks[gate] for gate in gates], dim=0)


def _reordered(e: Emitter, weight: Any, gates: tuple[int, ...]) -> Value:
    size = shape_of(weight)[0] // len(gates)
    value = e.value(weight)
    if len(gates) > 1:
        blocks = e.ops("Split", value, [size] * len(gates), outputs=len(gates), axis=0)
        value = e.op("Concat", *(blocks[gate] for gate in gates), axis=0)
    return e.op("Unsqueeze", value, [0])


def _joined(e: Emitter, y: Value, weight: Any, directions: int) -> Value:
    """From [time, directions, batch, hidden] to [time, batch, directions · hidden]."""
    if directions == 1:
        return e.op("Squeeze", y, [1])
    turned = e.op("Transpose", y, perm=[0, 2, 1, 3])
    return e.op("Reshape", turned, [0, 0, directions * shape_of(weight)[1]])


# -- single cells ---------------------------------------------------------------------------------


def _gate_sums(e: Emitter, x: Any, weight: Any, bias: Any, parts: int) -> Sequence[Value]:
    total = e.op("Gemm", x, weight, bias, transB=1)
    return e.ops("Split", total, outputs=parts, axis=1, num_outputs=parts)


@emits("lstm_cell")
def _lstm_cell(
    e: Emitter, x: Any, state: list[Any], w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> list[Value]:
    ours = _gate_sums(e, x, w_ih, b_ih, 4)
    theirs = _gate_sums(e, state[0], w_hh, b_hh, 4)
    i, f, g, o = (e.op("Add", a, b) for a, b in zip(ours, theirs, strict=True))
    kept = e.op("Mul", e.op("Sigmoid", f), state[1])
    cell = e.op("Add", kept, e.op("Mul", e.op("Sigmoid", i), e.op("Tanh", g)))
    return [e.op("Mul", e.op("Sigmoid", o), e.op("Tanh", cell)), cell]


@emits("gru_cell")
def _gru_cell(
    e: Emitter, x: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Value:
    ours = _gate_sums(e, x, w_ih, b_ih, 3)
    theirs = _gate_sums(e, state, w_hh, b_hh, 3)
    reset, update = (e.op("Sigmoid", e.op("Add", ours[k], theirs[k])) for k in (0, 1))
    new = e.op("Tanh", e.op("Add", ours[2], e.op("Mul", reset, theirs[2])))
    return e.op("Add", new, e.op("Mul", update, e.op("Sub", state, new)))


@emits("rnn_tanh_cell", "rnn_relu_cell")
def _rnn_cell(
    e: Emitter, x: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
) -> Value:
    ours = e.op("Gemm", x, w_ih, b_ih, transB=1)
    total = e.op("Add", ours, e.op("Gemm", state, w_hh, b_hh, transB=1))
    return e.op("Relu" if "relu" in e.called else "Tanh", total)
