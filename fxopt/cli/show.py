"""`fxopt show` and `fxopt explain`: the graph as text, and why a pass did what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from fxopt.cli.compile import (
    dynamic_option,
    example_inputs,
    expand,
    input_option,
    model_argument,
    passes_option,
    quiet_option,
    trust_option,
)
from fxopt.cli.model import load_model
from fxopt.cli.screen import Screen
from fxopt.cli.values import InputSpec, PassesType, dynamic_shapes
from fxopt.compile import optimize
from fxopt.graph_module import GraphModule
from fxopt.picture import visualize
from fxopt.story import Step, Story
from fxopt.text import graph_text


@click.command("show", short_help="Print a model's graph, or what passes change in it.")
@model_argument
@input_option
@dynamic_option
@passes_option
@click.option("--diff", is_flag=True, help="Print what each pass changed, instead of the graph.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="Draw the graph into this file instead: .dot, .svg, .png or .pdf.",
)  # fmt: skip
@trust_option
@quiet_option
def show_command(
    model: str,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    diff: bool,
    output: Path | None,
    trust: bool,
    quiet: bool,
) -> None:
    """Print the captured graph of MODEL as text, one line per node.

    With --passes the graph after those passes; with --diff what each of them changed (without
    --passes: each of the default list).
    """
    screen = Screen(quiet=quiet)
    with screen.job():
        wanted = passes if passes is not None else ["default"] if diff else []
        graph = _optimized(screen, model, input, dynamic, wanted, trust)
        if output is not None:
            visualize(graph, output)
    if output is not None:
        screen.show(f"wrote {output}")
    elif diff:
        screen.show(_diffs(_story(graph)))
    else:
        screen.show(Text(graph_text(graph).rstrip()))


@click.command("explain", short_help="Say what one pass did, and where it held back and why.")
@model_argument
@click.argument("pass_name", metavar="PASS")
@input_option
@dynamic_option
@click.option("--after", "passes", type=PassesType(), help="Run these passes first.")
@trust_option
@quiet_option
def explain_command(
    model: str,
    pass_name: str,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    trust: bool,
    quiet: bool,
) -> None:
    """Run PASS on the graph of MODEL; say what it rewrote, and where it held back and why."""
    screen = Screen(quiet=quiet)
    with screen.job():
        graph = _optimized(screen, model, input, dynamic, [*(passes or []), pass_name], trust)
        step = _story(graph).steps[-1]
    screen.show(_explanation(step))
    if step.rules:
        screen.show(_rules(step))


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
    text = Text()
    for step in story.steps:
        text.append(f"{step.name}: {_times(step.rewrites)}\n", style="bold")
        for line in step.diff().splitlines()[2:]:
            style = {"+": "green", "-": "red", "@": "dim"}.get(line[:1], "")
            text.append(line + "\n", style=style)
    text.rstrip()
    return text


def _times(rewrites: int) -> str:
    return f"{rewrites or 'no'} rewrite{'s' if rewrites != 1 else ''}"


def _explanation(step: Step) -> Text:
    lines = [f"{step.name}: {_times(step.rewrites)}"]
    for new, old in step.origins.items():
        lines.append(f"  {new} stands for {', '.join(old)}")
    lines += [f"  held back at {miss.node}: {miss.reason}" for miss in step.misses]
    if not step.rewrites and not step.misses:
        lines.append("  It found nothing that it applies to.")
    return Text("\n".join(lines))


def _rules(step: Step) -> Any:
    table = Table()
    for heading in ("rule", "tried", "matched", "rewritten"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for name, count in step.rules.items():
        table.add_row(name, str(count.tried), str(count.matched), str(count.rewritten))
    return table
