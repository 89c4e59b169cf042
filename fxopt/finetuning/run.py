"""The loop: take a batch, make a step, and know at any time where the run stands."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, Generic

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import OptionError
from fxopt.finetuning import weights
from fxopt.finetuning.checkpoint import Checkpoint
from fxopt.finetuning.display import Display
from fxopt.finetuning.history import Epoch, FineTuned, Model
from fxopt.finetuning.interrupts import Interrupts
from fxopt.finetuning.position import Budget, Position
from fxopt.finetuning.settings import Evaluate, Settings
from fxopt.finetuning.step import Step
from fxopt.finetuning.streams import Stream, from_plain, generators, plain, skip
from fxopt.inputs import Inputs
from fxopt.objective import Batches, NotFiniteError, ObjectiveError, each_batch, inputs_of


class Run(Generic[Model]):
    """One run of training. It changes `student`, which is its own, through `step`."""

    def __init__(
        self,
        student: Model,
        step: Step,
        data: Batches,
        evaluate: Evaluate | None,
        settings: Settings,
        display: Display,
        checkpoint: Checkpoint | None,
        save_every: float,
    ) -> None:
        self.student, self.step, self.data, self.evaluate = student, step, data, evaluate
        self.settings, self.display, self.checkpoint = settings, display, checkpoint
        self.budget, self.at = Budget.of(settings), Position(length=_length(data))
        self.model_stream, self.data_stream = Stream(settings.seed), Stream(settings.seed + 1)
        self.history: list[Epoch] = []
        self.best: dict[str, torch.Tensor] | None = None
        self.stopped: str | None = None
        self._save_every, self._saved = save_every, time.monotonic()  # minutes, seconds
        self._start_of_data: dict[str, Any] = {}
        self._finite = weights.finite(student)
        self._norms = False

    def train(self) -> FineTuned[Model]:
        """Train until the budget is spent, and return the result."""
        deferred = self.checkpoint is not None
        with self.model_stream, self.display, Interrupts(deferred=deferred) as interrupts:
            found = None if self.checkpoint is None else self.checkpoint.read()
            self.student.train()
            self._norms = weights.has_batch_norm(self.student)
            if found is None:
                self._begin()
            else:
                self._resume(found)
            while self.stopped is None:
                self._epoch(interrupts)
        return self._deliver()

    # -- one epoch --------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.step.schedule.at(0.0)
        self._note_data()
        self._save()  # a path that cannot be written shows now, not after hours
        self._record(None, self._score())
        self._save()

    def _epoch(self, interrupts: Interrupts) -> None:
        batches = self._batches(interrupts)
        while True:
            with self.at.clock():
                batch = next(batches, None)
                if batch is None:
                    break
                loss = self._take(batch)
            if loss is not None:
                self.display.step(self.at, loss)
            if self.budget.progress(self.at) >= 1:
                break
            if interrupts.asked:
                self._stop()
            if time.monotonic() - self._saved >= self._save_every * 60:
                self._save()
        self._end_of_epoch(ended=batch is None)
        if interrupts.asked:
            self._stop()

    def _batches(self, interrupts: Interrupts) -> Iterator[Any]:
        """Yield the batches of this epoch that are left, with the data's random numbers."""
        with self.data_stream:
            batches = each_batch(self.data)
            skip(batches, self.at.batch)
        while True:
            try:
                with self.data_stream:
                    batch = next(batches, None)
            except Exception:
                if interrupts.asked:  # which ends a DataLoader's workers, too
                    self._stop()
                raise
            if batch is None:
                return
            yield batch

    def _take(self, batch: Any) -> float | None:
        """Train on a batch; None where it is skipped: one sample has no batch statistics."""
        at = self.at
        at.batch += 1
        try:
            samples = _samples(inputs_of(batch, self.step.loss))
            at.largest = max(at.largest, samples)
            if self._norms and samples == 1 < at.largest:
                return None
            loss = self.step(batch)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error} {self._where()} {self._advice()}") from error
        except ObjectiveError as error:
            raise ObjectiveError(f"{error} {self._where()}") from error
        at.steps += 1
        at.steps_of_epoch += 1
        at.loss += loss
        self.step.schedule.at(self.budget.progress(at))
        return loss

    def _where(self) -> str:
        return f"This was batch {self.at.batch} of epoch {self.at.epoch + 1}."

    def _advice(self) -> str:
        kept = " The checkpoint from before was kept." if self.checkpoint is not None else ""
        return (
            f"Try a lower lr (it was {self.step.schedule.lr:.2g}), clip_grad=1.0 or warmup=0.1; "
            f"look at what the data holds there.{kept}"
        )

    def _end_of_epoch(self, *, ended: bool) -> None:
        at = self.at
        if at.steps_of_epoch == 0:
            raise ObjectiveError(
                "Every batch of this epoch has one sample, which a batch norm cannot train on."
            )
        for bad in sorted(self._finite - weights.finite(self.student)):
            raise NotFiniteError(
                f"'{bad}' holds nan or infinity now. {self._where()} {self._advice()}"
            )
        loss = at.loss / at.steps_of_epoch
        if ended:
            at.length = at.batch
        at.epoch, at.batch, at.loss, at.steps_of_epoch = at.epoch + 1, 0, 0.0, 0
        over = self.budget.progress(at) >= 1
        due = over or at.epoch % self.settings.evaluate_every == 0
        score = self._score() if due else None
        self.step.schedule.after_epoch(score)
        self.step.schedule.at(self.budget.progress(at))
        self._record(loss, score)
        if over:
            self.stopped = "budget"
        elif self.settings.patience is not None and at.stale >= self.settings.patience:
            self.stopped = "patience"
        self._note_data()
        self._save()

    # -- scores -----------------------------------------------------------------------------------

    def _score(self) -> float | None:
        if self.evaluate is None:
            return None
        subject = self.step.subject
        subject.eval()
        with torch.no_grad():
            score = float(self.evaluate(subject))
        self.student.train()
        if math.isnan(score):
            raise OptionError("`evaluate` returned nan: it must return a number, higher is better.")
        if self.best is None or score > self._best_row().score:  # type: ignore[operator]
            self.best, self.at.stale = weights.kept(subject), 0
        else:
            self.at.stale += 1
        return score

    def _record(self, loss: float | None, score: float | None) -> None:
        at = self.at
        minutes, cpu_minutes = at.seconds / 60, at.cpu_seconds / 60
        row = Epoch(at.epoch, at.steps, loss, score, self.step.schedule.lr, minutes, cpu_minutes)
        self.history.append(row)
        self.display.epoch(row)

    def _best_row(self) -> Epoch:
        """Return the row of the model that is returned: the first of the highest scores."""
        scored = [row for row in self.history if row.score is not None]
        return max(scored, key=lambda row: row.score or 0.0) if scored else self.history[-1]

    # -- keeping ----------------------------------------------------------------------------------

    def _note_data(self) -> None:
        """Remember the random state that the next epoch's data starts from."""
        own = [one.get_state() for one in generators(self.data)]
        self._start_of_data = {"stream": plain(self.data_stream.state), "own": own}

    def _save(self) -> None:
        self._saved = time.monotonic()
        if self.checkpoint is None:
            return
        self.checkpoint.write({
            "at": dataclasses.asdict(self.at),
            "history": [dataclasses.asdict(row) for row in self.history],
            "stopped": self.stopped,
            "best": self.best,
            "step": self.step.state(),
            "random": plain(self.model_stream.now()),
            "data": self._start_of_data,
        })

    def _resume(self, found: dict[str, Any]) -> None:
        self.at = Position(**found["at"])
        self.history = [Epoch(**row) for row in found["history"]]
        self.stopped, self.best = found["stopped"], found["best"]
        self.step.load(found["step"])
        self._start_of_data = found["data"]
        self.data_stream.state = from_plain(found["data"]["stream"])
        for one, state in zip(generators(self.data), found["data"]["own"], strict=True):
            one.set_state(state)
        self.model_stream.jump(from_plain(found["random"]))
        if not self.history:  # it was stopped before the first evaluation ended
            self._record(None, self._score())

    def _stop(self) -> None:
        assert self.checkpoint is not None
        self._save()
        raise KeyboardInterrupt(
            f"The run stands in '{self.checkpoint.path}' after step {self.at.steps}; the same call "
            "goes on from there."
        )

    def _deliver(self) -> FineTuned[Model]:
        student = self.student
        if self.best is not None:
            weights.put_back(student, self.best)
        elif self.step.subject is not student:
            weights.put_back(student, weights.kept(self.step.subject))
        self.step.optimizer.zero_grad(set_to_none=True)
        if self.settings.channels_last:
            weights.to_format(student, torch.contiguous_format)
        student.eval()
        assert self.stopped is not None
        return FineTuned(student, tuple(self.history), self._best_row(), self.stopped)


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # an endless or one-way source has none
        return None


def _samples(inputs: Inputs) -> int:
    """Return the size of the first dimension of the first tensor; 0 where there is none."""
    tensors = [
        value
        for value in pytree.tree_leaves((inputs.args, inputs.kwargs))
        if isinstance(value, torch.Tensor) and value.dim()
    ]
    return len(tensors[0]) if tensors else 0
