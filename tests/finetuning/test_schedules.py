from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxopt
from tests.finetuning.subjects import images, network, shuffled, tune


class Rates:
    """A loss that notes, at each step, the learning rate and the part of the budget spent."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self.seen: list[float] = []

    def make(self, parameters: Any) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.SGD(parameters, lr=0.1)
        return self.optimizer

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.optimizer.param_groups[0]["lr"])
        return F.cross_entropy(outputs, targets)


def rates(**options: Any) -> tuple[list[float], float]:
    """The rate at each step, and the one after the last."""
    note = Rates()
    result = tune(
        network(), options.pop("data", shuffled()), loss=note, optimizer=note.make, lr=None,
        **options,
    )  # fmt: skip
    return note.seen, result.history[-1].lr


def test_cosine_ends_where_the_budget_does() -> None:
    seen, last = rates(steps=8, warmup=0.0)
    assert seen == pytest.approx([0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert last == 0.0


@pytest.mark.parametrize("known", [True, False], ids=["with-len", "without-len"])
def test_a_budget_of_epochs(known: bool) -> None:
    class Batches:
        def __iter__(self) -> Any:
            return iter([images(16)] * 4)

    if known:
        Batches.__len__ = lambda self: 4  # type: ignore[attr-defined]
    seen, last = rates(data=Batches(), epochs=2, warmup=0.0, schedule="linear")
    usual = [0.1 * (1 - i / 8) for i in range(8)]
    # without a length, the first epoch says it
    assert seen == pytest.approx(usual if known else [0.1] * 4 + usual[4:])
    assert last == 0.0


def test_warmup_rises_in_a_straight_line_and_linear_falls_in_one() -> None:
    seen, last = rates(steps=8, warmup=0.5, schedule="linear")
    assert seen == pytest.approx([0.001, 0.025, 0.05, 0.075, 0.1, 0.075, 0.05, 0.025])
    assert last == 0.0


def test_constant() -> None:
    seen, last = rates(steps=4, warmup=0.0, schedule="constant")
    assert seen == [0.1] * 4 and last == 0.1


@pytest.mark.parametrize("unit", ["minutes", "cpu_minutes"])
def test_a_budget_of_time_is_kept_and_the_schedule_ends_with_it(unit: str) -> None:
    result = tune(network(), shuffled(), warmup=0.0, **{unit: 0.015})
    *before, last = result.history
    assert getattr(before[-1], unit) < 0.015 <= getattr(last, unit) and last.lr == 0.0
    rates = [row.lr for row in before]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) > 2


def test_evaluating_does_not_spend_the_budget() -> None:
    def slowly(model: Any) -> float:
        time.sleep(0.1)
        return 0.0

    result = tune(network(), shuffled(), epochs=1, evaluate=slowly)
    assert result.history[0].minutes == 0.0 < result.history[1].minutes


def step_by_half(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_a_scheduler_of_ones_own_counts_epochs_or_steps() -> None:
    seen, last = rates(epochs=2, schedule=step_by_half)
    assert seen == [0.1] * 4 + [0.05] * 4 and last == 0.025
    seen, last = rates(epochs=1, schedule=step_by_half, schedule_every="step")
    assert seen == [0.1, 0.05, 0.025, 0.0125] and last == 0.1 / 16


def test_a_plateau_needs_scores() -> None:
    def plateau(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", 0.5, patience=0)

    _, last = rates(epochs=3, schedule=plateau, evaluate=lambda model: 1.0)
    assert last == 0.025  # the first score is the best; the others are none better
    with pytest.raises(fxopt.OptionError, match="pass evaluate="):
        rates(epochs=1, schedule=plateau)


def test_what_is_no_scheduler_and_no_optimizer() -> None:
    with pytest.raises(fxopt.OptionError, match=r"`schedule` must return"):
        rates(epochs=1, schedule=lambda optimizer: None)
    with pytest.raises(fxopt.OptionError, match=r"`optimizer` must return"):
        tune(network(), shuffled(), lr=None, optimizer=lambda parameters: None)
