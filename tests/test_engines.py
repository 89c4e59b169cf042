"""The benchmark of engines: what it says of a race, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import engine_race
import engines
from engine_race import Case, Row, measure_engines, page

NAMES = ["eager", "fxopt eager"]


def row(median: float, **others: Any) -> Row:
    return Row(median, median, median, 1.0, 0.0, 1.0, **others)


def test_the_page_compares_ours_with_the_best_peers() -> None:
    times = {
        "fxopt eager": 6.0, "fxopt onnx": 4.0, "fxopt auto": 4.0, "Inductor": 12.0,
        "torch.onnx in ONNX Runtime": 5.0, "OpenVINO": 8.0,
    }  # fmt: skip
    one = Case("net", "fp32", 1, 2, {name: row(time) for name, time in times.items()})
    two = Case("other", "fp32", 1, 2, {}, {"OpenVINO": "openvino is not installed"})
    text = page([one, two], "plot.png")
    cells = "6.00 | 12.00 | 5.00 | 1.20 | 4.00 | 5.00 | 0.80"
    assert f"| net, fp32, batch 1, 2 threads | {cells} |" in text
    assert "fxopt eager : Inductor: 0.50 in the geometric mean, 0.50 at worst." in text
    assert "fxopt auto : the best peer: 0.80 in the geometric mean" in text
    assert "OpenVINO: openvino is not installed" in text and "(plot.png)" in text
    assert text.index("| fxopt onnx | 4.00") < text.index("| OpenVINO | 8.00")  # the fastest first


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every name stand for a tiny model; return the names that were asked for."""
    asked: list[str] = []

    def subject(name: str) -> tuple[nn.Module, torch.Tensor]:
        asked.append(name)
        if name == "broken":
            return nn.Linear(3, 3), torch.randn(2, 4)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)

    monkeypatch.setattr(engine_race, "subject", subject)
    return asked


def run(tmp_path: Path, models: list[str], names: list[str] = NAMES) -> dict[str, Case]:
    state = tmp_path / "state.json"
    measure_engines(
        models, ["fp32"], [1, 3], 1, names, 0.05, False, state, tmp_path / "page.md"
    )
    return engine_race._read(state)


def test_what_is_measured_is_kept(tmp_path: Path, tiny: list[str]) -> None:
    cases = run(tmp_path, ["a"])
    assert len(cases) == 2 and tiny == ["a", "a"]
    for case in cases.values():
        assert set(case.rows) == set(NAMES) and not case.failures
        assert case.rows["eager"].faster == 1.0 and case.rows["fxopt eager"].error < 1e-6
    run(tmp_path, ["a", "b"])
    assert tiny == ["a", "a", "b", "b"]  # what is there already is not measured again
    assert (tmp_path / "page.png").stat().st_size > 1000
    assert "## b, fp32, batch 3, 1 threads" in (tmp_path / "page.md").read_text()
    assert len(json.loads((tmp_path / "state.json").read_text())) == 4


def test_an_engine_that_fails_is_said(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(task: engines.Task) -> engines.Call:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setitem(engines.ENGINES, "broken", broken)
    cases = run(tmp_path, ["a"], [*NAMES, "broken", "eager, channels last"])
    for case in cases.values():
        assert set(case.rows) == set(NAMES)
        assert case.failures == {
            "broken": "RuntimeError: no such operator",
            "eager, channels last": "its input is no image",
        }


@pytest.mark.parametrize("name", ["torch.jit", "fxopt onnx", "torch.onnx in ONNX Runtime"])
def test_engines_compute_what_the_model_does(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    call, seconds = engines.built(name, engines.Task(model, x, threads=1))
    torch.testing.assert_close(engines.first_output(call()).float(), model(x).detach())
    assert seconds > 0
