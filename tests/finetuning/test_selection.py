from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxopt
from tests.finetuning.subjects import accuracy, graph, network, same, shuffled, tune, weights


def scores(*values: float) -> tuple[Callable[[Any], float], list[dict[str, torch.Tensor]]]:
    """An `evaluate` that says these, and the weights that it was shown."""
    shown: list[dict[str, torch.Tensor]] = []

    def evaluate(model: Any) -> float:
        assert not model.training and not torch.is_grad_enabled()
        shown.append(weights(model))
        return values[len(shown) - 1]

    return evaluate, shown


@pytest.mark.parametrize("make", [network, graph], ids=["module", "graph"])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_early_stopping_restores_the_best(make: Any, ema: float | None) -> None:
    evaluate, shown = scores(0.1, 0.5, 0.9, 0.9, 0.2, 0.8)
    result = tune(make(), shuffled(), epochs=9, evaluate=evaluate, patience=3, ema=ema)
    assert result.stopped == "patience" and len(shown) == 6
    assert result.best.epoch == 2 and result.score == 0.9
    assert same(weights(result.model), shown[2]) and not same(shown[2], shown[3])


def test_patience_starts_anew_with_every_better_score() -> None:
    evaluate, _ = scores(0.1, 0.0, 0.2, 0.1, 0.3, 0.2)
    result = tune(network(), shuffled(), epochs=5, evaluate=evaluate, patience=2)
    assert result.stopped == "budget" and result.best.epoch == 4


def test_scores_below_zero_are_scores() -> None:
    evaluate, shown = scores(-3.0, -1.0, -2.0)
    result = tune(network(), shuffled(), epochs=2, evaluate=evaluate)
    assert result.best.epoch == 1 and same(weights(result.model), shown[1])


def test_training_that_only_harms_returns_the_model_as_it_was() -> None:
    model = network()
    evaluate, _ = scores(1.0, 0.0, 0.0)
    result = tune(model, shuffled(), epochs=2, evaluate=evaluate)
    assert result.best.epoch == 0 and same(weights(result.model), weights(model))


def test_it_evaluates_every_nth_epoch_and_at_the_end() -> None:
    evaluate, _ = scores(0.1, 0.2, 0.3, 0.4)
    result = tune(network(), shuffled(), epochs=5, evaluate=evaluate, evaluate_every=2)
    assert [row.score for row in result.history] == [0.1, None, 0.2, None, 0.3, 0.4]


def test_without_scores_the_last_weights_are_returned() -> None:
    result = tune(network(), shuffled(), epochs=2)
    assert result.best is result.history[-1] and result.score is None


def test_a_score_of_nan_is_refused() -> None:
    with pytest.raises(fxopt.OptionError, match="returned nan"):
        tune(network(), shuffled(), evaluate=lambda model: float("nan"))


def test_patience_without_scores_is_refused() -> None:
    with pytest.raises(fxopt.OptionError, match="pass evaluate="):
        tune(network(), shuffled(), patience=2)
    assert tune(network(), shuffled(), patience=9, evaluate=accuracy).stopped == "budget"
