"""The histogram, against one that is computed directly from all numbers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fxopt.errors import OptionError
from fxopt.quantization.errors import CalibrationError
from fxopt.quantization.histogram import Histogram


def histogram_of(*batches: torch.Tensor, bins: int = 2048) -> Histogram:
    histogram = Histogram(bins)
    for batch in batches:
        histogram.add(batch)
    return histogram


def assert_direct(histogram: Histogram, *batches: torch.Tensor) -> None:
    """Compare with NumPy's histogram, over the edges that the text promises."""
    x = torch.cat([batch.detach().float().reshape(-1) for batch in batches]).double().numpy()
    largest = float(np.abs(x).max())
    limit = 2.0 ** math.frexp(largest)[1]
    edges = np.linspace(-limit if x.min() < 0 else 0.0, limit, histogram.bins + 1)
    assert histogram.edges().tolist() == edges.tolist()
    places = np.searchsorted(edges, x[x != 0], side="right") - 1
    assert histogram.counts.tolist() == np.bincount(places, minlength=histogram.bins).tolist()
    assert histogram.zeros == int((x == 0).sum())
    assert histogram.count == len(x)
    assert (histogram.low, histogram.high) == (x.min(), x.max())


def heavy_tailed(count: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=source) * torch.randn(count, generator=source).exp() ** 3


SAMPLES = {
    "normal": heavy_tailed(5000, 1),
    "relu": heavy_tailed(5000, 2).relu(),
    "negative": -heavy_tailed(5000, 3).abs(),
    "constant": torch.full((7, 3), 0.3),
    "power of two": torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, 0.25, 0.0]),
    "just below": torch.tensor([1 - 2**-24, -1 + 2**-24, 2**-30, -(2**-30)]),
    "tiny": heavy_tailed(5000, 4).clamp(-50, 50) * 1e-30,
    "huge": heavy_tailed(5000, 5).clamp(-50, 50) * 1e30,
    "largest": torch.tensor([torch.finfo(torch.float32).max, -1e38, 3.0]),
    "integers": torch.arange(-128.0, 128.0),
}

each_sample = pytest.mark.parametrize("x", SAMPLES.values(), ids=SAMPLES)


@each_sample
def test_one_batch(x: torch.Tensor) -> None:
    assert_direct(histogram_of(x), x)


@each_sample
@pytest.mark.parametrize("seed", range(3))
def test_order_and_cuts_do_not_matter(x: torch.Tensor, seed: int) -> None:
    source = random.Random(seed)
    flat = x.reshape(-1)[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(seed))]
    cuts = sorted(source.randrange(x.numel() + 1) for _ in range(10))
    parts = torch.tensor_split(flat, cuts)
    assert_direct(histogram_of(*parts), x)
    # the smallest magnitudes first: every growth there is
    assert_direct(histogram_of(*flat[flat.abs().argsort()].split(x.numel() // 5 + 1)), x)


def test_a_range_that_grows_a_long_way() -> None:
    x = torch.tensor([10.0**power for power in range(-32, 39)])
    assert_direct(histogram_of(*x.split(1)), x)
    assert_direct(histogram_of(*x.flip(0).split(1)), x)
    both = torch.stack([x, -x], 1).reshape(-1)[::3]
    kept = both[both.abs() > 1e-6]  # what is smaller by 2¹⁴⁹ is 0 when it is counted
    assert_direct(histogram_of(*kept.split(1)), kept)


def test_numbers_below_the_smallest_range_are_counted() -> None:
    histogram = histogram_of(torch.tensor([1e-45, 1e-40, -1e-45, 0.0]))
    assert (int(histogram.counts.sum()), histogram.zeros, histogram.count) == (3, 1, 4)
    assert histogram.low == torch.tensor(-1e-45).item()


def test_more_numbers_than_one_chunk() -> None:
    x = heavy_tailed(300_001, 6)
    assert_direct(histogram_of(x), x)


@pytest.mark.parametrize("bins", [4, 8, 256])
def test_other_numbers_of_bins(bins: int) -> None:
    x = SAMPLES["normal"]
    assert_direct(histogram_of(*x.split(100), bins=bins), x)


@pytest.mark.parametrize("bins", [0, 1, 2, -4, 12, 2047, 8.0])
def test_impossible_numbers_of_bins(bins: int) -> None:
    with pytest.raises(OptionError, match="a power of two"):
        Histogram(bins)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    batches = [(SAMPLES["normal"].clamp(-6e4, 6e4)).to(dtype), SAMPLES["constant"].to(dtype)]
    assert_direct(histogram_of(*batches), *batches)


def test_8_bit_floats() -> None:
    x = torch.randn(100).to(torch.float8_e4m3fn)
    assert_direct(histogram_of(x), x)


def test_shapes_and_strides() -> None:
    x = heavy_tailed(2 * 3 * 4 * 5, 7).reshape(2, 3, 4, 5)
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x[:, ::2, 1:, :3],
        x.transpose(0, 3),
        x[0, 0, 0, 0].expand(3, 4),
        x[0, 0, 0, 0],
        x.requires_grad_(),
    ):
        assert_direct(histogram_of(view), view)


def test_empty_batches_change_nothing() -> None:
    histogram = histogram_of(torch.empty(0), torch.empty(3, 0, 2))
    assert (histogram.count, histogram.low, histogram.high, len(histogram.lows)) == (0, 0, 0, 0)
    histogram = histogram_of(torch.empty(0), torch.tensor([5.0]), torch.empty(0, 1))
    assert (histogram.count, histogram.low, histogram.high, len(histogram.lows)) == (1, 5, 5, 1)


def test_zeros_have_no_bin() -> None:
    histogram = histogram_of(torch.zeros(10), torch.tensor([0.0, -0.0]))
    assert (histogram.zeros, histogram.count, int(histogram.counts.sum())) == (12, 12, 0)
    assert histogram.width == 0.0
    later = torch.tensor([1.0, 0.0, -3.0])
    histogram.add(later)
    assert_direct(histogram, torch.zeros(12), later)


def test_extremes_of_batches_keep_their_order() -> None:
    histogram = histogram_of(torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.0]), torch.ones(2))
    assert histogram.lows.tolist() == [1, -3, 1]
    assert histogram.highs.tolist() == [2, 0, 1]


@each_sample
def test_magnitudes(x: torch.Tensor) -> None:
    histogram = histogram_of(x)
    places = (x.reshape(-1).double() / histogram.width).floor()[x.reshape(-1) != 0]
    if histogram.low < 0:
        places = torch.maximum(places, -places - 1)  # [−2w, −w) is the mirror image of [w, 2w)
    direct = torch.bincount(places.long(), minlength=len(histogram.magnitudes()))
    assert histogram.magnitudes().tolist() == direct.tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite(bad: float, dtype: torch.dtype) -> None:
    histogram = histogram_of(torch.ones(3))
    with pytest.raises(CalibrationError, match="NaN, infinite or beyond float32.*leave the batch"):
        histogram.add(torch.tensor([-100.0, bad, 100.0], dtype=dtype))
    assert_direct(histogram, torch.ones(3))
    assert len(histogram.lows) == 1


def test_numbers_beyond_float32() -> None:
    with pytest.raises(CalibrationError, match="beyond float32"):
        histogram_of(torch.tensor([1e39], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floats(dtype: torch.dtype) -> None:
    with pytest.raises(CalibrationError, match=f"dtype {dtype}; only floats"):
        histogram_of(torch.ones(2).to(dtype))
