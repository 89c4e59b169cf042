"""Conditions on what a symbol of a pattern stands for.

    @rule(lambda x, w: x * w, x=floating, w=constant)

A condition is a function that gets a `Value` (or the number, list or operator that was captured)
and returns True, False, or why not in words. Any function will do; these are the frequent ones.
`every` and `some` combine them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.values import Value

Condition = Callable[[Any], Any]


def constant(value: Any) -> Any:
    """Ask for a constant tensor that nothing writes to: a weight."""
    return isinstance(value, Value) and value.is_constant or "it is not a constant"


def fixed(value: Any) -> Any:
    """Ask for a plain number, or a constant that no new weights can change."""
    if isinstance(value, (int, float)):
        return True
    known = isinstance(value, Value) and value.graph.fixed_tensor(str(value.target)) is not None
    return known or "it is neither a number nor a constant that stays"


def number(value: Any) -> Any:
    """Ask for a plain number."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return good or "it is not a plain number"


def tensor(value: Any) -> Any:
    """Ask for a tensor, not a number or a list."""
    return isinstance(value, Value) or "it is not a tensor"


def floating(value: Any) -> Any:
    """Ask for a tensor of real floating-point numbers."""
    return isinstance(value, Value) and value.is_floating or "it is not floating point"


def used_once(value: Any) -> Any:
    """Ask for a value that has one user only."""
    return isinstance(value, Value) and value.users == 1 or "it is used elsewhere too"


def rank(*ranks: int) -> Condition:
    """Ask for a tensor with one of these numbers of dimensions."""

    def has_rank(value: Any) -> Any:
        if not isinstance(value, Value):
            return "it is not a tensor"
        return value.ndim in ranks or f"it has {value.ndim} dimensions, not {_or(ranks)}"

    return has_rank


def shape(*sizes: int | None) -> Condition:
    """Ask for a tensor of this shape; None is any size: `shape(None, 3, None, None)`."""

    def has_shape(value: Any) -> Any:
        if not isinstance(value, Value):
            return "it is not a tensor"
        found = tuple(value.shape)
        same = len(found) == len(sizes) and all(
            want is None or isinstance(have, int) and have == want
            for have, want in zip(found, sizes, strict=True)
        )
        wanted = ["any" if size is None else size for size in sizes]
        return same or f"its shape is {list(found)}, not {wanted}"

    return has_shape


def dtype(*dtypes: torch.dtype) -> Condition:
    """Ask for a tensor of one of these dtypes."""

    def has_dtype(value: Any) -> Any:
        if not isinstance(value, Value):
            return "it is not a tensor"
        return value.dtype in dtypes or f"its dtype is {value.dtype}, not {_or(dtypes)}"

    return has_dtype


def every(*conditions: Condition) -> Condition:
    """Ask for all of several conditions; the first that fails says why not."""

    def holds(value: Any) -> Any:
        answers = (condition(value) for condition in conditions)
        return next((answer for answer in answers if answer is not True), True)

    return holds


def some(*conditions: Condition) -> Condition:
    """Ask for one of several conditions."""

    def holds(value: Any) -> Any:
        answers = []
        for condition in conditions:
            answer = condition(value)
            if answer is True:
                return True
            answers.append(answer if isinstance(answer, str) else condition.__name__)
        return ", and ".join(answers)

    return holds


def equal_to(wanted: Any) -> Condition:
    """Ask for a literal: a number, list, string or dtype; in a set or tuple: one of them."""
    from fxopt.matching import same_value

    choices = list(wanted) if isinstance(wanted, (set, frozenset, tuple)) else [wanted]

    def is_equal(value: Any) -> Any:
        return any(same_value(value, one) for one in choices) or f"{_or(choices)} is wanted"

    return is_equal


def _or(choices: Any) -> str:
    return " or ".join(str(one).removeprefix("torch.") for one in choices)
