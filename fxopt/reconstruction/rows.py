"""What a layer reads and returns at some positions: rows of numbers, by its groups.

A convolution or linear layer is one matrix per group, applied at every position of its output:

    y[position, group, :] = weight[group] · x[position, group, :] + bias[group]

where x holds, for each input channel of the group, the values under the taps of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fxopt.kernels import Kernel


def read(x: torch.Tensor, kernel: Kernel, positions: torch.Tensor) -> torch.Tensor:
    """Return what the layer reads at positions of its output: [positions, groups, inputs · taps].

    `positions` count the output's [batch, *space], as if flat; `x` is what the layer is given.
    """
    space = len(kernel.axes)
    images = _channels_last(x, space)
    if not space:
        return images[positions].unflatten(1, (kernel.groups, -1))
    padding = [size for axis in reversed(kernel.axes) for size in (axis.padding, axis.padding)]
    padded = F.pad(images, (0, 0, *padding))
    outputs = [
        (size - axis.dilation * (axis.taps - 1) - 1) // axis.stride + 1
        for size, axis in zip(padded.shape[1:-1], kernel.axes, strict=True)
    ]
    places = list(torch.unravel_index(positions, (len(images), *outputs)))
    index = [_along(places[0], 0, space)]
    for number, (axis, place) in enumerate(zip(kernel.axes, places[1:], strict=True)):
        taps = torch.arange(axis.taps, device=x.device) * axis.dilation
        index.append(_along(place[:, None] * axis.stride + taps, number, space))
    found = padded[tuple(index)]  # [positions, *taps, channels]
    return found.movedim(-1, 1).flatten(1).unflatten(1, (kernel.groups, -1))


def returned(y: torch.Tensor, groups: int, space: int, positions: torch.Tensor) -> torch.Tensor:
    """Return what the layer returned at positions: [positions, groups, outputs of a group]."""
    return _channels_last(y, space).flatten(0, -2)[positions].unflatten(1, (groups, -1))


def position_count(shape: Sequence[int], space: int) -> int:
    """Return at how many positions a layer computes, from the shape of its output."""
    return math.prod(shape) // shape[-1 - space]


def _channels_last(x: torch.Tensor, space: int) -> torch.Tensor:
    """Return [batch, *space, channels] of a tensor with any leading dimensions, or none."""
    lead = x.shape[: x.dim() - space - 1]
    return x.reshape(math.prod(lead), *x.shape[len(lead) :]).movedim(1, -1)


def _along(index: torch.Tensor, axis: int, space: int) -> torch.Tensor:
    """Return an index [positions] or [positions, taps] such that those of all axes broadcast."""
    shape = [len(index)] + [1] * space
    if index.dim() == 2:
        shape[1 + axis] = index.shape[1]
    return index.reshape(shape)
