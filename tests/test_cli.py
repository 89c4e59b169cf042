"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import fxopt
from fxopt.cli import main
from fxopt.cli.values import InputType, OptionType, dynamic_shapes, split_passes
from fxopt.registry import classes
from tests.models import Tokens

SMALL = "tests.models:ConvBnRelu"
IMAGE = ("--input", "1x3x8x8")
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder and check its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, list(arguments))
        unexpected = result.exception and not isinstance(result.exception, SystemExit)
        if unexpected:
            raise result.exception  # type: ignore[misc]
        assert result.exit_code == code, result.output
        return result

    return call


# -- compile ---------------------------------------------------------------------------------------


def test_compile_writes_an_artefact_and_reports(run: Run, tmp_path: Path) -> None:
    result = run("compile", SMALL, *IMAGE, "-o", "small.onnx", "--benchmark")
    for part in (
        "fuse-conv-bn",
        "verified: onnx backend",
        'backend = "onnx"',
        "wrote small.onnx",
        "speed:",
    ):
        assert part in result.stdout
    assert "capture" in result.stderr and "capture\n" not in result.stdout
    loaded = fxopt.load(tmp_path / "small.onnx")
    assert loaded(torch.randn(1, 3, 8, 8)).shape == (1, 8, 8, 8)


def test_the_backend_follows_the_suffix_unless_it_is_named(run: Run) -> None:
    assert 'backend = "eager"' in run("compile", SMALL, *IMAGE).stdout
    assert 'backend = "eager"' in run("compile", SMALL, *IMAGE, "-o", "a.fxopt").stdout
    assert (
        'backend = "eager"'
        in run("compile", SMALL, *IMAGE, "-o", "a.bin", "--backend", "eager").stdout
    )
    assert "names no backend" in run("compile", SMALL, *IMAGE, "-o", "a.bin", code=2).stderr


def test_json_is_one_document_on_stdout(run: Run) -> None:
    document = json.loads(run("compile", SMALL, *IMAGE, "--json", "--benchmark").stdout)
    assert document["model"] == "ConvBnRelu"
    assert document["final"]["nodes"] < document["captured"]["nodes"]
    assert all(v["passed"] for v in document["verifications"])
    assert document["recipe"]["model"] == SMALL
    assert document["benchmark"]["compiled_ms"] > 0


def test_json_is_one_document_also_when_the_job_fails(run: Run) -> None:
    result = run("compile", "tests.models:Branches", "--input", "1x4", "--json", code=1)
    assert json.loads(result.stdout)["error"]["type"] == "CaptureError"
    assert "Error: Branches cannot be captured" in result.stderr


def test_a_model_that_prints_does_not_spoil_the_document(run: Run) -> None:
    Path("loud.py").write_text(
        "import torch\nprint('import')\n"
        "class Loud(torch.nn.Linear):\n"
        "    def forward(self, x):\n        print('call')\n        return super().forward(x)\n"
        "def make():\n    return Loud(2, 2)\n"
    )
    result = run("compile", "loud.py:make", "--json")
    json.loads(result.stdout)
    assert "import" in result.stderr


def test_quiet_says_nothing_on_stderr(run: Run) -> None:
    assert run("compile", SMALL, *IMAGE, "--quiet").stderr == ""


def test_passes_may_have_options_and_stand_for_the_default_list(run: Run) -> None:
    result = run(
        "compile", SMALL, *IMAGE, "--json", "--passes", "fold-constants(growth=2.0),default"
    )
    names = json.loads(result.stdout)["recipe"]["passes"]
    assert names[0] == "fold-constants(growth=2.0)"
    assert len(names) == 1 + len(fxopt.default_passes())
    none = json.loads(run("compile", SMALL, *IMAGE, "--json", "--passes", "none").stdout)
    assert none["steps"] == []


def test_keyword_inputs_and_dynamic_dimensions(run: Run, tmp_path: Path) -> None:
    run(
        "compile", "tests.models:Tokens", "--input", "ids=1x5:int64", "--input", "mask=1x5",
        "--dynamic", "ids:0,ids:1", "--dynamic", "mask:0", "--dynamic", "mask:1", "-o", "t.onnx",
    )  # fmt: skip
    loaded = fxopt.load(tmp_path / "t.onnx")
    ids = torch.randint(0, 11, (3, 7))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tokens().eval()
    found, expected = loaded(ids, mask=torch.ones(3, 7)), model(ids, torch.ones(3, 7))
    torch.testing.assert_close(found["logits"], expected["logits"])


