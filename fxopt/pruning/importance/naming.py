"""Importances by name: "l2", "l1(roles=('output',))", "mine.py:my_importance"."""

from __future__ import annotations

import inspect
from typing import Any

from fxopt.errors import OptionError, unknown_name
from fxopt.imports import load_object
from fxopt.pruning.importance.activations import Activations
from fxopt.pruning.importance.chance import Random
from fxopt.pruning.importance.contract import Importance
from fxopt.pruning.importance.function import OwnFunction
from fxopt.pruning.importance.gradients import Hessian, Taylor
from fxopt.pruning.importance.magnitude import L1, L2, Lamp
from fxopt.pruning.importance.median import GeometricMedian
from fxopt.pruning.importance.norms import BnScale
from fxopt.registry import make, parse

BY_NAME: dict[str, type] = {
    kind.name: kind
    for kind in (
        *(L1, L2, Lamp, GeometricMedian, BnScale, Random),  # of weights alone
        *(Taylor, Hessian, Activations),  # with data
    )
}


def importance_of(spec: Any) -> Importance:
    """Return an importance: itself, from its name with options, or from the user's function.

    A function gets the graph and a `Family` and returns [channels] numbers. What stands in a file
    or a module is named by its place, "mine.py:my_importance". Raises OptionError, with the names
    that there are, for anything else.
    """
    if isinstance(spec, str):
        return _named(spec)
    if isinstance(spec, type):
        raise OptionError(f"{spec.__name__} is a class; pass an object: {spec.__name__}(…).")
    if isinstance(spec, Importance) and callable(spec.scores):
        return spec
    if callable(spec):
        _check_takes_two(spec)
        return OwnFunction(spec)
    raise OptionError(
        f"{spec!r} is no importance: give a name ({', '.join(sorted(BY_NAME))}), an object with a "
        "name and scores(graph, families), or a function of a graph and a family."
    )


def _named(spec: str) -> Importance:
    name, options = parse(spec, "importance")
    if ":" in name:
        found = load_object(name)
        if not isinstance(found, type):
            if options:
                named = ", ".join(options)
                raise OptionError(f"'{name}' is no class and takes no options: leave out {named}.")
            return importance_of(found)
    elif name in BY_NAME:
        found = BY_NAME[name]
    else:
        raise unknown_name("importance", name, BY_NAME)
    return importance_of(make(found, options))


def _check_takes_two(function: Any) -> None:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        named = getattr(function, "__qualname__", repr(function))
        raise OptionError(
            f"The importance function '{named}' must take two arguments: the graph and a family."
        ) from None
    except ValueError:  # written in C: its signature is not known
        return
