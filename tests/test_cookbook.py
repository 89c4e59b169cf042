"""docs/rules.md is what tools/cookbook.py writes, and shows every rule."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from fxopt.registry import classes, rules_of

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cookbook", ROOT / "tools" / "cookbook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(tool: ModuleType) -> None:
    assert tool.page() == PAGE, "run: python tools/cookbook.py"


def test_every_rule_has_a_heading_and_a_link_to_it() -> None:
    headings = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)
    assert len(headings) == len(set(headings)), "two rules of one name share a link"
    rules = {rule.name.partition("[")[0] for cls in classes("passes").values()
             for rule in rules_of(cls)}  # fmt: skip
    assert set(headings) == rules
    for heading in headings:
        assert f"[{heading}](#{heading})" in PAGE


def test_both_sides_of_a_picture_are_there() -> None:
    """Every rule shows a graph; one that fires shows what it leaves, too."""
    for part in PAGE.split("\n### ")[1:]:
        assert "return (" in part
        assert ("before" in part and "after" in part) or part.startswith("keep_"), part
