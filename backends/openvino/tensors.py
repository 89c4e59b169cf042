"""Tensors: PyTorch's for OpenVINO, over the same memory, and OpenVINO's for PyTorch, copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fxopt.backends.openvino.engine import openvino
from fxopt.errors import ShapeError


def openvino_tensor(x: Any, largest: int) -> Any:
    """Return a tensor or number as OpenVINO's tensor, over the same memory where it lies densely.

    Whoever holds the result must hold `x`, too. Raises ShapeError for integers whose absolute value
    is beyond `largest`.
    """
    if not isinstance(x, torch.Tensor):
        x = torch.tensor(x, dtype=torch.float32 if isinstance(x, float) else torch.int64)
    if x.dtype in (torch.int64, torch.int32):
        _check_range(x, largest)
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:  # numpy has no such type
        bits = x.view(torch.int16).numpy(force=True).view(np.uint16)
        return openvino.Tensor(bits, openvino.Shape(list(x.shape)), openvino.Type.bf16)
    return openvino.Tensor(x.numpy(force=True), shared_memory=True)


def _check_range(x: torch.Tensor, largest: int) -> None:
    if x.numel() == 0:
        return
    low, high = map(int, torch.aminmax(x))
    if low < -largest or high > largest:
        raise ShapeError(
            f"An input holds the integer {low if low < -largest else high}, and with what this "
            f"model computes, OpenVINO is exact up to {largest}. Use backend='eager' for such."
        )


def torch_tensor(tensor: Any) -> torch.Tensor:
    """Return OpenVINO's tensor as a tensor in memory of its own."""
    data = tensor.data
    if tensor.element_type == openvino.Type.bf16:
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(data.copy())
