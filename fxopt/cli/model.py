"""From the words on the command line to a model: only what is named is imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from torch.export import ExportedProgram

from fxopt.compiled import load
from fxopt.errors import FxoptError
from fxopt.imports import guarded, load_object
from fxopt.registry import backends_by_suffix

FORMS = (
    "Write module:callable (torchvision.models:resnet18), path.py:callable, a file that fxopt "
    "wrote, or a .pt2 file with --trust."
)


def load_model(spec: str, *, trust: bool = False) -> Any:
    """Return the model that `spec` names: an nn.Module, a captured graph or an ExportedProgram.

    A class or function is called without arguments, after torch's generator was seeded, so that
    random weights are the same each time. Raises UsageError for a spec that names no model.
    """
    if ":" in spec[1:-1] and not Path(spec).is_file():
        return _make(spec, load_object(spec))
    path = Path(spec)
    if path.suffix == ".pt2":
        return _load_program(path, trust)
    if path.suffix in backends_by_suffix():
        return _load_artefact(path)
    if path.suffix == ".py":
        raise click.UsageError(f"'{spec}' is a file: name what makes the model, {spec}:callable.")
    if path.suffix in (".pt", ".pth", ".safetensors", ".bin"):
        raise click.UsageError(
            f"'{spec}' holds weights or pickled objects, not a graph. Name a function that makes "
            "the model and loads its weights: path.py:callable."
        )
    raise click.UsageError(f"'{spec}' names no model. {FORMS}")


def _make(spec: str, found: Any) -> Any:
    """Call a factory; use anything else as it is."""
    if not isinstance(found, (torch.nn.Module, ExportedProgram)) and callable(found):
        given = _no_weights(found)
        needed = _needed(found, given)
        if needed:
            raise click.UsageError(
                f"{spec} needs arguments: {', '.join(needed)}. Write a function without any that "
                "makes the model, and name that: path.py:callable."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = guarded(spec, lambda: found(**given))
    if not isinstance(found, (torch.nn.Module, ExportedProgram)):
        raise click.UsageError(
            f"{spec} gives {type(found).__name__}, which is not a torch.nn.Module. {FORMS}"
        )
    return found


def _no_weights(factory: Any) -> dict[str, None]:
    """Ask torchvision's factories for no weights: the default may be a download."""
    if not getattr(factory, "__module__", "").startswith("torchvision."):
        return {}
    parameters = _parameters(factory)
    return {name: None for name in ("weights", "weights_backbone") if name in parameters}


def _needed(factory: Any, given: Iterable[str]) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in _parameters(factory).items()
        if parameter.default is parameter.empty
        and parameter.kind not in variadic
        and name not in given
    ]


def _parameters(factory: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # a builtin that does not say
        return {}


# -- files -----------------------------------------------------------------------------------------


def _load_artefact(path: Path) -> Any:
    compiled = load(path)
    if compiled.graph is None:
        raise FxoptError(
            f"'{path}' holds what {compiled.backend.name} runs, not the graph. Compile from the "
            "model, or from a .fxopt file."
        )
    return compiled.graph


def _load_program(path: Path, trust: bool) -> ExportedProgram:
    if not path.is_file():
        raise click.UsageError(f"There is no file '{path}'.")
    if not trust:
        raise click.UsageError(
            f"Reading '{path}' can run code that is stored in it: torch.export.load offers no safe "
            "way. If you trust where it comes from, say --trust."
        )
    return guarded(str(path), lambda: torch.export.load(path))
