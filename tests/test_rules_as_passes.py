"""A rule, and a set of rules, is a pass wherever a pass is named: by place, by plugin, by hand."""

from __future__ import annotations

import importlib.metadata
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import fxopt
from fxopt.cli import main
from fxopt.errors import OptionError
from fxopt.registry import is_reachable, registered, resolve_pass, rule_of, rules_of, spec_of
from fxopt.rules import Rule, RuleSet

MINE = '''
import torch
from fxopt.rules import RuleSet, rule

def make():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.ReLU())

@rule(lambda x: torch.relu(torch.relu(x)))
def merge_relus(x):
    """relu(relu(x)) = relu(x)"""
    return x.relu() if x.is_floating else "its input is not floating point"

@rule(lambda x: torch.relu(x))
def relu_by_tanh(x):
    """wrong"""
    return x.tanh()

@rule(lambda x, f: f(f(x)), family={"f": (torch.abs, torch.floor)})
def merge_repeated(x, f):
    """f(f(x)) = f(x)"""
    return f(x)

several = RuleSet(merge_relus, merge_repeated, name="several")
as_tuple = (merge_relus,)

def hidden():
    @rule(lambda x: torch.sin(torch.sin(x)))
    def in_a_function(x):
        return None
    return in_a_function

held = RuleSet(hidden(), name="held")
'''
INPUT = ("--input", "2x4")
X = torch.ones(2, 4)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's file in the current folder, under a name of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"mine_{random.randrange(10**9)}.py"
    Path(name).write_text(MINE)
    return name


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    return result


# -- by place --------------------------------------------------------------------------------------


def test_a_rule_or_a_set_is_named_by_its_place(mine: str) -> None:
    one, several = resolve_pass(f"{mine}:merge_relus"), resolve_pass(f"{mine}:several")
    assert isinstance(one, Rule) and isinstance(several, RuleSet)
    assert spec_of(one) == f"{Path(mine).resolve()}:merge_relus"
    assert spec_of(several) == f"{Path(mine).resolve()}:several"
    for spec in (spec_of(one), spec_of(several)):
        assert spec_of(resolve_pass(spec)) == spec


@pytest.mark.parametrize(
    ("member", "name", "spelled"),
    [
        ("merge_repeated[abs]", "merge_repeated[abs]", "merge_repeated[abs]"),
        ("merge_repeated[merge_repeated[floor]]", "merge_repeated[floor]", "merge_repeated[floor]"),
        ("several[merge_relus]", "merge_relus", "merge_relus"),
        ("several[merge_repeated[abs]]", "merge_repeated[abs]", "merge_repeated[abs]"),
        ("held[in_a_function]", "in_a_function", "held[in_a_function]"),
    ],
)
def test_one_rule_of_several_stands_in_brackets(
    mine: str, member: str, name: str, spelled: str
) -> None:
    one = resolve_pass(f"{mine}:{member}")
    assert isinstance(one, Rule) and one.name == name
    assert spec_of(one) == f"{Path(mine).resolve()}:{spelled}"
    assert resolve_pass(spec_of(one)) is one


