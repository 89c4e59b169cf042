"""`fxopt compare`: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from fxopt.backends import available
from fxopt.cli import main
from fxopt.registry import classes

SMALL = "tests.models:ConvBnRelu"
QUICK = ("--rounds", "1", "--no-memory", "--quiet")
IMAGE = ("--input", "1x3x8x8")
INSTALLED = sorted(
    name for name, cls in classes("backends").items()
    if available()[name] is None and not getattr(cls, "on_request", False)
)  # fmt: skip
Run = Callable[..., Result]
MINE = """
import torch
from tests.models import ConvBnRelu

def wide():
    return ConvBnRelu(16)

def data():
    for label in range(3):
        yield torch.randn(1, 3, 8, 8), [label]

def pooled(output):
    return output.mean((2, 3))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in a folder that holds mine.py, and check its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mine.py").write_text(MINE)

    def call(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["compare", *arguments])
        unexpected = result.exception and not isinstance(result.exception, SystemExit)
        if unexpected:
            raise result.exception  # type: ignore[misc]
        assert result.exit_code == code, result.output
        return result

    return call


def test_one_model_beside_its_backends(run: Run) -> None:
    pytest.importorskip("matplotlib")
    result = run(SMALL, *IMAGE, *QUICK, "--backend", "eager", "--backend", "onnx",
                 "--precision", "fp32", "--precision", "bf16", "--batch", "2", "--threads", "1",
                 "--data", "mine.py:data", "--logits", "mine.py:pooled",
                 "--plot", "a.svg")  # fmt: skip
    for part in ("ConvBnRelu on f32[1,3,8,8]", "onnx bf16", "batch 2", "3 of them with a label",
                 "wrote a.svg"):  # fmt: skip
        assert part in result.stdout
    assert result.stderr == ""
    assert all(len(line.rstrip()) <= 110 for line in result.stdout.splitlines() if "•" not in line)
    ElementTree.parse("a.svg")


def test_json_is_one_document(run: Run) -> None:
    result = run(SMALL, *IMAGE, *QUICK, "--json", "--passes", "none", "--dynamic", "0")
    document = json.loads(result.stdout)
    assert [row["name"] for row in document["rows"]] == ["model", *INSTALLED]
    assert {row["nodes"] for row in document["rows"]} == {3} and document["plot"] is None


def test_several_models_and_files(run: Run) -> None:
    CliRunner().invoke(main, ["compile", SMALL, *IMAGE, "-o", "small.onnx", "--quiet"])
    CliRunner().invoke(main, ["compile", SMALL, *IMAGE, "-o", "small.fxopt", "--quiet"])
    result = run(SMALL, "mine.py:wide", "small.onnx", *IMAGE, *QUICK, "--json")
    document = json.loads(result.stdout)
    assert [row["name"] for row in document["rows"]] == ["ConvBnRelu", "wide", "small.onnx"]
    assert document["rows"][2]["relative_error"] < 1e-5, "the file holds the same random weights"
    assert document["notes"] == [], "files run with torch's number of threads"
    document = json.loads(run("small.fxopt", *QUICK, "--json").stdout)
    assert [row["name"] for row in document["rows"]] == ["model", *INSTALLED]
    assert "small.onnx holds no example inputs" in run("small.onnx", *QUICK, code=2).stderr
    assert len(json.loads(run("small.onnx", *IMAGE, *QUICK, "--json").stdout)["rows"]) == 1


def test_a_model_beside_itself(run: Run) -> None:
    document = json.loads(run(SMALL, SMALL, *IMAGE, *QUICK, "--json").stdout)
    assert [row["name"] for row in document["rows"]] == [SMALL, f"{SMALL} 2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Missing argument 'MODEL...'"),
        ((SMALL, *IMAGE, "--backend", "onxx"), "Did you mean 'onnx'?"),
        ((SMALL, *IMAGE, "--precision", "fp8"), "precision must be one of"),
        ((SMALL, *IMAGE, "--batch", "0"), "0 is not in the range"),
        ((SMALL, *IMAGE, "--plot", "a.jpeg"), ".svg, .png, .pdf"),
        ((SMALL, *IMAGE, "--data", "mine.py:dta"), "has no 'dta'"),
        ((SMALL, *IMAGE, "--logits", "mine.py:MINE"), "has no 'MINE'"),
        ((SMALL, *IMAGE, "--logits", "mine.py:torch"), "is a module, not a function"),
        (("torch.nn:ReLU",), "--input"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments, "--rounds", "1", "--no-memory", code=2)
    assert words in result.stderr and result.stdout == ""


def test_a_job_that_fails(run: Run) -> None:
    assert "no folder" in run(SMALL, *IMAGE, "--plot", "no/a.svg", code=1).stderr
    result = run("tests.models:Branches", "--input", "1x4", *QUICK, "--json", code=1)
    assert json.loads(result.stdout)["error"]["type"] == "CaptureError"
    Path("bad.py").write_text("def data():\n    yield 1 / 0  # here\n")
    result = run(SMALL, *IMAGE, *QUICK, "--data", "bad.py:data", code=1)
    assert "ZeroDivisionError" in result.stderr and "yield 1 / 0" in result.stderr
