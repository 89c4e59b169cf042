"""From the histogram of a value to the range that a quantization scheme is to represent.

    minmax           the smallest and the largest number
    moving-average   those of each batch, averaged exponentially
    percentile       without the outermost numbers
    mse              the smallest expected squared error
    entropy          the smallest Kullback-Leibler divergence

A method is a function of a Histogram and a Scheme that returns (low, high); anybody can write one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxopt.errors import OptionError, check_option, unknown_name
from fxopt.quantization.errors import CalibrationError
from fxopt.quantization.histogram import Histogram
from fxopt.quantization.scheme import Scheme

Method = Callable[[Histogram, Scheme], tuple[float, float]]
Error = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class MinMax:
    """The smallest and the largest number: nothing is clipped."""

    def __call__(self, histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
        """Return the range."""
        return histogram.low, histogram.high


@dataclass(frozen=True)
class MovingAverage:
    """The extremes of each batch, averaged exponentially (Jacob et al., CVPR 2018, section 3.1).

    average ← average + momentum · (batch − average), from the first batch on.
    """

    momentum: float = 0.1

    def __post_init__(self) -> None:
        good = 0 < self.momentum <= 1
        check_option("MovingAverage", good, "momentum", self.momentum, "a number in (0, 1]")

    def __call__(self, histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
        """Return the range."""
        low, high = histogram.lows[0], histogram.highs[0]
        for each_low, each_high in zip(histogram.lows, histogram.highs, strict=True):
            low += self.momentum * (each_low - low)
            high += self.momentum * (each_high - high)
        return low, high


@dataclass(frozen=True)
class Percentile:
    """The range without the outermost numbers (Wu et al., "Integer Quantization for Deep Learning
    Inference", 2020, section 5.2).

    Symmetric schemes clip the largest (100 − percent) % of the magnitudes, affine ones as much at
    either end. Zeros do not count: no range changes them, and a ReLU that is rarely active would
    otherwise lose most of what it passes.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        good = 50 <= self.percent <= 100
        check_option("Percentile", good, "percent", self.percent, "a number from 50 to 100")

    def __call__(self, histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
        """Return the range."""
        if histogram.zeros == histogram.count:
            return histogram.low, histogram.high
        share = self.percent / 100
        if scheme.symmetric:
            counts = histogram.magnitudes()
            edges = torch.arange(len(counts) + 1, dtype=torch.float64) * histogram.width
            end = min(_quantile(counts, edges, share), _largest(histogram))
            return -end, end
        low, high = (
            _quantile(histogram.counts, histogram.edges(), each) for each in (1 - share, share)
        )
        low, high = max(low, histogram.low), min(high, histogram.high)
        return min(low, high), high


def _quantile(counts: torch.Tensor, edges: torch.Tensor, share: float) -> float:
    """Return the number below which a share of the counts lies, spread evenly over each bin."""
    below = counts.cumsum(0)
    target = share * float(below[-1])
    held = torch.nonzero(counts).view(-1)
    index = torch.searchsorted(below[held].double(), target).clamp(max=len(held) - 1)
    place = int(held[index])
    count = float(counts[place])
    part = (target - float(below[place])) / count + 1
    return float(edges[place] + (edges[place + 1] - edges[place]) * part)


@dataclass(frozen=True)
class Mse:
    """The range with the smallest expected squared error of the quantizer, rounding and clipping.

    The numbers are taken to be spread evenly over each bin. In steps of the scale, u = x / s and
    k = clamp(round(u) + z, qmin, qmax) − z, the antiderivative of (u − k)² is

        G(u) = k / 12 + (u − k)³ / 3        so that a bin [a, b] costs s² · (G(b) − G(a)) / (b − a).

    Zeros cost nothing. Where bins are wider than the quantizer's steps (about 10 bits and more),
    the histogram cannot tell which range is better, and the answer is MinMax. Little is lost: with
    n steps rounding costs range² / (12 · n²), so that even clipping one number in n² hardly pays.
    """

    def __call__(self, histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
        """Return the range."""
        low, high = _bounds(histogram.low, histogram.high, scheme)
        scale, _ = scheme.parameters(low, high)
        if scale < histogram.width:
            return low, high
        ends = torch.tensor([[low], [high]], dtype=torch.float64)
        octaves = math.ceil(math.log2(histogram.bins))
        best = smallest_error(expected_error(histogram, scheme), ends[0], ends[1], scheme, octaves)
        return best[0].item(), best[1].item()


def expected_error(histogram: Histogram, scheme: Scheme) -> Error:
    """Return the mean squared error of what was seen, as a function of ranges of any one shape."""
    edges = histogram.edges()
    held = histogram.counts > 0
    counts = histogram.counts[held].double()
    start = edges[:-1][held].clamp(min=histogram.low)
    end = edges[1:][held].clamp(max=histogram.high)

    def error(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        scale, zero_point = scheme.tensor_parameters(low.unsqueeze(-1), high.unsqueeze(-1))
        step = scale.double()

        def cost(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            steps = x / step
            places = torch.clamp(steps.round(), scheme.qmin - zero_point, scheme.qmax - zero_point)
            off = steps - places
            return places / 12 + off**3 / 3, off**2

        (at_start, point), (at_end, _) = cost(start), cost(end)
        width = (end - start) / step
        each = torch.where(width > 0, (at_end - at_start) / width, point)
        return (each * step**2 * counts).sum(-1) / histogram.count

    return error


def smallest_error(
    error: Error, low: torch.Tensor, high: torch.Tensor, scheme: Scheme, octaves: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shrink ranges, float64 [R], to those of the smallest error: never above the one given.

    `error` takes ranges [K, R] and returns their errors, [K, R]. Both ends shrink together, by
    quarters of an octave and then, around the best, by finer steps, two times; those of an affine
    scheme then shrink each by itself, twice in turn, since each end's best depends on the other's.
    """
    search = _Search(error, low, high)
    search.coarse(octaves, "both")
    search.fine("both")
    if not scheme.symmetric and bool(((low < 0) & (high > 0)).any()):
        for _ in range(2):
            for which in ("low", "high"):
                search.coarse(octaves, which)
                search.fine(which)
    return low * search.ratios[0], high * search.ratios[1]


class _Search:
    """The best ranges so far, as ratios of the full ones, [2, R]: of the low end and the high."""

    def __init__(self, error: Error, low: torch.Tensor, high: torch.Tensor) -> None:
        self._error = error
        self._low, self._high = low, high
        self.ratios = torch.ones_like(torch.stack([low, high]))
        self._smallest = error(low[None], high[None])[0]

    def coarse(self, octaves: int, which: str) -> None:
        powers = torch.arange(4 * octaves + 1, device=self.ratios.device) / -4
        ratios = torch.exp2(powers.double())[:, None].expand(-1, self.ratios.shape[1])
        self._try(ratios, ratios, which)

    def fine(self, which: str) -> None:
        for reach in (1 / 4, 1 / 16):
            powers = torch.linspace(-reach, reach, 9, device=self.ratios.device)
            factors = torch.exp2(powers.double())[:, None]
            low, high = self.ratios
            self._try(low * factors, high * factors, which)

    def _try(self, low: torch.Tensor, high: torch.Tensor, which: str) -> None:
        """Take those of the ratios, [K, R], whose errors are smaller than the smallest so far."""
        low = self.ratios[0].expand_as(high) if which == "high" else low.clamp(max=1)
        high = self.ratios[1].expand_as(low) if which == "low" else high.clamp(max=1)
        errors, best = self._error(self._low * low, self._high * high).min(0)
        chosen = torch.stack([each.gather(0, best[None])[0] for each in (low, high)])
        better = errors < self._smallest
        self.ratios = torch.where(better, chosen, self.ratios)
        self._smallest = torch.where(better, errors, self._smallest)


@dataclass(frozen=True)
class Entropy:
    """The range whose quantized distribution tells the most about the original one (Migacz, "8-bit
    Inference with TensorRT", GTC 2017, slides 28 to 37).

    For each number i of bins of |x|: P is the first i, with all that lies beyond added to the last;
    Q is the first i merged into as many levels as there are integers, each spread evenly over those
    of its bins that hold anything. The best i has the smallest KL(P ‖ Q), and the range ends half a
    bin beyond it.

    Magnitudes have half the integers, but for numbers of one sign and an affine scheme, which has
    all of them there. Zeros do not count. Where there are no more bins than levels, nothing can be
    merged and the answer is MinMax.
    """

    def __call__(self, histogram: Histogram, scheme: Scheme) -> tuple[float, float]:
        """Return the range."""
        low, high = histogram.low, histogram.high
        one_sided = low >= 0 or high <= 0
        levels = 2**scheme.bits if one_sided and not scheme.symmetric else 2 ** (scheme.bits - 1)
        counts = histogram.magnitudes()
        used = int(torch.nonzero(counts)[-1]) + 1 if bool(counts.any()) else 0
        if used <= levels:
            return low, high
        divergences = divergence(counts[:used].double(), levels)
        best = int(divergences.argmin()) + levels
        end = (best + 0.5) * histogram.width
        return max(low, -end), min(high, end)


def divergence(counts: torch.Tensor, levels: int) -> torch.Tensor:
    """Return KL(P ‖ Q) for each i from `levels` to all bins; infinite where P has what Q lacks.

    With counts h, all N of them, S those of the first i, H the last of P, C and A a level's count
    and its mean over bins that hold anything:

        N · KL = Σ h log h + H log H − N log N − (Σ C log A + (H − h) log A_last) + N log S
    """
    many = len(counts)
    total = counts.sum()
    sizes = torch.arange(levels, many + 1)
    before = _running(counts)
    logs = _running(torch.xlogy(counts, counts))
    held = _running((counts > 0).double())
    starts = -((-torch.arange(levels + 1) * sizes[:, None]) // levels)  # bin j has level ⌊j·n/i⌋
    in_level = before[starts].diff(dim=1)
    mean = in_level / held[starts].diff(dim=1).clamp(min=1)
    last = counts[sizes - 1]
    inside = before[sizes]
    with_beyond = last + total - inside
    of_p = logs[sizes - 1] + torch.xlogy(with_beyond, with_beyond) - total * total.log()
    beyond = torch.xlogy(total - inside, mean[:, -1])
    of_q = torch.xlogy(in_level, mean).sum(1) + beyond - total * inside.log()
    lacks = (last == 0) & (with_beyond > 0) | (inside == 0)
    return torch.where(lacks, torch.inf, (of_p - of_q) / total)


def _running(counts: torch.Tensor) -> torch.Tensor:
    """Return the sums of the first 0, 1, ... elements."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


METHODS: dict[str, Callable[[], Method]] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "mse": Mse,
    "entropy": Entropy,
}


def method_of(method: str | Method) -> Method:
    """Return the method of that name, or the one given; raise OptionError for what is neither."""
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown_name("calibration method", method, METHODS)
        return METHODS[method]()
    check_option("range_of", callable(method), "method", method, "a name, or a function")
    return method


def range_of(
    histogram: Histogram, scheme: Scheme, method: str | Method = "minmax"
) -> tuple[float, float]:
    """Return the range that a method chooses: low ≤ 0 ≤ high, and low = −high where symmetric.

    `method` is a name of METHODS, one of their classes with options, such as Percentile(99.9), or a
    function of the histogram and the scheme that returns two finite numbers, the lower one first.
    Raise CalibrationError where nothing was seen, OptionError for an unknown or wrong method.
    """
    method = method_of(method)
    if not histogram.count:
        raise CalibrationError(
            "Calibration saw no number of this value; give batches that are not empty and that "
            "reach it."
        )
    return _bounds(*_checked(method, method(histogram, scheme)), scheme)


def _checked(method: Method, answer: object) -> tuple[float, float]:
    """Return what a method answered, or raise OptionError."""
    name = getattr(method, "__name__", None) or repr(method)
    try:
        low, high = (float(each) for each in answer)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"The calibration method {name} returned {answer!r}; return two numbers, (low, high)."
        ) from error
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise OptionError(
            f"The calibration method {name} returned the range from {low} to {high}; return two "
            "finite numbers, the lower one first."
        )
    return low, high


def _bounds(low: float, high: float, scheme: Scheme) -> tuple[float, float]:
    """Widen a range to what a scheme represents anyway: 0, and both signs where symmetric."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme.symmetric:
        high = max(-low, high)
        low = -high
    return low, high


def _largest(histogram: Histogram) -> float:
    """Return the largest magnitude."""
    return max(-histogram.low, histogram.high)
