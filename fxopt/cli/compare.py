"""`fxopt compare`: a model beside what it compiles to, or several models beside the first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from fxopt.cli.model import load_model, load_object
from fxopt.cli.options import (
    check_writable,
    dynamic_option,
    example_inputs,
    expand,
    input_option,
    json_option,
    passes_option,
    quiet_option,
    trust_option,
)
from fxopt.cli.screen import Screen
from fxopt.cli.values import InputSpec, draw_inputs, dynamic_shapes
from fxopt.comparison import compare
from fxopt.comparison.candidate import with_threads
from fxopt.comparison.lineup import numbered
from fxopt.comparison.table import rich_parts
from fxopt.compile import PRECISIONS
from fxopt.compiled import CompiledModel, load
from fxopt.inputs import Inputs
from fxopt.plotting import plot_format
from fxopt.registry import backends_by_suffix, resolve_backend


@click.command("compare", short_help="Measure a model beside what it compiles to, or others.")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--backend", "backends", multiple=True,
    help="A backend to compile for (default: all that are installed, for a single model).",
)  # fmt: skip
@click.option(
    "--precision", multiple=True, metavar="|".join(PRECISIONS),
    help="What to compute in, beside or instead of fp32 (default: the model's own).",
)  # fmt: skip
@passes_option
@input_option
@dynamic_option
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(min=1),
    help="Also measure throughput, at this batch size.",
)  # fmt: skip
@click.option(
    "--threads", multiple=True, type=click.IntRange(min=1),
    help="Also measure throughput, with so many threads.",
)  # fmt: skip
@click.option(
    "--data", metavar="FILE.py:FUNCTION",
    help="Compare classes on what this function yields: inputs, or pairs of inputs and label.",
)  # fmt: skip
@click.option(
    "--logits", metavar="FILE.py:FUNCTION",
    help="Takes an output to the class scores (default: the first output that may be some).",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds of the latency measurement.")
@click.option("--no-memory", is_flag=True, help="Leave out peak memory, a process per row.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0.0),
    help="The bound on max |Δ| / max |reference| that compiling verifies.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw into this file: .svg, .png or .pdf."
)
@trust_option
@json_option
@quiet_option
def compare_command(
    models: tuple[str, ...],
    backends: tuple[str, ...],
    precision: tuple[str, ...],
    passes: list[str] | None,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    data: str | None,
    logits: str | None,
    rounds: int | None,
    no_memory: bool,
    tolerance: float | None,
    plot: Path | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure MODEL beside what it compiles to: speed, size, memory, errors.

    Several are measured as they are, beside the first, and with --backend compiled, too. A file
    that fxopt wrote is a MODEL as well.

    \b
    fxopt compare torchvision.models:resnet18 --precision fp32 --precision bf16 --plot resnet.svg
    fxopt compare mine.py:float mine.py:pruned --backend onnx --data mine.py:validation
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    with screen.job():
        shapes = dynamic_shapes(dynamic)
        if plot is not None:
            plot_format(plot)
            check_writable(plot)
        chosen_passes = expand(passes)
        loaded = [_load(screen, spec, trust, alone=len(models) == 1) for spec in models]
        names = _names(models)
        comparison = compare(
            loaded[0] if len(models) == 1 else dict(zip(names, loaded, strict=True)),
            _inputs(models[0], loaded[0], input),
            backends=list(backends) or None,
            precision=list(precision) or [None],
            passes=chosen_passes,
            dynamic_shapes=shapes,
            data=_data(data),
            logits=_function("--logits", logits),
            batches=list(batches),
            threads=list(threads),
            rounds=rounds,
            memory=not no_memory,
            tolerance=tolerance,
            progress=screen.progress,
        )
        if plot is not None:
            comparison.plot(plot)
    if as_json:
        screen.document({**comparison.to_json(), "plot": str(plot) if plot is not None else None})
        return
    for part in rich_parts(comparison).renderables:
        screen.show(part)
    if plot is not None:
        screen.show(f"wrote {plot}")


def _load(screen: Screen, spec: str, trust: bool, *, alone: bool) -> Any:
    """Return a model; an artefact as it is, unless it is to be compiled for other backends."""
    screen.progress(f"load {spec}")
    path = Path(spec)
    owner = backends_by_suffix().get(path.suffix)
    if owner is None or not path.is_file():
        return load_model(spec, trust=trust)
    backend = with_threads(resolve_backend(owner), torch.get_num_threads())
    compiled = load(path, backend=backend)
    return compiled.graph if alone and compiled.graph is not None else compiled


def _names(models: tuple[str, ...]) -> list[str]:
    """Return what stands behind the last `:` or `/`, or all of it where that is not unique.

    A model that is given twice, to see what chance does, gets a number.
    """
    short = [spec.rpartition(":")[2] if ":" in spec else Path(spec).name for spec in models]
    return short if len(set(short)) == len(short) else numbered(models)


def _inputs(spec: str, model: Any, specs: tuple[InputSpec, ...]) -> Inputs | None:
    if not isinstance(model, CompiledModel):
        return example_inputs(spec, model, specs)
    given = draw_inputs(specs, model)
    if given is None and model.graph is None:
        raise click.UsageError(f"{spec} holds no example inputs. Give them: --input 1x3x224x224.")
    return given


def _data(spec: str | None) -> Iterable[Any] | None:
    """Return what `FILE.py:FUNCTION` yields; the function is called at the first item."""
    if spec is None:
        return None
    found = load_object(spec)

    def items() -> Iterator[Any]:
        yield from found() if callable(found) else found

    return items()


def _function(option: str, spec: str | None) -> Callable[[Any], Any] | None:
    if spec is None:
        return None
    found = load_object(spec)
    if not callable(found):
        raise click.UsageError(f"{option} {spec} is a {type(found).__name__}, not a function.")
    function: Callable[[Any], Any] = found
    return function
