"""One step of training: a batch, its loss, its gradients, and what they do to the weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from fxopt.errors import OptionError
from fxopt.finetuning import weights
from fxopt.finetuning.distillation import distillation_loss
from fxopt.finetuning.schedule import Schedule, make_optimizer
from fxopt.finetuning.settings import Settings
from fxopt.inputs import map_tensors
from fxopt.objective import Loss, NotFiniteError, call, device_of, inputs_of, outputs_and_loss


class Step:
    """Makes steps with `student`, which it changes; remembers what optimizers remember."""

    def __init__(
        self,
        student: torch.nn.Module,
        loss: Loss | None,
        teacher: torch.nn.Module | None,
        settings: Settings,
    ) -> None:
        self.student, self.loss, self.teacher, self.settings = student, loss, teacher, settings
        self._trained = [p for p in student.parameters() if p.requires_grad]
        if not self._trained:
            raise OptionError("No weight requires grad: there is nothing to train.")
        if settings.channels_last:
            weights.to_format(student, torch.channels_last)
        self._device = device_of(student)
        if settings.precision == "fp16" and self._device.type == "cpu":
            raise OptionError('precision="fp16" needs a GPU; on a CPU use precision="bf16".')
        scales = settings.precision == "fp16"
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=scales)
        self._average: AveragedModel | None = None
        if settings.ema is not None:
            self._average = AveragedModel(student, multi_avg_fn=_averaging(settings.ema))
        self.optimizer = make_optimizer(settings, self._trained)
        self.schedule = Schedule(settings, self.optimizer)

    @property
    def subject(self) -> torch.nn.Module:
        """The model that counts: the student, or the average of what it was."""
        return self.student if self._average is None else self._average.module

    def __call__(self, batch: Any) -> float:
        """Train on a batch and return its loss. Raises ObjectiveError, before any change."""
        if self.settings.channels_last:
            batch = _in_channels_last(batch)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self._loss(batch)
        self._scaler.scale(loss).backward()
        if self.settings.clip_grad is not None:
            self._scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._trained, self.settings.clip_grad)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update_parameters(self.student)
        self.schedule.after_step()
        return loss.item()

    def _loss(self, batch: Any) -> torch.Tensor:
        outputs, loss = outputs_and_loss(self.student, batch, self.loss)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            told = call(self.teacher, inputs_of(batch, self.loss))
        distance = distillation_loss(outputs, told, self.settings.temperature)
        if not distance.isfinite():
            raise NotFiniteError(f"The distance to the teacher is {distance.item()}.")
        weight = self.settings.teacher_weight
        return (1 - weight) * loss + weight * distance

    def _autocast(self) -> AbstractContextManager[Any]:
        precision = self.settings.precision
        if precision is None:
            return nullcontext()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return torch.autocast(self._device.type, dtype)

    def state(self) -> dict[str, Any]:
        """Return all that the next step depends on, but for random numbers, as a checkpoint."""
        own = self.schedule.own
        return {
            "student": weights.kept(self.student),
            "average": None if self._average is None else self._average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "schedule": None if own is None else own.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        weights.put_back(self.student, state["student"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.schedule.own is not None:
            self.schedule.own.load_state_dict(state["schedule"])


def _averaging(decay: float) -> Any:
    """Return a moving average that is faster at the start: min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def average(averages: list[torch.Tensor], current: list[torch.Tensor], count: Any) -> None:
        count = float(count)
        weight = 1 - min(decay, (1 + count) / (10 + count))
        torch._foreach_lerp_(averages, current, weight)

    return average


def _in_channels_last(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)):
        return map_tensors(batch[0], weights.images_to_format), batch[1]
    return map_tensors(batch, weights.images_to_format)
