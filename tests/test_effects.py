"""Which calls may go, merge or be computed early: the pure ones, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.effects import effect, is_pure, training_flag
from tests.test_capture import Model

aten = torch.ops.aten
X = torch.linspace(-1, 1, 12).reshape(3, 4)


def effects_of(function: Callable[..., Any], training: bool = False, **parts: Any) -> list[str]:
    """Return the reasons of all calls of a model that have one."""
    graph = fxopt.capture(Model(function, **parts), X).train(training)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return [reason for reason in map(effect, calls) if reason is not None]


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: torch.sin(x) + x.sum(),
        lambda self, x: F.dropout(x, 0.5, training=False),
        lambda self, x: F.batch_norm(x, torch.zeros(4), torch.ones(4)),
        lambda self, x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda self, x: F.rrelu(x),
        lambda self, x: x.split(2)[0],
    ],
)
def test_calls_without_effects(function: Callable[..., Any]) -> None:
    assert effects_of(function) == []


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda self, x: x + torch.rand(4), "it is random"),
        (lambda self, x: torch.bernoulli(x.sigmoid()), "it is random"),
        (lambda self, x: F.dropout(x, 0.5, training=True), "it is in training mode"),
        (lambda self, x: F.rrelu(x, training=True), "it is in training mode"),
        (
            lambda self, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
            "it is random",
        ),
        (lambda self, x: x.add_(1), "it writes to its argument"),
        (
            lambda self, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
            "it holds sub-graphs",
        ),
    ],
)
def test_calls_with_an_effect(function: Callable[..., Any], reason: str) -> None:
    assert effects_of(function) == [reason]


def test_a_batch_norm_in_training_mode_has_an_effect_if_it_has_statistics_to_update() -> None:
    def forward(self: Any, x: Any) -> Any:
        return self.bn(x)

    assert effects_of(forward, bn=nn.BatchNorm1d(4)) == []
    assert effects_of(forward, training=True, bn=nn.BatchNorm1d(4)) == ["it is in training mode"]
    without = nn.BatchNorm1d(4, track_running_stats=False)
    assert effects_of(forward, training=True, bn=without) == []


def test_a_check_of_values_has_an_effect() -> None:
    def forward(self: Any, x: Any) -> Any:
        n = x.abs().sum().to(torch.int64).item()
        torch._check(n >= 0)
        torch._check(n < 1000)
        return x * n

    assert "it is an assertion" in effects_of(forward)


@torch.library.custom_op("fxopt_test::tell", mutates_args=())
def tell(x: torch.Tensor) -> torch.Tensor:
    return x * 2


tell.register_fake(torch.empty_like)


def test_a_custom_operator_may_do_anything() -> None:
    assert effects_of(lambda self, x: tell(x)) == [
        "a custom operator may do more than its schema says"
    ]


def test_inputs_and_the_output_stay_and_constants_may_go() -> None:
    graph = fxopt.capture(nn.Linear(4, 4), X)
    pure = {node.op: is_pure(node) for node in graph.graph.nodes}
    assert pure == {"placeholder": False, "get_attr": True, "call_function": True, "output": False}


@pytest.mark.parametrize(
    ("target", "position"),
    [
        (aten.batch_norm.default, 5),
        (aten.dropout.default, 2),
        (aten.lstm.input, 6),
        (aten.gru.data, 7),
        (aten.relu.default, None),
        (torch.cond, None),
    ],
)
def test_the_position_of_the_training_flag(target: Any, position: int | None) -> None:
    assert training_flag(target) == position
