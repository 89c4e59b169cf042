"""What the commands share: how a model, its inputs and its passes are named and checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from torch.export import ExportedProgram

from fxopt.cli.values import InputSpec, InputType, PassesType, draw_inputs
from fxopt.compile import PRECISIONS, resolve_passes
from fxopt.errors import ArtefactError
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, infer_inputs

model_argument = click.argument("model")
trust_option = click.option(
    "--trust", is_flag=True, help="Read a .pt2 file although reading it can run code stored in it."
)
input_option = click.option(
    "--input", type=InputType(), multiple=True,
    help="An example input: 1x3x224x224:float32, or ids=1x128:int64 for a keyword. Once per "
    "input, in order. Without any, they are inferred from the model.",
)  # fmt: skip
dynamic_option = click.option(
    "--dynamic", multiple=True, metavar="[NAME:]DIM",
    help="A dimension that may vary: 0 for the first of every input, NAME:0 for that of one.",
)  # fmt: skip
passes_option = click.option(
    "--passes", type=PassesType(),
    help="The passes to run, instead of the default list: a,b(option=1), mine.py:my_rule. The word "
    "default stands for the default list, none for an empty one.",
)  # fmt: skip
precision_option = click.option(
    "--precision", metavar="|".join(PRECISIONS),
    help="What to compute in: bf16 and fp16 where that is safe, fp32 and fp64 throughout.",
)  # fmt: skip
stats_option = click.option(
    "--stats", is_flag=True,
    help="Say how often each pass and rule was tried, matched and rewrote, in what time.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")


def example_inputs(spec: str, model: Any, specs: tuple[InputSpec, ...]) -> Inputs | None:
    """Return the inputs to capture with; None for a model that holds its own.

    Raises UsageError where none are given and none can be inferred.
    """
    given = draw_inputs(specs, model)
    if given is not None or isinstance(model, (GraphModule, ExportedProgram)):
        return given
    inferred = infer_inputs(model)
    if inferred is None:
        raise click.UsageError(
            f"{spec} does not say what inputs it takes. Give them: --input 1x3x224x224:float32, or "
            "--input NAME=SHAPE:DTYPE."
        )
    return inferred


def expand(passes: list[str] | None) -> list[Any] | None:
    """Return the passes; None for the default list."""
    return None if passes is None else list(resolve_passes(passes))


def check_writable(output: Path | None) -> None:
    """Fail before the work where the output could not be written after it."""
    if output is None:
        return
    if output.is_dir():
        raise ArtefactError(f"Cannot write '{output}': it is a folder. Give a file name.")
    if not output.absolute().parent.is_dir():
        raise ArtefactError(f"Cannot write '{output}': there is no folder '{output.parent}'.")
