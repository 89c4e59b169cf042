"""A histogram of one value over many batches, in constant memory.

It has bins of equal width over [0, L), or over [−L, L) once a number was negative, where L is the
smallest power of two above every magnitude. As L doubles, or the negative half is added, each two
neighbouring bins become one. Edges are whole multiples of the width, a power of two, and so is 0:
both the bin of a number, ⌊x / width⌋, and the merging are exact. Hence counts depend on which
numbers came, never on their order or how they were cut into batches.

Zeros are counted by themselves: 0 is exact in every quantization, and what ReLU leaves would hide
everything else in its bin.
"""

from __future__ import annotations

import math
from array import array

import torch

from fxopt.errors import check_option
from fxopt.quantization.errors import CalibrationError

_CHUNK = 2**17  # numbers at a time: they and their bins stay in a core's cache
_SMALLEST_EXPONENT = -110  # of L: the width and its reciprocal stay normal float32 numbers


class Histogram:
    """Counts of the numbers seen, with their exact extremes: see the module's text.

    `counts` (int64) are those of the bins, without the `zeros`; `count` is that of all numbers.
    `low` and `high` are the extremes, 0.0 as long as nothing was seen. `lows` and `highs` are those
    of each batch, in the order in which they came: 8 bytes for a batch.
    """

    def __init__(self, bins: int = 2048) -> None:
        good = isinstance(bins, int) and bins >= 4 and bins.bit_count() == 1
        check_option("Histogram", good, "bins", bins, "a power of two from 4 on")
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.zeros = 0
        self.count = 0
        self.low = 0.0
        self.high = 0.0
        self.lows = array("f")
        self.highs = array("f")
        self._exponent: int | None = None  # of L, once a number was not 0
        self._two_sided = False

    def add(self, values: torch.Tensor) -> None:
        """Count a batch: a float tensor of any dtype and shape; none of it is kept.

        Numbers are counted as float32. Raise CalibrationError, and count nothing, where one is NaN
        or infinite, or the dtype is no float.
        """
        flat = _flat(values)
        if not flat.numel():
            return
        low, high = torch.stack(torch.aminmax(flat)).float().tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"Calibration met a number that is NaN, infinite or beyond float32 (the smallest "
                f"is {low}, the largest {high}); look for what computes it, or leave the batch out."
            )
        self._grow(low, high)
        for chunk in flat.split(_CHUNK):
            self._count(chunk.float())
        self.low = min(self.low, low) if self.count else low
        self.high = max(self.high, high) if self.count else high
        self.count += flat.numel()
        self.lows.append(low)
        self.highs.append(high)

    @property
    def width(self) -> float:
        """The width of a bin, a power of two; 0.0 as long as every number was 0."""
        if self._exponent is None:
            return 0.0
        return 2.0**self._exponent / (self.bins - self._first)

    def edges(self) -> torch.Tensor:
        """Return the bins' edges, float64, [bins + 1]: bin i holds edges[i] ≤ x < edges[i + 1]."""
        first = -self._first
        return torch.arange(first, first + self.bins + 1, dtype=torch.float64) * self.width

    def magnitudes(self) -> torch.Tensor:
        """Return counts of |x| in bins of the same width from 0 on, zeros left out."""
        if not self._two_sided:
            return self.counts.clone()
        half = self.bins // 2
        return self.counts[half:] + self.counts[:half].flip(0)

    @property
    def _first(self) -> int:
        """How many bins lie below 0."""
        return self.bins // 2 if self._two_sided else 0

    def _count(self, chunk: torch.Tensor) -> None:
        """Count numbers that lie within the range."""
        zeros = chunk.numel() - int(torch.count_nonzero(chunk))
        self.zeros += zeros
        if self._exponent is None:
            return
        places = (chunk * (1 / self.width)).floor_().to(torch.int32).add_(self._first)
        counts = torch.bincount(places, minlength=self.bins).cpu()
        counts[self._first] -= zeros
        self.counts += counts

    def _grow(self, low: float, high: float) -> None:
        """Widen the range until it contains both numbers."""
        if low < 0 and not self._two_sided:
            self._merge(before=self.bins // 2)
            self._two_sided = True
        largest = max(-low, high)
        if not largest:
            return
        exponent = max(math.frexp(largest)[1], _SMALLEST_EXPONENT)
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            self._merge(before=self.bins // 4 if self._two_sided else 0)
            self._exponent += 1

    def _merge(self, before: int) -> None:
        """Make each two neighbouring bins one, and put `before` empty ones in front."""
        counts = torch.zeros_like(self.counts)
        counts[before : before + self.bins // 2] = self.counts.view(-1, 2).sum(1)
        self.counts = counts


def _flat(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor's numbers in a row, in the order of memory, which spares most copies."""
    if not values.is_floating_point():
        raise CalibrationError(
            f"Calibration was given numbers of dtype {values.dtype}; only floats are quantized, so "
            "leave this value out."
        )
    values = values.detach()
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    flat = values.permute(order).reshape(-1)
    if flat.element_size() == 1:  # PyTorch does not compare 8-bit floats
        return flat.float()
    return flat
