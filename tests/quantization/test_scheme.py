"""Schemes: their integers, and the scale and zero point of a range."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fxopt.errors import OptionError
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.scheme import Scheme

SYMMETRIC = Scheme(symmetric=True, signed=True)
SIGNED = Scheme(symmetric=False, signed=True)
UNSIGNED = Scheme(symmetric=False, signed=False)
ALL = [
    Scheme(bits=bits, symmetric=symmetric, signed=signed)
    for bits in (2, 4, 8, 16)
    for symmetric, signed in ((True, True), (False, True), (False, False))
]
LARGEST = torch.finfo(torch.float32).max

each_scheme = pytest.mark.parametrize("scheme", ALL, ids=str)


def quantized(scheme: Scheme, low: float, high: float, *numbers: float) -> list[float]:
    scale, zero_point = scheme.tensor_parameters(torch.tensor(low), torch.tensor(high))
    x = torch.tensor(numbers)
    return fake_quantize(x, scale, zero_point, scheme.qmin, scheme.qmax).tolist()


@pytest.mark.parametrize(
    ("scheme", "limits"),
    [
        (SYMMETRIC, (-127, 127)),
        (SIGNED, (-128, 127)),
        (UNSIGNED, (0, 255)),
        (Scheme(bits=2, symmetric=True, signed=True), (-1, 1)),
        (Scheme(bits=4, symmetric=False, signed=True), (-8, 7)),
        (Scheme(bits=16, symmetric=False, signed=False), (0, 65535)),
    ],
)
def test_integers(scheme: Scheme, limits: tuple[int, int]) -> None:
    assert (scheme.qmin, scheme.qmax) == limits


def test_text() -> None:
    assert str(UNSIGNED) == "8-bit affine, unsigned"
    weights = Scheme(bits=4, symmetric=True, signed=True, per_channel=True)
    assert str(weights) == "4-bit symmetric, signed, per channel"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits=1 is not possible; give a whole number from 2 to 16"),
        ({"bits": 17}, "bits=17"),
        ({"bits": 8.0}, "bits=8.0"),
        ({"bits": True}, "bits=True"),
        ({"symmetric": 1}, "symmetric=1"),
        ({"signed": None}, "signed=None"),
        ({"per_channel": "no"}, "per_channel='no'"),
        ({"symmetric": True, "signed": False}, "signed=False is not possible; give True, since"),
    ],
)
def test_impossible_schemes(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Scheme(**{"symmetric": False, "signed": True, **options})


def test_parameters_by_hand() -> None:
    assert SYMMETRIC.parameters(-127, 3) == (1.0, 0)
    assert UNSIGNED.parameters(0, 255) == (1.0, 0)
    assert UNSIGNED.parameters(-100, 155) == (1.0, 100)
    assert SIGNED.parameters(-128, 127) == (1.0, 0)
    assert SIGNED.parameters(0, 510) == (2.0, -128)
    assert UNSIGNED.parameters(-255, 0) == (1.0, 255)


def test_a_range_is_widened_to_contain_zero() -> None:
    assert UNSIGNED.parameters(5, 255) == UNSIGNED.parameters(0, 255)
    assert UNSIGNED.parameters(-255, -5) == UNSIGNED.parameters(-255, 0)


@each_scheme
def test_zero_is_exact_and_numbers_inside_are_near(scheme: Scheme) -> None:
    source = random.Random(0)
    for _ in range(200):
        size = 10.0 ** source.uniform(-35, 37)
        low, high = sorted(source.uniform(-size, size) for _ in range(2))
        scale, zero_point = scheme.parameters(low, high)
        assert math.isfinite(1 / scale) and scale >= torch.finfo(torch.float32).tiny
        assert scale == float(torch.tensor(scale)), "a float32 number"
        assert scheme.qmin <= zero_point <= scheme.qmax
        assert quantized(scheme, low, high, 0.0) == [0.0]
        inside = [source.uniform(low, high) for _ in range(20)]
        ends = [low, high] if scheme.symmetric else []
        for x, y in zip(
            [*inside, *ends], quantized(scheme, low, high, *inside, *ends), strict=True
        ):
            assert abs(x - y) <= scale * (0.505 if scheme.symmetric else 1.001)


@each_scheme
def test_a_range_of_zeros_is_exact(scheme: Scheme) -> None:
    scale, zero_point = scheme.parameters(0.0, 0.0)
    assert scale == 1.0 and zero_point == (0 if scheme.symmetric else scheme.qmin)
    assert quantized(scheme, 0.0, -0.0, 0.0) == [0.0]


@each_scheme
@pytest.mark.parametrize("value", [3.7, -0.01, 1e-30, -1e30, 3e38])
def test_a_constant_is_represented_well(scheme: Scheme, value: float) -> None:
    (result,) = quantized(scheme, value, value, value)
    assert result == pytest.approx(value, rel=1e-5)


@each_scheme
@pytest.mark.parametrize(
    ("low", "high"), [(-LARGEST, LARGEST), (0, LARGEST), (-LARGEST, 1), (-1e300, 1.7e308)]
)
def test_the_largest_numbers_stay_finite(scheme: Scheme, low: float, high: float) -> None:
    scale, zero_point = scheme.parameters(low, high)
    for q in (scheme.qmin, scheme.qmax):
        assert torch.isfinite(torch.tensor(scale) * (q - zero_point))
    low, high = max(low, -LARGEST), min(high, LARGEST)
    for x, y in zip((low, high), quantized(scheme, low, high, low, high), strict=True):
        assert math.isfinite(y) and abs(x - y) <= scale * 1.02


@each_scheme
@pytest.mark.parametrize("size", [1e-38, 1e-45, 1e-320])
def test_the_smallest_numbers_have_a_normal_scale(scheme: Scheme, size: float) -> None:
    for low, high in ((-size, size), (0, size), (-size, 0)):
        scale, zero_point = scheme.parameters(low, high)
        assert scale == torch.finfo(torch.float32).tiny
        assert scheme.qmin <= zero_point <= scheme.qmax


@each_scheme
def test_tensors_and_numbers_agree(scheme: Scheme) -> None:
    torch.manual_seed(0)
    low, high = torch.randn(2, 3, 5).sort(0).values.double()
    scales, zero_points = scheme.tensor_parameters(low, high)
    assert scales.dtype == torch.float32 and zero_points.dtype == torch.int32
    assert scales.shape == zero_points.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            pair = scheme.parameters(low[i, j].item(), high[i, j].item())
            assert pair == (scales[i, j].item(), zero_points[i, j].item())


@pytest.mark.parametrize(
    ("low", "high"), [(1, 0), (0, math.inf), (-math.inf, 0), (math.nan, 0), (0, math.nan)]
)
def test_impossible_ranges(low: float, high: float) -> None:
    with pytest.raises(OptionError, match="cannot be quantized .8-bit affine, unsigned.; give"):
        UNSIGNED.parameters(low, high)
    lows, highs = torch.tensor([0.0, low]), torch.tensor([1.0, high])
    with pytest.raises(OptionError, match="number 1 of 2, cannot be quantized"):
        UNSIGNED.tensor_parameters(lows, highs)
