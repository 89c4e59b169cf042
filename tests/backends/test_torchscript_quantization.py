"""Fake-quantized graphs in TorchScript: the same numbers, from operators that libtorch has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends.torchscript import TorchScript
from tests.backends.quantized import Residual, Round, Rounded

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def network(dtype: torch.dtype) -> nn.Module:
    model = nn.Sequential(
        Round(0.02, 120), Rounded(nn.Conv2d(3, 6, 3)), nn.ReLU(), Round(0.1, 3, 0, 15),
        nn.Flatten(2), Rounded(nn.Linear(49, 24), group=7, limit=7), Round(0.03, -5, -60, 99),
    ).to(dtype)  # fmt: skip
    for one in model.modules():
        if isinstance(one, (Round, Rounded)):
            one.scale = one.scale.float()
    return model.eval()


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_numbers(dtype: torch.dtype, freeze: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = network(dtype), torch.randn(2, 3, 9, 9, dtype=dtype) * 2
    compiled = fxopt.lower(fxopt.capture(model, (x,)), backend=TorchScript(freeze=freeze))
    compiled.save(tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(x)
    for one in (compiled, fxopt.load(tmp_path / "model.pt")):
        found = one(x)
        assert found.dtype is dtype
        assert float((found.double() - expected.double()).abs().max()) <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_halves_to_even_and_saturates(dtype: torch.dtype) -> None:
    x = torch.tensor([-9e3, -2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.4, 9e3], dtype=dtype) / 2
    graph = fxopt.capture(Round(0.5, 1, -1, 3), (x,))
    (found,) = TorchScript().lower(graph.copy()).run(x)
    wanted = torch.tensor([-1, -1, -1, 0, 0, 0, 1, 1, 1, 1], dtype=dtype)
    assert torch.equal(found, wanted) and torch.equal(Round(0.5, 1, -1, 3)(x), wanted)


def test_a_plain_torch_runs_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(1, 3, 8, 8)
    graph = fxopt.capture(model, (x,))
    fxopt.lower(graph, backend="torchscript").save(tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "y = torch.jit.load('model.pt')(torch.load('x.pt'))[0]\n"
        "assert 'fxopt' not in sys.modules\n"
        "torch.save(y, 'y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x), rtol=0, atol=0.02)


def test_a_dynamic_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Round(), Rounded(nn.Linear(6, 5)), Round(0.01, 9))
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = fxopt.capture(model, (torch.randn(3, 6),), dynamic_shapes=({0: batch},))
    compiled = fxopt.lower(graph, backend="torchscript")
    x = torch.randn(11, 6)
    torch.testing.assert_close(compiled(x), model(x))
