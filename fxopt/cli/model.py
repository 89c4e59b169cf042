"""From the words on the command line to a model: only what is named is imported."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import click
import torch
from torch.export import ExportedProgram

from fxopt.compiled import load
from fxopt.errors import FxoptError
from fxopt.provenance import user_frame
from fxopt.registry import classes
from fxopt.vision import import_torchvision, lacks_operators

T = TypeVar("T")
FORMS = (
    "Write module:callable (torchvision.models:resnet18), path.py:callable, a file that fxopt "
    "wrote, or a .pt2 file with --trust."
)


def load_model(spec: str, *, trust: bool = False) -> Any:
    """Return the model that `spec` names: an nn.Module, a captured graph or an ExportedProgram.

    A class or function is called without arguments, after torch's generator was seeded, so that
    random weights are the same each time. Raises UsageError for a spec that names no model.
    """
    if ":" in spec and not Path(spec).is_file():
        return _make(spec, load_object(spec))
    path = Path(spec)
    suffixes = {cls.suffix for cls in classes("backends").values()}  # type: ignore[attr-defined]
    if path.suffix == ".pt2":
        return _load_program(path, trust)
    if path.suffix in suffixes:
        return _load_artefact(path)
    if path.suffix == ".py":
        raise click.UsageError(f"'{spec}' is a file: name what makes the model, {spec}:callable.")
    if path.suffix in (".pt", ".pth", ".safetensors", ".bin"):
        raise click.UsageError(
            f"'{spec}' holds weights or pickled objects, not a graph. Name a function that makes "
            "the model and loads its weights: path.py:callable."
        )
    raise click.UsageError(f"'{spec}' names no model. {FORMS}")


def load_object(spec: str) -> Any:
    """Return what `module:name` or `path.py:name` names; raise UsageError where there is none."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise click.UsageError(f"'{spec}' names no model. {FORMS}")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise click.UsageError(f"{place} has no '{part}'.{_near(part, dir(found))}")
        found = getattr(found, part)
    return found


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
            found = _guarded(spec, lambda: found(**given))
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
    return _guarded(str(path), lambda: torch.export.load(path))


# -- imports ---------------------------------------------------------------------------------------


def _import_module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # like `python -m`
    if name.split(".")[0] == "torchvision" and importlib.util.find_spec("torchvision"):
        import_torchvision()
    try:
        return _guarded(name, lambda: importlib.import_module(name), ModuleNotFoundError)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (name == missing or name.startswith(f"{missing}.")):
            raise FxoptError(f"'{name}' cannot be imported: {error}.") from error
        parent, _, last = missing.rpartition(".")
        folders = sys.modules[parent].__path__ if parent in sys.modules else None
        found = pkgutil.iter_modules(folders)
        prefix = f"{parent}." if parent else ""
        near = _near(last, (module.name for module in found), prefix)
        raise click.UsageError(f"There is no module '{missing}'.{near}") from None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise click.UsageError(f"There is no file '{path}'.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # like `python path.py`

    def execute() -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        known = sys.modules.get(path.stem)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            if known is not None:
                sys.modules[path.stem] = known
            raise
        return module

    return _guarded(str(path), execute)


def _guarded(what: str, action: Callable[[], T], through: type[Exception] = FxoptError) -> T:
    """Run the user's code; raise FxoptError with the user's line for whatever it raises."""
    try:
        try:
            return action()
        except Exception as error:
            if not lacks_operators(error):
                raise
            import_torchvision()
            return action()
    except Exception as error:
        if isinstance(error, (FxoptError, click.UsageError, through)):
            raise
        where = user_frame(error.__traceback__)
        at = f"\n  at {where}" if where else ""
        raise FxoptError(f"{what} failed with {type(error).__name__}: {error}{at}") from error


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, [one for one in known if one[0] != "_"], n=1)
    return f" Did you mean '{prefix}{near[0]}'?" if near else ""