def test_a_module_of_the_library_is_a_place_too() -> None:
    one = resolve_pass("simplify[merge_pads]")
    assert spec_of(one) == "fxopt.passes.simplify:merge_pads"
    assert resolve_pass(spec_of(one)) is one


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mine.py:merge_relus(limit=3)", "is a rule and has no options: leave out limit"),
        ("mine.py:several(limit=3)", "is a set of rules and has no options"),
        ("mine.py:as_tuple", "is a tuple of rules: make it a RuleSet"),
        ("mine.py:merge_relu", "Did you mean 'merge_relus'?"),
        ("mine.py:several[merge_relu]", "Unknown rule of 'several': 'merge_relu'. Did you mean"),
        ("mine.py:make", "is not a pass"),
        ("fuse-conv-bn[x]", "'fuse-conv-bn' is not made of rules"),
    ],
)
def test_what_is_wrong_is_said_in_words(mine: str, spec: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_pass(spec.replace("mine.py", mine))
    assert words in str(caught.value)
    with pytest.raises(OptionError, match="is a class"):
        resolve_pass(Rule)


def test_the_rules_of_a_pass() -> None:
    passes = registered("passes")
    simplify = passes["simplify"]
    assert rules_of(simplify).name == "simplify" and len(rules_of(simplify)) > 10
    assert list(rules_of(simplify())) == list(rules_of(simplify))
    assert not rules_of(passes["fuse-conv-bn"])
    assert rule_of(simplify(), "merge_pads").name == "merge_pads"


# -- on the command line ---------------------------------------------------------------------------


def test_compile_and_its_recipe(mine: str) -> None:
    passes = f"{mine}:merge_relus,{mine}:several,default"
    report = run("compile", f"{mine}:make", *INPUT, "--passes", passes).stdout
    recipe = report.split("recipe that reproduces this (a file for --recipe):\n")[1]
    assert f'{Path(mine).resolve()}:merge_relus", "{Path(mine).resolve()}:several"' in recipe
    Path("again.toml").write_text(recipe)
    assert recipe in run("compile", "--recipe", "again.toml").stdout


def test_show(mine: str) -> None:
    shown = run("show", f"{mine}:make", *INPUT, "--diff", "--passes", f"{mine}:merge_relus").stdout
    assert "merge_relus: 1 rewrite" in shown
    member = run("show", f"{mine}:make", *INPUT, "--passes", f"{mine}:several[merge_relus]")
    assert member.stdout.count("relu(") == 1


def test_bisect_names_the_rule_and_its_script_imports_it(mine: str) -> None:
    bisect = ("bisect", f"{mine}:make", *INPUT, "--passes")
    set_of = f"{mine}:merge_relus,{mine}:relu_by_tanh"
    found = run(*bisect, set_of, "--script", "bug.py", code=1).stdout
    assert "relu_by_tanh' makes the result wrong" in found and "It was run and fails" in found
    assert "number 1 of 1, by the rule relu_by_tanh" in found
    assert f'PASS = "{Path(mine).resolve()}:relu_by_tanh"' in Path("bug.py").read_text()


# -- where no other process finds it ---------------------------------------------------------------

CELL = MINE.replace("def make", "def _make")


@pytest.fixture
def cell() -> dict[str, Any]:
    """What a cell of a notebook, or a line of a shell, defines."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(CELL, "<cell 3>", "exec"), names)
    return names


class TwoRelus(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().relu()


def test_a_rule_of_a_notebook_works_and_the_report_says_what_is_lacking(
    cell: dict[str, Any],
) -> None:
    one, several = cell["merge_relus"], cell["several"]
    assert one.source == "<cell 3>:8" and not is_reachable(one) and not is_reachable(several)
    compiled = fxopt.compile(TwoRelus(), X, passes=[one, several])
    assert [step.name for step in compiled.story.steps] == ["merge_relus", "several"]
    text = str(compiled.report)
    assert 'passes = ["merge_relus", "several"]' in text
    assert "# merge_relus stands where no other process finds it: put it into a file" in text
    assert compiled.report.to_json()["recipe"]["to_define"] == ["merge_relus", "several"]
    assert "merge_relus matches at" in str(fxopt.explain(one, fxopt.capture(TwoRelus(), X)))


def test_a_rule_of_a_script_is_not_found_by_another_process(
    cell: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ModuleType("__main__")
    vars(script).update(cell, __file__="/somewhere/script.py")
    monkeypatch.setitem(sys.modules, "__main__", script)
    names = ("merge_relus", "several", "held")
    assert not any(is_reachable(cell[name]) for name in names)
    assert spec_of(cell["held"]) == "held" and spec_of(cell["held"][0]) == "in_a_function"


def test_the_script_of_a_notebooks_rule_leaves_a_place(
    cell: dict[str, Any], tmp_path: Path
) -> None:
    for wrong in (cell["relu_by_tanh"], RuleSet(cell["relu_by_tanh"], name="mine")):
        found = fxopt.bisect(TwoRelus(), X, passes=[wrong], script=tmp_path / "bug.py")
        assert found.rule == "relu_by_tanh" and found.script is not None
        assert not found.script.confirmed and "It was not run" in str(found.script)
        text = (tmp_path / "bug.py").read_text()
        assert f"# {wrong.name} is defined where no other process can import it" in text
        assert f"Paste or import it here: PASS = {wrong.name}." in text


def test_a_rule_that_bears_the_name_of_a_pass_is_not_taken_for_it() -> None:
    @fxopt.rule(lambda x: torch.relu(x))
    def simplify(x: Any) -> Any:
        return None

    assert not is_reachable(simplify)
    compiled = fxopt.compile(TwoRelus(), X, passes=[simplify])
    assert compiled.report.recipe.settings["to_define"] == ["simplify"]


# -- by entry point --------------------------------------------------------------------------------


class Point:
    """An entry point of a package that is installed."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    usual = importlib.metadata.entry_points

    def plug_in(*values: Any) -> None:
        def entry_points(**options: Any) -> Any:
            points = [Point(lambda value=value: value) for value in values]
            return points if options.get("group") == "fxopt.passes" else usual(**options)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        registered.cache_clear()

    yield plug_in
    registered.cache_clear()


def test_a_package_brings_rules(plug: Callable[..., None], mine: str) -> None:
    one, several = resolve_pass(f"{mine}:merge_relus"), resolve_pass(f"{mine}:several")
    plug(one, several)
    assert resolve_pass("merge_relus") is one and resolve_pass("several") is several
    assert spec_of(one) == "merge_relus" and spec_of(several) == "several"
    assert resolve_pass("several[merge_repeated[abs]]").name == "merge_repeated[abs]"
    rows = {row["name"]: row for row in json.loads(run("passes", "--json").stdout)}
    assert rows["merge_relus"]["doc"] == "relu(relu(x)) = relu(x)"
    assert rows["several"]["rules"] == [rule.name for rule in several]
    assert rows["several"]["default"] is None and rows["several"]["effect"] == "exact"
    listed = run("passes", "several").stdout
    assert "merge_repeated[floor]" in listed and "f(f(x)) = f(x)" in listed
    with pytest.raises(OptionError, match="has no options"):
        resolve_pass("merge_relus(x=1)")


def test_two_of_one_name_are_refused(plug: Callable[..., None], mine: str) -> None:
    one = resolve_pass(f"{mine}:merge_relus")
    plug(one, RuleSet(one, name="merge_relus"))
    with pytest.raises(OptionError, match=r"Two passes are called 'merge_relus': the rule at .*"):
        resolve_pass("merge_relus")
    plug(RuleSet(one, name="simplify"))
    with pytest.raises(OptionError, match=r"passes.simplify.Simplify and the rules .*name=…\)"):
        resolve_pass("simplify")


def test_passes_without_rules_say_so() -> None:
    assert run("passes", "fuse-conv-bn").stdout == "fuse-conv-bn is not made of rules.\n"
    rules = json.loads(run("passes", "simplify", "--json").stdout)
    assert {"rule", "doc", "source"} == set(rules[0])
    assert "Did you mean 'simplify'?" in run("passes", "simplfy", code=2).stderr
