"""The operators that fake-quantized graphs are lowered to: what is computed on bytes.

    quantize(x, s, z, qmin, qmax)  = clamp(round(x / s) + z, qmin, qmax)       bytes
    dequantize(x̄, s, z, …)         = (x̄ − z) · s                               float32
    quantized_convolution, quantized_linear, and with `_add` what is added before the activation

A layer's result is bytes where it is given a scale, float32 otherwise; so is what is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

from fxopt.backends.eager.layout import channels_last_strides
from fxopt.backends.eager.onednn.grids import Grid, bytes_for
from fxopt.backends.eager.onednn.operators import Preparation, define, here
from fxopt.backends.eager.onednn.prepared import Prepared
from fxopt.backends.eager.onednn.quantized import (
    Dequantize,
    Quantize,
    QuantizedConvolution,
    QuantizedLinear,
    Scheme,
)

_GRID = "Tensor{0} {1}scale, Tensor{0} {1}zero_point, int {1}qmin, int {1}qmax"
_X = _GRID.format("", "")
_OTHERS = f"str activation, float[] scalars, {_GRID.format('?', 'result_')}"


def _grid(*args: Any) -> Grid | None:
    """Return the grid that four arguments are; None where the values are floats."""
    return None if args[0] is None else Grid.of(*args)


def _layer(kind: Callable[..., Prepared], count: int, other: str) -> Callable[..., Prepared]:
    """Return what prepares a layer of `count` constants."""

    def make(*args: Any) -> Prepared:
        x, args = Grid.of(*args[:4]), args[4:]
        (weight, weight_scale, *layer), args = args[:count], args[count:]
        (activation, scalars), args = args[:2], args[2:]
        scheme = Scheme(x, weight_scale, _grid(*args[:4]), _grid(*args[4:]) if other else None)
        then = scheme.then(activation, scalars, "read" if other else "none")
        return kind(here(), scheme, then, weight, *layer)

    return make


def _define_layer(
    name: str, kind: Callable[..., Prepared], constants: str, fake: Callable[..., torch.Tensor]
) -> tuple[OpOverload, OpOverload]:
    """Register a layer with an activation behind it: alone, and added to `other`."""
    schema = f"{_X}, {constants}, {_OTHERS}"
    count = constants.count(",") + 1
    at = 4 + count + 2  # where the result's grid begins

    def shaped(x: torch.Tensor, *args: Any) -> torch.Tensor:
        weight, _, *layer = args[4 : 4 + count]
        dtype = torch.float32 if args[at] is None else bytes_for(*args[at + 2 : at + 4])
        return fake(x.float(), weight.float(), *layer).to(dtype)

    return (
        define(
            name, f"(Tensor x, {schema}) -> Tensor", Preparation(_layer(kind, count, "")), shaped
        ),
        define(
            f"{name}_add",
            f"(Tensor x, Tensor other, {schema}, {_GRID.format('?', 'other_')}) -> Tensor",
            Preparation(_layer(kind, count, "read"), 2),
            lambda x, other, *constants: shaped(x, *constants),
        ),
    )  # fmt: skip


def _fake_convolution(x: Any, weight: Any, bias: Any, *geometry: Any) -> torch.Tensor:
    convolve = torch.conv2d if x.dim() == 4 else torch.conv3d
    result = convolve(x, weight, bias, *geometry)
    return torch.empty_strided(result.shape, channels_last_strides(result.shape), device=x.device)


def _by_definition(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, low: int, high: int
) -> torch.Tensor:
    """Return the integers for scales of any shape, as `fake_quantize` rounds them."""
    steps = (x / scale).round_().add_(zero_point).clamp_(low, high)
    return steps.to(bytes_for(low, high))


quantize = define(
    "quantize", f"(Tensor x, {_X}) -> Tensor",
    Preparation(lambda *grid: Quantize(here(), Grid.of(*grid))),
    lambda x, scale, zero_point, low, high: torch.empty_like(x, dtype=bytes_for(low, high)),
    _by_definition,
)  # fmt: skip
dequantize = define(
    "dequantize", f"(Tensor x, {_X}) -> Tensor",
    Preparation(lambda *grid: Dequantize(here(), Grid.of(*grid))),
    lambda x, *_: torch.empty_like(x, dtype=torch.float32),
)  # fmt: skip
quantized_convolution, quantized_convolution_add = _define_layer(
    "quantized_convolution", QuantizedConvolution,
    "Tensor weight, Tensor weight_scale, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups",
    _fake_convolution,
)  # fmt: skip
quantized_linear, quantized_linear_add = _define_layer(
    "quantized_linear", QuantizedLinear, "Tensor weight, Tensor weight_scale, Tensor? bias",
    F.linear,
)  # fmt: skip
