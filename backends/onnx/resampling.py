"""Resampling: interpolation and sampling on grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


def _resize(e: Emitter, x: Any, output_size: Any, factors: Any, **attributes: Any) -> Value:
    rank = len(shape_of(x))
    value: Any = x
    n = rank - 2
    sizes = scales = None
    single = n == 1 and attributes["mode"] != "nearest"  # the runtime has two dimensions or three
    if single:
        value = e.op("Unsqueeze", x, [2])
    if output_size is not None:
        sizes = e.sizes([e.size(x, 0), e.size(x, 1), *([1] if single else []), *output_size])
    else:
        given = [1.0, 1.0, *([1.0] if single else []), *map(float, factors)]
        scales = e.constant(np.asarray(given, dtype=np.float32))
    # without `axes`: ONNX Runtime turns a Resize between layers of integers, and forgets these
    resized = e.op("Resize", value, None, scales, sizes, **attributes)
    return e.op("Squeeze", resized, [2]) if single else resized


def _scales(output_size: Any, scales: tuple[Any, ...]) -> tuple[Any, Any]:
    """Prefer a given scale: it, and not the ratio of sizes, tells which pixels are read."""
    if scales and all(scale is not None for scale in scales):
        return None, scales
    return output_size, None


@emits("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
def _nearest(e: Emitter, x: Any, size: Any, factors: Any) -> Value:
    return _nearest_resize(e, x, size, factors)


@emits("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
def _nearest_scales(e: Emitter, x: Any, size: Any, *scales: Any) -> Value:
    return _nearest_resize(e, x, *_scales(size, scales))


def _nearest_resize(e: Emitter, x: Any, size: Any, factors: Any) -> Value:
    return _resize(
        e,
        x,
        size,
        factors,
        mode="nearest",
        nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )


@emits(*(f"_upsample_nearest_exact{n}d.vec" for n in (1, 2, 3)))
def _nearest_exact(e: Emitter, x: Any, size: Any, factors: Any) -> Value:
    return _resize(
        e,
        x,
        size,
        factors,
        mode="nearest",
        nearest_mode="round_prefer_ceil",
        coordinate_transformation_mode="half_pixel",
    )


@emits(*(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)))
def _nearest_exact_scales(e: Emitter, x: Any, size: Any, *scales: Any) -> Value:
    return _nearest_exact(e, x, *_scales(size, scales))


@emits(
    "upsample_linear1d.vec",
    "upsample_bilinear2d.vec",
    "upsample_trilinear3d.vec",
    "upsample_bicubic2d.vec",
    "_upsample_bilinear2d_aa.vec",
    "_upsample_bicubic2d_aa.vec",
)
def _smooth(e: Emitter, x: Any, size: Any, align_corners: bool, factors: Any) -> Value:
    name = e.called
    cubic, antialias = "bicubic" in name, "_aa" in name
    # antialiased cubic is Keys' kernel as PIL has it, the plain one has the sharper −0.75
    coefficient = (-0.5 if antialias else -0.75) if cubic else None
    return _resize(
        e,
        x,
        size,
        factors,
        mode="cubic" if cubic else "linear",
        coordinate_transformation_mode="align_corners" if align_corners else "half_pixel",
        cubic_coeff_a=coefficient,
        antialias=1 if antialias else None,
        exclude_outside=1 if antialias else None,
    )


@emits(
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def _smooth_scales(e: Emitter, x: Any, size: Any, align_corners: bool, *scales: Any) -> Value:
    output_size, factors = _scales(size, scales)
    return _smooth(e, x, output_size, align_corners, factors)


_MODES = {0: ("linear", "bilinear"), 1: ("nearest", "nearest"), 2: ("cubic", "bicubic")}
_PADDINGS = {0: "zeros", 1: "border", 2: "reflection"}


@emits("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(
    e: Emitter, x: Any, grid: Any, mode: int, padding: int, align_corners: bool
) -> Value:
    if len(shape_of(x)) == 5 and e.opset < 20:
        e.fail("a three-dimensional grid sample needs opset 20", "Use opset=20.")
    return e.op(
        "GridSample",
        x,
        e.operand(grid, e.out_dtype),
        mode=_MODES[mode][0 if e.opset >= 20 else 1],
        padding_mode=_PADDINGS[padding],
        align_corners=int(align_corners),
    )


@emits("affine_grid_generator")
def _affine_grid(e: Emitter, theta: Any, size: list[Any], align_corners: bool) -> Value:
    if not all(isinstance(n, int) for n in size[2:]):
        e.fail("an affine grid of symbolic size")
    axes = []
    for n in reversed(size[2:]):  # x first
        line = torch.linspace(-1, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1).double()
        axes.append(line if align_corners else line * (n - 1) / n)
    mesh = torch.meshgrid(*reversed(axes), indexing="ij")
    points = torch.stack([*reversed(mesh), torch.ones_like(mesh[0])], dim=-1)
    base = points.reshape(1, -1, len(size) - 1).to(e.out_dtype)
    product = e.op("MatMul", e.constant(base), e.op("Transpose", theta, perm=[0, 2, 1]))
    return e.op("Reshape", product, [-1, *size[2:], len(size) - 2])
