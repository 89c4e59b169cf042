from __future__ import annotations

from typing import Any

import pytest
import torch

import fxopt
from tests.finetuning.subjects import network, shuffled, tune


def factory(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"epochs": None}, "one of epochs, steps, minutes or cpu_minutes. Given: none"),
        ({"epochs": 1, "minutes": 2.0}, "Given: epochs= and minutes="),
        ({"epochs": 0}, "`epochs` must be a whole number above 0"),
        ({"steps": 1.5}, "`steps` must be a whole number"),
        ({"minutes": -1.0}, "`minutes` must be a positive number"),
        ({"cpu_minutes": float("nan")}, "`cpu_minutes` must be a positive number"),
        ({"optimizer": "sdg"}, "Did you mean 'sgd'"),
        ({"optimizer": 3}, "`optimizer` must be one of sgd or adamw"),
        ({"optimizer": factory}, "`lr` is not for your own optimizer"),
        ({"optimizer": "adamw", "momentum": 0.9}, "`momentum` is not for adamw"),
        ({"lr": 0.0}, "`lr` must be a positive number"),
        ({"nesterov": True, "momentum": 0}, "needs momentum"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"schedule_every": "batch"}, "Unknown schedule_every 'batch'"),
        ({"warmup": 2.0}, "`warmup` must lie between 0 and 1"),
        ({"precision": "fp8"}, "Unknown precision 'fp8'"),
        ({"precision": "fp16"}, "needs a GPU"),
        ({"evaluate": 3}, "`evaluate` must be a function"),
        ({"evaluate_every": 0}, "`evaluate_every` must be a whole number"),
        ({"patience": 0}, "`patience` must be a whole number"),
        ({"temperature": 0}, "`temperature` must be a positive number"),
        ({"teacher_weight": 1.5}, "`teacher_weight` must lie between"),
        ({"ema": 1.5}, "`ema` must lie between"),
        ({"clip_grad": 0}, "`clip_grad` must be a positive number"),
        ({"checkpoint_minutes": -1.0}, "`checkpoint_minutes` must not be negative"),
        ({"loss": torch.nn.CrossEntropyLoss}, r"pass CrossEntropyLoss\(\)"),
    ],
)
def test_a_setting_that_cannot_be_is_said_before_anything_happens(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(fxopt.OptionError, match=says):
        tune(network(), shuffled(), **options)


def test_momentum_can_be_left_out() -> None:
    assert tune(network(), shuffled(), epochs=1, momentum=0.0).history[-1].steps == 4
