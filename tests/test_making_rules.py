"""`@rule(...)`: what may stand above which function, and what is refused, in words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt import conditions
from fxopt.errors import OptionError
from fxopt.registry import resolve_pass
from fxopt.rules import Rule, RuleSet, Value, rule

relu = rule(lambda x: F.relu(x))


def rewrites(one: Rule) -> int:
    story = fxopt.optimize(torch.nn.ReLU(), torch.randn(2, 3), passes=[one]).story
    return int(story.steps[0].rewrites)


class Above:
    """Something to call that is no function."""

    def method(self, x: Value) -> Any:
        """relu(x) = max(x, 0)"""
        return x.clamp_min(0)

    __call__ = method


def with_default(x: Value, low: float = 0.0) -> Any:
    return x.clamp_min(low)


def with_all(**symbols: Any) -> Any:
    return symbols["x"].clamp_min(0)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (functools.partial(with_default, low=0.0), "with_default"),
        (functools.partial(lambda low, x: x.clamp_min(low), low=0.0), "<lambda>"),
        (Above().method, "method"),
        (Above(), "Above"),
        (with_default, "with_default"),
        (with_all, "with_all"),
    ],
)
def test_what_can_be_called_by_name_is_a_rule(build: Callable[..., Any], name: str) -> None:
    made = relu(build)
    assert made.name == name and __file__ in made.source
    assert rewrites(made) == 1


def test_parameters_of_a_pattern_may_be_by_keyword() -> None:
    made = rule(lambda x, *, s: x.relu() * s)(lambda x, s: x * s)
    assert made.symbols == ("x", "s")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda *x: x[0], r"gets its symbols by name, and '\*x' has none"),
        (3, "stands above a function, not above 3"),
        (Value, "stands above a function"),
        (lambda y: y, "asks for 'y', and no pattern of it has that symbol: x"),
    ],
)
def test_what_is_no_rule(build: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        relu(build)


def test_a_decorator_without_a_pattern_does_not_pass_for_a_rule() -> None:
    bare = rule(lambda x: F.relu(x))  # as `@rule` alone above a function would leave it
    with pytest.raises(OptionError, match="a pattern without a rule: write @rule"):
        resolve_pass(bare)
    with pytest.raises(OptionError, match="a pattern without a rule"):
        RuleSet(bare)
    with pytest.raises(OptionError, match="A rule needs a pattern"):
        rule()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("constant", "never holds.*without quotes: x=constant"),
        ("tanh", "'x' does not stand for a text"),
        (torch.zeros(2), "is no condition"),
        (float, "is no condition"),
        (set(), "allows nothing"),
    ],
)
def test_conditions_that_can_never_hold(wanted: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        rule(lambda x: F.relu(x), x=wanted)(lambda x: x)


def test_a_text_is_a_condition_where_one_stands() -> None:
    made = rule(lambda x, kind: F.gelu(x, approximate=kind), kind="tanh")(lambda x: x)
    assert "kind" in made.conditions


def test_a_condition_that_was_not_called_says_so() -> None:
    made = rule(lambda x: F.relu(x), x=conditions.rank)(lambda x: x)
    with pytest.raises(OptionError, match="condition of 'x' answers .* call it with values"):
        rewrites(made)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": {"f": F.relu}}, "give what its members have, in a tuple"),
        ({"family": {"f": ()}}, "give what its members have"),
        ({"family": [F.relu]}, "give what its members have"),
        ({"family": {"g": (F.relu,)}}, "no pattern has a parameter 'g': f, x"),
        ({"effect": "lossy"}, "it is Effect.EXACT or Effect.LOSSY"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        rule(lambda x, f: f(x), **options)


def test_match_is_not_a_symbol() -> None:
    with pytest.raises(OptionError, match="call the symbol otherwise"):
        rule(lambda match: F.relu(match))
