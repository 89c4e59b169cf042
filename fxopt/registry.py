"""Where passes and backends are found: the built-in folders, then entry points, by name.

A pass may be a class that is made with options, or a ready object: a rule, or a set of rules. What
stands in nobody's registry is named by its place, `mine.py:MyPass`, and one rule of several in
brackets behind it: `simplify[merge_pads]`, `mine.py:RULES[merge_relus]`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import logging
import pkgutil
import sys
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from fxopt.errors import BackendUnavailable, OptionError, unknown_name
from fxopt.imports import load_object, place_of, place_of_variable
from fxopt.rules import Rule, RuleSet

if TYPE_CHECKING:
    from fxopt.backend import Backend

log = logging.getLogger("fxopt")


@functools.cache
def _package(kind: str) -> ModuleType:
    return importlib.import_module(f"fxopt.{kind}")


@functools.cache
def registered(kind: str) -> dict[str, Any]:
    """Return what is known of a kind ("passes" or "backends") by name: classes, rules, rule sets.

    Raises OptionError where two bear one name.
    """
    found: dict[str, Any] = {}
    for one in (*_built_in(kind), *_plugged_in(kind)):
        name = getattr(one, "name", None)
        ready = isinstance(one, (Rule, RuleSet)) and kind == "passes"
        if isinstance(name, str) and (ready or isinstance(one, type) and is_dataclass(one)):
            if found.setdefault(name, one) is not one:
                hint = " A set is given its name by RuleSet(…, name=…)." if ready else ""
                raise OptionError(
                    f"Two {kind} are called '{name}': {_text(found[name])} and {_text(one)}.{hint}"
                )
    return found


def classes(kind: str) -> dict[str, type]:
    """Return the classes of a kind ("passes" or "backends") by their names."""
    return {name: one for name, one in registered(kind).items() if isinstance(one, type)}


def backends_by_suffix() -> dict[str, str]:
    """Return the names of backends by the suffix of their files; some write none."""
    found: dict[str, type[Backend]] = classes("backends")
    return {one.suffix: name for name, one in found.items() if one.suffix}


def _built_in(kind: str) -> list[type]:
    modules = [
        importlib.import_module(f"fxopt.{kind}.{module.name}")
        for module in sorted(pkgutil.iter_modules(_package(kind).__path__), key=lambda m: m.name)
    ]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and f"{value.__module__}.".startswith(f"{module.__name__}.")
    ]


def _plugged_in(kind: str) -> list[Any]:
    found = []
    for point in importlib.metadata.entry_points(group=f"fxopt.{kind}"):
        try:
            found.append(point.load())
        except Exception as error:  # a plugin of somebody else's must not take everything down
            log.warning(
                "the plugin %s cannot be loaded: %s: %s", point, type(error).__name__, error
            )
    return found


def _text(one: Any) -> str:
    if isinstance(one, type):
        return f"{one.__module__}.{one.__qualname__}"
    return f"the rule at {one.source}" if isinstance(one, Rule) else f"the rules {one!r}"


def check_available(backend: Backend) -> None:
    """Raise BackendUnavailable, with what to install, where a backend's engine is missing."""
    missing = backend.missing()
    if missing is not None:
        raise BackendUnavailable(f"The backend '{backend.name}' is not installed. {missing}")


def resolve_pass(spec: Any) -> Any:
    """Return a pass: itself, or from its name with options: "fold-constants(growth=2.0)".

    One that is in no registry is named by its place: "mine.py:MyPass", "package.module:my_rule".
    One rule of a pass that is made of rules stands in brackets: "simplify[merge_pads]".
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
    name, written = parse(spec, word)
    name, member = _without_member(name) if kind == "passes" else (name, "")
    if ":" in name:
        found = load_object(name)
    else:
        known = registered(kind)
        if name not in known:
            raise unknown_name(word, name, known)
        found = known[name]
    one = _made(word, kind, name, found, {**written, **(options or {})})
    return rule_of(one, member) if member else one


def _made(word: str, kind: str, name: str, found: Any, options: dict[str, Any]) -> Any:
    """Make a class with options; a rule, or another object, is ready and takes none."""
    if isinstance(found, (Rule, RuleSet)) and options:
        what = "a rule" if isinstance(found, Rule) else "a set of rules"
        raise OptionError(f"'{name}' is {what} and has no options: leave out {', '.join(options)}.")
    if isinstance(found, (tuple, list)) and found and isinstance(found[0], (Rule, RuleSet)):
        raise OptionError(f"'{name}' is a {type(found).__name__} of rules: make it a RuleSet.")
    if not isinstance(found, type):
        return _resolve(word, kind, found, options)
    if not is_dataclass(found):
        raise OptionError(f"{name} is not a {word}: a {word} is a frozen dataclass.")
    return _resolve(word, kind, make(found, options))


def _without_member(name: str) -> tuple[str, str]:
    """Read 'pass[rule]'; the rule's own name may end in brackets, too."""
    start, bracket, rest = name.partition("[")
    return (start.strip(), rest.removesuffix("]")) if bracket else (name, "")


