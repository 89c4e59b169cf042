"""What a server did so far, in numbers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from fxopt.serving.request import Request


@dataclass(frozen=True)
class Statistics:
    """The numbers of one server at one moment.

    `requests` were taken by `submit`, and end as `completed`, `failed` or `cancelled`; the rest
    wait or run. `runs` are calls of the model, each for one request or for several; `rows` adds up
    what was in dimension 0 of all runs, one for each request where there are no batches. `retried`
    requests ran once more by themselves, after the batch they were in had failed. Queue waits are
    the milliseconds from `submit` to the run.
    """

    requests: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    runs: int = 0
    rows: int = 0
    mean_queue_wait_ms: float = 0.0
    max_queue_wait_ms: float = 0.0

    @property
    def mean_batch(self) -> float:
        """The mean number of rows in a run; 0 before the first."""
        return self.rows / self.runs if self.runs else 0.0

    def __str__(self) -> str:
        return (
            f"{self.requests} requests: {self.completed} completed, {self.failed} failed, "
            f"{self.cancelled} cancelled; {self.runs} runs of {self.mean_batch:.1f} rows on "
            f"average; waited {self.mean_queue_wait_ms:.2f} ms on average, "
            f"{self.max_queue_wait_ms:.2f} ms at most"
        )


class Tally:
    """Counts for all threads of a server; the names are those of `Statistics`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._started = 0  # requests that a worker took up
        self._waited, self._longest = 0.0, 0.0  # seconds: of these together, and of one

    def add(self, name: str, count: int = 1) -> None:
        """Count something."""
        with self._lock:
            self._counts[name] += count

    def start(self, requests: Sequence[Request]) -> None:
        """Count requests that wait no longer."""
        now = perf_counter()
        waits = [now - request.arrived for request in requests]
        with self._lock:
            self._started += len(waits)
            self._waited += sum(waits)
            self._longest = max(self._longest, *waits)

    def run(self, rows: int) -> None:
        """Count one call of the model."""
        with self._lock:
            self._counts["runs"] += 1
            self._counts["rows"] += rows

    def snapshot(self) -> Statistics:
        """Return the numbers of this moment."""
        with self._lock:
            return Statistics(
                **self._counts,
                mean_queue_wait_ms=self._waited / max(self._started, 1) * 1e3,
                max_queue_wait_ms=self._longest * 1e3,
            )
