"""Layouts, threads, NaN: what a caller counts on stays, whatever kernels like better."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends.eager.cpu import choice
from fxopt.backends.eager.cpu.lower_convolutions import LowerConvolutions
from fxopt.backends.eager.cpu.lower_transposed_convolutions import LowerTransposedConvolutions
from fxopt.backends.eager.program import program_of
from tests.backends.eager.lowered import Always, check_lowering, graph_of


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_SMALL", 0)


class Then(nn.Module):
    """A convolution, and a reader of its memory layout."""

    def __init__(self, then: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 8, 3), then

    def forward(self, x: torch.Tensor) -> Any:
        return self.then(self.conv(x))


X = torch.randn(2, 3, 10, 10)


@pytest.mark.parametrize(
    "then",
    [
        lambda y: torch.view_as_complex(y.reshape(2, 8, 8, 4, 2)).real,
        lambda y: torch.as_strided(y, (4, 5), (7, 1), 3),
        lambda y: torch.as_strided(y.permute(0, 2, 3, 1), (4, 5), (7, 1), 3),
        lambda y: y.view(torch.int32) & 1,
        lambda y: y.view(torch.float64).isnan(),
    ],
)
def test_readers_of_the_layout(then: Callable[[torch.Tensor], Any]) -> None:
    model = Then(then).eval()
    graph = fxopt.capture(model, X)
    for way in ("oneDNN", "channels last"):
        lowered = graph.copy()
        LowerConvolutions(Always(way)).run(lowered)
        with torch.no_grad():
            expected, (found,) = model(X), program_of(lowered).function(X)
        assert found.shape == expected.shape and found.dtype is expected.dtype
        if expected.is_floating_point():
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dynamic", [None, {0: "batch"}])
def test_outputs_lie_as_the_model_s(dynamic: Any) -> None:
    model = Then(lambda y: (y, torch.relu(y).permute(0, 2, 3, 1))).eval()
    compiled = fxopt.compile(model, X, measure=False, dynamic_shapes=dynamic)
    for ours, theirs in zip(compiled(X), model(X), strict=True):
        if dynamic is None or theirs.is_contiguous():
            assert ours.stride() == theirs.stride()
    assert compiled(X)[0].view(2, -1).shape == (2, 512)


def test_an_input_that_comes_back_is_not_copied() -> None:
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            size = x.shape[0]
            return x, torch.ones(1, 4).expand(size, -1) + x.reshape(size, -1)

    compiled = fxopt.compile(Both(), torch.randn(3, 4), dynamic_shapes={0: "batch"})
    x = torch.randn(4, 4).t()
    assert compiled(x)[0] is x


@pytest.mark.parametrize("way", ["oneDNN", "channels last"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(3, 8, 3), (3, 9, 9)), (nn.Conv3d(3, 8, 3), (3, 5, 6, 7))],
    ids=str,
)
def test_one_image_without_a_batch(way: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    check_lowering(graph_of(layer, torch.randn(shape)), LowerConvolutions(Always(way)))


def test_one_image_without_a_batch_backwards() -> None:
    graph = graph_of(nn.ConvTranspose2d(3, 8, 3), torch.randn(3, 9, 9))
    check_lowering(graph, LowerTransposedConvolutions(Always("oneDNN")))


def test_compiling_draws_no_random_numbers_of_the_user_s(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path))
    model = nn.Conv2d(3, 8, 3).eval()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    compiled = fxopt.compile(model, X, verify="off")
    assert "1 of them now" in compiled.executable.notes[0] and torch.equal(torch.rand(1), expected)


def test_autocast_of_the_caller_changes_nothing() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.a(x) * 2) + y

    x, y = torch.randn(4, 8), torch.randn(4, 8)
    compiled = fxopt.compile(Mixed().eval(), (x, y))
    expected = compiled(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, y), expected)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_executables_are_copied_and_pickled(twin: Callable[[Any], Any]) -> None:
    compiled = fxopt.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), X, threads=1)
    again = twin(compiled.executable)
    assert again.threads == 1
    assert torch.equal(again.run(X)[0], compiled.executable.run(X)[0])


def test_threads_of_models_that_run_at_once() -> None:
    before = torch.get_num_threads()
    x = torch.randn(4, 64)
    models = [fxopt.compile(nn.Linear(64, 64), x, threads=n, measure=False) for n in (1, 2, 3)]
    expected = [model(x) for model in models]
    wrong: list[Any] = []

    def call(index: int) -> None:
        for _ in range(200):
            if not torch.equal(models[index](x), expected[index]):
                wrong.append(index)

    workers = [threading.Thread(target=call, args=(n % 3,)) for n in range(9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert not wrong and seen == [before] and torch.get_num_threads() == before


def test_a_negative_slope_is_not_fused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.0))
    graph = graph_of(model, X)
    _, program = check_lowering(graph, LowerConvolutions(Always("oneDNN")))
    infinite = torch.full_like(X, float("inf"))
    with torch.no_grad():
        assert torch.equal(program.function(infinite)[0].isnan(), graph.run(infinite)[0].isnan())


def test_a_lifted_tensor_is_its_argument() -> None:
    class Lifted(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = torch.sigmoid(x)
            return torch.tanh(torch.ops.aten.lift(y)), y * 2

    x = torch.randn(3, 4)
    compiled = fxopt.compile(Lifted(), x, verify="off", passes=[])
    for ours, theirs in zip(compiled(x), Lifted()(x), strict=True):
        assert torch.equal(ours, theirs)
