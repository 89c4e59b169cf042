"""Linear layers by oneDNN's own library."""

from __future__ import annotations

import math

import torch

from fxopt.backends.eager.layout import contiguous_strides
from fxopt.backends.eager.onednn import primitives
from fxopt.backends.eager.onednn.library import Library
from fxopt.backends.eager.onednn.prepared import Constants, Kernel, Prepared
from fxopt.backends.eager.onednn.primitives import Descriptor, Then


class Linear(Prepared):
    """`then(x · weightᵀ + bias)` for x […, inputs] of any sizes."""

    def __init__(
        self, api: Library, then: Then, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        super().__init__(api, weight.dtype, then)
        self.outputs, self.inputs = weight.shape
        self._constants = Constants(api, weight.t(), None if bias is None else bias[None])

    def obstacle(self, sizes: tuple[int, ...]) -> str | None:
        """Why these are no rows for the weight."""
        if not sizes or sizes[-1] != self.inputs:
            return f"the weight is for rows of {self.inputs}"
        return "rows of 0 have no products" if self.inputs == 0 else None

    def result_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the result."""
        return (*sizes[:-1], self.outputs)

    def strides_for(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return those of rows that lie behind each other."""
        return contiguous_strides(x.shape)

    def make(self, sizes: tuple[int, ...], x_strides: tuple[int, ...]) -> Kernel:
        """Return the kernel for inputs of these sizes."""
        rows = math.prod(sizes[:-1])
        x, result, other = (
            Descriptor.strided(self.api, (rows, width), (width, 1), dtype)
            for width, dtype in (
                (self.inputs, self.dtype), (self.outputs, self.result_dtype),
                (self.outputs, self.other_dtype),
            )
        )  # fmt: skip
        primitive = primitives.matrix_product(
            self.api, x, self._constants.free, self._constants.bias_descriptor, result, self.then,
            other, self.grids,
        )  # fmt: skip
        result_sizes = self.result_sizes(sizes)
        return Kernel(
            primitive, x, x_strides, result, result_sizes, contiguous_strides(result_sizes),
            self.result_dtype, {**self._constants.of(primitive), **self.grids.memories}, other,
            self.other_dtype,
        )  # fmt: skip
