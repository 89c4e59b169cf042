"""check_rule: what it asks of a rule, and what a wrong rule must not get past it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt import conditions
from fxopt.errors import FxoptError
from fxopt.pattern import each, near, optional, repeated
from fxopt.rules import Match, Rule, Value, new_constant, rule
from fxopt.testing import Example, check_rule


@rule(lambda x: F.relu(F.relu(x)))
def merge_relus(x: Value) -> Any:
    """relu(relu(x)) = relu(x)"""
    return x.relu() if x.is_floating else "its input is not floating point"


@rule(lambda x, w, s: F.linear(x, w) * s, w=conditions.constant, s=conditions.number)
def scale_weight(x: Value, w: Value, s: float) -> Any:
    """(x·Wᵀ)·s = x·(s·W)ᵀ"""
    return F.linear(x, new_constant(lambda w: w * s, w))


def test_a_right_rule_passes() -> None:
    report = check_rule(merge_relus, (3, 4))
    assert (report.fired, report.dynamic, report.notes) == (1, 1, [])
    assert check_rule(scale_weight, (2, 4), (3, 4), 2.5).error < 1e-14
    assert check_rule(scale_weight, x=(2, 4), w=torch.randn(3, 4), s=-1.0).fired == 1


def test_every_form_is_tried() -> None:
    @rule(lambda x, a: repeated(lambda y, a: y * a, torch.sin(x)).neg())
    def one_product(x: Value, a: Any) -> Any:
        return x.sin() * -math.prod(a or [1.0])

    assert check_rule(one_product, (3, 4), 1.5).fired == 3

    @rule(lambda p, d: torch.cat(each(lambda p: torch.relu(p)), d))
    def relu_last(p: list[Value], d: int) -> Any:
        return torch.cat(p, d).relu()

    assert check_rule(relu_last, p=(3, 4), d=1).fired == 3


def test_a_form_that_does_not_fire_is_explained() -> None:
    @rule(lambda x, m: torch.softmax(optional(lambda y: y + m, torch.sin(x)), -1))
    def only_masked(x: Value, m: Any) -> Any:
        return "there is no mask" if m is None else torch.softmax(m + x.sin(), -1).clone()

    with pytest.raises((AssertionError, FxoptError), match=r"no mask|come to no end"):
        check_rule(only_masked, (3, 4), (3, 4))


def wrong(name: str) -> Rule:
    """Return a rule that is wrong in one respect."""
    if name == "value":

        @rule(lambda x: torch.sin(x) * 2)
        def value(x: Value) -> Any:
            return torch.sin(x) + 2

        return value
    if name == "form":

        @rule(lambda x, m: optional(lambda y: y + m, torch.sin(x)).neg())
        def form(x: Value, m: Any) -> Any:
            return torch.cos(x).neg() if m is not None else torch.sin(x) * -1

        return form
    if name == "gradient":

        @rule(lambda x: torch.sin(x) * 2)
        def gradient(x: Value) -> Any:
            return (torch.sin(x) + torch.sin(x)).detach()

        return gradient
    if name == "size":

        @rule(lambda x: torch.sin(x).sum(0))
        def size(x: Value, match: Match) -> Any:
            return torch.sin(x).mean(0) * int(x.shape[0])

        return size
    if name == "tolerance":

        @rule(lambda x: torch.sin(x) * near(2.0, 1e-3))
        def tolerance(x: Value) -> Any:
            return torch.sin(x) + torch.sin(x)

        return tolerance

    @rule(lambda x: torch.sin(x) * 2)
    def precision(x: Value) -> Any:
        return ((torch.sin(x) + 3e5) - 3e5) * torch.full_like(x, 2)

    return precision


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("value", "results differ"),
        ("form", "results differ"),
        ("gradient", "gradient"),
        ("size", "a symbolic size, results differ"),
        ("tolerance", "results differ"),
        ("precision", "float32 the error grows"),
    ],
)
def test_a_wrong_rule_is_caught(name: str, part: str) -> None:
    with pytest.raises(AssertionError, match=part):
        inputs = [(3, 4)] * (2 if name == "form" else 1)
        check_rule(wrong(name), *inputs, tolerance=1e-9)


def test_an_input_that_proves_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="makes no difference"):
        check_rule(
            merge_relus, examples=[Example(lambda x, y: x.relu().relu() + 0 * y, (3, 4), (3, 4))]
        )


def test_examples_that_must_hold_back() -> None:
    held = Example(lambda x: F.relu(F.relu(x) + 1), (3, 4), reason="relu wanted, found add")
    integers = Example(
        lambda x: F.relu(F.relu(x)), torch.arange(4), reason="its input is not floating point"
    )
    report = check_rule(merge_relus, examples=[held, integers])
    assert (report.fired, report.held_back) == (0, 2)
    with pytest.raises(AssertionError, match="must hold back, and fired"):
        check_rule(merge_relus, examples=[Example(lambda x: x.relu().relu(), (3,), reason="no")])
    with pytest.raises(AssertionError, match="expected the reason"):
        check_rule(merge_relus, examples=[Example(lambda x: x.relu().sin(), (3,), reason="xyz")])


def test_weights_are_parameters_of_the_model() -> None:
    example = Example(lambda x, w: F.linear(x, w) * 2.0, (2, 4), weights={"w": (3, 4)})
    assert check_rule(scale_weight, examples=[example]).fired == 1


def test_what_a_pattern_needs_is_asked_for() -> None:
    with pytest.raises(FxoptError, match="give 'w' a shape"):
        check_rule(scale_weight, (2, 4))
    with pytest.raises(FxoptError, match="has the symbols x, w, s"):
        check_rule(scale_weight, (2, 4), (3, 4), 2.0, 3.0)
