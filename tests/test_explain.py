"""`fxopt explain`: what a pass or a rule does to a model, where it holds back, and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.errors import OptionError
from fxopt.passes.simplify import Simplify, merge_bounds

SMALL = "tests.models:ConvBnRelu"
IMAGE = ("--input", "1x3x8x8")
BOUNDS = ("tests.test_explain:Bounds", "--input", "2x4")
Run = Callable[..., Result]


class TwoNorms(nn.Module):
    """A convolution whose output two batch norms use."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.a(y) + self.b(y)


class Bounds(nn.Module):
    """Bounds that merge, cross, and merge behind a dropout; a pad that is none of a convolution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.clamp(-1, 1).clamp(0, 2)
        b = x.clamp(0, 1).clamp(2, 3) + x.clamp(0, 1).clamp(2, 3)
        c = nn.functional.dropout(x.relu(), training=False).relu()
        return (a + b + c).abs().exp().abs()


class Inside(nn.Module):
    """Something to merge in one branch of a condition."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.clamp(-1, 1).clamp(0, 2), lambda y: -y, (x,))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, ["explain", *arguments, "-q"])
        assert result.exit_code == code, result.output
        return result

    return call


# -- a pass ----------------------------------------------------------------------------------------


def test_it_says_what_and_why_not(run: Run) -> None:
    said = run(SMALL, "fuse-conv-bn", *IMAGE).stdout
    assert said.startswith("fuse-conv-bn: 1 rewrite, on the graph after remove-dead-nodes, fold-")
    assert "conv2d_1 stands for conv2d, batch_norm" in said
    shared = run("tests.test_explain:TwoNorms", "fuse-conv-bn", *IMAGE).stdout
    assert "held back at batch_norm" in shared


def test_on_which_graph(run: Run) -> None:
    assert "on the captured graph" in run(SMALL, "fuse-conv-bn", *IMAGE, "--after", "none").stdout
    assert "on the captured graph" in run(SMALL, "remove-dead-nodes", *IMAGE).stdout
    after = run(SMALL, "fuse-conv-bn", *IMAGE, "--after", "fuse-conv-bn").stdout
    assert "on the graph after fuse-conv-bn" in after and "It found nothing" in after


def test_rules_in_a_table(run: Run) -> None:
    said = run(BOUNDS[0], "simplify", *BOUNDS[1:]).stdout
    (row,) = [line for line in said.splitlines() if "│ merge_bounds" in line]
    assert "clamp_3: the bounds cross (and 1 more)" in row
    (row,) = [line for line in said.splitlines() if "│ merge_neg_into_sum" in line]
    assert "nearest at add_2: neg wanted, found relu_1 (relu)" in row
    (row,) = [line for line in said.splitlines() if "│ merge_roundings" in line] or [""]
    assert not row, "its operators do not stand in the graph"
    assert "no operator to begin at: merge_reshapes," in said


def test_as_json(run: Run) -> None:
    document = json.loads(run(SMALL, "fuse-conv-bn", *IMAGE, "--json").stdout)
    assert document["pass"] == "fuse-conv-bn" and document["rewrites"] == 1
    assert document["after"][:2] == ["remove-dead-nodes", "fold-constants"]
    assert document["stands_for"]["conv2d_1"] == ["conv2d", "batch_norm"]
    assert document["diff"].startswith("@@ top level @@\n-%conv2d") and document["misses"] == []
    assert document["rules"] == document["explanations"] == {}
    shared = run("tests.test_explain:TwoNorms", "fuse-conv-bn", *IMAGE, "--json").stdout
    assert json.loads(shared)["misses"][0]["reason"]
    document = json.loads(run(BOUNDS[0], "simplify", *BOUNDS[1:], "--json").stdout)
    counts = {"tried", "matched", "rewritten", "seconds"}
    assert all(set(count) == counts for count in document["rules"].values())
    bounds = document["explanations"]["merge_bounds"]
    assert bounds["matched"] == ["clamp_1", "relu_1"]
    assert [held["reason"] for held in bounds["held_back"][:2]] == ["the bounds cross"] * 2
    near = document["explanations"]["merge_neg_into_sum"]["nearest"]
    assert near["node"] == "add_2" and near["matched"] == ["add_2"]


def test_as_json_when_it_fails(run: Run) -> None:
    failed = run(SMALL, "fuse-conv-bn", "--input", "1x4x8x8", "--json", code=1)
    assert json.loads(failed.stdout)["error"]["type"]


# -- one rule --------------------------------------------------------------------------------------


def test_one_rule_of_a_pass(run: Run) -> None:
    said = run(BOUNDS[0], "simplify", *BOUNDS[1:], "--rule", "merge_bounds").stdout.splitlines()
    assert said[0].startswith("merge_bounds (") and said[0].endswith(")")
    assert "clamp(clamp(x, a, b), c, d) = clamp(x, max(a, c), min(b, d))" in said[1]
    assert "  pattern  relu(y)" in said
    assert any(line.startswith("On the graph after remove-dead-nodes") for line in said)
    assert "  fires at clamp_1, relu_1" in said
    assert "  holds back: the bounds cross" in said
    (place,) = [line for line in said if line.startswith("    at clamp_3, clamp_5 (")]
    assert place.endswith(")") and "test_explain.py:" in place
    assert said[-1] == "In the course of simplify it makes 2 rewrites."


