"""Several threads that call one model at once get what each would get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import CompiledModel
from tests.models import ConvBnRelu, Residual
from tests.serving.models import PATIENCE, Counts, rows, words

BACKENDS = ("eager", "onnx", "torchscript")
THREADS = 8

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Start all calls at the same moment, each in a thread of its own; return what they return."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [one.result(PATIENCE) for one in [pool.submit(run, call) for call in calls]]


@each_backend
def test_calls_at_once_give_what_calls_in_turn_give(backend: str) -> None:
    layers = nn.Sequential(Residual(), nn.Flatten(), nn.Linear(512, 4))
    compiled = rows(layers, 3, 8, 8, backend=backend)
    inputs = [torch.randn(1 + index % 5, 3, 8, 8) for index in range(THREADS * 5)]
    expected = [compiled(x) for x in inputs]

    def some(first: int) -> list[torch.Tensor]:
        return [compiled(x) for x in inputs[first::THREADS]]

    found = at_once(*[lambda first=first: some(first) for first in range(THREADS)])
    for first, results in enumerate(found):
        for ours, theirs in zip(results, expected[first::THREADS], strict=True):
            assert torch.equal(ours, theirs)


@each_backend
def test_the_first_calls_may_come_at_once(backend: str, tmp_path: Path) -> None:
    """Code is generated and sessions are made then, which is for one thread."""
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(20)])
    compiled = rows(deep, 8, backend=backend)
    path = tmp_path / f"model{compiled.backend.suffix}"
    compiled.save(path)
    x = torch.randn(4, 8)
    expected = compiled(x)
    for _ in range(5):
        fresh = fxopt.load(path)
        for found in at_once(*[lambda model=fresh: model(x)] * THREADS):
            torch.testing.assert_close(found, expected)


class SpiesOnRuns:
    """An executable that notes how many are inside at once."""

    notes = ()

    def __init__(self, inner: Any) -> None:
        self.inner, self.inside, self.most = inner, 0, 0
        self._lock = threading.Lock()

    def run(self, *flat: Any) -> Any:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        try:
            return self.inner.run(*flat)
        finally:
            with self._lock:
                self.inside -= 1


def test_new_weights_make_the_next_call_a_first_one_again() -> None:
    model = ConvBnRelu()
    compiled = fxopt.compile(model, torch.randn(1, 3, 8, 8))
    compiled.update(model.state_dict())
    spy = SpiesOnRuns(compiled.executable)
    compiled.executable = spy  # type: ignore[assignment]
    before = compiled._free
    compiled(torch.randn(1, 3, 8, 8))
    assert before is not spy and compiled._free is spy


@pytest.mark.parametrize("options", [{"backend": "eager"}, {"backend": "onnx", "state": "io"}])
def test_calls_that_change_state_take_turns(options: dict[str, Any]) -> None:
    compiled = fxopt.compile(Counts(), torch.ones(1), **options)
    spy = SpiesOnRuns(compiled.executable)
    compiled.executable = spy  # type: ignore[assignment]
    assert compiled.has_state

    def count() -> list[float]:
        return [float(compiled(torch.ones(1))) for _ in range(25)]

    seen = [total for one in at_once(*[count] * THREADS) for total in one]
    assert sorted(seen) == [float(n + 1) for n in range(25 * THREADS)]
    assert spy.most == 1


def test_a_call_that_fails_leaves_the_turn_to_others() -> None:
    compiled = words()
    bad = (torch.full((2, 5), 99), torch.zeros(2, 8))
    good = (torch.full((2, 5), 9), torch.zeros(2, 8))
    with pytest.raises(IndexError):
        compiled(*bad)
    assert at_once(lambda: compiled(*good)["scores"].shape)[0] == (2, 4)


def test_a_model_without_inputs_is_compiled_once_for_each_shape() -> None:
    deferred = fxopt.compile(nn.Sequential(nn.ReLU(), nn.Sigmoid()), backend="torchscript")
    compile_for = deferred._compile_for
    compiled: list[CompiledModel] = []

    def counted(inputs: Any) -> CompiledModel:
        compiled.append(compile_for(inputs))
        return compiled[-1]

    deferred._compile_for = counted
    shapes = [(2, 3), (4, 3), (2, 3), (4, 3), (5,), (2, 3), (4, 3), (5,)]
    inputs = [torch.randn(shape) for shape in shapes]
    for x, y in zip(inputs, at_once(*[lambda x=x: deferred(x) for x in inputs]), strict=True):
        torch.testing.assert_close(y, x.relu().sigmoid())
    assert len(compiled) == 3
