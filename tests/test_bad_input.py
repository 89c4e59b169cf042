"""Whatever is wrong with a model or its inputs, one fxopt error says what, where and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from tests.test_capture import Model

X = torch.linspace(-1, 1, 12).reshape(3, 4)


def refused(model: Any, inputs: Any = (X,), **options: Any) -> str:
    with pytest.raises(fxopt.CaptureError) as caught:
        fxopt.capture(model, inputs, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (nn.Linear, "got the class Linear itself. Make an instance: Linear(...)"),
        (torch.relu, "A function can be wrapped in an nn.Module"),
        (3, "got int"),
        (None, "got NoneType"),
        ("resnet18", "got str"),
        ([nn.Linear(4, 4)], "got list"),
        (nn.ModuleList([nn.Linear(4, 4)]), "ModuleList has no forward()"),
        (nn.Module(), "Module has no forward()"),
    ],
)
def test_what_is_no_model(model: Any, part: str) -> None:
    assert part in refused(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_cannot_be_captured_as_it_is() -> None:
    linear = nn.Linear(4, 4)
    assert "The model is a TorchScript module" in refused(torch.jit.trace(linear, X))
    assert "The submodule '0' is" in refused(nn.Sequential(torch.jit.script(linear)))
    assert "'weight' is on the meta device" in refused(nn.Linear(4, 4, device="meta"))
    assert "'1.weight' is lazy" in refused(nn.Sequential(nn.ReLU(), nn.LazyLinear(4)))
    sparse = Model(lambda self, x: self.w @ x, w=torch.eye(3).to_sparse())
    assert "'w' is sparse" in refused(sparse) and ".to_dense()" in refused(sparse)
    quantized = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    assert "'w' is quantized" in refused(Model(lambda self, x: x, w=quantized))
    assert "Input 'input' is quantized" in refused(linear, (quantized,))


class Thing:
    pass


@pytest.mark.parametrize(
    ("inputs", "parts"),
    [
        (X[:, :2], ["Linear does not run on the example inputs", "mat1 and mat2"]),
        ((X, X), ["do not fit Linear.forward(input", "too many positional"]),
        ((), ["missing a required argument: 'input'"]),
        ({"x": X}, ["missing a required argument: 'input'"]),
        (X.double(), ["linear gets torch.float64 and torch.float32", "dtype of the weights"]),
        (torch.arange(4), ["linear gets torch.int64"]),
        (X.to("meta"), ["Input 'input' is on the meta device"]),
        (X.to_sparse(), ["Input 'input' is sparse", "input.to_dense()"]),
        (np.zeros((3, 4), dtype=np.float32), ["numpy.ndarray", "torch.as_tensor(input)"]),
        ([[Thing()]], ["Input 'input[0]' has the type Thing", "register_pytree_node"]),
        ("text", ["does not run", "must be Tensor, not str"]),
        ((None,), ["does not run", "must be Tensor, not NoneType"]),
    ],
)
def test_inputs_that_do_not_fit_the_model(inputs: Any, parts: list[str]) -> None:
    text = refused(nn.Linear(4, 4), inputs)
    for part in parts:
        assert part in text


def two_ways(self: Any, x: Any) -> Any:
    if x.sum() > 0:  # this line
        return x + 1
    return x - 1


def a_loop(self: Any, x: Any) -> Any:
    while x.abs().sum() < 100:  # this line
        x = x * 2
    return x


def its_own_error(self: Any, x: Any) -> Any:
    raise ValueError("only five channels, please")  # this line


def resized(self: Any, x: Any) -> Any:
    return x.clone().resize_(2)  # this line


@pytest.mark.parametrize("function", [two_ways, a_loop, its_own_error, resized])
def test_the_message_shows_the_users_source_line(function: Callable[..., Any]) -> None:
    text = refused(nn.Sequential(nn.Linear(4, 4), Model(function)))
    assert "test_bad_input.py:" in text and "# this line" in text


def test_control_flow_on_values_names_the_remedies() -> None:
    text = refused(Model(two_ways))
    for part in ("torch.where", "torch.cond", "submodules=", "non-strict:", "strict:"):
        assert part in text


def test_the_models_own_error_is_handed_on() -> None:
    text = refused(Model(its_own_error))
    assert "ValueError: only five channels, please" in text and "torch.export said" not in text


def test_nothing_is_printed_when_capture_fails(capfd: pytest.CaptureFixture[str]) -> None:
    refused(Model(two_ways))
    refused(nn.Linear(4, 4), X[:, :2])
    assert capfd.readouterr() == ("", "")


def test_the_models_own_prints_stay(capfd: pytest.CaptureFixture[str]) -> None:
    def forward(self: Any, x: Any) -> Any:
        import sys

        print("here", file=sys.stderr)
        return x

    fxopt.capture(Model(forward), X)
    assert "here" in capfd.readouterr().err


def test_nesting_beyond_the_recursion_limit() -> None:
    model: nn.Module = nn.ReLU()
    for _ in range(400):
        model = nn.Sequential(model)
    assert "sys.setrecursionlimit" in refused(model)


def test_a_failed_capture_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), Model(two_ways)).train()
    model[0].notes = {"kept": X}
    before = model[0].notes
    refused(model)
    assert model.training and model[0].notes is before and before["kept"] is X
    assert not model[0].running_mean.any() and model[0].num_batches_tracked == 0
