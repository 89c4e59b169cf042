"""Integers that stand for numbers, and what kernels need to know of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.backends.eager.onednn.library import Library
from fxopt.backends.eager.onednn.primitives import SCALES, ZERO_POINTS, Descriptor, Memory


@dataclass(frozen=True)
class Grid:
    """Integers of a dtype between two bounds: number = (integer − zero point) · scale."""

    dtype: torch.dtype
    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, scale: torch.Tensor, zero_point: torch.Tensor, low: int, high: int) -> Grid:
        """Return the grid that `fake_quantize` rounds to with these arguments."""
        return cls(bytes_for(low, high), float(scale), int(zero_point), low, high)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The smallest and the largest number; None where the dtype's own bounds do."""
        whole = torch.iinfo(self.dtype)
        if (self.low, self.high) == (whole.min, whole.max):
            return None
        return (
            (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale
        )  # fmt: skip

    def memories(self, api: Library, argument: int, unit: float = 1.0) -> dict[int, Memory]:
        """Return scale and zero point as arguments of kernels that count in `unit`."""
        found = {SCALES + argument: vector(api, torch.tensor([self.scale / unit]))}
        return found | zero_point_of(api, argument, self.zero_point)


def bytes_for(low: int, high: int) -> torch.dtype:
    """Return the dtype of bytes that holds integers from `low` to `high`."""
    return torch.uint8 if low >= 0 else torch.int8


def are_bytes(low: int, high: int) -> bool:
    """Whether there is a dtype of bytes for integers from `low` to `high`."""
    whole = torch.iinfo(bytes_for(low, high))
    return whole.min <= low < high <= whole.max


def zero_point_of(api: Library, argument: int, zero_point: int) -> dict[int, Memory]:
    """Return a zero point as an argument of kernels; nothing for 0."""
    if zero_point == 0:
        return {}
    tensor = torch.tensor([zero_point], dtype=torch.int32)
    return {ZERO_POINTS + argument: vector(api, tensor)}


def vector(api: Library, tensor: torch.Tensor) -> Memory:
    """Return the memory of a tensor of one dimension."""
    return Memory(Descriptor.strided(api, tensor.shape, (1,), tensor.dtype), tensor)
