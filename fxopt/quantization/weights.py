"""Scales and zero points of weights, which are known: no data is needed.

Ranges are chosen for each channel, or group of numbers, by themselves. "minmax" clips nothing;
"mse" searches for the range with the smallest squared error of what fake_quantize makes of the
weight, as it will be computed, and is never worse than "minmax".
"""

from __future__ import annotations

import torch

from fxopt.errors import OptionError, check_choice
from fxopt.quantization.errors import CalibrationError
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.ranges import Error, smallest_error
from fxopt.quantization.scheme import Scheme

_BLOCK = 2**17  # numbers at a time: all ranges are tried while they are in a core's cache
_OCTAVES = 8


def weight_parameters(
    weight: torch.Tensor,
    scheme: Scheme,
    axis: int = 0,
    method: str = "minmax",
    group: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale (float32) and the zero point (int32), which broadcast against the weight.

    Without dimensions where the scheme is per tensor; where it is per channel, of the weight's
    rank, with `axis` as the only dimension that is not 1: [C, 1, 1, 1]. With `group`, each `group`
    numbers in a row along the last dimension share a scale, whatever the scheme says of channels:
    [..., groups, 1], for the weight viewed as [..., groups, group].

    Raise OptionError for an impossible axis, group or method, CalibrationError where a number is
    NaN, infinite, beyond float32, or no float.
    """
    check_choice("A weight's method", method, ("minmax", "mse"))
    if not weight.is_floating_point():
        raise CalibrationError(
            f"A weight of dtype {weight.dtype} cannot be quantized; give one of floats."
        )
    rows, shape = _rows(weight.detach(), scheme, axis, group)
    scale = torch.empty(len(rows), dtype=torch.float32, device=weight.device)
    zero_point = torch.empty(len(rows), dtype=torch.int32, device=weight.device)
    several = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, len(rows), several):
        part = slice(start, start + several)
        low, high = _range(rows[part].float(), scheme, method)
        scale[part], zero_point[part] = scheme.tensor_parameters(low, high)
    return scale.view(shape), zero_point.view(shape)


def _rows(
    weight: torch.Tensor, scheme: Scheme, axis: int, group: int | None
) -> tuple[torch.Tensor, list[int]]:
    """Return the weight as [ranges, numbers], and the shape of its parameters."""
    if group is not None:
        last = weight.shape[-1] if weight.dim() else 0
        if isinstance(group, bool) or group < 1 or not last or last % group:
            raise OptionError(
                f"A weight of shape {list(weight.shape)} has no groups of {group!r} along its last "
                "dimension; give a divisor of that."
            )
        return weight.reshape(-1, group), [*weight.shape[:-1], last // group, 1]
    if not scheme.per_channel:
        return weight.reshape(1, -1), []
    if not -weight.dim() <= axis < weight.dim():
        raise OptionError(
            f"A weight of shape {list(weight.shape)} has no dimension {axis}; give another axis, "
            "or a scheme with per_channel=False."
        )
    channels = weight.shape[axis]
    shape = [1] * weight.dim()
    shape[axis] = channels
    each = weight.numel() // max(channels, 1)
    return weight.movedim(axis, 0).reshape(channels, each), shape


def _range(rows: torch.Tensor, scheme: Scheme, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the low and the high end of each row, float64."""
    if not rows.shape[1]:
        nothing = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        return nothing, nothing
    low, high = (each.double() for each in torch.aminmax(rows, dim=1))
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise CalibrationError(
            "A weight holds a number that is NaN, infinite or beyond float32, and cannot be "
            "quantized; look into the checkpoint, or leave this layer out."
        )
    low, high = low.clamp(max=0), high.clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    if method == "minmax":
        return low, high
    return smallest_error(_squared_error(rows, scheme, low, high), low, high, scheme, _OCTAVES)


def _squared_error(
    rows: torch.Tensor, scheme: Scheme, low: torch.Tensor, high: torch.Tensor
) -> Error:
    """Return the squared error of each row, as a function of ranges [K, rows].

    It is counted in a unit near the row's largest magnitude, since the square of a very large or
    small number has no place in float32: a power of two, so that nothing is rounded.
    """
    largest = torch.maximum(-low, high)
    power = torch.frexp(largest).exponent.clamp(-125, 126)
    unit = torch.exp2(-power.double()).float()[:, None]

    def error(lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
        scales, zero_points = scheme.tensor_parameters(lows, highs)
        errors = torch.zeros_like(lows)
        for block in rows.split(_BLOCK, dim=1):
            for each, scale, zero_point in zip(errors, scales, zero_points, strict=True):
                quantized = fake_quantize(
                    block, scale[:, None], zero_point[:, None], scheme.qmin, scheme.qmax
                )
                off = quantized.sub_(block).mul_(unit)
                each += off.square_().sum(1, dtype=torch.float64)
        return errors

    return error
