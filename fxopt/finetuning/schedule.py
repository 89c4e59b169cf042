"""Learning rates that follow how much of the budget is spent, so that they end where it does."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.errors import OptionError
from fxopt.finetuning.settings import Settings

# Of what a factory gives the optimizer, or of what is usual where nothing was said.
_USUAL = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
    "adamw": {"lr": 1e-4, "weight_decay": 0.01},
}


def make_optimizer(
    settings: Settings, parameters: list[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, or that the user's function makes."""
    if callable(settings.optimizer):
        made = settings.optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise OptionError(
                f"`optimizer` must return a torch.optim.Optimizer for the parameters it is given, "
                f"such as `lambda parameters: torch.optim.Adam(parameters, 1e-4)`; it returned "
                f"{type(made).__name__}."
            )
        return made
    options: dict[str, Any] = dict(_USUAL[settings.optimizer])
    for name in options:
        if getattr(settings, name) is not None:
            options[name] = getattr(settings, name)
    if options.get("momentum") == 0:
        options["nesterov"] = False
    kind = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    return kind(parameters, **options)


class Schedule:
    """Sets the learning rates: warms up in a straight line, then falls as its name says.

    "cosine" falls to 0 along half a cosine (Loshchilov and Hutter: SGDR, ICLR 2017, equation 5,
    without restarts), "linear" in a straight line, "constant" not at all.
    """

    def __init__(self, settings: Settings, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.warmup = settings.warmup
        self.shape = settings.schedule if isinstance(settings.schedule, str) else None
        self.every = settings.schedule_every
        self.own: Any = None
        if callable(settings.schedule):
            self.own = settings.schedule(optimizer)
            if not hasattr(self.own, "step") or not hasattr(self.own, "state_dict"):
                raise OptionError(
                    "`schedule` must return a scheduler of torch.optim.lr_scheduler for the "
                    f"optimizer it is given; it returned {type(self.own).__name__}."
                )

    def at(self, progress: float) -> None:
        """Set the learning rates for the next step."""
        if self.own is None:
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak * self.factor(progress)

    def factor(self, progress: float) -> float:
        """Return the part of the highest learning rate: progress runs from 0 to 1."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.01)
        if self.shape == "constant" or self.warmup == 1:
            return 1.0
        rest = (progress - self.warmup) / (1 - self.warmup)
        return (1 + math.cos(math.pi * rest)) / 2 if self.shape == "cosine" else 1 - rest

    def after_step(self) -> None:
        """Let the user's own scheduler follow, where it counts steps."""
        if self.own is not None and self.every == "step":
            self.own.step()

    def after_epoch(self, score: float | None) -> None:
        """Let the user's own scheduler follow, where it counts epochs."""
        if self.own is None or self.every != "epoch":
            return
        if not isinstance(self.own, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.own.step()
        elif score is None:
            raise OptionError("ReduceLROnPlateau needs a score after each epoch: pass evaluate=.")
        else:
            self.own.step(score)

    @property
    def lr(self) -> float:
        """The learning rate now, of the first group of parameters."""
        return float(self.optimizer.param_groups[0]["lr"])
