"""Convolutions by oneDNN's own library, channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.backends.eager.layout import channels_last_strides, no_room, positions
from fxopt.backends.eager.onednn import primitives
from fxopt.backends.eager.onednn.library import Library
from fxopt.backends.eager.onednn.prepared import Constants, Kernel, Prepared
from fxopt.backends.eager.onednn.primitives import Descriptor, Then


class Convolution(Prepared):
    """`then(conv(x, weight, bias))` for images [n, channels, …positions] of any sizes."""

    def __init__(
        self,
        api: Library,
        then: Then,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__(api, weight.dtype, then)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.outputs, inputs, *self.window = weight.shape
        self.inputs = inputs * groups
        grouped = weight if groups == 1 else weight.unflatten(0, (groups, -1))
        self._constants = Constants(api, grouped, bias)

    def obstacle(self, sizes: tuple[int, ...]) -> str | None:
        """Why these are no images for the weight."""
        if len(sizes) != len(self.window) + 2 or sizes[1] != self.inputs:
            return f"the weight is for images [n, {self.inputs}, …]"
        return no_room(self.result_sizes(sizes), self.window)

    def result_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the result."""
        geometry = (self.window, self.stride, self.padding, self.dilation)
        return (sizes[0], self.outputs, *positions(sizes[2:], *geometry))

    def strides_for(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return those of images whose channels lie last."""
        return channels_last_strides(x.shape)

    def make(self, sizes: tuple[int, ...], x_strides: tuple[int, ...]) -> Kernel:
        """Return the kernel for images of these sizes."""
        result_sizes = self.result_sizes(sizes)
        strides = channels_last_strides(result_sizes)
        x = Descriptor.strided(self.api, sizes, x_strides, self.dtype)
        result, other = (
            Descriptor.strided(self.api, result_sizes, strides, dtype)
            for dtype in (self.result_dtype, self.other_dtype)
        )
        primitive = primitives.convolution(
            self.api, x, self._constants.free, self._constants.bias_descriptor, result,
            self.stride, self.padding, self.dilation, self.then, other, self.grids,
        )  # fmt: skip
        return Kernel(
            primitive, x, x_strides, result, result_sizes, strides, self.result_dtype,
            {**self._constants.of(primitive), **self.grids.memories}, other, self.other_dtype,
        )  # fmt: skip
