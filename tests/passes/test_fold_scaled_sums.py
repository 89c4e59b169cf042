"""fold-scaled-sums: which batch norms and factors go into the layers of a sum, and which not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.capture import capture
from fxopt.passes.fold_scaled_sums import FoldScaledSums
from fxopt.testing import check_pass


class Calls(nn.Module):
    """A function of layers and the input."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def model(call: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> Calls:
    given: dict[str, Any] = {
        "a": nn.Conv2d(4, 6, 3, padding=1), "b": nn.Conv2d(4, 6, 1, bias=False),
        "norm": nn.BatchNorm2d(6),
    }  # fmt: skip
    return Calls(call, **{**given, **layers})


def image() -> torch.Tensor:
    return torch.randn(2, 4, 5, 5)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


FOLDED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "batch norm": (model(lambda m, x: m.norm(m.a(x) + m.b(F.relu(x)))), (2, 4, 5, 5)),
    "batch norm without weights": (
        model(lambda m, x: m.norm(m.a(x) + m.b(x)), norm=nn.BatchNorm2d(6, affine=False)),
        (2, 4, 5, 5),
    ),
    "difference": (model(lambda m, x: m.norm(m.b(x) - m.a(F.relu(x)))), (2, 4, 5, 5)),
    "three, with a factor": (
        model(lambda m, x: m.norm(m.a(x) - torch.add(m.b(x), m.c(x.sin()), alpha=2)),
              c=nn.Conv2d(4, 6, 1)),
        (2, 4, 5, 5),
    ),
    "factor": (model(lambda m, x: (m.a(x) + m.b(x)) * m.s, s=parameter(6, 1, 1)), (2, 4, 5, 5)),
    "number": (model(lambda m, x: 0.5 * (m.a(x) + m.b(x))), (2, 4, 5, 5)),
    "linear": (
        model(lambda m, x: m.norm(m.a(x) + m.b(x.sin())), a=nn.Linear(4, 6), b=nn.Linear(4, 6),
              norm=nn.BatchNorm1d(6)),
        (3, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_folds_into_all_layers(case: str) -> None:
    made, shape = FOLDED[case]
    after = {"batch_norm": 0, "mul": 0}
    check_pass(FoldScaledSums(), made, torch.randn(shape), after=after, rewrites=1, misses=[])


def test_the_new_graph_reads_as_expected() -> None:
    made = model(lambda m, x: m.norm(m.b(x) - m.a(x)))
    check_pass(FoldScaledSums(), made, image(), text="""
%inputs_0: f64[2,4,5,5] = input
%b_weight_scaled: f64[6,4,1,1] = constant 'b.weight_scaled'
%b_bias_scaled: f64[6] = constant 'b.bias_scaled'
%conv2d_2: f64[2,6,5,5] = conv2d(%inputs_0, %b_weight_scaled, %b_bias_scaled, [1, 1], [0, 0], [1, 1], 1)
%a_weight_scaled: f64[6,4,3,3] = constant 'a.weight_scaled'
%a_bias_scaled: f64[6] = constant 'a.bias_scaled'
%conv2d_3: f64[2,6,5,5] = conv2d(%inputs_0, %a_weight_scaled, %a_bias_scaled, [1, 1], [1, 1], [1, 1], 1)
%sub_1: f64[2,6,5,5] = sub.Tensor(%conv2d_2, %conv2d_3, alpha=1)
return (%sub_1)
""")  # noqa: E501


KEPT: dict[str, tuple[nn.Module, str]] = {
    "a term that is no layer": (model(lambda m, x: m.norm(m.a(x) + m.b(x).relu())), ""),
    "a sum that others read": (
        model(lambda m, x: (m.norm(y := m.a(x) + m.b(x)), y.relu())), ""
    ),
    "a layer that others read": (
        model(lambda m, x: (m.norm((y := m.a(x)) + m.b(x)), y.relu())), ""
    ),
    "one layer": (model(lambda m, x: m.norm(m.a(x))), ""),
    "batch statistics": (
        model(lambda m, x: m.norm(m.a(x) + m.b(x)),
              norm=nn.BatchNorm2d(6, track_running_stats=False)),
        "batch statistics",
    ),
    "other axes": (
        model(lambda m, x: (m.a(x) + m.b(x)) * m.s, s=parameter(5, 5)), "other axes than the"
    ),
    "two tensors": (model(lambda m, x: (m.a(x) + m.b(x)) * x.sum()), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_stays(case: str) -> None:
    made, reason = KEPT[case]
    misses = [reason] if reason else []
    check_pass(FoldScaledSums(), made, image(), rewrites=0, misses=misses)


def test_weights_that_are_computed_prevent_it() -> None:
    def call(m: Calls, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return m.norm(m.a(x) + F.conv2d(x, w))  # type: ignore[no-any-return, operator]

    misses = ["weight of conv2d_1 is not a constant"]
    inputs = (image(), torch.randn(6, 4, 1, 1))
    check_pass(FoldScaledSums(), model(call), inputs, rewrites=0, misses=misses)


def test_training_prevents_it() -> None:
    graph = capture(FOLDED["batch norm"][0], image())
    graph.train()
    assert not FoldScaledSums().run(graph).modified
