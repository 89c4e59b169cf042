"""`fxopt bisect`: which pass, and which rewrite of it, makes the result wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fxopt.bisection import Bisection, bisect
from fxopt.cli.model import load_model
from fxopt.cli.options import (
    dynamic_option,
    example_inputs,
    expand,
    input_option,
    json_option,
    model_argument,
    passes_option,
    precision_option,
    quiet_option,
    trust_option,
)
from fxopt.cli.screen import Screen
from fxopt.cli.values import InputSpec, dynamic_shapes
from fxopt.imports import load_object


@click.command("bisect", short_help="Find the pass, and the rewrite, that makes a result wrong.")
@model_argument
@input_option
@dynamic_option
@passes_option
@click.option("--backend", help="Judge what this backend computes, instead of the graph itself.")
@click.option(
    "--oracle", metavar="FILE.py:FUNCTION",
    help="Let a function judge: it gets the graph (with --backend the compiled model) and returns "
    "True for right, or a metric for --threshold. Without it, results are compared with the "
    "model's own.",
)  # fmt: skip
@click.option("--threshold", type=float, help="The metric from which on a result is right.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0.0),
    help="The bound on max |Δ| / max |reference| (default: what the dtype and the model warrant).",
)  # fmt: skip
@precision_option
@click.option(
    "--script", type=click.Path(path_type=Path), metavar="FILE.py",
    help="Write a stand-alone script that fails as long as the error is there.",
)  # fmt: skip
@trust_option
@json_option
@quiet_option
@click.pass_context
def bisect_command(
    context: click.Context,
    model: str,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    backend: str | None,
    oracle: str | None,
    threshold: float | None,
    tolerance: float | None,
    precision: str | None,
    script: Path | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Find the pass, and the one rewrite in it, after which the result of MODEL is wrong.

    Exit codes: 0 nothing is wrong, 1 something is, 2 it could not be told: it was asked for
    wrongly, or the model cannot be captured or run.

    \b
    fxopt bisect torchvision.models:resnet18
    fxopt bisect mine.py:make --passes default,mine.py:MyPass --script bug.py
    fxopt bisect mine.py:make --backend onnx --oracle mine.py:accuracy --threshold 0.75
    """
    screen = Screen(as_json=as_json, quiet=quiet, failure_code=2)  # 1 says that it found something
    with screen.job():
        shapes = dynamic_shapes(dynamic)
        judge = None if oracle is None else _function(oracle)
        chosen = expand(passes)
        screen.progress(f"load {model}")
        loaded = load_model(model, trust=trust)
        found = bisect(
            loaded, example_inputs(model, loaded, input), passes=chosen, oracle=judge,
            threshold=threshold, backend=backend, tolerance=tolerance, precision=precision,
            dynamic_shapes=shapes, script=script, progress=screen.progress,
        )  # fmt: skip
    _show(screen, found)
    context.exit(0 if found.blame == "nothing" else 1)


def _function(spec: str) -> Callable[[Any], Any]:
    function = load_object(spec)
    if not callable(function):
        raise click.UsageError(
            f"--oracle {spec} is a {type(function).__name__}, not a function of the graph."
        )
    return function


def _show(screen: Screen, found: Bisection) -> None:
    if screen.as_json:
        screen.document(found.to_json())
    else:
        screen.show(found)
