"""The errors that fxopt raises: each says what happened, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FxoptError(Exception):
    """Base of every error that fxopt raises on purpose."""


class CaptureError(FxoptError):
    """The model could not be captured as one graph."""


class PreconditionError(FxoptError):
    """A pass was asked to run on a graph that does not meet its preconditions."""


class LoweringError(FxoptError):
    """A backend could not express the graph."""


class ShapeError(FxoptError):
    """An input's number, shape, dtype or device differs from what was captured."""


class BackendUnavailable(FxoptError):
    """A backend's engine is not installed; the message holds the install command."""


class ArtefactError(FxoptError):
    """A file could not be written, or is not a whole and readable fxopt artefact."""


class OptionError(FxoptError):
    """An unknown name, or an option with a value it cannot take."""


class RuleError(FxoptError):
    """A rewrite rule, or a condition of it, failed at a node: a bug of the rule."""


class DialectError(FxoptError):
    """A graph breaks an invariant of the dialect: a bug of a pass, or of ours."""


class VerifyError(FxoptError):
    """The optimized graph does not compute what the original did: a bug of a pass, or of ours."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """Build the error for a name nobody knows, with the nearest one that somebody does."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return OptionError(f"Unknown {kind} '{name}'.{hint} Known: {', '.join(names) or 'none'}.")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise OptionError where an option is none of the allowed words."""
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}.")


def check_option(owner: str, good: bool, option: str, value: Any, allowed: str) -> None:
    """Raise OptionError, which says what may be given, unless an option's value is `good`."""
    if not good:
        raise OptionError(f"{owner} option {option}={value!r} is not possible; give {allowed}.")


def is_count(value: Any) -> bool:
    """Whether a value is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
