"""Ranges from histograms: each method against what all the numbers say, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fxopt.errors import OptionError
from fxopt.quantization.errors import CalibrationError
from fxopt.quantization.histogram import Histogram
from fxopt.quantization.ranges import (
    METHODS,
    Entropy,
    MovingAverage,
    Mse,
    Percentile,
    divergence,
    expected_error,
    range_of,
)
from fxopt.quantization.scheme import Scheme
from tests.quantization.test_histogram import histogram_of

SYMMETRIC = Scheme(symmetric=True, signed=True)
SIGNED = Scheme(symmetric=False, signed=True)
UNSIGNED = Scheme(symmetric=False, signed=False)
ALL = [
    Scheme(bits=bits, symmetric=symmetric, signed=signed)
    for bits in (2, 8, 16)
    for symmetric, signed in ((True, True), (False, True), (False, False))
]
COUNT = 30_000


def source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, generator=source(seed))


def uniform(seed: int) -> torch.Tensor:
    return torch.rand(COUNT, generator=source(seed))


SAMPLES = {
    "normal": normal(0),
    "shifted": normal(1) + 2,
    "heavy-tailed": normal(2) * (normal(3) * 0.8).exp(),
    "very heavy-tailed": normal(2) * (normal(3) * 2).exp(),
    "skewed": normal(4).exp() - 0.5,
    "relu": (normal(5) * 3).relu(),
    "sparse": torch.where(uniform(6) < 0.001, normal(7).abs() + 1, 0.0),
    "negative": -normal(8).exp(),
    "uniform": uniform(9) * 5 - 1,
    "one spike": torch.cat([normal(10), torch.tensor([40.0])]),
    "spike at an end": (normal(11) * 3 + 3).clamp(0, 6),
    "constant": torch.full((100,), 0.7),
    "negative constant": torch.full((100,), -0.7),
    "zeros": torch.zeros(100),
    "one number": torch.tensor([3.0]),
    "integers": torch.arange(0.0, 256),
    "tiny": normal(12) * 1e-30,
    "huge": normal(13) * 1e30,
}

each_sample = pytest.mark.parametrize("name", SAMPLES)
each_scheme = pytest.mark.parametrize("scheme", ALL, ids=str)
each_method = pytest.mark.parametrize("method", METHODS)


def true_errors(x: torch.Tensor, scheme: Scheme, ranges: list[tuple[float, float]]) -> list[float]:
    """Quantize every number, in float64, and return the mean squared errors, one per range."""
    x = x.double().reshape(-1)
    errors = []
    for low, high in ranges:
        scale, zero_point = scheme.parameters(low, high)
        q = (torch.round(x / scale) + zero_point).clamp(scheme.qmin, scheme.qmax)
        errors.append(float(((q - zero_point) * scale - x).square().mean()))
    return errors


def true_error(x: torch.Tensor, scheme: Scheme, ends: tuple[float, float]) -> float:
    return true_errors(x, scheme, [ends])[0]


# -- every method ----------------------------------------------------------------------------------


@each_sample
@each_scheme
@each_method
def test_a_range_lies_within_the_extremes_and_holds_zero(
    method: str, scheme: Scheme, name: str
) -> None:
    x = SAMPLES[name]
    low, high = range_of(histogram_of(*x.split(1000)), scheme, method)
    smallest, largest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if scheme.symmetric:
        largest = max(-smallest, largest)
        smallest = -largest
        assert low == -high
    assert smallest <= low <= 0 <= high <= largest
    assert (low, high) != (0, 0) or name == "zeros"


@pytest.mark.parametrize("name", ["constant", "negative constant", "zeros", "one number"])
@each_scheme
def test_constants_are_exact_whatever_the_method(scheme: Scheme, name: str) -> None:
    x = SAMPLES[name]
    for method in METHODS:
        error = true_error(x, scheme, range_of(histogram_of(x), scheme, method))
        assert error <= (1e-6 * float(x[0])) ** 2, method


@each_method
def test_nothing_seen(method: str) -> None:
    with pytest.raises(CalibrationError, match="saw no number.*give batches that are not empty"):
        range_of(histogram_of(torch.empty(0)), SYMMETRIC, method)


def test_minmax() -> None:
    histogram = histogram_of(torch.tensor([-2.0, 1.0]), torch.tensor([3.0]))
    assert range_of(histogram, UNSIGNED) == (-2, 3)
    assert range_of(histogram, SYMMETRIC, "minmax") == (-3, 3)
    assert range_of(histogram_of(torch.tensor([2.0, 3.0])), UNSIGNED) == (0, 3)


def test_unknown_method() -> None:
    with pytest.raises(OptionError, match="Unknown calibration method 'mean'.*percentile"):
        range_of(histogram_of(torch.ones(1)), SYMMETRIC, "mean")


# -- functions of the user's -----------------------------------------------------------------------


def test_a_function_is_given_both_and_its_range_is_widened() -> None:
    seen: list[object] = []

    def mine(histogram: Histogram, scheme: Scheme) -> Any:
        seen.extend((histogram, scheme))
        return torch.tensor(1), np.float32(2.5)

    histogram = histogram_of(torch.ones(1))
    assert range_of(histogram, UNSIGNED, mine) == (0.0, 2.5)
    assert range_of(histogram, SYMMETRIC, mine) == (-2.5, 2.5)
    assert seen == [histogram, UNSIGNED, histogram, SYMMETRIC]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "mine returned None; return two numbers"),
        (1.0, "mine returned 1.0"),
        ((1.0,), "mine returned .1.0,."),
        ((1, 2, 3), "return two numbers"),
        (("low", "high"), "return two numbers"),
        (torch.zeros(2, 2), "return two numbers"),
        ((1.0, -1.0), "from 1.0 to -1.0; return two finite numbers, the lower one first"),
        ((-math.inf, 1.0), "finite"),
        ((0.0, math.nan), "finite"),
    ],
)
def test_what_a_function_returns_is_checked(answer: Any, message: str) -> None:
    def mine(histogram: Histogram, scheme: Scheme) -> Any:
        return answer

    with pytest.raises(OptionError, match=message):
        range_of(histogram_of(torch.ones(1)), UNSIGNED, mine)


# -- moving average --------------------------------------------------------------------------------


def test_moving_average_by_hand() -> None:
    batches = [torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 3.0]), torch.tensor([0.0, 8.0])]
    histogram = histogram_of(*batches)
    low = -1 + 0.1 * (-2 + 1)
    high = 1 + 0.1 * (3 - 1)
    expected = low + 0.1 * (0 - low), high + 0.1 * (8 - high)
    assert range_of(histogram, UNSIGNED, "moving-average") == pytest.approx(expected)
    assert range_of(histogram, UNSIGNED, MovingAverage(1.0)) == (0, 8), "the last batch's"
    half = range_of(histogram_of(*batches[::-1]), UNSIGNED, MovingAverage(0.5))
    assert half == pytest.approx((-1, 3.25)), "their order matters"


@pytest.mark.parametrize("momentum", [0, -0.1, 1.1, math.nan])
def test_impossible_momentum(momentum: float) -> None:
    with pytest.raises(OptionError, match="MovingAverage option momentum"):
        MovingAverage(momentum)


# -- percentile ------------------------------------------------------------------------------------


@each_sample
@pytest.mark.parametrize("percent", [50, 90, 99, 99.9, 99.99, 100])
def test_percentile_is_near_that_of_the_numbers(name: str, percent: float) -> None:
    x = SAMPLES[name].double().numpy()
    histogram = histogram_of(SAMPLES[name])
    x = x[x != 0] if (x != 0).any() else x
    near = 1.001 * histogram.width
    low, high = Percentile(percent)(histogram, UNSIGNED)

    def neighbours(numbers: Any, share: float) -> tuple[float, float]:
        lower, higher = (
            float(np.percentile(numbers, share, method=method)) for method in ("lower", "higher")
        )
        return lower - near, higher + near

    for end, share in ((low, 100 - percent), (high, percent)):
        lower, higher = neighbours(x, share)
        assert lower <= end <= higher
    minus, end = Percentile(percent)(histogram, SYMMETRIC)
    lower, higher = neighbours(np.abs(x), percent)
    assert minus == -end and lower <= end <= higher


def test_percentile_interpolates_within_a_bin() -> None:
    histogram = histogram_of(torch.linspace(0, 1, 100_001)[1:-1])
    assert Percentile(90)(histogram, UNSIGNED) == pytest.approx((0.1, 0.9), abs=2e-5)


def test_percentile_does_not_count_zeros() -> None:
    busy = normal(20).abs()
    rare = torch.cat([busy, torch.zeros(1000 * COUNT // 10)])
    ranges = [range_of(histogram_of(x), UNSIGNED, "percentile") for x in (busy, rare)]
    assert ranges[0] == ranges[1]


@pytest.mark.parametrize("percent", [49, 100.1, -1, math.nan])
def test_impossible_percent(percent: float) -> None:
    with pytest.raises(OptionError, match="Percentile option percent"):
        Percentile(percent)


# -- squared error ---------------------------------------------------------------------------------


@each_scheme
@pytest.mark.parametrize("ratio", [1.0, 0.6, 0.1, 0.01])
def test_the_expected_error_is_that_of_numbers_spread_over_bins(
    scheme: Scheme, ratio: float
) -> None:
    histogram = histogram_of(normal(21, 2000) + 0.3, bins=64)
    edges = histogram.edges()
    low, high = histogram.low * ratio, histogram.high * ratio / 2
    between = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    each = []
    for i, count in enumerate(histogram.counts.tolist()):
        start = max(edges[i].item(), histogram.low)
        end = min(edges[i + 1].item(), histogram.high)
        if count:
            each.append(count * true_error(start + (end - start) * between, scheme, (low, high)))
    expected = sum(each) / histogram.count
    ends = torch.tensor([[low], [high]], dtype=torch.float64)
    found = float(expected_error(histogram, scheme)(ends[0], ends[1])[0])
    assert found == pytest.approx(expected, rel=2e-3 if scheme.bits == 16 else 2e-4)


@each_sample
@each_scheme
def test_mse_is_as_good_as_brute_force(scheme: Scheme, name: str) -> None:
    x = SAMPLES[name][:8000]
    histogram = histogram_of(x)
    chosen = true_error(x, scheme, range_of(histogram, scheme, "mse"))
    minmax = true_error(x, scheme, range_of(histogram, scheme))
    assert chosen <= minmax * (1 + 1e-3) + 1e-12 * float(x.abs().max()) ** 2
    if scheme.bits > 8:
        return
    low, high = range_of(histogram, scheme)
    shares = [2 ** (-power / 3) for power in range(20)]
    pairs = {(low * i, high * (i if scheme.symmetric else j)) for i in shares for j in shares}
    best = min(true_errors(x, scheme, sorted(pairs)))
    # a bin holds its numbers wherever they are, so an answer from bins is good, not best
    assert chosen <= best * 1.04 + 1e-12 * float(x.abs().max()) ** 2


@each_sample
@pytest.mark.parametrize("bits", [11, 12, 14, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_with_more_steps_than_bins_is_minmax(name: str, bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, symmetric=symmetric, signed=True)
    histogram = histogram_of(SAMPLES[name])
    found, minmax = range_of(histogram, scheme, "mse"), range_of(histogram, scheme)
    if bits == 11:
        x = SAMPLES[name]
        assert true_error(x, scheme, found) <= true_error(x, scheme, minmax) * (1 + 1e-3)
    else:
        assert found == minmax


def test_a_spike_of_zeros_does_not_count() -> None:
    rest = normal(22).abs() + 0.001
    spike = torch.cat([rest, torch.zeros(100 * COUNT)])
    for scheme in (UNSIGNED, SYMMETRIC, Scheme(bits=4, symmetric=False, signed=False)):
        ranges = [range_of(histogram_of(x), scheme, "mse") for x in (rest, spike)]
        assert ranges[1] == pytest.approx(ranges[0], rel=1e-6)
        ranges = [range_of(histogram_of(x), scheme, "entropy") for x in (rest, spike)]
        assert ranges[1] == ranges[0]


def test_a_spike_at_an_extreme_is_not_clipped() -> None:
    x = SAMPLES["spike at an end"]
    assert Mse()(histogram_of(x), UNSIGNED) == pytest.approx((0, 6), rel=5e-3)


def test_mse_clips_either_end_by_itself() -> None:
    x = torch.cat([normal(23), torch.tensor([-20.0])])
    low, high = range_of(histogram_of(x), Scheme(bits=4, symmetric=False, signed=True), "mse")
    assert -5 < low < -2 and 2 < high <= x.max()


def test_mse_of_a_normal_distribution_is_the_one_in_the_literature() -> None:
    """Banner et al., "Post training 4-bit quantization", NeurIPS 2019: 2.55 σ for 4 bits."""
    x = normal(24, 400_000)
    _, high = range_of(histogram_of(x), Scheme(bits=4, symmetric=False, signed=True), "mse")
    assert high == pytest.approx(2.55, abs=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_method
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    x = SAMPLES["heavy-tailed"].to(dtype)
    ranges = [range_of(histogram_of(each), UNSIGNED, method) for each in (x, x.float())]
    assert ranges[0] == ranges[1]


@each_method
@pytest.mark.parametrize("scheme", [SYMMETRIC, SIGNED, UNSIGNED], ids=str)
@pytest.mark.parametrize("power", [-90, 100])
def test_scaling_the_numbers_scales_the_range(method: str, scheme: Scheme, power: int) -> None:
    x = SAMPLES["heavy-tailed"]
    ends = range_of(histogram_of(x), scheme, method)
    scaled = range_of(histogram_of(x * 2.0**power), scheme, method)
    assert scaled == pytest.approx([end * 2.0**power for end in ends], rel=1e-6)


# -- entropy ---------------------------------------------------------------------------------------


def divergence_by_hand(counts: list[float], bins: int, levels: int) -> float:
    """Follow the pseudocode of Migacz's slides literally."""
    reference = [*counts[: bins - 1], counts[bins - 1] + sum(counts[bins:])]
    quantized = [0.0] * bins
    for level in range(levels):
        members = [j for j in range(bins) if j * levels // bins == level]
        holding = [j for j in members if counts[j]]
        for j in holding:
            quantized[j] = sum(counts[i] for i in members) / len(holding)
    total, inside = sum(reference), sum(quantized)
    result = 0.0
    for p, q in zip(reference, quantized, strict=True):
        if p and not q:
            return math.inf
        if p:
            result += p / total * math.log((p / total) / (q / inside))
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [2, 7, 16])
def test_divergence_follows_the_slides(seed: int, levels: int) -> None:
    counts = torch.randint(0, 20, (50,), generator=source(seed)).double()
    counts *= torch.rand(50, generator=source(seed)) < (0.9, 0.5, 0.2, 0.05)[seed]
    counts[49] = 1
    expected = [divergence_by_hand(counts.tolist(), i, levels) for i in range(levels, 51)]
    assert divergence(counts, levels).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "scheme", "levels"),
    [
        ("heavy-tailed", SYMMETRIC, 128),
        ("heavy-tailed", UNSIGNED, 128),
        ("relu", SYMMETRIC, 128),
        ("relu", UNSIGNED, 256),
        ("negative", SIGNED, 256),
        ("relu", Scheme(bits=4, symmetric=False, signed=False), 16),
    ],
)
def test_entropy_takes_the_smallest_divergence(name: str, scheme: Scheme, levels: int) -> None:
    x = SAMPLES[name]
    histogram = histogram_of(x)
    counts = histogram.magnitudes().tolist()
    used = max(i for i, count in enumerate(counts) if count) + 1
    each = {i: float(d) for i, d in zip(
        range(levels, used + 1), divergence(torch.tensor(counts[:used]).double(), levels),
        strict=True,
    )}  # fmt: skip
    best = min(each, key=lambda i: each[i])
    end = (best + 0.5) * histogram.width
    low, high = range_of(histogram, scheme, "entropy")
    assert max(-low, high) == min(end, float(x.abs().max()))
    if not scheme.symmetric:
        assert low == max(min(float(x.min()), 0), -end)
        assert high == min(max(float(x.max()), 0), end)


def test_entropy_clips_what_is_rare() -> None:
    x = torch.cat([normal(25, 500_000), torch.tensor([30.0, -25.0])])
    for scheme in (SYMMETRIC, SIGNED):
        low, high = range_of(histogram_of(x), scheme, "entropy")
        assert 3 < high < 10 and -10 < low < -3


def test_entropy_with_too_few_bins_is_minmax() -> None:
    x = SAMPLES["normal"]
    histogram = histogram_of(x, bins=128)
    assert Entropy()(histogram, SYMMETRIC) == (x.min(), x.max())


def test_the_table() -> None:
    assert list(METHODS) == ["minmax", "moving-average", "percentile", "mse", "entropy"]
