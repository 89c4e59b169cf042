"""Formulas of pooling and of sampling between pixels."""

from __future__ import annotations

import math

from fxopt.cost.call import Call, Size, common_divisor, largest
from fxopt.cost.formula import Work, formula


@formula("max_pool1d", "max_pool2d", "max_pool3d")
@formula("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(call: Call) -> Work:
    """Output elements × (kernel elements − 1) comparisons."""
    return Work(0, call.out_elements * (_kernel(call) - 1))


@formula("avg_pool1d", "avg_pool2d", "avg_pool3d")
def average_pool(call: Call) -> Work:
    """Output elements × kernel elements: the sum, and one division."""
    return Work(0, call.out_elements * _kernel(call))


@formula("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
@formula("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def adaptive_average_pool(call: Call) -> Work:
    """The elements of all windows: the sums, and one division each. From n to m, neighbours that
    share an element are m − gcd(n, m), so the windows hold n + m − gcd(n, m) in one dimension.
    """
    return Work(0, _windows(call))


@formula("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(call: Call) -> Work:
    """The elements of all windows, as in average pooling, less one per output element."""
    return Work(0, _windows(call) - call.out_elements)


@formula("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
def interpolation(call: Call) -> Work:
    """Output elements × (2 · taps − 1), with 2 taps in a dimension, 4 for a bicubic one."""
    cubic = "cubic" in call.name
    return Work(0, call.out_elements * _between((4 if cubic else 2) ** (len(call.out_shape) - 2)))


@formula("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa")
def antialiased(call: Call) -> Work:
    """One dimension after the other, the last first; from n to m there are t · max(n, m) taps in a
    row, with t = 2 (bilinear), 4 (bicubic) or 6 (Lanczos), and 2 operations for each.
    """
    taps = {"bilinear": 2, "bicubic": 4}.get(call.name.split("_")[2].removesuffix("2d"), 6)
    (batch, channels, height, width), (_, _, rows, columns) = call.first, call.out_shape
    horizontal = height * largest(width, columns)
    vertical = columns * largest(height, rows)
    return Work(0, 2 * taps * batch * channels * (horizontal + vertical))


@formula("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(call: Call) -> Work:
    """Output elements × (2 · taps − 1): 2 taps in a dimension, 4 for bicubic sampling; nothing for
    the nearest.
    """
    mode = call["interpolation_mode"]
    taps = {0: 2, 2: 4}.get(mode, 0) ** (len(call.out_shape) - 2)
    return Work(0, call.out_elements * _between(taps) if taps else 0)


def _between(taps: int) -> int:
    """Return the operations of a weighted sum."""
    return 2 * taps - 1


def _kernel(call: Call) -> int:
    sides = call["kernel_size"]
    rank = int(call.name.split("pool")[1][0])
    sides = [sides] if isinstance(sides, int) else sides
    return math.prod(sides) if len(sides) == rank else sides[0] ** rank


def _windows(call: Call) -> Size:
    rank = int(call.name.split("pool")[1][0])
    before, after = call.first, call.out_shape
    outer = math.prod(before[: len(before) - rank])
    sides = zip(before[-rank:], after[-rank:], strict=True)
    return outer * math.prod(n + m - common_divisor(n, m) for n, m in sides)
