"""Channels last on CUDA: by rule, and by a race where there is a GPU; judged without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends.eager.cpu import cpu_passes
from fxopt.backends.eager.cuda import use_channels_last
from fxopt.backends.eager.cuda.use_channels_last import UseChannelsLast
from fxopt.backends.eager.program import program_of
from fxopt.graph_module import GraphModule
from fxopt.pipeline import legalize
from fxopt.testing import op_counts
from fxopt.timings import Timings
from tests.backends.eager.lowered import Always, check_lowering, graph_of, operators
from tests.backends.eager.pretended_cuda import pretend_cuda


def network(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.MaxPool2d(2), nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv2d(6, 8, 1),
    )  # fmt: skip
    return model.to(dtype), torch.randn(2, 3, 12, 12).to(dtype)


def pretended(model: nn.Module, x: torch.Tensor, **options: Any) -> GraphModule:
    return pretend_cuda(graph_of(model, x, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_channels_last(dtype: torch.dtype) -> None:
    graph = pretended(*network(dtype))
    lowered, program = check_lowering(graph, UseChannelsLast(), bound=2e-2)
    assert operators(lowered)["clone"] == 4
    weights = [value for value in program.names.values() if getattr(value, "ndim", 0) == 4]
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in weights)
    assert not any("clone" in name for name in program.operators)  # laid once
    x = graph.info.example_inputs[0]
    assert program.function(x)[0].stride() == graph.run(x)[0].stride()  # as in the model


def test_images_of_three_dimensions() -> None:
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ConvTranspose3d(4, 2, 2)).bfloat16()
    x = torch.randn(1, 2, 5, 6, 7).bfloat16()
    lowered, _ = check_lowering(pretended(model, x), UseChannelsLast(), bound=2e-2)
    assert operators(lowered)["clone"] == 2


def test_dynamic_sizes() -> None:
    model, x = network(torch.bfloat16)
    graph = pretended(model, x, dynamic_shapes={0: "batch", 2: "height"})
    other = (torch.randn(3, 3, 20, 12).bfloat16(),)
    check_lowering(graph, UseChannelsLast(), other, bound=2e-2)


class Given(nn.Module):
    """A convolution with a weight that is an input."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(x, weight)


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8), "half precision, or none"),
        (
            nn.Conv2d(4, 4, 3, groups=4).bfloat16(),
            torch.randn(1, 4, 8, 8).bfloat16(),
            "only depthwise",
        ),
        (
            nn.ConvTranspose2d(4, 4, 3, groups=4).half(),
            torch.randn(4, 8, 8).half(),
            "only depthwise",
        ),
        (nn.Conv2d(3, 4, 3).double(), torch.randn(1, 3, 8, 8).double(), "float64 channels first"),
        (Given(), (torch.randn(1, 3, 8, 8), torch.randn(4, 3, 1, 1)), "not constant"),
    ],
)
def test_what_is_left_alone(model: nn.Module, x: Any, why: str) -> None:
    graph = pretended(model, x)
    result = UseChannelsLast().run(graph)
    assert not result.modified and why in result.misses[0].reason


def test_convolutions_on_the_cpu_are_left_to_its_passes() -> None:
    graph = graph_of(*network())
    result = UseChannelsLast().run(graph)
    assert not result.modified and result.misses[0].reason == "it runs on cpu"


@pytest.mark.parametrize("measure", [False, True])
def test_the_passes_of_the_cpu_leave_cuda_alone(measure: bool) -> None:
    model = nn.Sequential(network(torch.float32)[0], nn.Flatten(), nn.Linear(512, 9), nn.GELU())
    x = torch.randn(2, 3, 12, 12)
    on_cpu, on_cuda = graph_of(model, x), pretended(model, x)
    expected = op_counts(on_cuda)
    for graph in (on_cpu, on_cuda):
        legalize(graph, cpu_passes(Timings(1, None) if measure else None))
    assert op_counts(on_cuda) == expected != op_counts(on_cpu)


def test_a_graph_on_both() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).bfloat16()
    graph = graph_of(model, torch.randn(2, 3, 12, 12).bfloat16())
    pretend_cuda(graph, but=["input_1", "conv2d"])
    lowered, _ = check_lowering(graph, UseChannelsLast(), bound=2e-2)
    clones = lowered.find(torch.ops.aten.clone.default)
    assert [str(node.args[0]) for node in clones] == ["_1_weight", "_2_weight"]


# -- the race --------------------------------------------------------------------------------------


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let there seem to be a GPU; return the list of times that somebody waited for it."""
    waits: list[str] = []
    monkeypatch.setattr(use_channels_last, "examples_on_gpu", lambda g: g.info.example_inputs)
    monkeypatch.setattr(use_channels_last, "gpu", lambda examples: "a GPU")
    monkeypatch.setattr(use_channels_last, "waiter", lambda _: lambda: waits.append("waited"))
    return waits


class Race(Timings):
    """Runs each way once, and lets one win."""

    def __init__(self, winner: str) -> None:
        super().__init__(1, None)
        self.winner = winner
        self.order: tuple[str, ...] = ()

    def fastest(self, question: str, ways: Any) -> str:
        self.order, self.question = tuple(ways), question
        for way in ways.values():
            way()
        return self.winner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("winner", ["channels last", "channels first"])
def test_the_faster_layout_wins(winner: str, dtype: torch.dtype, with_gpu: list[str]) -> None:
    race = Race(winner)
    lowered, _ = check_lowering(pretended(*network(dtype)), UseChannelsLast(race), bound=2e-2)
    assert operators(lowered)["clone"] == (4 if winner == "channels last" else 0)
    assert (race.order[0] == "channels last") == (dtype is torch.bfloat16)  # the rule breaks ties
    assert len(with_gpu) == 2 and "a GPU" in race.question


def test_what_is_known_is_not_measured_again(with_gpu: list[str]) -> None:
    graph = pretended(*network())
    result = UseChannelsLast(Always("channels first")).run(graph)
    assert not result.modified and "channels first is faster" in result.misses[0].reason
    assert UseChannelsLast(Always("channels last")).run(graph).modified
    assert not with_gpu


def test_a_real_race(with_gpu: list[str]) -> None:
    timings = Timings(1, None)
    UseChannelsLast(timings).run(pretended(*network()))
    assert timings.measured == 1 and len(with_gpu) > 4
    UseChannelsLast(timings).run(pretended(*network()))
    assert timings.measured == 1


def test_without_a_gpu_nothing_is_timed() -> None:
    timings = Timings(1, None)
    assert UseChannelsLast(timings).run(pretended(*network())).modified
    assert timings.asked == timings.measured == 0


def test_a_graph_that_leaves_traces_is_not_run() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    graph = fxopt.capture(Noisy(), torch.randn(2))
    assert use_channels_last.examples_on_gpu(graph) is None
    assert program_of(graph).function(torch.zeros(2))[0].shape == (2,)