def test_a_rule_by_its_place_on_the_graph_of_its_pass(run: Run) -> None:
    alone = run(BOUNDS[0], "simplify[merge_bounds]", *BOUNDS[1:]).stdout
    assert "On the graph after remove-dead-nodes" in alone and "In the course" not in alone
    dropout = run(BOUNDS[0], "fxopt.passes.remove_no_ops:remove_dropout", *BOUNDS[1:]).stdout
    assert "On the graph after remove-dead-nodes, fold-constants:\n  fires at dropout" in dropout


def test_a_rule_of_ones_own(run: Run) -> None:
    Path("rules_of_mine.py").write_text(
        "import torch\nfrom fxopt.rules import RuleSet, rule\n"
        "@rule(lambda x: torch.relu(torch.dropout(torch.relu(x), 0.5, True)))\n"
        "def merge(x):\n    return x.relu()\n"
        "@rule(lambda x: torch.sinc(x))\ndef absent(x):\n    return x\n"
        "both = RuleSet(merge, absent, name='both')\n"
    )
    said = run(BOUNDS[0], "rules_of_mine.py:merge", *BOUNDS[1:]).stdout
    assert said.startswith("merge (rules_of_mine.py:3)\n") and "On the captured graph:" in said
    assert "  matches nowhere\n  nearest at relu_1 (" in said
    assert "relu_1 ← dropout ← relu match, then True wanted, found False" in said
    after = run(BOUNDS[0], "rules_of_mine.py:merge", *BOUNDS[1:], "--after", "remove-no-ops").stdout
    assert "On the graph after remove-no-ops:" in after
    assert "relu_1 matches, then dropout wanted, found relu (relu)" in after
    gone = run(BOUNDS[0], "rules_of_mine.py:both", *BOUNDS[1:], "--rule", "absent").stdout
    assert "the operator at its root stands nowhere in the graph" in gone
    both = run(BOUNDS[0], "rules_of_mine.py:both", *BOUNDS[1:]).stdout
    assert "│ merge" in both and "no operator to begin at: absent" in both


def test_inside_of_control_flow(run: Run) -> None:
    said = run("tests.test_explain:Inside", "simplify[merge_bounds]", "--input", "2x4").stdout
    assert "fires at clamp_1" in said


def test_one_rule_as_json(run: Run) -> None:
    arguments = ("simplify", "--rule", "merge_bounds", "--json")
    document = json.loads(run(BOUNDS[0], *arguments, *BOUNDS[1:]).stdout)
    assert list(document["explanations"]) == ["merge_bounds"] and document["rewrites"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simplify", "--rule", "merge_bound"), "Did you mean 'merge_bounds'?"),
        (("fuse-conv-bn", "--rule", "x"), "'fuse-conv-bn' is not made of rules"),
        (("fuse-bn",), "Unknown pass 'fuse-bn'"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], words: str) -> None:
    said = run(SMALL, *arguments, *IMAGE, code=2).stderr
    assert words in said and "capture" not in said


# -- in Python -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> fxopt.GraphModule:
    return fxopt.capture(Bounds(), torch.randn(2, 4))


def test_by_rule_pass_or_name_on_a_graph_or_a_compiled_model(graph: fxopt.GraphModule) -> None:
    one = fxopt.explain(merge_bounds, graph)
    assert one.matched == ("clamp_1",) and repr(one) == str(one)
    assert str(one).startswith("merge_bounds matches at clamp_1. At clamp_3")
    assert fxopt.explain("simplify[merge_bounds]", graph) == one
    assert fxopt.explain(graph, merge_bounds) == one, "the other way round, too"
    compiled = fxopt.compile(Bounds(), torch.randn(2, 4), passes=[])
    assert fxopt.explain(merge_bounds, compiled).matched == one.matched
    several = fxopt.explain("simplify", graph)
    assert isinstance(several, list) and one in several
    assert fxopt.explain(Simplify(), graph) == several
    assert "The root operators of these stand nowhere: merge_reshapes," in repr(several)


def test_inside_of_control_flow_in_python() -> None:
    inside = fxopt.capture(Inside(), torch.randn(2, 4))
    assert fxopt.explain(merge_bounds, inside).matched == ("clamp_1",)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (merge_bounds, Bounds(), "not a Bounds. Capture the model first: fxopt.explain"),
        (merge_bounds, 3, "asks about a graph, not 3"),
        ("fuse-conv-bn", None, "is not made of rules"),
        ("simplfy", None, "Did you mean 'simplify'"),
        (None, None, "is not a pass"),
    ],
)
def test_what_cannot_be_explained(
    graph: fxopt.GraphModule, one: object, other: object, words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        fxopt.explain(one, graph if other is None else other)


def test_a_node_without_a_source_has_no_place() -> None:
    graph = fxopt.capture(Bounds(), (torch.randn(2, 4),))
    for node in graph.graph.nodes:
        node.meta["source"] = None
    assert "None" not in str(fxopt.explain("simplify", graph))
