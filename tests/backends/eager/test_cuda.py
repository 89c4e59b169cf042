"""Models on CUDA, from end to end: pretended, and where there is a GPU, in earnest."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends import Eager
from fxopt.backends.eager import EagerExecutable, cuda
from fxopt.backends.eager.cuda.replays import Replays
from fxopt.errors import LoweringError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.passes.expand_attention import ExpandAttention
from fxopt.testing import op_counts, relative_error
from tests.backends.eager.lowered import graph_of
from tests.backends.eager.pretended_cuda import PretendedRecorder, pretend_cuda
from tests.models import Counter


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


X = torch.randn(2, 3, 12, 12)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[PretendedRecorder]:
    """Record on the CPU; return the recorders that were made."""
    made: list[PretendedRecorder] = []

    def make(device: torch.device) -> PretendedRecorder:
        made.append(PretendedRecorder())
        return made[-1]

    monkeypatch.setattr(cuda, "CudaRecorder", make)
    return made


def check(executable: Any, graph: GraphModule, *others: torch.Tensor) -> None:
    for x in (X, *others):
        for _ in range(4):
            x = torch.randn_like(x)
            found, expected = executable.run(x)[0], graph.run(x)[0]
            assert relative_error(found, expected) <= 1e-5
            assert found.stride() == expected.stride()


def test_a_model_on_cuda_is_recorded_and_replayed(recorders: list[PretendedRecorder]) -> None:
    graph = pretend_cuda(graph_of(network(), X))
    executable: Any = fxopt.lower(graph).executable
    check(executable, graph)
    assert [(one.recorded, one.replayed) for one in recorders] == [(1, 3)]
    assert "replay CUDA graphs, one per shape, at most 8" in str(executable.notes)
    targets = map(str, executable.program.operators.values())
    assert all(target.startswith("aten.") for target in targets)


def test_dynamic_shapes(recorders: list[PretendedRecorder]) -> None:
    graph = pretend_cuda(graph_of(network(), X, dynamic_shapes={0: "batch"}))
    check(fxopt.lower(graph).executable, graph, torch.randn(5, 3, 12, 12), X)
    assert [one.recorded for one in recorders] == [2]


def test_in_inference_mode_and_out_of_it(recorders: list[PretendedRecorder]) -> None:
    graph = pretend_cuda(graph_of(network(), X))
    executable = fxopt.lower(graph).executable
    with torch.inference_mode():
        for _ in range(2):
            executable.run(torch.randn_like(X))
    check(executable, graph)
    assert [one.recorded for one in recorders] == [1]


def test_autocast_changes_nothing(recorders: list[PretendedRecorder]) -> None:
    graph = pretend_cuda(graph_of(network(), X))
    expected = graph.run(X)[0]
    for option in (None, False):
        executable = EagerExecutable(graph, cuda_graphs=option)
        function: Any = executable._function  # run() itself asks for the CPU's autocast alone
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert relative_error(function(X)[0], expected) <= 1e-5


def test_copies_and_pickles_record_their_own(recorders: list[PretendedRecorder]) -> None:
    graph = pretend_cuda(graph_of(network(), X))
    first = EagerExecutable(graph)
    check(first, graph)
    second = copy.deepcopy(first)
    assert isinstance(second._function, Replays) and len(second._function) == 0
    check(second, graph)
    assert [one.recorded for one in recorders] == [1, 1]
    plain = pickle.loads(pickle.dumps(EagerExecutable(graph_of(network(), X), cuda_graphs=False)))
    assert plain.cuda_graphs is False


def test_false_means_none(recorders: list[PretendedRecorder]) -> None:
    graph = pretend_cuda(graph_of(network(), X))
    compiled = fxopt.lower(graph, cuda_graphs=False)
    check(compiled.executable, graph)
    assert not recorders and "cuda_graphs=False" in str(compiled.executable.notes)


def test_what_cannot_be_recorded_says_why(recorders: list[PretendedRecorder]) -> None:
    graph = pretend_cuda(fxopt.capture(Counter(), torch.zeros(2)))
    compiled = fxopt.lower(graph)
    assert "no CUDA graphs: " in compiled.executable.notes[-1]
    assert "it writes to its argument" in compiled.executable.notes[-1]
    found = [compiled.executable.run(torch.zeros(2))[0][0].item() for _ in range(3)]
    assert found == [1, 2, 3] and not recorders
    with pytest.raises(LoweringError, match="cuda_graphs=True .*it writes to its argument"):
        fxopt.lower(graph, cuda_graphs=True)


def test_true_on_a_cpu_says_why() -> None:
    with pytest.raises(LoweringError, match="the input 'input_1' is on cpu"):
        fxopt.compile(network(), X, cuda_graphs=True)


@pytest.mark.parametrize("value", [1, "yes", 0])
def test_odd_options(value: Any) -> None:
    with pytest.raises(OptionError, match="cuda_graphs=.* True, False, or None"):
        Eager(cuda_graphs=value)


def test_a_model_on_the_cpu_imports_nothing_of_cuda() -> None:
    script = (
        "import sys, torch, fxopt; c = fxopt.compile(torch.nn.Linear(4, 4), torch.randn(2, 4));"
        "assert c.executable._function is c.executable.program.function;"
        "sys.exit(any(name.startswith('fxopt.backends.eager.cuda') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Attention(nn.Module):
    """Attention over three axes, for which PyTorch's CPU has no fused kernel."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v) * 2


