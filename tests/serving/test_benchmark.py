"""What calls cost: percentiles, several callers, and the first calls."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.serving import Benchmark, WarmUp
from fxopt.serving.benchmark import measure, percentile
from tests.models import Function
from tests.serving.models import Counts, Held, rows, words


def test_percentiles_are_those_of_the_calls() -> None:
    times = tuple(float(n) for n in range(1, 102))
    found = Benchmark(times, seconds=2.0)
    assert (found.median, found.p90, found.p99, found.spread) == (51, 91, 100, 50)
    assert (found.rounds, found.calls_per_second) == (101, 50.5)
    assert [percentile([3.0], p) for p in (1, 50, 99)] == [3, 3, 3]
    for wrong in (0, 100, 50.0, True):
        with pytest.raises(fxopt.OptionError, match="from 1 to 99"):
            found.percentile(wrong)  # type: ignore[arg-type]


def test_it_prints_what_a_reader_wants() -> None:
    text = str(Benchmark((1.0, 2.0, 3.0, 2.0), seconds=0.004, callers=2))
    assert text.startswith("2.00 ms (quartiles 0.50 ms apart, p90 2.70 ms, p99 2.97 ms")
    assert text.endswith("4 calls by 2 callers at once, 1000.0 per second)")
    assert str(WarmUp((5.0, 2.0, 1.0))) == "5.00 ms the first call, 1.00 ms the last of 3"


def test_callers_call_at_once() -> None:
    both_inside = threading.Barrier(2)
    calls: list[int] = []

    def call() -> None:
        both_inside.wait(30)  # breaks unless two callers are inside at once
        calls.append(1)

    found = measure(call, rounds=3, warmup=0, callers=2)
    assert len(found.times) == len(calls) == 6 and found.rounds == 3 and found.callers == 2


def test_a_caller_s_error_is_raised_and_nobody_waits_for_it() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        measure(call, rounds=5, warmup=2, callers=3)


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"rounds": 0}, "at least one round"), ({"rounds": 2.5}, "at least one round"),
        ({"callers": 0}, "at least one caller"), ({"warmup": -1}, "warmup"),
    ],
)  # fmt: skip
def test_wrong_numbers_are_named(options: dict[str, Any], words_: str) -> None:
    with pytest.raises(fxopt.OptionError, match=words_):
        words().benchmark(**options)


def test_a_warm_up_calls_the_model() -> None:
    compiled = words()
    held = Held(compiled)
    held.gate.set()
    assert len(compiled.warmup(calls=4).times) == 4 and held.batches == [3] * 4
    compiled.warmup(torch.zeros(7, 2).long(), x=torch.zeros(7, 8), calls=1)
    assert held.batches[4:] == [7]
    with pytest.raises(fxopt.OptionError, match="at least one call"):
        compiled.warmup(calls=0)
    with pytest.raises(fxopt.ShapeError):
        compiled.warmup(torch.zeros(7, 2).long(), torch.zeros(7, 9))


def test_a_warm_up_makes_the_session() -> None:
    compiled = words("onnx")
    assert compiled.executable._session is None
    compiled.warmup(calls=1)
    assert compiled.executable._session is not None


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"backend": "onnx", "state": "io"}])
def test_state_and_inputs_stay_as_they_are(options: dict[str, Any]) -> None:
    compiled = fxopt.compile(Counts(), torch.ones(1), **options)
    x = torch.full((1,), 5.0)
    compiled.warmup()
    compiled.warmup(x)
    compiled.benchmark(x, rounds=3)
    assert float(compiled(x)) == 5
    with pytest.raises(fxopt.OptionError, match="one call at a time"):
        compiled.benchmark(callers=2)


def test_inputs_that_the_model_writes_to_stay_as_they_are() -> None:
    compiled = fxopt.compile(Function(lambda x: x.add_(1)), torch.zeros(2))
    x = torch.zeros(2)
    compiled.warmup(x)
    compiled.benchmark(x, rounds=2)
    assert torch.equal(x, torch.zeros(2))


def test_a_loaded_model_is_given_inputs(tmp_path: Path) -> None:
    words("onnx").save(tmp_path / "words.onnx")
    loaded = fxopt.load(tmp_path / "words.onnx")
    for method in (loaded.warmup, loaded.benchmark):
        with pytest.raises(fxopt.OptionError, match="no example inputs; pass inputs"):
            method()
    assert loaded.benchmark(torch.zeros(2, 2).long(), torch.zeros(2, 8), rounds=2).rounds == 2


def test_a_loaded_model_with_state_is_left_alone(tmp_path: Path) -> None:
    compiled = fxopt.compile(Counts(), torch.ones(1), backend="onnx", state="io")
    compiled.save(tmp_path / "counts.onnx")
    loaded = fxopt.load(tmp_path / "counts.onnx", state="io")
    assert loaded.has_state
    with pytest.raises(fxopt.OptionError, match="without changing that"):
        loaded.benchmark(torch.ones(1))
    assert float(loaded(torch.ones(1))) == 1


def test_a_loaded_graph_knows_its_state(tmp_path: Path) -> None:
    fxopt.compile(Counts(), torch.ones(1)).save(tmp_path / "counts.fxopt")
    loaded = fxopt.load(tmp_path / "counts.fxopt")
    assert loaded.has_state
    loaded.benchmark(torch.ones(1), rounds=2)
    assert float(loaded(torch.ones(1))) == 1


def test_a_deferred_model_warms_up_for_the_inputs_given() -> None:
    deferred = fxopt.compile(nn.Sequential(nn.ReLU(), nn.Sigmoid()))
    with pytest.raises(fxopt.FxoptError, match="Nothing is compiled yet"):
        deferred.warmup()
    deferred.warmup(torch.randn(2, 3), calls=1)
    deferred.benchmark(torch.randn(4), rounds=1)
    assert len(deferred._compiled) == 2 and deferred.benchmark(rounds=2).rounds == 2


def test_benchmarking_a_dynamic_model_takes_other_sizes() -> None:
    compiled = rows(nn.Linear(4, 4), 4)
    assert compiled.benchmark(torch.randn(9, 4), rounds=3, callers=2).callers == 2
