"""`fxopt profile`: what a model costs, counted and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fxopt.cli.model import load_model
from fxopt.cli.options import (
    check_writable,
    dynamic_option,
    example_inputs,
    expand,
    input_option,
    json_option,
    model_argument,
    passes_option,
    quiet_option,
    trust_option,
)
from fxopt.cli.screen import Screen
from fxopt.cli.values import InputSpec, dynamic_shapes
from fxopt.compile import optimize
from fxopt.plotting import plot_format
from fxopt.profile import Profile, profile
from fxopt.profiling.table import COLUMNS

_PICTURE = click.Path(path_type=Path, dir_okay=False)


@click.command("profile", short_help="Say what a model costs, node by node or by module.")
@model_argument
@input_option
@dynamic_option
@passes_option
@click.option(
    "--by", type=click.Choice(["module", "node", "op"]), default="module", show_default=True,
    help="What a row of the table is.",
)  # fmt: skip
@click.option("--depth", type=click.IntRange(min=0), help="How deep a table by module goes.")
@click.option(
    "--sort", type=click.Choice(COLUMNS, case_sensitive=False), metavar="COLUMN",
    help=f"Put the largest first: {', '.join(COLUMNS)}.",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(min=1), default=10, show_default=True,
    help="How often each node is measured.",
)  # fmt: skip
@click.option("--no-measure", is_flag=True, help="Count only: no milliseconds.")
@click.option("--plot", type=_PICTURE, help="Draw a roofline into this .svg, .png or .pdf.")
@click.option("--memory", type=_PICTURE, help="Draw memory over time into this file.")
@trust_option
@json_option
@quiet_option
def profile_command(
    model: str,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    by: str,
    depth: int | None,
    sort: str | None,
    rounds: int,
    no_measure: bool,
    plot: Path | None,
    memory: Path | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what MODEL costs: parameters, MACs, FLOPs, bytes, memory and milliseconds.

    The model is profiled as it is captured; with --passes, as it is after those passes.

    \b
    fxopt profile torchvision.models:resnet18 --sort ms
    fxopt profile torchvision.models:resnet18 --passes default --by op --plot roofline.svg
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    with screen.job():
        if plot is not None and no_measure:
            raise click.UsageError("--plot needs milliseconds: leave --no-measure out.")
        for path in filter(None, (plot, memory)):
            plot_format(path)
            check_writable(path)
        shapes = dynamic_shapes(dynamic)
        wanted = expand(passes)
        screen.progress(f"load {model}")
        loaded: Any = load_model(model, trust=trust)
        inputs = example_inputs(model, loaded, input)
        if wanted is not None:
            loaded = optimize(
                loaded, inputs, passes=wanted, dynamic_shapes=shapes, verify="off",
                progress=screen.progress,
            )  # fmt: skip
            shapes = None
        screen.progress("count" if no_measure else "measure")
        found = profile(
            loaded, inputs, rounds=rounds, measure=not no_measure, dynamic_shapes=shapes
        )
        table = found.table(by, depth=depth, sort=sort)
        written = _draw(found, plot, memory)
    if as_json:
        screen.document({**found.to_json(), "written": [str(path) for path in written]})
        return
    screen.show(table.__rich__())
    for path in written:
        screen.show(f"wrote {path}")


def _draw(found: Profile, plot: Path | None, memory: Path | None) -> list[Path]:
    """Draw the pictures that were asked for; return their paths."""
    if plot is not None:
        found.roofline(plot)
    if memory is not None:
        found.memory(memory)
    return [path for path in (plot, memory) if path is not None]
