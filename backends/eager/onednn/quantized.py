"""Layers that multiply bytes, and the way from floats to bytes and back.

    y = s · w̄ · (x̄ − z) + b        s: the input's scale times the weight's, per output channel

x̄ and w̄ are bytes, and so may be what is added to y, and the result. Where the former is, all is
counted in its scale, so that nothing has to be multiplied before the addition; that is right for
what may follow a sum: nothing, or relu.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fxopt.backends.eager.onednn import primitives
from fxopt.backends.eager.onednn.convolution import Convolution
from fxopt.backends.eager.onednn.grids import Grid, vector, zero_point_of
from fxopt.backends.eager.onednn.library import Library
from fxopt.backends.eager.onednn.linear import Linear
from fxopt.backends.eager.onednn.prepared import Kernel, Prepared
from fxopt.backends.eager.onednn.primitives import (
    SCALES,
    SOURCE,
    TARGET,
    WEIGHTS,
    Descriptor,
    Grids,
    Then,
)


@dataclass(frozen=True)
class Scheme:
    """Which numbers the bytes of a layer stand for; None for floats. `other` is what is added."""

    x: Grid
    weight_scale: torch.Tensor
    result: Grid | None
    other: Grid | None

    @property
    def unit(self) -> float:
        """In what the kernel counts when it adds."""
        return 1.0 if self.other is None else self.other.scale

    def then(self, activation: str, scalars: Sequence[float], other: str) -> Then:
        """Return what the kernel does to its result."""
        bounds, factor = None, self.unit
        if self.result is not None:
            factor = 1.0  # the result's scale is relative to the unit
            if self.result.bounds is not None:
                low, high = self.result.bounds
                bounds = (low / self.unit, high / self.unit)
        return Then(activation, tuple(scalars), other, factor, bounds)

    def bias(self, bias: torch.Tensor | None, outputs: int) -> torch.Tensor | None:
        """Return the bias in units, with the zero point of what is added taken off."""
        shift = 0 if self.other is None else self.other.zero_point
        if bias is None:
            return torch.full((outputs,), -float(shift)) if shift else None
        return bias.detach() / self.unit - shift

    def apply(self, layer: Prepared, outputs: int, weight_mask: int) -> None:
        """Tell a layer the dtypes of its values, and its kernels the scales."""
        api, wide = layer.api, torch.float32
        layer.dtype = self.x.dtype
        layer.result_dtype = wide if self.result is None else self.result.dtype
        layer.other_dtype = wide if self.other is None else self.other.dtype
        scale = self.weight_scale.detach().reshape(-1).expand(outputs) * (self.x.scale / self.unit)
        memories = {SCALES + WEIGHTS: vector(api, scale.contiguous())}
        memories |= zero_point_of(api, SOURCE, self.x.zero_point)
        if self.result is not None:
            memories |= self.result.memories(api, TARGET, self.unit)
        layer.grids = Grids(memories, weight_mask)


class QuantizedConvolution(Convolution):
    """A convolution of bytes, for images of any sizes."""

    def __init__(
        self,
        api: Library,
        scheme: Scheme,
        then: Then,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        outputs = weight.shape[0]
        shifted = scheme.bias(bias, outputs)
        super().__init__(api, then, weight, shifted, stride, padding, dilation, groups)
        # a weight of groups has the outputs in its first two dimensions
        scheme.apply(self, outputs, weight_mask=0b1 if groups == 1 else 0b11)


class QuantizedLinear(Linear):
    """A linear layer on bytes, for inputs of any sizes."""

    def __init__(
        self,
        api: Library,
        scheme: Scheme,
        then: Then,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        outputs = weight.shape[0]
        super().__init__(api, then, weight, scheme.bias(bias, outputs))
        scheme.apply(self, outputs, weight_mask=0b10)


class Conversion(Prepared):
    """The same numbers in another dtype, element by element, in whatever layout they lie."""

    def __init__(
        self, api: Library, dtype: torch.dtype, result_dtype: torch.dtype, grids: Grids
    ) -> None:
        super().__init__(api, dtype, Then())
        self.result_dtype, self.grids = result_dtype, grids

    def obstacle(self, sizes: tuple[int, ...]) -> str | None:
        """Inputs of all sizes will do."""
        return None

    def result_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the same sizes."""
        return sizes

    def strides_for(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return the tensor's own, unless there are gaps between its elements."""
        return torch.empty_like(x, device="meta").stride()

    def make(self, sizes: tuple[int, ...], x_strides: tuple[int, ...]) -> Kernel:
        """Return the kernel for as many elements, whatever their order."""
        count = (math.prod(sizes),)
        x, result = (
            Descriptor.strided(self.api, count, (1,), dtype)
            for dtype in (self.dtype, self.result_dtype)
        )
        primitive = primitives.conversion(x, result, self.grids)
        return Kernel(
            primitive, x, x_strides, result, sizes, x_strides, self.result_dtype,
            dict(self.grids.memories),
        )  # fmt: skip


class Quantize(Conversion):
    """Floats become the nearest integers of a grid."""

    def __init__(self, api: Library, grid: Grid) -> None:
        super().__init__(api, torch.float32, grid.dtype, Grids(grid.memories(api, TARGET)))
        self.limits = None if grid.bounds is None else (grid.low, grid.high)

    def __call__(self, x: torch.Tensor, *other: torch.Tensor) -> torch.Tensor:
        """Return the integers, in memory of their own."""
        result = super().__call__(x)
        return result if self.limits is None else result.clamp_(*self.limits)


class Dequantize(Conversion):
    """Integers of a grid become the floats that they stand for."""

    def __init__(self, api: Library, grid: Grid) -> None:
        super().__init__(api, grid.dtype, torch.float32, Grids(grid.memories(api, SOURCE)))
