"""tools/new_pass.py writes a pass that works and a test that fails, both in house style."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fxopt.passes
from fxopt.registry import rules_of
from fxopt.testing import check_pass, check_rule
from tests import test_house_style as house_style

ROOT = Path(__file__).parent.parent


def load(path: Path) -> ModuleType:
    """Import a file; a dataclass in it needs its module among sys.modules."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


@pytest.fixture
def tool() -> ModuleType:
    return load(ROOT / "tools" / "new_pass.py")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree whose passes are found where the library's own are."""
    for folder in ("passes", "tests/passes", "tests/rules"):
        (tmp_path / folder).mkdir(parents=True)
    places = [*fxopt.passes.__path__, str(tmp_path / "passes")]
    monkeypatch.setattr(fxopt.passes, "__path__", places)
    return tmp_path


@pytest.fixture(params=[False, True], ids=["rules", "nodes"])
def written(tool: ModuleType, root: Path, request: pytest.FixtureRequest) -> Iterator[list[Path]]:
    """The files of a pass of rules, and of one that works on nodes."""
    yield tool.new_pass("merge_two_relus", root, nodes=request.param)
    sys.modules.pop("fxopt.passes.merge_two_relus", None)


def test_the_pass_works_and_bears_its_name(written: list[Path]) -> None:
    module = importlib.import_module("fxopt.passes.merge_two_relus")
    assert Path(module.__file__ or "") == written[0]
    one = module.MergeTwoRelus()
    assert one.name == "merge-two-relus"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU())
    check_pass(one, model, torch.randn(2, 4), rewrites=1)
    assert [rule.name for rule in rules_of(one)] == ["merge_relus"][: len(written) - 2]


def test_the_test_fails_for_the_reason_that_it_says(written: list[Path]) -> None:
    test = load(written[1])
    test.test_rewrites_what_it_should()
    with pytest.raises(AssertionError, match="write a model that looks like it and is not"):
        test.test_leaves_alone_what_it_must()


def test_its_examples_hold(written: list[Path]) -> None:
    for path in written[2:]:
        examples = load(path).EXAMPLES["merge_relus"]
        rules = rules_of(importlib.import_module("fxopt.passes.merge_two_relus").MergeTwoRelus)
        report = check_rule(rules[0], examples=examples)
        assert (report.fired, report.held_back) == (1, 2)


def test_the_files_are_in_house_style(written: list[Path], root: Path) -> None:
    house_style.test_a_pass_opens_with_before_after_and_left_alone(written[0])
    house_style.test_a_pass_imports_no_other_pass(written[0])
    run_tool("ruff", "check", "--config", str(ROOT / "pyproject.toml"), ".", folder=root)


@pytest.mark.slow
def test_the_files_have_types(tool: ModuleType, root: Path) -> None:
    rules, nodes = tool.new_pass("fuse_x", root)[0], tool.new_pass("fuse_y", root, nodes=True)[0]
    text = rules.read_text().replace("x.relu()", "torch.nn.functional.linear(x, x)")
    rules.write_text(text)  # what torch annotates takes what stands for a tensor, too
    run_tool("mypy", str(rules), str(nodes), folder=ROOT)


def test_it_says_what_comes_next(
    tool: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tool, "ROOT", root)
    monkeypatch.setattr(tool, "new_pass", partial(tool.new_pass, root=root))
    monkeypatch.setattr(sys, "argv", ["new_pass.py", "move_x"])
    tool.main()
    said = capsys.readouterr().out
    assert "wrote passes/move_x.py" in said
    assert "passes/__init__.py; python tools/cookbook.py" in said


def test_every_pass_of_the_library_begins_with_a_verb_that_it_knows(tool: ModuleType) -> None:
    for path in (ROOT / "passes").glob("[a-z]*.py"):
        assert path.stem.split("_")[0] in tool.VERBS


def run_tool(name: str, *arguments: str, folder: Path) -> None:
    pytest.importorskip(name)
    command = [sys.executable, "-m", name, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("stem", ["FuseX", "fuse-x", "fuse", "relu_twice", "../fuse_x"])
def test_a_name_out_of_style_is_refused(tool: ModuleType, root: Path, stem: str) -> None:
    with pytest.raises(ValueError):
        tool.new_pass(stem, root)


def test_nothing_is_overwritten(tool: ModuleType, root: Path) -> None:
    tool.new_pass("fuse_x", root)
    with pytest.raises(ValueError, match="there already"):
        tool.new_pass("fuse_x", root)
