"""What passes and rules were tried, matched and rewrote, in what time: `--stats`, report.stats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxopt
from fxopt.cli import main


class Relus(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().relu().sin().clamp(0, 1).clamp(2, 3)


@pytest.fixture(scope="module")
def report() -> Any:
    passes = ["remove-dead-nodes", "simplify", "simplify"]
    return fxopt.compile(Relus(), torch.randn(2, 3), passes=passes).report


def test_every_pass_and_rule_that_matched_has_a_row(report: Any) -> None:
    text = str(report.stats)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    cells = {row[0]: row[1:] for row in rows if len(row) == 5}
    assert cells["remove-dead-nodes"][:3] == ["", "", "0"]
    assert cells["all passes"][2] == "1" and float(cells["all passes"][3]) > 0
    first = next(row for row in rows if row[0] == "merge_bounds")
    assert int(first[1]) >= int(first[2]) >= int(first[3]) == 1
    assert any(name.endswith("rules without a match") for name in cells)


def test_what_never_fired_is_listed_once(report: Any) -> None:
    never = report.stats.never_fired
    assert list(never) == ["simplify"] and "merge_bounds" not in never["simplify"]
    assert "merge_pads" in never["simplify"]
    lines = str(report.stats).splitlines()
    (line,) = [line for line in lines if line.startswith("never fired")]
    count = len(never["simplify"])
    assert line.startswith(f"never fired in simplify  {count} of {count + 1}: merge_")
    assert len(lines[-1]) < 110 and lines[-1].startswith(" " * 20), "it is wrapped"


def test_rules_that_only_explain_and_families_are_listed_apart() -> None:
    passes = ["fuse-activations", "replace-pools"]
    stats = fxopt.optimize(Relus(), torch.randn(2, 3), passes=passes).report.stats
    assert not any(name.startswith("keep_") for name in stats.never_fired["fuse-activations"])
    assert "keep_x_times_ndtr" in stats.to_json()["only_explained"]["fuse-activations"]
    text = str(stats)
    assert "only explain in fuse-activations" in text
    assert "merge_reductions[mean.dim, sum.dim_IntList, amax," in text


def test_as_data_and_in_a_notebook(report: Any) -> None:
    document = json.loads(json.dumps(report.stats.to_json()))
    assert [one["pass"] for one in document["passes"]] == [
        "remove-dead-nodes", "simplify", "simplify",
    ]  # fmt: skip
    rules = document["passes"][1]["rules"]
    assert set(rules["merge_bounds"]) == {"tried", "matched", "rewritten", "seconds"}
    assert 0 < rules["merge_bounds"]["seconds"] <= document["passes"][1]["seconds"]
    assert document["seconds"] == sum(one["seconds"] for one in document["passes"])
    assert "merge_bounds" in report.stats._repr_html_()


def test_a_pass_that_was_rolled_back_says_so() -> None:
    @fxopt.rule(lambda x: torch.relu(x))
    def wrong(x: Any) -> Any:
        return x.tanh()

    graph = fxopt.optimize(nn.ReLU(), torch.randn(2, 3), passes=[wrong], on_error="skip")
    assert "rolled back" in str(graph.report.stats)


def test_the_command_prints_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["compile", "tests.models:ConvBnRelu", "--input", "1x3x8x8", "-q"]
    assert "never fired" not in CliRunner().invoke(main, command).stdout
    shown = CliRunner().invoke(main, [*command, "--stats"]).stdout
    assert "pass, and its rules" in shown and "never fired in simplify" in shown
    document = json.loads(CliRunner().invoke(main, [*command, "--stats", "--json"]).stdout)
    assert document["stats"]["never_fired"]["simplify"]
    assert "stats" not in json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
