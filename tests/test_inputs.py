"""Example inputs: the forms they may have, and what a model says about its own."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.inputs import as_inputs, evaluation, infer_inputs

X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, X), (X, X), {}),
        ([X, X], (X, X), {}),
        ({"x": X}, (), {"x": X}),
        (((X,), {"y": X}), (X,), {"y": X}),
        (((), {"y": X}), (), {"y": X}),
        (([X], {"y": X}), ([X], {"y": X}), {}),  # a list is no tuple of arguments
        (((X,), {"y": X}, X), ((X,), {"y": X}, X), {}),
        (None, (None,), {}),
        ((), (), {}),
    ],
)
def test_the_forms_of_example_inputs(given: Any, args: Any, kwargs: Any) -> None:
    inputs = as_inputs(given)
    assert repr((inputs.args, inputs.kwargs)) == repr((args, kwargs))


class Lightning(nn.Linear):
    example_input_array = X


class Timm(nn.Conv2d):
    default_cfg = {"input_size": (3, 17, 19)}  # noqa: RUF012


class Speech(nn.Linear):
    main_input_name = "input"
    config = object()
    dummy_inputs = {"input": torch.ones(5, 4)}  # noqa: RUF012


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Lightning(4, 2), (2, 4)),
        (Timm(3, 4, 3), (1, 3, 17, 19)),
        (Speech(4, 2), (5, 4)),
        (nn.Sequential(nn.Linear(7, 2)), (1, 7)),
        (nn.Sequential(nn.Embedding(9, 2)), (1, 8)),
        (nn.Sequential(nn.Conv1d(2, 3, 3)), (1, 2, 224)),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(2700, 2)), (1, 2, 32, 32)),
    ],
)
def test_what_a_model_says_about_its_input(model: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = infer_inputs(model)
    assert inputs is not None
    (tensor,) = (*inputs.args, *inputs.kwargs.values())
    assert tuple(tensor.shape) == shape
    fxopt.capture(model)


def test_inferred_inputs_have_the_dtype_of_the_weights_and_are_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "fxopt"):
        graph = fxopt.capture(nn.Linear(4, 2).double())
    assert graph.info.example_inputs[0].dtype == torch.float64
    assert "example inputs inferred from the first layer: float64[1, 4]" in caplog.text


class Two(nn.Linear):
    def forward(self, x: Any, y: Any) -> Any:
        return super().forward(x) + y


class Pixels(nn.Sequential):
    """Its first layer is a Linear, but it wants an image before."""

    def forward(self, x: torch.Tensor) -> Any:
        batch, channels, height, width = x.shape
        return super().forward(x.reshape(batch, channels * height * width))


@pytest.mark.parametrize("model", [Two(4, 4), Pixels(nn.Linear(48, 2)), nn.ReLU(), nn.Sequential()])
def test_where_nothing_can_be_inferred_nothing_is_guessed(model: nn.Module) -> None:
    assert infer_inputs(model) is None
    with pytest.raises(fxopt.CaptureError, match="none can be inferred"):
        fxopt.capture(model)


def test_inferring_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    infer_inputs(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_evaluation_sets_flags_only_and_sets_them_back() -> None:
    class Fuses(nn.Sequential):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("train() may do anything")

    model = Fuses(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[0].training = False
    with evaluation(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True, True]


def test_a_model_in_training_mode_is_captured_in_evaluation_mode_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.9)).train()
    with caplog.at_level(logging.INFO, "fxopt"):
        graph = fxopt.capture(model, X)
    assert "captured in evaluation mode" in caplog.text and model[1].training
    assert torch.equal(graph(X), model[0](X))
