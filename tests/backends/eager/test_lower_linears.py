"""Linear layers by every way there is, with everything that may follow them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.backends.eager.cpu import choice
from fxopt.backends.eager.cpu.lower_linears import LowerLinears
from tests.backends.eager.lowered import LIBRARY, Always, check_lowering, graph_of, operators

WAYS = [*LIBRARY, "oneDNN", "BLAS", "BLAS, transposed"]


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_SMALL", 0)


class Layer(nn.Module):
    """A linear layer, and what follows it."""

    def __init__(self, linear: nn.Linear, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.then = linear, then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.linear(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (2, 3, 4, 16), (1, 1, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes(way: str, shape: tuple[int, ...], bias: bool) -> None:
    model = Layer(nn.Linear(16, 24, bias=bias), F.gelu)
    lowered, _ = check_lowering(graph_of(model, torch.randn(shape)), LowerLinears(Always(way)))
    fused = operators(lowered)["mkldnn::_linear_pointwise"]
    assert fused == (1 if way == "oneDNN" and len(shape) > 1 else 0)


class Residual(nn.Module):
    """linear(x) + other, then an activation, which is not the linear layer's any more."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return torch.relu(y + x)


@pytest.mark.parametrize("way", WAYS)
def test_residual_sums(way: str) -> None:
    graph = graph_of(Residual(), torch.randn(2, 5, 16))
    lowered, _ = check_lowering(graph, LowerLinears(Always(way)))
    assert operators(lowered)["add"] == (0 if way.startswith("oneDNN") else 1)
    assert operators(lowered)["relu"] == 1


class Broadcast(nn.Module):
    """A summand of another shape is no residual."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.other = nn.Parameter(torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.other


@pytest.mark.parametrize("way", WAYS)
def test_a_summand_of_another_shape_stays_outside(way: str) -> None:
    graph = graph_of(Broadcast(), torch.randn(2, 5, 16))
    lowered, _ = check_lowering(graph, LowerLinears(Always(way)))
    assert operators(lowered)["add"] == 1


class Constant(Broadcast):
    """A summand of the same shape that is a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros(2, 5, 16))


@pytest.mark.parametrize("way", WAYS)
def test_a_constant_summand(way: str) -> None:
    check_lowering(graph_of(Constant(), torch.randn(2, 5, 16)), LowerLinears(Always(way)))


@pytest.mark.parametrize("way", WAYS)
def test_dynamic_sizes(way: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    axes = {0: "batch", 1: "length"}
    graph = graph_of(model, torch.randn(2, 5, 16), dynamic_shapes={"input": axes})
    others = [(torch.randn(1, 7, 16),), (torch.randn(4, 1, 16),)]
    check_lowering(graph, LowerLinears(Always(way)), *others)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_that_do_not_lie_in_order(way: str) -> None:
    graph = graph_of(Layer(nn.Linear(16, 24), torch.relu), torch.randn(4, 6, 16))
    strange = [
        (torch.randn(6, 4, 16).transpose(0, 1),),
        (torch.randn(4, 16, 6).transpose(1, 2),),
        (torch.randn(1, 1, 16).expand(4, 6, 16),),
        (torch.randn(8, 12, 32)[::2, ::2, ::2],),
    ]
    check_lowering(graph, LowerLinears(Always(way)), *strange)


def test_a_weight_that_is_given_is_left_alone() -> None:
    class Given(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w)

    graph = graph_of(Given(), (torch.randn(4, 16), torch.randn(8, 16))).copy()
    result = LowerLinears(Always("oneDNN")).run(graph)
    assert not result.modified and result.misses[0].reason == "its weight is not constant"
