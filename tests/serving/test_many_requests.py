"""Hundreds of requests from many threads: each gets its own answer, whatever the others do.

No result depends on timing: which requests are cancelled or refused is up to chance, what the
others get is not.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as Late
from typing import Any

import pytest
import torch

import fxopt
from fxopt import CompiledModel
from fxopt.serving import QueueFull, Server
from tests.serving.models import PATIENCE, words

CLIENTS, EACH = 8, 40


@pytest.fixture(autouse=True)
def _threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Client:
    """Sends requests of random sizes, some of them wrong, and checks every answer."""

    def __init__(self, compiled: CompiledModel, server: Server, seed: int) -> None:
        self.compiled, self.server = compiled, server
        self.draw = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []

    def work(self) -> None:
        pending: list[tuple[str, Any, Future[Any]]] = []
        for _ in range(EACH):
            kind = self.draw.choice(["good"] * 12 + ["poisoned", "misshapen", "hurried"])
            ids = torch.randint(0, 50, (self.draw.randint(1, 6), self.draw.randint(1, 2)),
                                generator=self.numbers)  # fmt: skip
            x = torch.randn(len(ids), 8, generator=self.numbers)
            if kind == "poisoned":
                ids[0, 0] = 99
            try:
                future = self.server.submit(ids, x[:, :7] if kind == "misshapen" else x)
            except (fxopt.ShapeError, QueueFull) as error:
                self.outcomes[type(error).__name__] += 1
                if isinstance(error, fxopt.ShapeError) != (kind == "misshapen"):
                    self.problems.append(f"{kind}: {error!r}")
                continue
            pending.append((kind, (ids, x), future))
            if self.draw.random() < 0.3:
                self.settle(*pending.pop(0))
        for one in pending:
            self.settle(*one)

    def settle(self, kind: str, sent: Any, future: Future[Any]) -> None:
        """Wait for an answer, or only a moment and then cancel; compare it with the serial one."""
        try:
            result = future.result(self.draw.random() * 1e-3 if kind == "hurried" else PATIENCE)
        except Late:
            kind = "given up" if future.cancel() else "hurried"
            if kind == "hurried":
                result = future.result(PATIENCE)
        except (IndexError, fxopt.ShapeError):  # PyTorch's word for it, and the ONNX backend's
            self.count(kind, "poisoned")
            return
        if kind == "given up":
            try:
                future.result(PATIENCE)
            except CancelledError:
                self.outcomes["given up"] += 1
            return
        self.count("good" if kind == "hurried" else kind, "good")
        for name, wanted in self.compiled(*sent).items():
            if not torch.allclose(result[name], wanted, atol=1e-5):
                self.problems.append(f"a wrong answer for {tuple(sent[0].shape)}")

    def count(self, expected: str, found: str) -> None:
        self.outcomes[found] += 1
        if expected != found:
            self.problems.append(f"{expected} ended as {found}")


@pytest.mark.parametrize("backend", ["eager", "onnx"])
@pytest.mark.parametrize(
    "options",
    [
        {"workers": 3, "queue_size": 8},
        {"workers": 1, "queue_size": 64, "max_batch": 16},
        {"workers": 3, "queue_size": 16, "max_batch": 5, "max_wait_ms": 1},
        {"workers": 2, "queue_size": 3, "queue_timeout": 0, "max_batch": 8, "max_wait_ms": 0.2},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_each_gets_its_own_answer(backend: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    compiled = words(backend)
    with compiled.serve(**options) as server:
        clients = [Client(compiled, server, seed) for seed in range(CLIENTS)]
        threads = [threading.Thread(target=client.work, daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a client waits for an answer that does not come"
    problems = [text for client in clients for text in client.problems]
    assert not problems, problems[:5]
    outcomes = sum((client.outcomes for client in clients), Counter())
    assert sum(outcomes.values()) == CLIENTS * EACH
    assert outcomes["good"] > 150 or "queue_timeout" in options
    counts = server.statistics
    assert counts.completed == outcomes["good"] and counts.failed == outcomes["poisoned"]
    assert counts.cancelled == outcomes["given up"]
    assert counts.requests == counts.completed + counts.failed + counts.cancelled
    assert len(server._waiting) == 0
    if options.get("max_batch", 1) == 1:
        assert counts.rows == counts.runs


def test_closing_in_the_middle_loses_no_request() -> None:
    """Every future that was handed out is done, and every refusal says why."""
    compiled = words()
    for turn in range(15):
        server = compiled.serve(workers=2, queue_size=4, max_batch=4, max_wait_ms=1)
        futures: list[Future[Any]] = []
        reasons: list[Exception] = []
        started = threading.Barrier(4)

        def ask(
            server: Server = server, futures: list[Any] = futures, reasons: list[Any] = reasons,
            started: threading.Barrier = started,
        ) -> None:  # fmt: skip
            started.wait(PATIENCE)
            while not reasons:
                try:
                    futures.append(server.submit(torch.ones(2, 1).long(), torch.zeros(2, 8)))
                except fxopt.FxoptError as error:
                    reasons.append(error)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait(PATIENCE)
        while len(futures) < turn:
            futures[-1].result(PATIENCE) if futures else None
        server.close(cancel=turn % 2 == 0)
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert all(future.done() for future in futures)
        assert {type(reason) for reason in reasons} == {fxopt.serving.ServerClosed}
