"""fold-group-norms: which weights go into the layers behind, and which stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.backends.onnx.fold_group_norms import FoldGroupNorms
from fxopt.compile import compile
from fxopt.testing import check_pass, noisy, relative_error

aten = torch.ops.aten


class Calls(nn.Module):
    """A model made of a norm, a layer and a function of them and the input."""

    def __init__(
        self, norm: nn.Module, layer: nn.Module, call: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.norm, self.layer = norm, layer
        self.call = call or (lambda m, x: m.layer(m.norm(x)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self, x)


def one_by_one(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(8, 6, 1, **options)


def picture() -> torch.Tensor:
    return torch.randn(2, 8, 5, 3)


def bare(graph: Any) -> list[bool]:
    return [n.args[2] is None and n.args[3] is None for n in graph.find(aten.group_norm.default)]


FOLDED: dict[str, nn.Module] = {
    "a convolution": Calls(nn.GroupNorm(2, 8), one_by_one()),
    "one without a bias": Calls(nn.GroupNorm(1, 8), one_by_one(bias=False)),
    "a grouped one": Calls(nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 2, groups=4)),
    "two": Calls(nn.GroupNorm(2, 8), one_by_one(), lambda m, x: (m.layer(y := m.norm(x)),
                 m.layer(y).relu())),
    "a permute between": Calls(nn.GroupNorm(2, 8), nn.Linear(8, 5),
                               lambda m, x: m.layer(m.norm(x).permute(0, 2, 3, 1))),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_layers_take_in_scale_and_shift(name: str) -> None:
    graph, _ = check_pass(FoldGroupNorms(), FOLDED[name], picture(), rewrites=1)
    assert bare(graph) == [True]


LEFT_ALONE: dict[str, tuple[nn.Module, list[str]]] = {
    "something else reads it": (
        Calls(nn.GroupNorm(2, 8), one_by_one(), lambda m, x: (m.layer(y := m.norm(x)), y.relu())),
        ["beside"],
    ),
    "zeros around it": (
        Calls(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)), ["pads with zeros"]
    ),
    "a group per channel": (Calls(nn.GroupNorm(8, 8), one_by_one()), []),
    "no weights": (Calls(nn.GroupNorm(2, 8, affine=False), one_by_one()), []),
    "no layer": (Calls(nn.GroupNorm(2, 8), nn.ReLU()), []),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_stays(name: str) -> None:
    model, misses = LEFT_ALONE[name]
    check_pass(FoldGroupNorms(), model, picture(), rewrites=0, misses=misses)


def test_a_layer_in_front_takes_nothing_in() -> None:
    model = Calls(nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), lambda m, x: m.norm(m.layer(x)))
    check_pass(FoldGroupNorms(), model, picture(), rewrites=0)


def test_half_precision_and_dynamic_sizes() -> None:
    model = FOLDED["a convolution"]
    check_pass(FoldGroupNorms(), model, picture(), rewrites=1, dynamic_shapes={0: "batch"})
    check_pass(FoldGroupNorms(), model.half(), picture().half(), rewrites=1, double=False,
               tolerance=1e-2, gradients=False)  # fmt: skip


def test_in_onnx_a_product_and_a_sum_less() -> None:
    model = noisy(Calls(nn.GroupNorm(2, 8), one_by_one()).eval())
    compiled = compile(model, picture(), backend="onnx")
    assert compiled.executable.op_counts() == {"Conv": 1, "InstanceNormalization": 1, "Reshape": 2}
    x = picture()
    assert relative_error(compiled(x), model(x)) < 1e-5
