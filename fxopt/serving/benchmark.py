"""How long calls take: one caller, or several at once."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fxopt.errors import OptionError


@dataclass(frozen=True)
class Benchmark:
    """Latencies of one compiled model, in milliseconds.

    `times` are those of all calls, `seconds` what they took from the first to the last, `callers`
    how many threads called at once.
    """

    times: tuple[float, ...]
    seconds: float
    callers: int = 1

    @property
    def rounds(self) -> int:
        """The number of calls of each caller."""
        return len(self.times) // self.callers

    @property
    def median(self) -> float:
        """The latency that half of the calls stay below, p50."""
        return self.percentile(50)

    @property
    def spread(self) -> float:
        """The distance between the first and the third quartile."""
        return self.percentile(75) - self.percentile(25)

    @property
    def p90(self) -> float:
        """The latency that nine calls of ten stay below."""
        return self.percentile(90)

    @property
    def p99(self) -> float:
        """The latency that 99 calls of 100 stay below; nearly the largest where there are fewer."""
        return self.percentile(99)

    @property
    def calls_per_second(self) -> float:
        """Calls of all callers per second."""
        return len(self.times) / self.seconds

    def percentile(self, percent: int) -> float:
        """Return the latency that so many per cent (1 to 99) of the calls stay below."""
        return percentile(self.times, percent)

    def __str__(self) -> str:
        calls = f"{len(self.times)} calls"
        if self.callers > 1:
            calls += f" by {self.callers} callers at once"
        return (
            f"{self.median:.2f} ms (quartiles {self.spread:.2f} ms apart, p90 {self.p90:.2f} ms, "
            f"p99 {self.p99:.2f} ms, {calls}, {self.calls_per_second:.1f} per second)"
        )


@dataclass(frozen=True)
class WarmUp:
    """The first calls of a model, in milliseconds: the first one pays for what the others find."""

    times: tuple[float, ...]

    @property
    def first(self) -> float:
        """The latency of the first call."""
        return self.times[0]

    @property
    def last(self) -> float:
        """The latency of the last call."""
        return self.times[-1]

    def __str__(self) -> str:
        count = len(self.times)
        return f"{self.first:.2f} ms the first call, {self.last:.2f} ms the last of {count}"


def percentile(times: Sequence[float], percent: int) -> float:
    """Return what `percent` (1 to 99) of some values stay below, between neighbours in proportion.

    Raises OptionError for another percentage.
    """
    if not (type(percent) is int and 1 <= percent <= 99):
        raise OptionError(f"A percentile is an integer from 1 to 99, not {percent!r}.")
    if len(times) == 1:
        return times[0]
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def timed(call: Callable[[], object], count: int) -> tuple[float, ...]:
    """Return the milliseconds of `count` calls, one after the other."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return tuple(times)


def measure(call: Callable[[], object], rounds: int, warmup: int, callers: int) -> Benchmark:
    """Time `rounds` calls of each of `callers` threads, after `warmup` calls that do not count.

    Raises OptionError for numbers that make no measurement, and whatever a call raises.
    """
    for option, value in (("round", rounds), ("caller", callers)):
        if not (type(value) is int and value >= 1):
            raise OptionError(f"benchmark() needs at least one {option}, not {value!r}.")
    if not (type(warmup) is int and warmup >= 0):
        raise OptionError(f"warmup is a number of calls, at least 0, not {warmup!r}.")
    timed(call, warmup)
    if callers == 1:
        started = time.perf_counter()
        times = timed(call, rounds)
        return Benchmark(times, time.perf_counter() - started)
    return _measure_at_once(call, rounds, warmup, callers)


def _measure_at_once(
    call: Callable[[], object], rounds: int, warmup: int, callers: int
) -> Benchmark:
    start = threading.Barrier(callers)

    def lap() -> tuple[float, tuple[float, ...], float]:
        try:
            timed(call, warmup)  # engines and torch keep things for each thread
            start.wait()
        except BaseException:
            start.abort()  # the others shall not wait for this one
            raise
        started = time.perf_counter()
        times = timed(call, rounds)
        return started, times, time.perf_counter()

    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(lap) for _ in range(callers)]
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    laps = [future.result() for future in futures]
    seconds = max(end for *_, end in laps) - min(began for began, *_ in laps)
    return Benchmark(tuple(time for _, times, _ in laps for time in times), seconds, callers)
