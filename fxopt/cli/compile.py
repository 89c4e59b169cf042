"""`fxopt compile`: from a model's name to an artefact and a report."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fxopt.cli.model import load_model, load_object
from fxopt.cli.options import (
    check_writable,
    dynamic_option,
    example_inputs,
    expand,
    input_option,
    json_option,
    model_argument,
    passes_option,
    precision_option,
    quiet_option,
    stats_option,
    trust_option,
)
from fxopt.cli.race import Speed, speed_of
from fxopt.cli.recipe import recipe_option
from fxopt.cli.screen import Screen
from fxopt.cli.values import (
    InputSpec,
    OptionType,
    dynamic_shapes,
)
from fxopt.compile import compile
from fxopt.compiled import CompiledModel
from fxopt.pipeline import ON_ERROR, VERIFY
from fxopt.registry import backends_by_suffix, resolve_backend


@click.command("compile", short_help="Optimize a model and lower it to a backend.")
@model_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the artefact here.")
@click.option("--backend", help="What to lower to (default: what -o's suffix says, else eager).")
@input_option
@dynamic_option
@passes_option
@precision_option
@click.option(
    "--calibration", metavar="FILE.py:FUNCTION|random",
    help="For --precision int8: a function that yields batches of what the model will see, or "
    "random ones, which say nothing about accuracy.",
)  # fmt: skip
@click.option(
    "--verify", default="final", show_default=True, metavar="final|each|off|FILE.py:FUNCTION",
    help="Compare with the original: at the end, after each pass, or not; or let a function judge "
    "the result, which returns False to refuse it.",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(min=0.0),
    help="The bound on max |Δ| / max |reference| (default: what the dtype and the model warrant).",
)  # fmt: skip
@click.option(
    "--on-error", type=click.Choice(ON_ERROR), default="raise", show_default=True,
    help="What to do about a pass that fails: stop, or undo it and go on.",
)  # fmt: skip
@click.option(
    "--option", type=OptionType(), multiple=True,
    help="An option of the backend; see `fxopt backends`.",
)  # fmt: skip
@click.option("--benchmark", is_flag=True, help="Measure the result beside the model itself.")
@stats_option
@recipe_option
@trust_option
@json_option
@quiet_option
def compile_command(
    model: str,
    output: Path | None,
    backend: str | None,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    precision: str | None,
    calibration: str | None,
    verify: str,
    tolerance: float | None,
    on_error: str,
    option: tuple[tuple[str, Any], ...],
    benchmark: bool,
    stats: bool,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Optimize MODEL and lower it to a backend; report what each pass did.

    \b
    fxopt compile torchvision.models:resnet18 -o resnet18.onnx --benchmark
    fxopt compile mine.py:make --input 1x16:int64 --dynamic 0 --backend onnx -o mine.onnx
    fxopt compile mine.py:make --precision int8 --calibration mine.py:images -o mine.onnx
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    with screen.job():
        shapes = dynamic_shapes(dynamic)
        judge = _judge(verify)
        check_writable(output)
        chosen = resolve_backend(backend or _backend_for(output), dict(option))
        if output is not None and hasattr(chosen, "that_write"):  # it chooses among others
            chosen = chosen.that_write(output)
        chosen_passes = expand(passes)
        screen.progress(f"load {model}")
        loaded = load_model(model, trust=trust)
        inputs = example_inputs(model, loaded, input)
        compiled: CompiledModel = compile(
            loaded, inputs, backend=chosen, passes=chosen_passes, dynamic_shapes=shapes,
            precision=precision, calibration=_calibration(calibration), verify=judge,
            tolerance=tolerance, on_error=on_error, progress=screen.progress,
        )  # fmt: skip
        _complete_recipe(compiled, model, input, dynamic, calibration, verify)
        if output is not None:
            if not output.suffix and not chosen.suffix:
                output = output.with_name(output.name + compiled.backend.suffix)
            screen.progress(f"write {output}")
            compiled.save(output)
        speed = None
        if benchmark:
            screen.progress("benchmark")
            speed = speed_of(loaded, inputs, compiled)
    _show(screen, compiled, output, speed, stats)


def _calibration(spec: str | None) -> Any:
    """Return the data to calibrate on: what a function returns when it is called."""
    if spec is None or spec == "random":
        return spec
    if ":" not in spec:
        raise click.UsageError(f"--calibration '{spec}' is neither 'random' nor FILE.py:FUNCTION.")
    found = load_object(spec)
    return found() if callable(found) else found


def _judge(verify: str) -> str | Callable[[Any], Any]:
    if verify in VERIFY:
        return verify
    if ":" not in verify:
        near = difflib.get_close_matches(verify, VERIFY, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise click.UsageError(
            f"--verify '{verify}' is none of {', '.join(VERIFY)}, nor FILE.py:FUNCTION.{hint}"
        )
    judge = load_object(verify)
    if not callable(judge):
        raise click.UsageError(f"--verify {verify} is a {type(judge).__name__}, not a function.")
    return judge


def _backend_for(output: Path | None) -> str:
    """Return the backend whose artefacts have this suffix; raise UsageError where none has."""
    if output is None:
        return "eager"
    suffixes = backends_by_suffix()
    if output.suffix not in suffixes:
        raise click.UsageError(
            f"The suffix of '{output}' names no backend. Use one of "
            f"{', '.join(sorted(suffixes))}, or say which with --backend."
        )
    return suffixes[output.suffix]


def _complete_recipe(
    compiled: CompiledModel,
    model: str,
    specs: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    calibration: str | None,
    verify: str,
) -> None:
    """Add to the story's recipe what only the command line knows, in its own words."""
    assert compiled.story is not None
    settings = dict(compiled.story.recipe)
    settings.pop("dynamic_shapes", None)
    settings.pop("verify", None)
    recipe: dict[str, Any] = {"model": model}
    if specs:
        recipe["input"] = [str(spec) for spec in specs]
    if dynamic:
        recipe["dynamic"] = list(dynamic)
    if calibration is not None:
        settings["calibration"] = calibration
    if verify != "final":
        settings["verify"] = verify
    compiled.story.recipe = {**recipe, **settings}


def _show(
    screen: Screen, compiled: CompiledModel, output: Path | None, speed: Speed | None, stats: bool
) -> None:
    report = compiled.report
    if screen.as_json:
        document = report.to_json()
        document["output"] = str(output) if output is not None else None
        document["benchmark"] = vars(speed) if speed is not None else None
        if stats:
            document["stats"] = report.stats.to_json()
        screen.document(document)
        return
    for part in report.__rich__().renderables:
        screen.show(part)
    for part in report.stats.__rich__().renderables if stats else ():
        screen.show(part)
    if output is not None:
        screen.show(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
    if speed is not None:
        screen.show(str(speed))
