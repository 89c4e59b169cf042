"""Every rule of the library fires in its examples, exactly, and holds back in the others.

`tests/rules/simplify.py` holds the examples of the rules of `passes/simplify.py`, by name. They are
the pictures of docs/rules.md, too.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from fxopt.registry import classes, rules_of
from fxopt.rules import Rule
from fxopt.testing import Example, check_rule

RULES = {
    (cls.__module__.rpartition(".")[2], rule.name): rule
    for cls in classes("passes").values()
    if cls.__module__.startswith("fxopt.passes.")
    for rule in rules_of(cls)
}
STEMS = sorted({stem for stem, _ in RULES})


def module_of(stem: str) -> Any:
    known = Path(__file__).with_name(f"{stem}.py").is_file()
    return importlib.import_module(f"tests.rules.{stem}") if known else None


def examples_of(stem: str) -> dict[str, list[Example]]:
    return getattr(module_of(stem), "EXAMPLES", {})


CASES = [
    pytest.param(stem, rule, example, id=f"{name}-{'fires' if not example.reason else 'not'}")
    for (stem, name), rule in RULES.items()
    for example in examples_of(stem).get(name, ())
]


@pytest.mark.parametrize(("stem", "rule", "example"), CASES)
def test_it_does_what_the_example_says(stem: str, rule: Rule, example: Example) -> None:
    options = getattr(module_of(stem), "OPTIONS", {}).get(rule.name, {})
    report = check_rule(rule, examples=[example], **options)
    assert report.fired + report.held_back == 1


@pytest.mark.parametrize("stem", STEMS)
def test_every_rule_has_an_example_where_it_fires(stem: str) -> None:
    """One that is called keep_… never does: it says why what looks right is left alone."""
    for name, rule in {n: r for (s, n), r in RULES.items() if s == stem}.items():
        assert rule.doc, f"{name} has no docstring: its equation ({rule.source})"
        known = examples_of(stem).get(name, [])
        wanted = [one for one in known if (one.reason is not None) is name.startswith("keep_")]
        assert wanted, f"tests/rules/{stem}.py has no such example of {name} ({rule.source})"
    stale = examples_of(stem).keys() - {n for s, n in RULES if s == stem}
    assert not stale, f"tests/rules/{stem}.py has examples of rules that are gone: {stale}"
