"""How tensors lie in memory, and what windows that move over them leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def contiguous_strides(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    strides: list[Any] = []
    step: Any = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def laid_out(value: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """Return a tensor with these strides: itself, or a copy. What has one index has any stride."""
    steps = zip(value.shape, value.stride(), strides, strict=True)
    if all(size < 2 or step == wanted for size, step, wanted in steps):
        return value
    own = torch.empty_strided(
        value.shape, tuple(strides), dtype=value.dtype, device=value.device
    )
    return own.copy_(value)


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor [n, channels, …] whose channels lie next to each other."""
    batch, channels, *positions = shape
    first, *others, last = contiguous_strides((batch, *positions, channels))
    return (first, last, *others)


def positions(
    sizes: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    last_may_end_outside: bool = False,
) -> tuple[int, ...]:
    """Return how many places a window takes along each dimension of an image.

    `last_may_end_outside` is the `ceil_mode` of PyTorch's pools: a window that begins inside of the
    image, or of the padding in front of it, counts even where it ends behind the padding.
    """
    found = []
    for size, width, step, pad, apart in zip(
        sizes, window, stride, padding, dilation, strict=True
    ):
        room = size + 2 * pad - apart * (width - 1) - 1
        count = room // step + 1
        if last_may_end_outside and room % step and count * step < size + pad:
            count += 1
        found.append(count)
    return tuple(found)


def no_room(sizes: Sequence[int], window: Sequence[int]) -> str | None:
    """Why a result [n, channels, …positions] of these sizes is none, in words."""
    fits = all(count > 0 for count in sizes[2:])
    return None if fits else f"a window {list(window)} does not fit into the image"