# -- the rules of a pass ---------------------------------------------------------------------------


def rules_of(one: Any) -> RuleSet:
    """Return the rules that a pass, or its class, is made of; an empty set for other passes.

    They are the RULES of the file in which the pass stands.
    """
    if isinstance(one, (Rule, RuleSet)):
        return RuleSet(one, name=one.name)
    cls = one if isinstance(one, type) else type(one)
    held = getattr(sys.modules.get(cls.__module__), "RULES", ())
    known = [rule for rule in held if isinstance(rule, (Rule, RuleSet))]
    return RuleSet(*known, name=str(getattr(one, "name", cls.__name__)))


def rule_of(one: Any, name: str) -> Rule:
    """Return one rule of a pass; raise OptionError, with the nearest name, where it has none such.

    A member of a family may be called by its own part of the name: `relu` for `merge[relu]`.
    """
    rules = rules_of(one)
    if not rules:
        raise OptionError(f"'{one.name}' is not made of rules, so there is no rule '{name}' in it.")
    named = {rule.name: rule for rule in rules}
    found = named.get(name) or named.get(f"{rules.name}[{name}]")
    if found is None:
        raise unknown_name(f"rule of '{one.name}':", name, named)
    return found


# -- how a pass or backend is written --------------------------------------------------------------


def spec_of(one: Any) -> str:
    """Return a pass or backend as it is written by name: `fold-constants(growth=2.0)`.

    One that is in no registry is written by its place, or by its bare name where nobody else can
    reach it.
    """
    spec = _spec(one) or str(one.name)
    options = ", ".join(f"{key}={value!r}" for key, value in options_of(one).items())
    return f"{spec}({options})" if options else spec


def is_reachable(one: Any) -> bool:
    """Whether another process finds a pass or backend by its spec."""
    return _spec(one) is not None


def _spec(one: Any) -> str | None:
    """Return the registered name, or else the place; None where there is neither."""
    known = one if isinstance(one, (Rule, RuleSet)) else type(one)
    if any(registered(kind).get(str(one.name)) is known for kind in ("passes", "backends")):
        return str(one.name)
    if isinstance(one, Rule):
        return _place_of_rule(one)
    if isinstance(one, RuleSet):
        return place_of_variable(one, (rule.build.__module__ for rule in one))
    return place_of(known)


def _place_of_rule(one: Rule) -> str | None:
    """Return the place of a rule, or of a set in its module with the rule's name in brackets."""
    name = one.build.__module__
    place = place_of_variable(one, [name])
    sets = [v for v in vars(sys.modules.get(name, sys)).values() if isinstance(v, RuleSet)]
    for held in [] if place else sets:
        if any(rule is one for rule in held):
            found = place_of_variable(held, [name])
            own = f"{held.name}["  # a family: its member is called by the member's own name
            member = one.name[len(own) : -1] if one.name.startswith(own) else one.name
            place = place or (found and f"{found}[{member}]")
    return place


def options_of(one: Any) -> dict[str, Any]:
    """Return the fields of a pass or backend that differ from their defaults.

    Data, in fields that `repr` leaves out, are nobody's to print or to save: only a name of some.
    """
    if isinstance(one, (Rule, RuleSet)):
        return {}
    default = type(one)
    plain = default() if all(map(_has_default, fields(one))) else None
    given = {f.name: (getattr(one, f.name), f.repr) for f in fields(one)}
    values = {name: v for name, (v, shown) in given.items() if shown or isinstance(v, str)}
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


def parse(spec: str, word: str) -> tuple[str, dict[str, Any]]:
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