def test_precision_and_backend_options(run: Run) -> None:
    document = json.loads(
        run("compile", SMALL, *IMAGE, "--json", "--backend", "onnx", "--option", "opset=21",
            "--precision", "fp16", "--benchmark").stdout
    )  # fmt: skip
    assert document["recipe"]["backend"] == "onnx(opset=21)"
    assert document["recipe"]["precision"] == "fp16"


def test_int8_is_calibrated_on_what_a_function_of_mine_yields(run: Run) -> None:
    Path("images.py").write_text(
        "import torch\ndef some():\n    for _ in range(3):\n        yield torch.randn(2, 3, 8, 8)\n"
    )
    for data, words in (("images.py:some", "over 6 samples"), ("random", "over 8 samples")):
        document = json.loads(
            run("compile", SMALL, *IMAGE, "--json", "--backend", "onnx", "--precision", "int8",
                "--calibration", data).stdout
        )  # fmt: skip
        assert document["recipe"]["calibration"] == data
        assert words in str(document["steps"][-1])


def test_a_function_of_mine_judges_the_result(run: Run) -> None:
    Path("judge.py").write_text(
        "def yes(model):\n    return True\ndef no(model):\n    return False\n"
    )
    assert (
        'verify = "judge.py:yes"'
        in run("compile", SMALL, *IMAGE, "--verify", "judge.py:yes").stdout
    )
    run("compile", SMALL, *IMAGE, "--verify", "judge.py:no", code=1)


# -- recipes ---------------------------------------------------------------------------------------


def test_the_printed_recipe_reproduces_the_run(run: Run) -> None:
    first = run(
        "compile", SMALL, *IMAGE, "--dynamic", "0", "--verify", "each", "--tolerance", "0.001",
        "--on-error", "skip", "--backend", "onnx(opset=21)", "--passes", "fuse-conv-bn",
    ).stdout  # fmt: skip
    recipe = first.split("recipe that reproduces this (a file for --recipe):\n")[1]
    Path("ship.toml").write_text(recipe)
    again = run("compile", "--recipe", "ship.toml").stdout
    assert again.split("recipe that reproduces")[1] == first.split("recipe that reproduces")[1]
    assert tomllib.loads(recipe)["input"] == ["1x3x8x8:float32"]


def test_flags_win_over_the_recipe(run: Run) -> None:
    Path("ship.toml").write_text(
        f'model = "{SMALL}"\ninput = "1x3x8x8"\nbackend = "onnx"\nverify = "off"\n'
        "[option]\nopset = 21\n"
    )
    assert 'backend = "onnx(opset=21)"' in run("compile", "--recipe", "ship.toml").stdout
    result = run("compile", "--recipe", "ship.toml", "--verify", "each", "tests.models:SharedLayer",
                 "--input", "2x4")  # fmt: skip
    assert 'verify = "each"' in result.stdout and "SharedLayer" in result.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle = 'x'", "unknown setting 'modle'. Did you mean 'model'?"),
        ("model = ", "is not TOML"),
        ("model = 'm:x'\ntolerance = 'much'", "not a valid float"),
    ],
)
def test_a_bad_recipe_is_refused(run: Run, text: str, words: str) -> None:
    Path("bad.toml").write_text(text)
    assert words in run("compile", "--recipe", "bad.toml", code=2).stderr


def test_a_missing_recipe_is_refused(run: Run) -> None:
    assert "Cannot read the recipe" in run("compile", "--recipe", "no.toml", code=2).stderr


# -- wrong usage: exit code 2, and the nearest name ------------------------------------------------

WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "command": (("explian", SMALL), "Did you mean 'explain'?"),
    "flag": (("compile", SMALL, "--bakend", "onnx"), "Did you mean '--backend'?"),
    "no model": (("compile",), "Missing argument 'MODEL'"),
    "pass": (("compile", SMALL, "--passes", "fuse-conv"), "Did you mean 'fuse-conv-bn'?"),
    "pass option": (
        ("compile", SMALL, "--passes", "fold-constants(grow=2)"),
        "Did you mean 'growth'?",
    ),
    "pass value": (("compile", SMALL, "--passes", "fold-constants(growth='x')"), "wants float"),
    "backend": (("compile", SMALL, "--backend", "onxx"), "Did you mean 'onnx'?"),
    "backend option": (
        ("compile", SMALL, "--backend", "onnx", "--option", "opst=20"),
        "Did you mean 'opset'?",
    ),
    "option": (("compile", SMALL, "--option", "opset"), "Write KEY=VALUE"),
    "precision": (("compile", SMALL, *IMAGE, "--precision", "fp8"), "precision must be one of"),
    "no calibration": (
        ("compile", SMALL, *IMAGE, "--precision", "int8"), "calibration='random'",
    ),
    "calibration": (
        ("compile", SMALL, *IMAGE, "--precision", "int8", "--calibration", "images"), "FILE.py",
    ),
    "verify": (("compile", SMALL, "--verify", "finale"), "Did you mean 'final'?"),
    "verify function": (("compile", SMALL, "--verify", "tests.models:nothing"), "has no 'nothing'"),
    "on-error": (("compile", SMALL, "--on-error", "ignore"), "'raise', 'skip'"),
    "input": (("compile", SMALL, "--input", "1x3xa"), "1x3x224x224:float32"),
    "input dtype": (("compile", SMALL, "--input", "1x3:flot32"), "Did you mean 'float32'?"),
    "dynamic": (("compile", SMALL, "--dynamic", "batch"), "Write 0 for the first"),
    "dynamic of both kinds": (("compile", SMALL, "--dynamic", "0,x:1"), "not both"),
    "no module": (("show", "tests.model:ConvBnRelu"), "Did you mean 'tests.models'?"),
    "no name": (("show", "tests.models:ConvBn"), "Did you mean 'ConvBnRelu'?"),
    "no file": (("show", "nowhere.py:make"), "There is no file 'nowhere.py'"),
    "no spec": (("show", "resnet18"), "Write module:callable"),
    "weights": (("show", "weights.pth"), "holds weights"),
    "a file alone": (("show", "make.py"), "make.py:callable"),
    "not a module": (("show", "tests.models:annotations"), "not a torch.nn.Module"),
    "needs arguments": (("show", "torch.nn:Linear"), "needs arguments: in_features, out_features"),
    "a function that makes no model": (("show", "os:getcwd"), "gives str, which is not"),
    "no inputs known": (("show", "torch.nn:ReLU"), "--input 1x3x224x224:float32"),
    "explain": (("explain", SMALL, "fuse-bn"), "Unknown pass 'fuse-bn'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(run: Run, case: str) -> None:
    arguments, words = WRONG[case]
    result = run(*arguments, code=2)
    assert words in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


# -- a job that fails: exit code 1 -----------------------------------------------------------------


def test_an_unwritable_output_is_found_before_the_work(run: Run) -> None:
    result = run("compile", SMALL, *IMAGE, "-o", "no/such/folder/x.onnx", code=1)
    assert "there is no folder 'no/such/folder'" in result.stderr and "capture" not in result.stderr
    assert "it is a folder" in run("compile", SMALL, *IMAGE, "-o", ".", code=1).stderr


def test_a_missing_engine_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        classes("backends")["onnx"], "missing", lambda self: "pip install onnxruntime"
    )
    result = run("compile", SMALL, *IMAGE, "--backend", "onnx", code=1)
    assert "not installed. pip install onnxruntime" in result.stderr
    assert "pip install" in run("backends").stdout


def test_a_model_that_cannot_be_captured(run: Run) -> None:
    result = run("show", "tests.models:Branches", "--input", "1x4", code=1)
    assert "cannot be captured" in result.stderr and "models.py" in result.stderr


def test_inputs_that_do_not_fit(run: Run) -> None:
    assert (
        "does not run on the example inputs"
        in run("show", SMALL, "--input", "1x4x8x8", code=1).stderr
    )


def test_a_file_that_fails_shows_its_line(run: Run) -> None:
    Path("broken.py").write_text("def make():\n    return 1 / 0  # here\n")
    result = run("show", "broken.py:make", code=1)
    assert "ZeroDivisionError" in result.stderr and "return 1 / 0" in result.stderr
    Path("imports.py").write_text("import no_such_package\n")
    assert "No module named 'no_such_package'" in run("show", "imports.py:make", code=1).stderr


# -- models ----------------------------------------------------------------------------------------


def test_a_file_may_import_its_neighbour(run: Run) -> None:
    Path("neighbour_of_mine.py").write_text("import torch\nlayer = torch.nn.Linear(3, 2)\n")
    Path("mine.py").write_text("from neighbour_of_mine import layer\n")
    assert "linear" in run("show", "mine.py:layer").stdout


def test_a_module_instance_is_used_as_it_is(run: Run) -> None:
    Path("instances.py").write_text("import torch\nlayer = torch.nn.Linear(3, 2)\nlayer.half()\n")
    assert "f16[2,3]" in run("show", "instances.py:layer", "--input", "1x3:float16").stdout


def test_random_weights_are_the_same_each_time(run: Run, tmp_path: Path) -> None:
    run("compile", SMALL, *IMAGE, "-o", "a.fxopt")
    run("compile", SMALL, *IMAGE, "-o", "b.fxopt")
    x = torch.randn(1, 3, 8, 8)
    a, b = fxopt.load(tmp_path / "a.fxopt"), fxopt.load(tmp_path / "b.fxopt")
    assert torch.equal(a(x), b(x))


