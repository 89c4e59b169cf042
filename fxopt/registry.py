"""Where passes and backends are found: the built-in folders, then entry points, by name."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import logging
import pkgutil
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from fxopt.errors import BackendUnavailable, OptionError, unknown_name
from fxopt.imports import load_object, place_of

if TYPE_CHECKING:
    from fxopt.backend import Backend

log = logging.getLogger("fxopt")


@functools.cache
def _package(kind: str) -> ModuleType:
    return importlib.import_module(f"fxopt.{kind}")


@functools.cache
def classes(kind: str) -> dict[str, type]:
    """Return the classes of a kind ("passes" or "backends") by their names.

    Raises OptionError where two bear one name.
    """
    found: dict[str, type] = {}
    package = _package(kind)
    modules = [
        importlib.import_module(f"fxopt.{kind}.{module.name}")
        for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name)
    ]
    candidates = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]
    for point in importlib.metadata.entry_points(group=f"fxopt.{kind}"):
        try:
            candidates.append(point.load())
        except Exception as error:  # a plugin of somebody else's must not take everything down
            log.warning(
                "the plugin %s cannot be loaded: %s: %s", point, type(error).__name__, error
            )
    for cls in candidates:
        name = getattr(cls, "name", None)
        if isinstance(name, str) and is_dataclass(cls):
            if found.get(name, cls) is not cls:
                raise OptionError(f"Two {kind} are called '{name}': {found[name]} and {cls}.")
            found[name] = cls
    return found


def check_available(backend: Backend) -> None:
    """Raise BackendUnavailable, with what to install, where a backend's engine is missing."""
    missing = backend.missing()
    if missing is not None:
        raise BackendUnavailable(f"The backend '{backend.name}' is not installed. {missing}")


def resolve_pass(spec: Any) -> Any:
    """Return a pass: itself, or from its name with options: "fold-constants(growth=2.0)".

    One that is in no registry is named by its place: "mine.py:MyPass", "package.module:MyPass".
    """
    return _resolve("pass", "passes", spec)


def resolve_backend(spec: Any, options: dict[str, Any] | None = None) -> Any:
    """Return a backend: itself, or from its name, with options."""
    return _resolve("backend", "backends", spec, options)


def _resolve(word: str, kind: str, spec: Any, options: dict[str, Any] | None = None) -> Any:
    if not isinstance(spec, str):
        if isinstance(spec, type):
            raise OptionError(f"{spec.__name__} is a class; pass an object: {spec.__name__}().")
        method = "run" if kind == "passes" else "lower"
        if not hasattr(spec, "name") or not callable(getattr(spec, method, None)):
            raise OptionError(f"{spec!r} is not a {word}: it has no name and {method}().")
        if options:
            raise OptionError(f"Options {', '.join(options)} belong into the {word} object itself.")
        return spec
    name, written = _parse(spec, word)
    if ":" in name:
        return _from_place(word, kind, name, {**written, **(options or {})})
    known = classes(kind)
    if name not in known:
        raise unknown_name(word, name, known)
    return make(known[name], {**written, **(options or {})})


def _from_place(word: str, kind: str, place: str, options: dict[str, Any]) -> Any:
    """Return what a module or file of the user's own holds; a class is made with options."""
    found = load_object(place)
    if not isinstance(found, type):
        return _resolve(word, kind, found, options)
    if not is_dataclass(found):
        raise OptionError(f"{place} is not a {word}: a {word} is a frozen dataclass.")
    return _resolve(word, kind, make(found, options))


def spec_of(one: Any) -> str:
    """Return a pass or backend as it is written by name: `fold-constants(growth=2.0)`.

    One that is in no registry is written by its place, or by its bare name where nobody else can
    reach it.
    """
    name, cls = str(one.name), type(one)
    if hasattr(one, "place"):
        return str(one.place)
    if all(classes(kind).get(name) is not cls for kind in ("passes", "backends")):
        name = place_of(cls) or name
    options = ", ".join(f"{key}={value!r}" for key, value in options_of(one).items())
    return f"{name}({options})" if options else name


def options_of(one: Any) -> dict[str, Any]:
    """Return the fields of a pass or backend that differ from their defaults."""
    if hasattr(one, "place"):
        return {}  # a rule, or a set of them: an object without options
    default = type(one)
    plain = default() if all(map(_has_default, fields(one))) else None
    values = {f.name: getattr(one, f.name) for f in fields(one)}
    return {k: v for k, v in values.items() if plain is None or getattr(plain, k) != v}


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def make(cls: type, options: dict[str, Any]) -> Any:
    """Make a pass or backend with options; raise OptionError for one that it does not take."""
    hints = typing.get_type_hints(cls)
    known = {field.name: hints.get(field.name) for field in fields(cls)}
    name = getattr(cls, "name", cls.__name__)
    for option, value in options.items():
        if option not in known:
            raise unknown_name(f"option for '{name}':", option, known)
        if not _is_of(value, known[option]):
            raise OptionError(
                f"Option '{option}' of '{name}' wants {_type_text(known[option])}, not {value!r}."
            )
    options = {
        key: tuple(value) if isinstance(value, list) and get_origin(known[key]) is tuple else value
        for key, value in options.items()
    }
    try:
        return cls(**options)
    except TypeError as error:
        raise OptionError(f"'{name}' cannot be made with {options}: {error}.") from None


def _parse(spec: str, word: str) -> tuple[str, dict[str, Any]]:
    """Read 'name' or 'name(option=literal, …)'."""
    name, bracket, rest = spec.strip().partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"_({rest}", mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return name.strip(), {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
        raise ValueError(spec)
    except (SyntaxError, ValueError):
        raise OptionError(
            f"Cannot read the {word} '{spec}'. Write name(option=value, …) with plain values."
        ) from None


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value fits a field's type, as far as plain types go."""
    origin = get_origin(hint)
    if hint is None or hint is Any or (origin is None and not isinstance(hint, type)):
        return True
    if origin is None:
        if hint is float:
            return isinstance(value, (int, float)) and not isinstance(value, bool)
        if hint is int:
            return isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, hint) if hint in (bool, str) else True
    if origin in (typing.Union, types.UnionType):
        return any(
            value is None if arg is type(None) else _is_of(value, arg) for arg in get_args(hint)
        )
    return isinstance(value, (tuple, list)) if origin is tuple else True


def _type_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
