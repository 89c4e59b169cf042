"""`fxopt show`: the graph as text or as a picture, and what passes change in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.text import Text

from fxopt.cli.model import load_model
from fxopt.cli.options import (
    check_writable,
    dynamic_option,
    example_inputs,
    expand,
    input_option,
    model_argument,
    passes_option,
    quiet_option,
    stats_option,
    trust_option,
)
from fxopt.cli.screen import Screen
from fxopt.cli.values import InputSpec, dynamic_shapes
from fxopt.compile import optimize
from fxopt.diff import diff_text
from fxopt.graph_module import GraphModule
from fxopt.picture import check_drawable, moments, visualize
from fxopt.stats import Stats
from fxopt.story import Snapshot, Story
from fxopt.text import graph_text


class DepthType(click.ParamType[Any]):
    """Reads how deep modules are open: `auto`, `all` or a number of levels."""

    name = "auto|all|LEVELS"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str | None:
        """Return the depth as `visualize` takes it."""
        if value in ("auto", "all"):
            return "auto" if value == "auto" else None
        if not str(value).isdecimal():
            self.fail(f"'{value}' is no depth. Write auto, all, or a number of module levels.")
        return int(value)


class StepType(click.ParamType[Any]):
    """Reads a step: a pass's name, a number from 0 on, or `all`."""

    name = "PASS|NUMBER|all"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        """Return the step as `visualize` takes it."""
        return int(value) if str(value).isdecimal() else str(value)


@click.command("show", short_help="Print or draw a model's graph, or what passes change in it.")
@model_argument
@input_option
@dynamic_option
@passes_option
@click.option("--diff", is_flag=True, help="Print what each pass changed, instead of the graph.")
@click.option(
    "--step", type=StepType(),
    help="Only what this one changed; with -o, the graph before and after it, side by side. "
    "`all` is the captured and the final graph.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="Draw into this file instead: .svg, .png, .pdf, .dot, or .html for the interactive page.",
)  # fmt: skip
@click.option(
    "--depth", type=DepthType(), default="auto", show_default=True,
    help="With -o, which modules are open: as many as a page shows legibly, all, or some levels.",
)  # fmt: skip
@stats_option
@trust_option
@quiet_option
def show_command(
    model: str,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    diff: bool,
    step: int | str | None,
    output: Path | None,
    depth: int | str | None,
    stats: bool,
    trust: bool,
    quiet: bool,
) -> None:
    """Print the captured graph of MODEL as text, one line per node.

    With --passes the graph after those passes; with --diff or --step what each or one of them
    changed, with --stats how often they and their rules were tried (without --passes: of the
    default list).

    \b
    fxopt show torchvision.models:resnet18 --diff
    fxopt show torchvision.models:resnet18 -o resnet18.pdf
    fxopt show torchvision.models:resnet18 --step fuse-conv-bn -o before_after.svg
    """
    screen = Screen(quiet=quiet)
    with screen.job():
        if output is not None:
            check_drawable(output)
            check_writable(output)
        runs = diff or stats or step is not None
        wanted = passes if passes is not None else ["default"] if runs else []
        graph = _optimized(screen, model, input, dynamic, wanted, trust)
        if output is not None:
            visualize(graph, output, depth=depth, step=step)
            parts: list[Any] = [Text(f"wrote {output}")]
        elif step is not None:
            parts = [_diff(*moments(_story(graph), step))]
        elif diff or not stats:
            parts = [_diffs(_story(graph)) if diff else Text(graph_text(graph).rstrip())]
        else:
            parts = []
    if stats:
        parts += Stats(_story(graph).steps).__rich__().renderables
    for part in parts:
        screen.show(part)


def _optimized(
    screen: Screen,
    spec: str,
    specs: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str],
    trust: bool,
) -> GraphModule:
    shapes = dynamic_shapes(dynamic)
    expanded = expand(passes)
    screen.progress(f"load {spec}")
    model = load_model(spec, trust=trust)
    return optimize(
        model, example_inputs(spec, model, specs), passes=expanded, dynamic_shapes=shapes,
        verify="off", progress=screen.progress,
    )  # fmt: skip


def _story(graph: GraphModule) -> Story:
    story = graph.info.story
    assert story is not None
    return story


def _diffs(story: Story) -> Text:
    return Text("\n").join(
        _diff(f"{step.name}: {_times(step.rewrites)}", step.before, step.after)
        for step in story.steps
    )


def _diff(title: str, before: Snapshot, after: Snapshot) -> Text:
    """Return a title and what differs, in colour."""
    text = Text(title, style="bold")
    for line in diff_text(before, after).splitlines():
        style = {"+": "green", "-": "red", "@": "dim"}.get(line[:1], "")
        text.append(f"\n{line}", style=style)
    return text


def _times(rewrites: int) -> str:
    return f"{rewrites or 'no'} rewrite{'s' if rewrites != 1 else ''}"
