"""The settings of a run, checked before anything else happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from fxopt.errors import OptionError, unknown_name

MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]
Evaluate = Callable[[Any], float]

BUDGETS = ("epochs", "steps", "minutes", "cpu_minutes")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class Settings:
    """What `finetune` was asked for; see there."""

    epochs: int | None
    steps: int | None
    minutes: float | None
    cpu_minutes: float | None
    optimizer: str | MakeOptimizer
    lr: float | None
    weight_decay: float | None
    momentum: float | None
    nesterov: bool | None
    schedule: str | MakeScheduler
    schedule_every: str
    warmup: float
    precision: str | None
    evaluate_every: int
    patience: int | None
    temperature: float
    teacher_weight: float
    ema: float | None
    clip_grad: float | None
    seed: int
    channels_last: bool

    def __post_init__(self) -> None:
        self._check_budget()
        self._check_optimizer()
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("schedule_every", self.schedule_every, ("epoch", "step"))
        _one_of("precision", self.precision, ("bf16", "fp16", None))
        _between("warmup", self.warmup, 0, 1)
        _between("teacher_weight", self.teacher_weight, 0, 1)
        _positive("temperature", self.temperature)
        _positive("clip_grad", self.clip_grad)
        _whole("evaluate_every", self.evaluate_every)
        _whole("patience", self.patience)
        if self.ema is not None:
            _between("ema", self.ema, 0, 1)

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(f"{name}=" for name in given) or "none"
            raise OptionError(f"Say how long to train: one of {_listed(BUDGETS)}. Given: {got}.")
        for name in ("epochs", "steps"):
            _whole(name, getattr(self, name))
        for name in ("minutes", "cpu_minutes"):
            _positive(name, getattr(self, name))

    def _check_optimizer(self) -> None:
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        own = {"lr", "weight_decay"} if self.optimizer == "adamw" else set()
        if self.optimizer == "sgd":
            own = {"lr", "weight_decay", "momentum", "nesterov"}
        for name in ("lr", "weight_decay", "momentum", "nesterov"):
            if getattr(self, name) is not None and name not in own:
                whose = "your own optimizer" if callable(self.optimizer) else self.optimizer
                raise OptionError(f"`{name}` is not for {whose}: set it where that is made.")
        _positive("lr", self.lr)
        if self.nesterov and self.momentum == 0:
            raise OptionError("Nesterov's method needs momentum: set momentum=0.9, say.")

    def plain(self) -> dict[str, Any]:
        """Return the settings as plain data; functions by name."""
        return {one.name: spelled(getattr(self, one.name)) for one in fields(self)}


def spelled(value: Any) -> Any:
    """Return plain data as it is, and a function by its name."""
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value


def _one_of(name: str, value: Any, known: tuple[str | None, ...]) -> None:
    if value in known or (callable(value) and name in ("optimizer", "schedule")):
        return
    if isinstance(value, str):
        raise unknown_name(name, value, [one for one in known if one is not None])
    raise OptionError(f"`{name}` must be one of {_listed(known)}, got {value!r}.")


def _between(name: str, value: Any, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise OptionError(f"`{name}` must lie between {low} and {high}, got {value!r}.")


def _positive(name: str, value: Any) -> None:
    if value is not None and not (_is_number(value) and value > 0):
        raise OptionError(f"`{name}` must be a positive number, got {value!r}.")


def _whole(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value is not None and not (whole and value > 0):
        raise OptionError(f"`{name}` must be a whole number above 0, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _listed(names: Iterable[Any]) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} or {last}"
