"""Scaled dot-product attention, as two products and a softmax."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


@emits("scaled_dot_product_attention")
def _attention(
    e: Emitter,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: float,
    causal: bool,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """softmax(scale·q·kᵀ + mask)·v: measured as fast as opset 23's Attention, and runs anywhere."""
    if dropout:
        e.fail("attention with dropout is random", "Call model.eval() before compiling.")
    rank, dtype = len(shape_of(query)), e.out_dtype
    keys, values = e.value(key), e.value(value)
    if enable_gqa:
        repeats = _heads(e, query) // _heads(e, key)
        keys, values = _repeated(e, key, repeats), _repeated(e, value, repeats)
    turn = [*range(rank - 2), rank - 1, rank - 2]
    scores = e.op("MatMul", _scaled(e, query, scale), e.op("Transpose", keys, perm=turn))
    if causal:
        scores = e.op("Add", scores, _causal(e, query, key))
    if mask is not None:
        if mask.meta["val"].dtype == torch.bool:
            mask = _where_allowed(e, mask, dtype)
            weights = e.op("Softmax", e.op("Add", scores, mask), axis=-1)
            return e.op("MatMul", _no_nan(e, weights), values)
        scores = e.op("Add", scores, e.operand(mask, dtype))
    return e.op("MatMul", e.op("Softmax", scores, axis=-1), values)


def _scaled(e: Emitter, query: Any, scale: float | None) -> Value:
    if scale is None:
        size = shape_of(query)[-1]
        if not isinstance(size, int):
            e.fail("attention over heads of a symbolic size needs an explicit scale")
        scale = 1.0 / math.sqrt(size)
    return e.op("Mul", query, e.number(scale, e.out_dtype)) if scale != 1 else e.value(query)


def _heads(e: Emitter, x: Any) -> int:
    heads = shape_of(x)[-3]
    if not isinstance(heads, int):
        e.fail("grouped attention with a symbolic number of heads")
    return int(heads)


def _repeated(e: Emitter, x: Any, repeats: int) -> Value:
    """Repeat each head `repeats` times."""
    source = shape_of(x)
    if repeats == 1:
        return e.value(x)
    rank = len(source)
    spread = e.op("Unsqueeze", x, [rank - 2])
    wide = e.op("Expand", spread, [repeats if axis == rank - 2 else 1 for axis in range(rank + 1)])
    if rank == 4:
        return e.op("Reshape", wide, [0, source[1] * repeats, -1, source[3]])
    return e.op(
        "Reshape", wide, [*e.shape_list(x)[:-3], source[-3] * repeats, *e.shape_list(x)[-2:]]
    )


def _causal(e: Emitter, query: Any, key: Any) -> Value:
    """−∞ above the diagonal that starts at the top left."""
    rows, columns = shape_of(query)[-2], shape_of(key)[-2]
    dtype = e.out_dtype
    if isinstance(rows, int) and isinstance(columns, int):
        matrix = torch.full((rows, columns), float("-inf"), dtype=dtype)
        return e.constant(torch.triu(matrix, 1))
    shape = e.sizes([e.size(query, -2), e.size(key, -2)])
    full = e.op("Expand", e.number(float("-inf"), dtype), shape)
    return e.op("Trilu", full, e.number(1, torch.int64), upper=1)


def _where_allowed(e: Emitter, mask: Any, dtype: torch.dtype) -> Value:
    zero, never = e.number(0.0, dtype), e.number(float("-inf"), dtype)
    return e.op("Where", mask, zero, never)


def _no_nan(e: Emitter, weights: Value) -> Value:
    """A query that may attend to nothing gets zeros, as in PyTorch."""
    return e.op("Where", e.op("IsNaN", weights), e.number(0.0, e.out_dtype), weights)
