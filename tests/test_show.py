"""`fxopt show`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fxopt.cli import main
from tests.programs import needs_dot

SMALL = "tests.models:ConvBnRelu"
IMAGE = ("--input", "1x3x8x8")
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(command: str, *arguments: str, code: int = 0) -> Result:
        result = CliRunner().invoke(main, [command, *arguments])
        assert result.exit_code == code, result.output
        return result

    return call


def test_diff_prints_every_step_and_step_prints_one(run: Run) -> None:
    every = run("show", SMALL, *IMAGE, "--diff").stdout
    assert "remove-no-ops: no rewrites\n" in every
    assert "fuse-conv-bn: 1 rewrite\n@@ top level @@\n-%conv2d" in every
    one = run("show", SMALL, *IMAGE, "--step", "fuse-conv-bn").stdout
    assert one.startswith("fuse-conv-bn: 1 rewrite\n@@ top level @@\n-%conv2d") and one in every
    assert run("show", SMALL, *IMAGE, "--step", "0", "--passes", "fuse-conv-bn").stdout == one
    assert run("show", SMALL, *IMAGE, "--step", "all").stdout.startswith("all steps\n@@")


def test_a_long_line_is_not_broken(run: Run) -> None:
    lines = run("show", SMALL, *IMAGE, "--diff").stdout.splitlines()
    assert any("batch_norm(" in line and line.endswith("→ %conv2d_1") for line in lines)


def test_it_draws_collapsed_open_and_before_and_after(run: Run) -> None:
    run("show", SMALL, *IMAGE, "-o", "a.dot", "--depth", "1")
    run("show", SMALL, *IMAGE, "-o", "b.dot", "--depth", "all")
    assert Path("a.dot").read_text() == Path("b.dot").read_text(), "its modules are single calls"
    assert "batch_norm" in Path("a.dot").read_text(), "nothing runs unless it is asked for"
    run("show", SMALL, *IMAGE, "-o", "c.dot", "--step", "fuse-conv-bn")
    drawn = Path("c.dot").read_text()
    assert '"before batch_norm"' in drawn and '"after conv2d_1"' in drawn


@needs_dot
def test_it_draws_svg(run: Run) -> None:
    assert run("show", SMALL, *IMAGE, "-o", "a.svg").stdout == "wrote a.svg\n"
    assert "<svg" in Path("a.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--depth", "deep"), "Write auto, all, or a number"),
        (("-o", "a.dot", "--depth", "0"), "number of module levels from 1 on"),
        (("--step", "fuse-conv"), "Did you mean 'fuse-conv-bn'?"),
        (("--step", "99"), "There is no step 99"),
        (("-o", "a.gif"), ".html"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], words: str) -> None:
    assert words in run("show", SMALL, *IMAGE, *arguments, code=2).stderr


def test_what_cannot_be_written_is_found_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "capture" not in run("show", SMALL, *IMAGE, "-o", "no/a.dot", code=1).stderr
    monkeypatch.setenv("PATH", "")
    failed = run("show", SMALL, *IMAGE, "-o", "a.pdf", code=1).stderr
    assert "needs Graphviz's program" in failed and "capture" not in failed


def test_stats_stand_alone_or_behind_the_rest(run: Run) -> None:
    alone = run("show", SMALL, *IMAGE, "--stats").stdout
    assert "pass, and its rules" in alone and "batch_norm" not in alone
    assert "never fired in simplify" in alone and "all passes" in alone
    both = run("show", SMALL, *IMAGE, "--diff", "--stats").stdout
    assert both.index("fuse-conv-bn: 1 rewrite") < both.index("pass, and its rules")
