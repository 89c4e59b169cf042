"""Maximum pooling by oneDNN's own library, channels last."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxopt.backends.eager.layout import channels_last_strides, no_room, positions
from fxopt.backends.eager.onednn import primitives
from fxopt.backends.eager.onednn.library import Library
from fxopt.backends.eager.onednn.prepared import Kernel, Prepared
from fxopt.backends.eager.onednn.primitives import Descriptor, Then


class MaxPool(Prepared):
    """The largest value of each window, for images [n, channels, …positions] of any sizes."""

    def __init__(
        self,
        api: Library,
        dtype: torch.dtype,
        window: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        last_may_end_outside: bool,
    ) -> None:
        super().__init__(api, dtype, Then())
        self.window, self.stride, self.padding, self.dilation = window, stride, padding, dilation
        self.last_may_end_outside = last_may_end_outside

    def obstacle(self, sizes: tuple[int, ...]) -> str | None:
        """Why these are no images for the window."""
        if len(sizes) != len(self.window) + 2:
            return f"the window {list(self.window)} is for images [n, channels, …positions]"
        return no_room(self.result_sizes(sizes), self.window)

    def result_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the sizes of the result."""
        geometry = (self.window, self.stride, self.padding, self.dilation)
        counts = positions(sizes[2:], *geometry, last_may_end_outside=self.last_may_end_outside)
        return (*sizes[:2], *counts)

    def strides_for(self, x: torch.Tensor) -> tuple[int, ...]:
        """Return those of images whose channels lie last."""
        return channels_last_strides(x.shape)

    def make(self, sizes: tuple[int, ...], x_strides: tuple[int, ...]) -> Kernel:
        """Return the kernel for images of these sizes."""
        result_sizes = self.result_sizes(sizes)
        strides = channels_last_strides(result_sizes)
        x = Descriptor.strided(self.api, sizes, x_strides, self.dtype)
        result = Descriptor.strided(self.api, result_sizes, strides, self.dtype)
        behind = [
            (count - 1) * step + apart * (width - 1) + 1 - size - pad
            for count, step, apart, width, size, pad in zip(
                result_sizes[2:], self.stride, self.dilation, self.window, sizes[2:],
                self.padding, strict=True,
            )
        ]  # fmt: skip
        primitive = primitives.max_pool(
            self.api, x, result, self.window, self.stride, self.padding, self.dilation, behind
        )
        return Kernel(primitive, x, x_strides, result, result_sizes, strides, self.dtype)
