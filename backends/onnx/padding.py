"""Padding: constant, reflected, replicated, circular."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits

_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


@emits("pad", "constant_pad_nd")
def _pad(e: Emitter, x: Any, pad: list[Any], mode: Any = "constant", value: Any = None) -> Value:
    if not isinstance(mode, str):  # constant_pad_nd(x, pad, value)
        mode, value = "constant", mode
    return _padded(e, x, list(pad), mode, value or 0)


@emits("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
def _reflection(e: Emitter, x: Any, pad: list[Any]) -> Value:
    return _padded(e, x, list(pad), "reflect", 0)


@emits("replication_pad1d", "replication_pad2d", "replication_pad3d")
def _replication(e: Emitter, x: Any, pad: list[Any]) -> Value:
    return _padded(e, x, list(pad), "replicate", 0)


def _padded(e: Emitter, x: Any, pad: list[Any], mode: str, number: Any) -> Value:
    """PyTorch lists (before, after) from the last dimension on; ONNX all before, then all after."""
    rank, dtype = len(shape_of(x)), e.out_dtype
    if all(isinstance(width, int) and width == 0 for width in pad):
        return e.value(x)
    before: list[Any] = [0] * rank
    after: list[Any] = [0] * rank
    for index in range(len(pad) // 2):
        before[rank - 1 - index], after[rank - 1 - index] = pad[2 * index], pad[2 * index + 1]
    if mode == "circular" and e.opset < 19:
        return _circular(e, x, before, after)
    work = torch.int32 if dtype == torch.int16 else dtype
    fill = None
    if mode == "constant" and (isinstance(number, fx.Node) or number != 0):
        fill = e.number(number, work)
    padded = e.op("Pad", e.operand(x, work), [*before, *after], fill, mode=_MODES[mode])
    return e.cast(padded, work, dtype)


def _circular(e: Emitter, x: Any, before: list[Any], after: list[Any]) -> Value:
    value = e.value(x)
    for axis, (start, end) in enumerate(zip(before, after, strict=True)):
        if not isinstance(start, int) or not isinstance(end, int) or min(start, end) < 0:
            e.fail("circular padding of that width")
        parts = [value]
        if start:
            parts.insert(0, e.op("Slice", value, [-start], [2**63 - 1], [axis]))
        if end:
            parts.append(e.op("Slice", value, [0], [end], [axis]))
        if len(parts) > 1:
            value = e.op("Concat", *parts, axis=axis)
    return value
