"""replace-linears-by-convs: which linear layers become convolutions, and which must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.backends.onnx.replace_linears_by_convs import ReplaceLinearsByConvs
from fxopt.capture import capture
from fxopt.compile import compile
from fxopt.rewrite import fuel
from fxopt.testing import check_pass, noisy, relative_error

TO_BACK, TO_FRONT = (0, 2, 3, 1), (0, 3, 1, 2)


class Calls(nn.Module):
    """A model made of named layers and a function of them and the inputs."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def between(call: Callable[[Any, torch.Tensor], torch.Tensor], **layers: nn.Module) -> Calls:
    """A model that computes with the channels last, between two transpositions."""
    return Calls(lambda m, x: call(m, x.permute(TO_BACK)).permute(TO_FRONT), **layers)


def picture(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 4, 5, 3)


def check(model: nn.Module, convs: int, permutes: int, **options: Any) -> None:
    check_pass(
        ReplaceLinearsByConvs(double=True), model, picture(),
        after={"conv2d": convs, "permute": permutes}, **{"rewrites": 1, **options},
    )  # fmt: skip


TURNED: dict[str, tuple[nn.Module, int, int]] = {  # with how many convolutions and permutes
    "one layer": (between(lambda m, x: m.a(x)), 1, 0),
    "an activation between two": (between(lambda m, x: m.b(F.gelu(m.a(x)))), 2, 0),
    "a norm before them": (between(lambda m, x: m.b(m.a(m.n(x))), n=nn.LayerNorm(4)), 2, 2),
    "a sum with what came in": (between(lambda m, x: x + m.b(m.a(x).relu())), 2, 0),
    "a scale per channel": (between(lambda m, x: m.b(m.a(x)) * m.b.bias), 2, 0),
    "numbers": (between(lambda m, x: m.b(m.a(x) * 2.5 + m.a.bias.max())), 2, 0),
    "dropout": (between(lambda m, x: m.b(m.d(m.a(x))), d=nn.Dropout()), 2, 0),
    "parts of the channels": (
        between(lambda m, x: m.b(torch.cat([*m.a(x).split([2, 4], -1)][::-1], -1))), 2, 0
    ),
    "some of the channels": (
        between(lambda m, x: m.c(m.a(x)[..., 1:5]), c=nn.Linear(4, 4)), 2, 0
    ),
    "no second transposition": (Calls(lambda m, x: m.b(m.a(x.permute(TO_BACK)))), 2, 1),
    "a transposition that is there already": (
        between(lambda m, x: m.b(m.a(y := m.n(x))) + y, n=nn.LayerNorm(4)), 2, 2
    ),
    "one that was read before": (
        Calls(lambda m, x: ((y := m.n(x.permute(TO_BACK))).permute(TO_FRONT).relu(),
                            m.b(m.a(y)).permute(TO_FRONT)), n=nn.LayerNorm(4)), 2, 2
    ),
    "one that comes later": (
        Calls(lambda m, x: (m.b(m.a(y := m.n(x.permute(TO_BACK)))).permute(TO_FRONT),
                            y.permute(TO_FRONT)), n=nn.LayerNorm(4)), 2, 2
    ),
    "another reader of the input": (
        Calls(lambda m, x: (m.a(y := x.permute(TO_BACK)).permute(TO_FRONT), y.relu())), 1, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_linear_layers_between_transpositions_become_convolutions(name: str) -> None:
    model, convs, permutes = TURNED[name]
    check(model, convs, permutes)


LEFT_ALONE: dict[str, nn.Module] = {
    "no transposition": Calls(lambda m, x: m.b(m.a(x.reshape(2, 3, 5, 4)))),
    "another transposition": Calls(lambda m, x: m.a(x.permute(0, 3, 2, 1))),
    "norms around": between(
        lambda m, x: m.o(m.b(m.a(m.n(x)))), n=nn.LayerNorm(4), o=nn.LayerNorm(4)
    ),
    "sums over pixels around": between(
        lambda m, x: m.b(m.a(x.cumsum(1)).relu()).cumsum(2)
    ),
    "tokens": Calls(lambda m, x: m.a(x.flatten(2).transpose(1, 2)).transpose(1, 2)),
    "no bias, and a transposition less on neither side": Calls(
        lambda m, x: m.c(x.permute(TO_BACK)).cumsum(1), c=nn.Linear(4, 4, bias=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_where_a_transposition_more_were_needed_they_stay(name: str) -> None:
    check_pass(ReplaceLinearsByConvs(double=True), LEFT_ALONE[name], picture(), after={"conv2d": 0},
               rewrites=0)  # fmt: skip


def test_a_tied_weight_stays_one_constant() -> None:
    twice = between(lambda m, x: m.c(m.c(x).relu()), c=nn.Linear(4, 4))
    check(twice, 0, 2, rewrites=0, misses=["used elsewhere too"])


def test_a_weight_that_is_computed_stays() -> None:
    model = between(lambda m, x: F.linear(x, m.a.weight * x.max(), m.a.bias))
    check(model, 0, 2, rewrites=0, misses=["not a constant"])


def test_a_slope_along_another_dimension_stays() -> None:
    slopes = between(lambda m, x: m.b(m.p(m.a(x))), p=nn.PReLU(5))
    check(slopes, 2, 2, rewrites=2)


def test_a_dropout_that_draws_stays() -> None:
    graph = capture(between(lambda m, x: m.d(m.a(x)), d=nn.Dropout()).eval(), (picture(),))
    graph.train()
    ReplaceLinearsByConvs().run(graph)
    assert [rank for rank in str(graph).split() if "dropout" in rank]
    assert len(graph.find(torch.ops.aten.permute.default)) == 2


def test_a_constant_that_differs_between_pixels_is_no_part_of_it() -> None:
    positions = between(lambda m, x: m.b((m.a(x) + m.p.weight).relu()), p=nn.Embedding(3, 6))
    check(positions, 2, 2, rewrites=2)


def test_half_precision_and_dynamic_sizes() -> None:
    model = between(lambda m, x: m.b(F.gelu(m.a(x))))
    check(model, 2, 0, dynamic_shapes={0: "batch", 2: "height", 3: "width"})
    check_pass(
        ReplaceLinearsByConvs(), model.half(), picture().half(), double=False, tolerance=1e-2,
        gradients=False, after={"conv2d": 2},
    )  # fmt: skip


def test_in_double_precision_they_stay_where_the_runtime_has_no_convolution() -> None:
    model = between(lambda m, x: m.b(F.gelu(m.a(x))))
    check_pass(
        ReplaceLinearsByConvs(), model, picture(), after={"conv2d": 0}, rewrites=0,
        misses=["no convolution in float64"],
    )  # fmt: skip
    plain = between(lambda m, x: m.b(m.a(x).relu())).double().eval()
    compiled = compile(plain, picture().double(), backend="onnx")
    assert "Conv" not in compiled.executable.op_counts()


def test_without_fuel_nothing_changes() -> None:
    graph = capture(between(lambda m, x: m.a(x)).eval(), (picture(),))
    text = str(graph)
    with fuel(0):
        result = ReplaceLinearsByConvs().run(graph)
    assert not result.modified and str(graph) == text


def test_in_onnx_the_block_of_a_convnext_has_eight_nodes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.norm, self.a, self.b = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.conv(x).permute(TO_BACK))
            return x + self.b(F.gelu(self.a(y))).permute(TO_FRONT)

    model = noisy(Block().eval())
    compiled = compile(model, picture(), backend="onnx", dynamic_shapes={0: "batch"})
    assert compiled.executable.op_counts() == {
        "Add": 1, "Conv": 3, "Gelu": 1, "LayerNormalization": 1, "Transpose": 2
    }  # fmt: skip
    x = picture(3)
    assert relative_error(compiled(x), model(x)) < 1e-5
