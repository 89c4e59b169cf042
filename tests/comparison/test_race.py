"""Taking turns: who runs when, and what ratios of rounds say."""

from __future__ import annotations

import time

import pytest

from fxopt.comparison.race import Latency, Ratio, interval_rank, race


def latency(*medians: float) -> Latency:
    return Latency(tuple((median,) for median in medians))


def test_every_round_has_everybody_and_the_order_changes() -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    outcome = race(calls, rounds=6)  # type: ignore[arg-type]
    turns = [name for name in seen[9:] if name]  # three calls of each to warm up
    rounds = [turns[place : place + 12 : 4] for place in range(0, 72, 12)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert all(len(one.rounds) == 6 and len(one.calls) == 18 for one in outcome.latencies.values())


def test_a_slow_candidate_takes_part_in_fewer_rounds() -> None:
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    rounds = {
        name: len(one.rounds)
        for name, one in race(calls, least=2, most=9, seconds=0.4).latencies.items()
    }
    assert rounds == {"slow": 2, "fast": 9}


def test_who_fails_is_out_with_a_reason_and_the_others_go_on() -> None:
    left = [7]

    def tired() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("no more\nat all")

    def broken() -> None:
        raise ValueError

    outcome = race({"fine": lambda: None, "tired": tired, "broken": broken}, rounds=4)
    assert outcome.failures == {"broken": "ValueError.", "tired": "RuntimeError: no more."}
    assert list(outcome.latencies) == ["fine"]
    assert race({}).latencies == {}


def test_devices_are_waited_for_within_the_measured_time() -> None:
    events: list[str] = []
    race({"a": lambda: events.append("call")}, rounds=1, synchronize=lambda: events.append("wait"))
    assert events[:3] == ["wait", "call", "wait"]
    assert events[-6:] == ["call", "wait"] * 3


def test_a_latency_is_a_median_between_quartiles() -> None:
    one = Latency(((1.0, 9.0, 2.0), (3.0, 4.0)))
    assert one.median == 3.0 and one.quartiles == (2.0, 4.0) and one.spread == 2.0
    assert one.medians == [2.0, 3.5]
    assert latency(5.0).quartiles == (5.0, 5.0)


def test_ratios_are_of_the_same_round() -> None:
    """Both get slower together: each round says 2, and so does the interval."""
    slow, fast = latency(2, 4, 8, 16, 32, 64, 128), latency(1, 2, 4, 8, 16, 32)
    ratio = Ratio.of(fast, slow)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.is_faster and not ratio.is_slower
    assert Ratio.of(slow, fast).is_slower


def test_what_chance_may_explain_is_neither_faster_nor_slower() -> None:
    mixed = Ratio.of(latency(*[1.0] * 6), latency(1.5, 1.5, 1.5, 1.5, 1.5, 0.9))
    assert mixed.median == 1.5 and not mixed.is_faster and not mixed.is_slower
    hair = Ratio.of(latency(*[1.0] * 6), latency(*[1.01] * 6))
    assert not hair.is_faster
    few = Ratio.of(latency(*[1.0] * 5), latency(*[9.0] * 5))
    assert few.median == 9.0 and not few.is_faster and few.high == float("inf")


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (5, 0), (6, 1), (8, 1), (9, 2), (30, 10)])
def test_the_interval_of_a_median(count: int, rank: int) -> None:
    """As tabulated for the sign test at 95 %."""
    assert interval_rank(count) == rank