def test_an_artefact_is_a_model_again(run: Run) -> None:
    run("compile", SMALL, *IMAGE, "-o", "small.fxopt", "--passes", "none")
    assert "batch_norm" in run("show", "small.fxopt").stdout
    result = run("compile", "small.fxopt", "--backend", "onnx", "-o", "small.onnx", "--benchmark")
    assert "verified: onnx backend" in result.stdout
    assert "not the graph" in run("show", "small.onnx", code=1).stderr


def test_pt2_needs_trust(run: Run) -> None:
    program = torch.export.export(torch.nn.Linear(3, 2), (torch.randn(1, 3),))
    torch.export.save(program, "linear.pt2")
    assert "can run code" in run("show", "linear.pt2", code=2).stderr
    assert "linear" in run("show", "linear.pt2", "--trust").stdout


def test_torchvision_comes_without_weights(run: Run) -> None:
    pytest.importorskip("torchvision")
    result = run("show", "torchvision.models:squeezenet1_1", "--input", "1x3x64x64")
    assert "conv2d" in result.stdout
    assert "Did you mean 'resnet18'" in run("show", "torchvision.models:resnet81", code=2).stderr


# -- show, explain, lists --------------------------------------------------------------------------


def test_show_before_after_and_between(run: Run) -> None:
    assert "batch_norm" in run("show", SMALL, *IMAGE).stdout
    assert "batch_norm" not in run("show", SMALL, *IMAGE, "--passes", "fuse-conv-bn").stdout
    diff = run("show", SMALL, *IMAGE, "--diff").stdout
    assert "fuse-conv-bn: 1 rewrite\n" in diff and "\n-%batch_norm" in diff


def test_show_draws(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "wrote small.dot" in run("show", SMALL, *IMAGE, "-o", "small.dot").stdout
    drawn = Path("small.dot").read_text()
    assert drawn.startswith("digraph") and "batch_norm" in drawn
    assert "ends in .dot" in run("show", SMALL, *IMAGE, "-o", "small.gif", code=2).stderr
    monkeypatch.setenv("PATH", "")
    assert (
        "needs Graphviz's program" in run("show", SMALL, *IMAGE, "-o", "small.svg", code=1).stderr
    )


def test_explain_says_what_and_why_not(run: Run) -> None:
    assert "fuse-conv-bn: 1 rewrite" in run("explain", SMALL, "fuse-conv-bn", *IMAGE).stdout
    after = run("explain", SMALL, "fuse-conv-bn", *IMAGE, "--after", "fuse-conv-bn").stdout
    assert "It found nothing" in after


def test_passes_and_backends_are_listed(run: Run) -> None:
    rows = json.loads(run("passes", "--json").stdout)
    assert [row["name"] for row in rows if row["default"]]
    assert (
        next(row for row in rows if row["name"] == "fold-constants")["options"]["growth"] == "4.0"
    )
    assert "fuse-conv-bn" in run("passes").stdout
    backends = {row["name"]: row for row in json.loads(run("backends", "--json").stdout)}
    assert backends["eager"]["missing"] is None
    assert "ready" in run("backends").stdout


# -- how values are written ------------------------------------------------------------------------


def test_inputs_are_read_and_written_alike() -> None:
    for text in ("1x3x224x224:float32", "ids=1x128:int64", "scalar:bool", "mask=7:bfloat16"):
        assert str(InputType().convert(text, None, None)) == text
    assert str(InputType().convert("2x3", None, None)) == "2x3:float32"
    assert str(InputType().convert("2:i64", None, None)) == "2:int64"


def test_passes_are_split_outside_of_brackets() -> None:
    assert split_passes("a, b(x=(1, 2), y='p,q') ,c") == ["a", "b(x=(1, 2), y='p,q')", "c"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=1.5", 1.5), ("a=true", True), ("a=None", None), ("a=io", "io"),
     ("a=(1,2)", (1, 2)), ("a=x=y", "x=y")],
)  # fmt: skip
def test_options_are_literals_or_strings(text: str, value: Any) -> None:
    assert OptionType().convert(text, None, None) == ("a", value)


def test_dynamic_dimensions_are_named() -> None:
    assert dynamic_shapes(("0", "2")) == {0: "size_0", 2: "size_2"}
    assert dynamic_shapes(("x:0,x:1",)) == {"x": {0: "x_0", 1: "x_1"}}
    assert dynamic_shapes(()) is None


def test_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fxopt", "--version"], capture_output=True, text=True, check=False
    )
    assert result.stdout == f"fxopt, version {fxopt.__version__}\n"