def test_attention_on_cuda_stays_whole() -> None:
    inputs = tuple(torch.randn(4, 16, 8) for _ in range(3))
    graph = fxopt.capture(Attention(), inputs)
    for one, expected in ((graph.copy(), 0), (pretend_cuda(graph.copy()), 1)):
        ExpandAttention(keep_fast=True).run(one)
        assert op_counts(one).get("scaled_dot_product_attention", 0) == expected


# -- in earnest ------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
BOUND = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.fixture
def exact() -> Iterator[None]:
    """Let float32 be float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def on_gpu(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    return network().to("cuda", dtype), X.to("cuda", dtype)


def replays_of(compiled: Any) -> Replays:
    function = compiled.executable._function
    assert isinstance(function, Replays) and function.failure is None
    return function


@needs_gpu
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("measure", [False, True])
def test_replays_on_a_gpu(dtype: torch.dtype, measure: bool, exact: None) -> None:
    model, x = on_gpu(dtype)
    compiled = fxopt.compile(model, x, measure=measure, cuda_graphs=True)
    results = []
    for _ in range(5):
        x = torch.randn_like(x)
        with torch.no_grad():
            results.append((compiled(x), model(x)))
    assert len(replays_of(compiled)) == 1
    for found, expected in results:  # later calls have not written over earlier outputs
        assert relative_error(found, expected) <= BOUND[dtype]


@needs_gpu
def test_shapes_come_and_go_on_a_gpu(exact: None) -> None:
    model, _ = on_gpu()
    compiled = fxopt.compile(model, X.cuda(), dynamic_shapes={0: "batch"})
    for _ in range(20):
        for size in range(2, 12):
            x = torch.randn(size, 3, 12, 12, device="cuda")
            with torch.no_grad():
                assert relative_error(compiled(x), model(x)) <= 1e-4
    assert len(replays_of(compiled)) == 8


@needs_gpu
def test_threads_and_streams_on_a_gpu(exact: None) -> None:
    model, x = on_gpu()
    compiled = fxopt.compile(model, x)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for _ in range(50):
                    given = torch.randn_like(X, device="cuda")
                    assert relative_error(compiled(given), model(given)) <= 1e-4
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(replays_of(compiled)) == 1


@needs_gpu
def test_inside_of_the_users_own_recording(exact: None) -> None:
    model, x = on_gpu()
    compiled = fxopt.compile(model, x)
    for _ in range(3):
        compiled(x)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compiled(x)
    with torch.cuda.graph(graph, stream=side):
        found = compiled(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    with torch.no_grad():
        assert relative_error(found, model(x)) <= 1e-4


@needs_gpu
def test_a_recording_that_fails_leaves_cuda_usable(exact: None) -> None:
    waiting = Replays(
        lambda x: (x * float(x.sum()),),  # waits for the GPU
        lambda: cuda.CudaRecorder(torch.device("cuda", 0)),
    )
    x = torch.randn(4, device="cuda")
    before = torch.cuda.current_stream()
    for _ in range(4):
        assert torch.allclose(waiting(x)[0], x * x.sum())
    assert waiting.failure is not None and torch.cuda.current_stream() == before
    test_replays_on_a_gpu(torch.float32, False, exact)


@needs_gpu
def test_files_and_copies_on_a_gpu(exact: None) -> None:
    model, x = on_gpu()
    compiled = fxopt.compile(model, x)
    for _ in range(3):
        expected = compiled(x)
    other = copy.deepcopy(compiled.executable)
    for _ in range(3):
        assert relative_error(other.run(x)[0], expected) <= 1e-5
    buffer = io.BytesIO()
    torch.save(expected, buffer)  # an output is memory of its own
    assert len(buffer.getvalue()) < 10_000
