from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.objective import (
    NotFiniteError,
    ObjectiveError,
    batch_loss,
    check_loss,
    device_of,
    each_batch,
    inputs_of,
)

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(a if b is None else a + b)


@pytest.mark.parametrize(
    "inputs", [X, (X,), (X / 2, X / 2), {"a": X}, {"a": X / 2, "b": X / 2}, [X / 2, X / 2],
               ((X / 2,), {"b": X / 2})],
)  # fmt: skip
def test_inputs_are_a_tensor_positional_or_named_arguments(inputs: Any) -> None:
    model = Two()
    expected = F.cross_entropy(model(X), Y)
    torch.testing.assert_close(batch_loss(model, (inputs, Y), F.cross_entropy), expected)
    torch.testing.assert_close(batch_loss(model, [inputs, Y], F.cross_entropy), expected)
    graph = fxopt.capture(model, inputs if not isinstance(inputs, list) else tuple(inputs))
    torch.testing.assert_close(batch_loss(graph, (inputs, Y), F.cross_entropy), expected)


def test_a_model_may_have_its_own_loss() -> None:
    class Own(nn.Linear):
        def forward(self, x: Any, labels: Any = None) -> Any:
            y = super().forward(x)
            return {"logits": y} if labels is None else {"loss": F.cross_entropy(y, labels)}

    model = Own(3, 2)
    for batch in ({"x": X, "labels": Y}, UserDict({"x": X, "labels": Y})):
        assert batch_loss(model, batch, None).requires_grad
    with pytest.raises(ObjectiveError, match="return its own loss"):
        batch_loss(model, {"x": X}, None)


@pytest.mark.parametrize(
    "loss, says",
    [
        (lambda y, t: y, r"shape \[4, 2\].*loss.mean"),
        (lambda y, t: 1.0, "floating-point tensor, got 1.0"),
        (lambda y, t: y.sum().long(), "floating-point tensor, got a tensor of torch.int64"),
        (lambda y, t: y.sum().detach(), "depends on no weight"),
    ],
)
def test_a_loss_that_is_none(loss: Any, says: str) -> None:
    with pytest.raises(ObjectiveError, match=says):
        batch_loss(Two(), (X, Y), loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value: float) -> None:
    with pytest.raises(NotFiniteError, match=str(value)):
        batch_loss(Two(), (X, Y), lambda y, t: y.sum() * value)


def test_without_gradients_none_are_asked_for() -> None:
    with torch.no_grad():
        assert batch_loss(Two(), (X, Y), F.cross_entropy).shape == ()
    assert batch_loss(Two(), (X, Y), lambda y, t: y.sum()[None]).shape == ()


@pytest.mark.parametrize(
    "batch, says",
    [
        (X, "got a Tensor"),
        ((X, X, Y), "got a tuple of 3"),
        ({"a": X}, "pass loss=None"),
        (3, "got a int"),
    ],
)
def test_a_batch_of_another_form(batch: Any, says: str) -> None:
    with pytest.raises(ObjectiveError, match=says):
        batch_loss(Two(), batch, F.cross_entropy)


def test_without_a_loss_a_batch_may_be_the_inputs_alone() -> None:
    assert inputs_of(X).args == (X,)
    assert inputs_of({"a": X}).kwargs == {"a": X}
    with pytest.raises(ObjectiveError, match="got a tuple of 3"):
        inputs_of((X, X, X))


def test_data() -> None:
    assert list(each_batch([1, 2])) == [1, 2]
    with pytest.raises(ObjectiveError, match="no batches"):
        list(each_batch([]))
    with pytest.raises(ObjectiveError, match="`images` must be an iterable"):
        list(each_batch(3, "images"))  # type: ignore[arg-type]
    once = iter([1])
    assert list(each_batch(once)) == [1]
    with pytest.raises(ObjectiveError, match="only once"):
        list(each_batch(once))


def test_asking_for_the_device_copies_nothing() -> None:
    model = Two()
    graph = fxopt.capture(model, X)
    assert device_of(graph) == device_of(model) == torch.device("cpu")
    assert graph.info.shares_storage
    assert device_of(nn.Identity()) == torch.device("cpu")


def test_what_is_no_loss() -> None:
    with pytest.raises(fxopt.OptionError, match=r"pass CrossEntropyLoss\(\)"):
        check_loss(nn.CrossEntropyLoss)
    with pytest.raises(fxopt.OptionError, match="must be a function"):
        check_loss("cross_entropy")
