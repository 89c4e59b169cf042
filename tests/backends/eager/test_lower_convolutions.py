"""Convolutions by every way there is, with everything that may follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.backends.eager.cpu import choice
from fxopt.backends.eager.cpu.lower_convolutions import LowerConvolutions
from fxopt.timings import Timings
from tests.backends.eager.lowered import LIBRARY, Always, check_lowering, graph_of, operators

WAYS = [*LIBRARY, "oneDNN", "channels last"]
POINTWISE = ["linear, oneDNN", "linear, BLAS", "linear, BLAS, transposed"]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.3),
}


@pytest.fixture
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_SMALL", 0)


pytestmark = pytest.mark.usefixtures("nothing_is_small")


class Layer(nn.Module):
    """A convolution, and what follows it."""

    def __init__(self, conv: nn.Module, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv = conv
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.conv(x))


class Residual(nn.Module):
    """relu(conv(x) + other), the other a value that this program made, or not."""

    def __init__(self, conv: nn.Module, *, swapped: bool = False, relu: bool = True) -> None:
        super().__init__()
        self.conv, self.swapped, self.relu = conv, swapped, relu

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> Any:
        y = self.conv(x)
        y = other + y if self.swapped else y + other
        return torch.relu(y) if self.relu else y


@pytest.mark.parametrize("way", WAYS + POINTWISE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(way: str, activation: str) -> None:
    model = Layer(nn.Conv2d(16, 24, 1), ACTIVATIONS[activation])
    graph = graph_of(model, torch.randn(2, 16, 14, 14))
    lowered, _ = check_lowering(graph, LowerConvolutions(Always(way)))
    assert operators(lowered)["conv2d"] == (1 if way == "channels last" else 0)
    if "oneDNN" in way:
        assert sum(operators(lowered).values()) <= 6  # the activation is in the kernel


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2), bias=False),
        nn.Conv2d(16, 32, 3, groups=4, padding=2),
        nn.Conv2d(16, 16, 5, groups=16, padding=2, stride=2),
        nn.Conv2d(16, 32, 3, groups=16, padding=1),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.Conv2d(8, 16, 1, padding=1),
        nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)
def test_geometries(way: str, conv: nn.Conv2d) -> None:
    graph = graph_of(Layer(conv, torch.relu), torch.randn(2, conv.in_channels, 29, 31))
    lowered, _ = check_lowering(graph, LowerConvolutions(Always(way)))
    assert operators(lowered)["mkldnn::_convolution_pointwise"] == (way == "oneDNN")


@pytest.mark.parametrize("way", WAYS)
def test_three_dimensions(way: str) -> None:
    graph = graph_of(
        Layer(nn.Conv3d(4, 8, 3, padding=1), torch.relu), torch.randn(1, 4, 9, 11, 13)
    )
    check_lowering(graph, LowerConvolutions(Always(way)))


@pytest.mark.parametrize("way", WAYS + POINTWISE)
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_residual_sums(way: str, swapped: bool, relu: bool) -> None:
    model = Residual(nn.Conv2d(16, 16, 1), swapped=swapped, relu=relu)
    graph = graph_of(model, (torch.randn(2, 16, 14, 14), torch.randn(2, 16, 14, 14)))
    lowered, _ = check_lowering(graph, LowerConvolutions(Always(way)))
    if way == "oneDNN":
        assert operators(lowered) == {
            "mkldnn::_reorder_convolution_weight": 1, "mkldnn::_convolution_pointwise": 1
        }  # fmt: skip


class Block(nn.Module):
    """A sum with a value that nobody reads afterwards: oneDNN adds in its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return torch.relu(self.b(torch.relu(y)) + y)


class Kept(Block):
    """The same, but the value is an output, too."""

    def forward(self, x: torch.Tensor) -> Any:
        y = self.a(x)
        return torch.relu(self.b(torch.relu(y)) + y), y


def test_a_sum_is_added_in_place_only_where_nobody_reads_the_summand() -> None:
    one = LowerConvolutions(Always("oneDNN"))
    x = torch.randn(2, 8, 20, 20)
    _, program = check_lowering(graph_of(Block(), x), one)
    assert torch.ops.mkldnn._convolution_pointwise_.binary in program.operators.values()
    _, program = check_lowering(graph_of(Kept(), x), one)
    assert torch.ops.mkldnn._convolution_pointwise_.binary not in program.operators.values()


class Twice(nn.Module):
    """One convolution called twice; its result read by two; a sum with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        z = self.conv(torch.relu(y) + y)
        return z + z, torch.relu(z), y


@pytest.mark.parametrize("way", WAYS + POINTWISE)
def test_shared_weights_and_values(way: str) -> None:
    check_lowering(graph_of(Twice(), torch.randn(2, 16, 20, 20)), LowerConvolutions(Always(way)))


@pytest.mark.parametrize("way", WAYS + POINTWISE)
def test_dynamic_sizes(way: str) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 16, 1))
    axes = {0: "batch", 2: "height"}
    graph = graph_of(model, torch.randn(2, 16, 14, 14), dynamic_shapes={"input": axes})
    others = [(torch.randn(1, 16, 9, 14),), (torch.randn(5, 16, 30, 14),)]
    check_lowering(graph, LowerConvolutions(Always(way)), *others)


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way: str) -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this processor")
    model = Layer(nn.Conv2d(16, 24, 3), torch.relu).bfloat16()
    graph = graph_of(model, torch.randn(2, 16, 14, 14).bfloat16())
    check_lowering(graph, LowerConvolutions(Always(way)), bound=0.03)


def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch, without_library: None) -> None:
    one = LowerConvolutions(Always("oneDNN"))
    monkeypatch.setattr(choice, "_SMALL", 2**17)
    small = nn.Conv2d(4, 4, 1)
    assert one.run(graph_of(small, torch.randn(1, 4, 8, 8)).copy()).rewrites == 0
    large = torch.randn(2, 16, 32, 32, dtype=torch.float64)
    result = one.run(graph_of(nn.Conv2d(16, 16, 3).double(), large).copy())
    assert result.rewrites == 0 and "no kernels for torch.float64" in result.misses[0].reason

    class Given(nn.Module):
        def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.conv2d(x, w)

    graph = graph_of(Given(), (torch.randn(1, 16, 32, 32), torch.randn(16, 16, 3, 3)))
    result = one.run(graph.copy())
    assert result.rewrites == 0 and result.misses[0].reason == "its weight is not constant"


def test_a_second_run_changes_nothing() -> None:
    graph = graph_of(nn.Conv2d(16, 16, 3), torch.randn(2, 16, 32, 32)).copy()
    one = LowerConvolutions(Always("oneDNN"))
    assert one.run(graph).rewrites == 1 and not one.run(graph).modified


def test_ways_are_timed_once(tmp_path: Any) -> None:
    graph = graph_of(
        nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()),
        torch.randn(2, 16, 32, 32),
    )
    timings = Timings(1, tmp_path / "timings.sqlite")
    check_lowering(graph, LowerConvolutions(timings))
    assert timings.asked == 2 and timings.measured == 2  # the first reads the caller's layout
    again = Timings(1, tmp_path / "timings.sqlite")
    check_lowering(graph, LowerConvolutions(again))
    assert again.asked == 2 and again.measured == 0
    other = Timings(2, tmp_path / "timings.sqlite")
    LowerConvolutions(other).run(graph.copy())
    assert other.measured == 2
