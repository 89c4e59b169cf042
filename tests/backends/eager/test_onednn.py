"""oneDNN's own library: every operator beside PyTorch's, and what could go wrong around them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.eager.cpu import choice
from fxopt.backends.eager.cpu.lower_convolutions import LowerConvolutions
from fxopt.backends.eager.cpu.lower_linears import LowerLinears
from fxopt.backends.eager.onednn import OneDnnError, library, operators, prepared
from fxopt.backends.eager.program import program_of
from fxopt.timings import Timings
from tests.backends.eager.lowered import LIBRARY, Always, check_lowering, graph_of
from tests.backends.eager.lowered import operators as operators_of

pytestmark = pytest.mark.skipif(not LIBRARY, reason="oneDNN's own library is not installed")
ACTIVATIONS: dict[str, tuple[list[float], Callable[[torch.Tensor], torch.Tensor]]] = {
    "none": ([], lambda x: x),
    "relu": ([], F.relu),
    "sigmoid": ([], torch.sigmoid),
    "tanh": ([], torch.tanh),
    "swish": ([], F.silu),
    "hardswish": ([], F.hardswish),
    "hardsigmoid": ([], F.hardsigmoid),
    "gelu_none": ([], F.gelu),
    "gelu_tanh": ([], lambda x: F.gelu(x, approximate="tanh")),
    "leaky_relu": ([0.2], lambda x: F.leaky_relu(x, 0.2)),
    "hardtanh": ([-0.5, 2.0], lambda x: F.hardtanh(x, -0.5, 2.0)),
}
PLAIN: Any = ([1, 1], [0, 0], [1, 1], 1, "none", [])


def close(found: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> bool:
    """Whether two tensors are the same up to rounding."""
    assert found.shape == expected.shape and found.dtype is expected.dtype
    return float((found - expected).abs().max()) <= bound * float(expected.abs().max() + 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("adds", [False, True])
def test_activations(activation: str, adds: bool) -> None:
    scalars, then = ACTIVATIONS[activation]
    x, w, b, other = torch.randn(7, 24), torch.randn(17, 24), torch.randn(17), torch.randn(7, 17)
    plain = F.linear(x, w, b)
    if adds:
        found = torch.ops.fxopt.linear_add(x, other, w, b, activation, scalars)
        assert close(found, then(plain + other))
    else:
        assert close(torch.ops.fxopt.linear(x, w, b, activation, scalars), then(plain))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(
    ("window", "stride", "padding", "dilation", "groups", "inputs", "outputs"),
    [
        (3, 1, 1, 1, 1, 8, 16), (1, 1, 0, 1, 1, 5, 7), (3, 2, 1, 1, 8, 8, 8),
        (5, 1, 4, 2, 2, 6, 10), (3, 1, 0, 1, 1, 1, 1), (2, 3, 0, 1, 1, 3, 33),
        (1, 2, 0, 1, 4, 4, 4), (13, 1, 0, 1, 1, 2, 3),
    ],
)  # fmt: skip
def test_convolutions(
    rank: int, window: int, stride: int, padding: int, dilation: int, groups: int, inputs: int,
    outputs: int,
) -> None:  # fmt: skip
    x = torch.randn(2, inputs, *[13] * rank)
    w, b = torch.randn(outputs, inputs // groups, *[window] * rank), torch.randn(outputs)
    convolve: Any = F.conv2d if rank == 2 else F.conv3d
    geometry = ([stride] * rank, [padding] * rank, [dilation] * rank, groups)
    for bias in (b, None):
        plain = convolve(x, w, bias, *geometry)
        assert close(torch.ops.fxopt.convolution(x, w, bias, *geometry, "none", []), plain)
        other = torch.randn_like(plain)
        found = torch.ops.fxopt.convolution_add(x, other, w, bias, *geometry, "relu", [])
        assert close(found, F.relu(plain + other))
        kept = other.clone()
        found = torch.ops.fxopt.convolution_add_(x, other, w, bias, *geometry, "none", [])
        assert close(found, plain + kept)


def test_operators_are_sound() -> None:
    """What PyTorch checks of every custom operator: schema, shapes, and results."""
    x, w, b = torch.randn(2, 6, 9, 9), torch.randn(4, 6, 1, 1), torch.randn(4)
    other = torch.randn(2, 4, 9, 9)
    rows, matrix = torch.randn(5, 6), torch.randn(4, 6)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.convolution, (x, w, b, *PLAIN)),
        (operators.convolution_add, (x, other, w, b, *PLAIN)),
        (operators.linear, (rows, matrix, b, "relu", [])),
        (operators.linear_add, (rows, torch.randn(5, 4), matrix, None, "none", [])),
        (operators.linear_add_, (rows, torch.randn(5, 4), matrix, None, "none", [])),
    ]
    for target, args in calls:
        torch.library.opcheck(target, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda x: x.contiguous(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 3)[..., ::2][..., : x.shape[3]],
        lambda x: x[:1].expand(x.shape),
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),  # at 4 bytes
    ],
)
def test_inputs_may_lie_in_any_way(lay_out: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, w = lay_out(torch.randn(3, 5, 8, 6)), torch.randn(5, 5, 1, 1)
    other = lay_out(torch.randn(3, 5, 8, 6))
    kept = x.clone()
    assert close(torch.ops.fxopt.convolution_add(x, other, w, None, *PLAIN), F.conv2d(x, w) + other)
    assert close(torch.ops.fxopt.max_pool(x, x.dtype, [2, 2], [2, 2], [0, 0], [1, 1], False),
                 F.max_pool2d(x, 2))  # fmt: skip
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    x, w, b = torch.randn(9, 32), torch.randn(16, 32), torch.randn(16)
    x, w, b = x.to(dtype), w.to(dtype), b.to(dtype)
    try:
        found = torch.ops.fxopt.linear(x, w, b, "relu", [])
    except OneDnnError:
        pytest.skip(f"oneDNN has no kernels for {dtype} on this processor")
    assert close(found.float(), F.relu(F.linear(x.float(), w.float(), b.float())), 0.02)


def make_convolution() -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    w = torch.randn(6, 4, 3, 3)
    make = operators.PREPARATIONS[operators.convolution].make
    return make(w, None, [1, 1], [1, 1], [1, 1], 1, "none", []), w


def test_one_operator_for_all_shapes() -> None:
    convolution, w = make_convolution()
    for turn in range(2):
        for side in range(3, 3 + prepared._KEPT + 10):
            x = torch.randn(1 + side % 3, 4, side, 5 + turn)
            assert close(convolution(x), F.conv2d(x, w, padding=1))


def test_the_weight_is_packed_once_for_shapes_that_want_it_alike() -> None:
    convolution, _ = make_convolution()
    for batch in range(1, 9):
        convolution(torch.randn(batch, 4, 16, 16))
    assert len(convolution._constants._packed) <= 2  # type: ignore[attr-defined]


def test_nothing_in_nothing_out() -> None:
    convolution, w = make_convolution()
    x = torch.randn(0, 4, 9, 9)
    assert convolution(x).shape == F.conv2d(x, w, padding=1).shape


def test_what_would_read_beyond_memory_is_refused() -> None:
    convolution, _ = make_convolution()
    with pytest.raises(OneDnnError, match="torch.float16"):
        convolution(torch.randn(1, 4, 9, 9).half())
    with pytest.raises(OneDnnError, match=r"\[1, 3, 9, 9\] do not fit: .* \[n, 4, …\]"):
        convolution(torch.randn(1, 3, 9, 9))
    rows, matrix = torch.randn(5, 6), torch.randn(4, 6)
    with pytest.raises(OneDnnError, match="rows of 6"):
        torch.ops.fxopt.linear(torch.randn(5, 7), matrix, None, "none", [])
    with pytest.raises(OneDnnError, match="cannot be added"):
        torch.ops.fxopt.linear_add(rows, torch.randn(5, 3), matrix, None, "none", [])
    with pytest.raises(OneDnnError, match="cannot be added"):
        torch.ops.fxopt.linear_add_(rows, torch.randn(5, 4).double(), matrix, None, "none", [])
    for side in (10, 20):  # PyTorch refuses both, too
        window = torch.randn(6, 4, side, side)
        with pytest.raises(OneDnnError, match="does not fit"):
            torch.ops.fxopt.convolution(torch.randn(1, 4, 9, 9), window, None, *PLAIN)
    with pytest.raises(OneDnnError, match="does not fit"):
        torch.ops.fxopt.max_pool(
            torch.randn(1, 4, 1, 9), torch.float32, [2, 2], [2, 2], [0, 0], [1, 1], False
        )


def test_many_threads_call_one_operator() -> None:
    convolution, w = make_convolution()
    wrong: list[str] = []

    def work(seed: int) -> None:
        own = torch.Generator().manual_seed(seed)
        for turn in range(60):
            x = torch.rand(1, 4, 8 + turn % 5, 8, generator=own)
            if not close(convolution(x), F.conv2d(x, w, padding=1)):
                wrong.append(f"{seed} {turn}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Block(nn.Module):
    """relu(b(y) + y) of y = a(x), or relu(b(x) + y), where nothing else reads y."""

    def __init__(self, is_read: bool) -> None:
        super().__init__()
        self.is_read = is_read
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return torch.relu(self.b(y if self.is_read else x) + y)


@pytest.mark.parametrize("is_read", [False, True])
def test_a_sum_is_written_over_what_nobody_else_reads(is_read: bool) -> None:
    graph = graph_of(Block(is_read), torch.randn(2, 8, 9, 9))
    _, program = check_lowering(graph, LowerConvolutions(Always(LIBRARY[0])))
    written_over = operators.convolution_add_ in program.operators.values()
    assert written_over == (not is_read)


def test_a_shared_layer_is_packed_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(torch.tanh(self.linear(x)) * 2)

    graph = graph_of(Shared(), torch.randn(3, 12)).copy()
    LowerLinears(Always(LIBRARY[0])).run(graph)
    bound = [one for one in program_of(graph).names.values() if isinstance(one, prepared.Prepared)]
    kinds = {one.then.activation for one in bound}
    assert len(bound) == len(kinds) == 2


def test_ways_that_are_refused_or_wrong_do_not_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of(nn.Conv2d(4, 4, 1), torch.randn(1, 4, 8, 8))
    asked: list[list[str]] = []

    class Watching(Timings):
        def fastest(self, question: str, ways: Any) -> str:
            asked.append(list(ways))
            return next(iter(ways))

    def lowered() -> fxopt.GraphModule:
        twin = graph.copy()
        LowerConvolutions(Watching(1, None)).run(twin)
        return twin

    assert operators_of(lowered())["fxopt::convolution"] == 1
    wrong = prepared.Prepared.__call__
    with monkeypatch.context() as patch:
        patch.setattr(prepared.Prepared, "__call__", lambda self, x: wrong(self, x) + 0.1)
        assert operators_of(lowered())["conv2d"] == 1

    def refuse(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise OneDnnError("not here")

    with monkeypatch.context() as patch:
        patch.setattr(prepared.Prepared, "__call__", refuse)
        assert operators_of(lowered())["conv2d"] == 1
    assert asked == [[*LIBRARY, "as it is"], ["as it is"], ["as it is"]]


def test_without_the_library(without_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library() is None
    monkeypatch.setattr(choice, "_SMALL", 0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = torch.randn(1, 4, 9, 9)
    compiled = fxopt.compile(model, x)
    names = {str(one) for one in compiled.executable.program.operators.values()}
    assert not any(name.startswith("fxopt") for name in names)
    with torch.no_grad():
        assert close(compiled(x), model(x))
    with pytest.raises(OneDnnError, match=r"pip install 'fxopt\[onednn\]'"):
        torch.ops.fxopt.linear(torch.ones(2, 2), torch.ones(2, 2), None, "none", [])


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_a_library_that_is_named_must_be_one(tmp_path: Path) -> None:
    code = "from fxopt.backends.eager.onednn import library; library()"
    named = tmp_path / "libdnnl.so.3"
    done = run(code, FXOPT_ONEDNN=str(named))
    assert done.returncode and "OSError" in done.stderr and str(named) in done.stderr


def test_it_shares_the_threads_of_pytorch() -> None:
    code = """
import torch
from fxopt.backends.eager.onednn import library
torch.ops.fxopt.linear(torch.ones(2, 2), torch.ones(2, 2), None, "none", [])
maps = open("/proc/self/maps").read().split()
print(len({one for one in maps if "libgomp" in one or "libiomp" in one}))
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not say what is loaded")
    done = run(code)
    assert done.stdout.split()[-1] == "1", done.stderr


def test_a_bias_that_is_an_input() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            y = torch.conv2d(x, self.conv.weight, bias)
            return F.linear(y, self.linear.weight, bias)

    model, inputs = Given().eval(), (torch.randn(2, 3, 14, 14), torch.randn(4))
    compiled = fxopt.compile(model, inputs, measure=False)
    assert close(compiled(*inputs), model(*inputs))
