"""Latencies side by side: all candidates take turns, so that a busy machine slows all alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fxopt.comparison.failure import reason_of

Call = Callable[[], object]

PAUSE = 0.05  # seconds: the threads of whoever ran before spin on for a while
LAP = 0.02  # seconds that the timed calls of one turn shall take together
LEAST_CALLS, MOST_CALLS = 3, 50  # timed calls of one turn
LONG = 0.5  # seconds: a call this long fills the caches itself
MARGIN = 0.02  # a ratio nearer to 1 than this is no difference worth a word
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Latency:
    """How long one candidate's calls took, in milliseconds, round by round."""

    rounds: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> list[float]:
        """The time of every call."""
        return [call for one in self.rounds for call in one]

    @property
    def medians(self) -> list[float]:
        """The median of each round."""
        return [statistics.median(one) for one in self.rounds]

    @property
    def median(self) -> float:
        """The median of all calls."""
        return statistics.median(self.calls)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile of all calls."""
        calls = self.calls
        if len(calls) < 2:
            return calls[0], calls[0]
        low, _, high = statistics.quantiles(calls, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The distance of the quartiles."""
        low, high = self.quartiles
        return high - low


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one is as another: a median, and the interval that it lies in.

    Each round gives one ratio of two neighbours in time, which what else the machine does changes
    little. `low` to `high` holds the true median with 95 % confidence, whatever the distribution:
    order statistics bound it (the sign test). Below six rounds no interval can, and it is infinite.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, one: Latency, other: Latency) -> Ratio:
        """Return how many times as fast `one` is as `other`, from the rounds that both ran in."""
        pairs = zip(one.medians, other.medians, strict=False)
        ratios = sorted(theirs / ours for ours, theirs in pairs)
        rank = interval_rank(len(ratios))
        low, high = (ratios[rank - 1], ratios[-rank]) if rank else (0.0, math.inf)
        return cls(statistics.median(ratios), low, high)

    @property
    def is_faster(self) -> bool:
        """Whether it is faster for certain, and by more than a hair."""
        return self.low > 1 + MARGIN

    @property
    def is_slower(self) -> bool:
        """Whether it is slower for certain, and by more than a hair."""
        return self.high < 1 - MARGIN


def interval_rank(count: int) -> int:
    """Return k such that the k-th smallest and k-th largest of `count` values bound the median.

    With probability 1 − 2 · P(Binomial(count, ½) < k), which is to be at least 95 %; 0 where none
    is.
    """
    rank, tail = 0, 0.0
    while rank < count // 2:
        tail += math.comb(count, rank) / 2**count
        if 1 - 2 * tail < CONFIDENCE:
            break
        rank += 1
    return rank


@dataclass
class Race:
    """The outcome: the latency of each candidate, and in words why others have none."""

    latencies: dict[str, Latency] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def race(
    calls: Mapping[str, Call],
    *,
    rounds: int | None = None,
    least: int = 9,
    most: int = 30,
    seconds: float = 40.0,
    synchronize: Callable[[], object] = lambda: None,
) -> Race:
    """Time `calls` by turns, in another order each round.

    A turn is a pause, one call that does not count (the caches are the others'), and timed calls:
    more of them where they are short. Without `rounds` each takes part in as many rounds, from the
    first on, as fit into its share of `seconds`, from `least` to `most`. `synchronize` waits for
    what a call left running, on a GPU.
    """
    outcome = Race()
    once = {}
    for name, call in calls.items():
        try:
            once[name] = _warm_up(call, synchronize)
        except Exception as error:  # whatever a backend's engine raises
            outcome.failures[name] = reason_of(error)
    share = seconds / max(len(once), 1)
    turns = {name: rounds or _turns(took, share, least, most) for name, took in once.items()}
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in once}
    order, draw = list(once), random.Random(0)
    for turn in range(max(turns.values(), default=0)):
        draw.shuffle(order)
        for name in order:
            if turn >= turns[name] or name in outcome.failures:
                continue
            time.sleep(PAUSE)
            try:
                if once[name] < LONG:
                    calls[name]()
                times[name].append(_lap(calls[name], _timed(once[name]), synchronize))
            except Exception as error:  # as above
                outcome.failures[name] = reason_of(error)
    outcome.latencies = {
        name: Latency(tuple(taken)) for name, taken in times.items() if name not in outcome.failures
    }
    return outcome


def _timed(seconds: float) -> int:
    """Return how many calls of this length are timed in one turn."""
    if seconds >= LONG:
        return 1
    return min(max(math.ceil(LAP / seconds), LEAST_CALLS), MOST_CALLS)


def _turns(took: float, share: float, least: int, most: int) -> int:
    """Return in how many rounds a candidate takes part whose calls take `took` seconds."""
    turn = PAUSE + took * (_timed(took) + (took < LONG))
    return min(max(int(share / turn), least), most)


def _warm_up(call: Call, synchronize: Callable[[], object]) -> float:
    """Call twice (TorchScript optimizes at the second call), or three times where that is quick.

    Returns the seconds of the last call.
    """
    _lap(call, 1, synchronize)
    seconds = _lap(call, 1, synchronize)[0] / 1e3
    if seconds < LONG:
        seconds = _lap(call, 1, synchronize)[0] / 1e3
    return max(seconds, 1e-7)


def _lap(call: Call, count: int, synchronize: Callable[[], object]) -> tuple[float, ...]:
    """Return the milliseconds of `count` calls."""
    times = []
    synchronize()
    for _ in range(count):
        started = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return tuple(times)
