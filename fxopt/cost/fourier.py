"""Formulas of Fourier transforms."""

from __future__ import annotations

import math

from fxopt.cost.call import Call, Size, log2
from fxopt.cost.formula import Work, formula


@formula("fft_fft", "fft_ifft", "fft_fft2", "fft_ifft2", "fft_fftn", "fft_ifftn", "_fft_c2c")
def complex_transform(call: Call) -> Work:
    """5 · n · ⌈log₂ n⌉ for each transform of n points, the convention of FFTW's benchmarks (Frigo
    and Johnson, "The Design and Implementation of FFTW3", 2005).
    """
    return Work(0, 5 * _points(call, call.out_shape))


@formula("fft_rfft", "fft_rfft2", "fft_rfftn", "fft_ihfft", "_fft_r2c")
def real_transform(call: Call) -> Work:
    """Half of a complex transform of the real input, cut or filled up to `n` or `s`."""
    return Work(0, 5 * _points(call, _filled(call)) // 2)


@formula("fft_irfft", "fft_irfft2", "fft_irfftn", "fft_hfft", "_fft_c2r")
def inverse_real_transform(call: Call) -> Work:
    """Half of a complex transform to the real output."""
    return Work(0, 5 * _points(call, call.out_shape) // 2)


@formula("stft")
def short_time_transform(call: Call) -> Work:
    """A transform of `n_fft` points for each frame, half of that for real data; a window is one
    operation per point.
    """
    size = call.size(call["n_fft"])
    *batch, _, frames = call.out_shape
    points = math.prod(batch) * frames * size
    whole = 5 * points * log2(size)
    windowed = points if call["window"] is not None else 0
    return Work(0, (whole // 2 if call["onesided"] is not False else whole) + windowed)


def _filled(call: Call) -> tuple[Size, ...]:
    """Return the shape of the input as it is transformed."""
    shape = list(call.first)
    if call["n"] is not None:
        shape[call["dim"]] = call.size(call["n"])
    elif call["s"] is not None:
        dims = call["dim"] if call["dim"] is not None else range(-len(call["s"]), 0)
        for dim, size in zip(dims, call["s"], strict=True):
            shape[dim] = call.size(size)
    return tuple(shape)


def _points(call: Call, shape: tuple[Size, ...]) -> Size:
    """Return the points of all transforms, times the halvings of each dimension."""
    dims = call["dim"]
    if dims is None:
        dims = (-2, -1) if call.name.endswith("2") else range(len(shape))
    sides = [shape[dim] for dim in ([dims] if isinstance(dims, int) else dims)]
    return math.prod(shape) * sum(map(log2, sides))
