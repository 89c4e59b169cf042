"""`fxopt view`: the story of a model as an interactive page."""

from __future__ import annotations

from pathlib import Path

import click

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
    trust_option,
)
from fxopt.cli.screen import Screen
from fxopt.cli.values import InputSpec, dynamic_shapes
from fxopt.compile import optimize
from fxopt.page import write_page
from fxopt.profile import profile


@click.command("view", short_help="Write a page that shows a model before and after each pass.")
@model_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("graph.html"),
    show_default=True, help="Write the page here.",
)  # fmt: skip
@input_option
@dynamic_option
@passes_option
@click.option(
    "--profile", "profiled", is_flag=True,
    help="Measure each node, too: the page then shows milliseconds and a roofline.",
)  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Do not compare the result with the original.")
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@trust_option
@quiet_option
def view_command(
    model: str,
    output: Path,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    profiled: bool,
    no_verify: bool,
    opened: bool,
    trust: bool,
    quiet: bool,
) -> None:
    """Run the passes on MODEL and write one HTML file that shows the graph before and after each.

    The file holds everything it needs but the weights, and opens without a network.
    """
    screen = Screen(quiet=quiet)
    with screen.job():
        shapes = dynamic_shapes(dynamic)
        check_writable(output)
        if output.suffix.lower() not in (".html", ".htm"):
            raise click.UsageError(
                f"The page is HTML: name a file *.html, not '{output}'. For .svg, .png, .pdf or "
                ".dot there is `fxopt show -o`."
            )
        screen.progress(f"load {model}")
        loaded = load_model(model, trust=trust)
        graph = optimize(
            loaded, example_inputs(model, loaded, input), passes=expand(passes),
            dynamic_shapes=shapes, verify="off" if no_verify else "final",
            progress=screen.progress,
        )  # fmt: skip
        measured = None
        if profiled:
            screen.progress("profile")
            measured = profile(graph)
        screen.progress(f"write {output}")
        write_page(graph, output, profile=measured)
    screen.show(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
    if opened:
        click.launch(str(output))
