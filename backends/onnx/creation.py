"""Tensors made from numbers: filled, ranges, identities, indices of triangles."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.dtypes import FLOATS
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits

HELD = 4096  # up to this many elements are stored; more are computed when the model loads


def _filled(e: Emitter, number: Value, shape: list[Any]) -> Value:
    return e.op("Expand", number, shape) if shape else number


def _given(e: Emitter, sizes: Any) -> list[Any]:
    """Return the result's sizes: integers, and nodes for symbolic ones."""
    return [
        known if isinstance(known, int) else given
        for known, given in zip(e.out_shape, sizes, strict=True)
    ]


@emits("full", "empty.memory_format", "zeros", "ones", "new_empty", "new_zeros", "new_ones")
def _full(e: Emitter, *args: Any, **named: Any) -> Value:
    name = e.called.split(".")[0]
    sizes = args[1] if name.startswith("new_") else args[0]
    number = args[1] if name == "full" else int("ones" in name)
    return _of_shape(e, number, _given(e, sizes))


@emits("new_full")
def _new_full(e: Emitter, x: Any, sizes: Any, number: Any, **named: Any) -> Value:
    return _of_shape(e, number, _given(e, sizes))


def _of_shape(e: Emitter, number: Any, shape: list[Any]) -> Value:
    dtype = e.out_dtype
    if all(isinstance(size, int) for size in shape) and not isinstance(number, torch.fx.Node):
        if int(np.prod(shape, dtype=np.int64)) <= 64:
            return e.constant(torch.full(shape, number, dtype=dtype))
    return _filled(e, e.number(number, dtype), shape)


@emits("full_like", "empty_like", "zeros_like", "ones_like")
def _full_like(e: Emitter, x: Any, number: Any = None, **named: Any) -> Value:
    if number is None:
        number = int("ones" in e.called)
    if all(isinstance(size, int) for size in e.out_shape):
        return _of_shape(e, number, e.out_shape)
    return e.op("Expand", e.number(number, e.out_dtype), e.op("Shape", x))


@emits("fill.Tensor", "fill.Scalar")
def _fill(e: Emitter, x: Any, value: Any) -> Value:
    return e.op("Expand", e.operand(value, e.out_dtype), _shape_value(e, x))


def _shape_value(e: Emitter, x: Any) -> Any:
    shape = shape_of(x)
    return shape if all(isinstance(size, int) for size in shape) else e.op("Shape", x)


@emits("copy", "copy_")
def _copy(e: Emitter, x: Any, source: Any, non_blocking: bool = False) -> Value:
    value = e.operand(source, e.out_dtype)
    if [str(s) for s in shape_of(x)] == [str(s) for s in shape_of(source)]:
        return value
    return e.op("Expand", value, _shape_value(e, x))


@emits("arange.start_step", "arange", "arange.start")
def _arange(e: Emitter, *given: Any, **named: Any) -> Value:
    start, end, step = {1: (0, *given, 1), 2: (*given, 1), 3: given}[len(given)]
    dtype = e.out_dtype
    if not any(isinstance(x, torch.fx.Node) for x in (start, end, step)):
        values = torch.arange(start, end, step, dtype=dtype)
        if values.numel() <= HELD:
            return e.constant(values)
    floats = any(_is_float(x) for x in (start, end, step))
    work = torch.float64 if floats else torch.int64  # counted exactly, then converted
    numbers = [e.number(x, work) for x in (start, end, step)]
    return e.cast(e.op("Range", *numbers), work, dtype)


def _is_float(x: Any) -> bool:
    value = x.meta["val"] if isinstance(x, torch.fx.Node) else x
    return isinstance(value, (float, torch.SymFloat))


@emits("linspace", "logspace")
def _linspace(e: Emitter, start: Any, end: Any, steps: Any, *rest: Any, **named: Any) -> Value:
    if any(isinstance(x, torch.fx.Node) for x in (start, end, steps)):
        e.fail("linspace with symbolic limits")
    fn = torch.logspace if "logspace" in e.called else torch.linspace
    return e.constant(fn(start, end, steps, *rest, dtype=e.out_dtype))


@emits("eye", "eye.m")
def _eye(e: Emitter, rows: Any, columns: Any = None, **named: Any) -> Value:
    columns = rows if columns is None else columns
    if isinstance(rows, int) and isinstance(columns, int) and rows * columns <= HELD:
        return e.constant(torch.eye(rows, columns, dtype=e.out_dtype))
    zeros = e.op("Expand", e.number(0.0, torch.float32), [rows, columns])
    return e.cast(e.op("EyeLike", zeros), torch.float32, e.out_dtype)


@emits("tril_indices", "triu_indices")
def _triangle_indices(e: Emitter, rows: Any, columns: Any, offset: Any = 0, **named: Any) -> Value:
    if not all(isinstance(x, int) for x in (rows, columns, offset)):
        e.fail("the indices of a triangle of symbolic size")
    fn = torch.tril_indices if "tril" in e.called else torch.triu_indices
    return e.constant(fn(rows, columns, offset, dtype=e.out_dtype))


@emits("tril", "triu")
def _triangle(e: Emitter, x: Any, diagonal: Any = 0) -> Value:
    dtype = e.out_dtype
    known = FLOATS | {torch.int32, torch.int64, torch.bool}
    work = dtype if dtype in known else torch.int32
    offset = None if diagonal == 0 else e.number(diagonal, torch.int64)
    upper = 1 if "triu" in e.called else 0
    return e.cast(e.op("Trilu", e.operand(x, work), offset, upper=upper), work, dtype)


@emits(
    *(
        f"{name}"
        for name in (
            "rand",
            "randn",
            "rand_like",
            "randn_like",
            "randperm",
            "bernoulli",
            "multinomial",
            "randint",
            "randint.low",
            "bernoulli.p",
            "randint_like",
            "normal_functional",
            "rrelu_with_noise",
        )
    )
)
def _random(e: Emitter, *args: Any, **named: Any) -> Value:
    e.fail(
        "it is random, and ONNX's random numbers are not PyTorch's",
        "Make the noise an input of the model, or use backend='eager'.",
    )
