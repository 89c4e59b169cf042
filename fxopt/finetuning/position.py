"""Where a run stands, and how much of its budget that is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fxopt.finetuning.settings import BUDGETS, Settings


@dataclass
class Position:
    """Where a run stands: everything here is in its checkpoint."""

    epoch: int = 0  # epochs that are over
    batch: int = 0  # batches that were taken in this one
    steps: int = 0
    seconds: float = 0.0  # of training: evaluating and saving do not count
    cpu_seconds: float = 0.0
    loss: float = 0.0  # the sum over the steps of this epoch
    steps_of_epoch: int = 0
    length: int | None = None  # batches per epoch, where it is known
    largest: int = 0  # samples in the largest batch so far
    stale: int = 0  # evaluations since the best

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time inside."""
        wall, processor = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - wall
            self.cpu_seconds += time.process_time() - processor


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of epochs, steps, minutes or minutes of processor time."""

    unit: str
    amount: float

    @classmethod
    def of(cls, settings: Settings) -> Budget:
        """Return the one budget that was given."""
        unit = next(name for name in BUDGETS if getattr(settings, name) is not None)
        return cls(unit, float(getattr(settings, unit)))

    def progress(self, at: Position) -> float:
        """Return which part of the budget is spent: 0 at the start, 1 at the end."""
        return min(self._spent(at) / self.amount, 1.0)

    def _spent(self, at: Position) -> float:
        if self.unit == "steps":
            return at.steps
        if self.unit == "minutes":
            return at.seconds / 60
        if self.unit == "cpu_minutes":
            return at.cpu_seconds / 60
        # An epoch is over when its data is: until then, never all of it.
        part = min(at.batch / at.length, 1 - 1e-9) if at.length else 0.0
        return at.epoch + part

    def text(self, at: Position) -> str:
        """Return what is spent, for people."""
        unit = self.unit.replace("_", " ")
        if self.unit in ("epochs", "steps"):
            spent = at.epoch if self.unit == "epochs" else at.steps
            return f"{spent}/{self.amount:.0f} {unit}"
        return f"{self._spent(at):.1f}/{self.amount:g} {unit}"
