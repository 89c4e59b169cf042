"""Data types: torch's, ONNX's and numpy's names for one another."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

ONNX_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float64: ir.DataType.DOUBLE,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
    torch.uint16: ir.DataType.UINT16,
    torch.uint32: ir.DataType.UINT32,
    torch.uint64: ir.DataType.UINT64,
    torch.bool: ir.DataType.BOOL,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
}

# What ONNX Runtime's CPU kernels compute instead of a type they do not know.
SHADOWS_ON_CPU = {torch.bfloat16: torch.float32}

INTEGERS = frozenset(
    {
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    }
)
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def array_of(value: Any, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Return a Python number as an array of `dtype` without dimensions."""
    array: np.ndarray[Any, Any] = tensor_of(torch.tensor(value, dtype=dtype), "").numpy()
    return array


def tensor_of(tensor: torch.Tensor, name: str) -> Any:
    """Return a torch tensor as an ONNX tensor over the same memory."""
    return tensor_adapters.TorchTensor(tensor.contiguous().cpu(), name=name)
