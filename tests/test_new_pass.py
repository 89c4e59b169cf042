"""tools/new_pass.py writes a pass that works and a test that fails, both in house style."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fxopt.testing import check_pass

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
def root(tmp_path: Path) -> Path:
    (tmp_path / "passes").mkdir()
    (tmp_path / "tests" / "passes").mkdir(parents=True)
    return tmp_path


def test_the_pass_works_and_bears_its_name(tool: ModuleType, root: Path) -> None:
    source, test = tool.new_pass("merge_two_relus", root)
    assert test == root / "tests/passes/test_merge_two_relus.py"
    one = load(source).MergeTwoRelus()
    assert one.name == "merge-two-relus"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU())
    check_pass(one, model, torch.randn(2, 4), rewrites=1)
    for word in ("Before", "After", "Left alone"):
        assert word in source.read_text()
    assert "raise AssertionError" in test.read_text()
    compile(test.read_text(), str(test), "exec")


@pytest.mark.parametrize("stem", ["FuseX", "fuse-x", "fuse", "relu_twice", "../fuse_x"])
def test_a_name_out_of_style_is_refused(tool: ModuleType, root: Path, stem: str) -> None:
    with pytest.raises(ValueError):
        tool.new_pass(stem, root)


def test_nothing_is_overwritten(tool: ModuleType, root: Path) -> None:
    tool.new_pass("fuse_x", root)
    with pytest.raises(ValueError, match="there already"):
        tool.new_pass("fuse_x", root)
