"""check_rule: what it asks of a rule, and what a wrong rule must not get past it."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt import conditions
from fxopt.conditions import constant
from fxopt.errors import FxoptError, OptionError
from fxopt.pattern import any_of, each, named, near, optional, repeated
from fxopt.rules import Rule, RuleSet, Value, new_constant, rule
from fxopt.testing import Example, check_rule
from fxopt.testing import rules as asked
from fxopt.testing.examples import other_ranks
from fxopt.testing.forms import forms


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


# -- wrong rules -----------------------------------------------------------------------------------

WRONG: dict[str, tuple[Rule, tuple[Any, ...], str]] = {}


def wrong(says: str, pattern: Any, *inputs: Any, **asked: Any) -> Any:
    """Remember a rule that is wrong in one respect, and what is said about it."""

    def decorate(build: Any) -> None:
        WRONG[build.__name__] = (rule(pattern, **asked)(build), inputs, says)

    return decorate


@wrong("results differ by", lambda x: torch.sin(x) * 2, (3, 4))
def other_value(x: Value) -> Any:
    return torch.sin(x) + 2


@wrong("results differ by", lambda x, m: optional(lambda y: y + m, x.sin()).neg(), (3, 4), (3, 4))
def in_one_form(x: Value, m: Any) -> Any:
    return torch.cos(x).neg() if m is not None else torch.sin(x) * -1


@wrong("was ", lambda x, a, b: torch.maximum(optional(lambda y: y * a, x.exp()),
                                             optional(lambda z: z + b, x.sin())),
       (3, 4), (3, 4), (3, 4))  # fmt: skip
def in_one_combination(x: Value, a: Any, b: Any) -> Any:
    y, z = x.exp() if a is None else x.exp() * a, x.sin() if b is None else x.sin() + b
    larger = torch.minimum(y.neg(), z.neg()).neg()
    return larger + 1 if a is not None and b is not None else larger


@wrong("gradient", lambda x: torch.sin(x) * 2, (3, 4))
def gradient(x: Value) -> Any:
    return (torch.sin(x) + torch.sin(x)).detach()


@wrong("on large inputs: at .* the result is inf, and was", lambda x: F.softplus(x), (3, 4))
def overflow(x: Value) -> Any:
    return torch.log(1 + torch.exp(x))


@wrong("(?s)on large inputs.*float16", lambda x: torch.abs(x) * 1.5, (3, 4))
def overflow_in_half_precision(x: Value) -> Any:
    return torch.sqrt(x * x) * 1.5 if x.dtype == torch.float16 else (x * 1.5).abs()


@wrong("where x holds a nan: .* was nan", lambda x: torch.relu(x) * 2, (3, 4))
def nan(x: Value) -> Any:
    return torch.where(x > 0, x * 2, 0.0)


@wrong("where x holds an infinity", lambda x: torch.tanh(x) * 2, (3, 4))
def infinity(x: Value) -> Any:
    return 2 * (1 - 2 / (torch.exp(2 * x) + 1)) + (x - x)


@wrong("on zeros, ties and halves", lambda x: 1 / (x + 0.0), (3, 4))
def negative_zero(x: Value) -> Any:
    return x.reciprocal()


@wrong("on zeros, ties and halves", lambda x, s: (x / s) * s, (3, 4), (3, 4))
def division_by_zero(x: Value, s: Value) -> Any:
    return x.clone() if not x.is_floating else x + 0 * s


@wrong("on zeros, ties and halves", lambda x: torch.round(x) * 2, (3, 4))
def ties(x: Value) -> Any:
    return torch.floor(x + 0.5) * 2


@wrong("on large inputs", lambda x: torch.sqrt(x) * 1.5, (3, 4))
def beyond_a_threshold(x: Value) -> Any:
    return torch.where(x > 20, x, torch.pow(x, 0.5)) * 1.25 + torch.sqrt(x) * 0.25


@wrong("float16 the error grows", lambda x: torch.relu(x) * 2, (3, 4))
def float16(x: Value) -> Any:
    return torch.relu(x) * 3 if x.dtype == torch.float16 else torch.relu(x + x)


@wrong("float32 the error grows", lambda x: torch.sin(x) * 2, (3, 4))
def cancellation(x: Value) -> Any:
    return ((torch.sin(x) + 3e4) - 3e4) * torch.full_like(x, 2)


@wrong("int64", lambda x: torch.relu(x) * 2, (3, 4))
def integers(x: Value) -> Any:
    return torch.relu(x + x) if x.is_floating else torch.relu(x) * 3


@wrong("uint8", lambda x: torch.neg(x).clamp(min=0), (3, 4))
def unsigned(x: Value) -> Any:
    return torch.clamp(x, max=0).neg()


@wrong("float32 and torch.float64", lambda x, y: (x * y).to(torch.float64).neg(), (3, 4), (3, 4))
def promotion(x: Value, y: Value) -> Any:
    if not x.is_floating:
        return "integers overflow"
    return (x.float() * y.float()).double().neg() if x.dtype != y.dtype else (x * y).neg().double()


@wrong("operands that broadcast", lambda x, y: (x + y).sum(0), (3, 4), (3, 4))
def broadcast(x: Value, y: Value) -> Any:
    return x.sum(0) + y.sum(0) if x.is_floating else "integers overflow"


@wrong("1 in the place of size 4", lambda x: x.var(1) * 2, (3, 4))
def one_element(x: Value) -> Any:
    return x.var(1) + x.var(1) if x.shape[1] > 1 else x.sum(1) * 0.0


@wrong("0 in the place of size 3", lambda x: x.mean(0) * 1.5, (3, 4))
def no_element(x: Value) -> Any:
    return x.sum(0) * 1.5 if x.shape[0] == 0 else x.mean(0).mul(3.0).mul(0.5)


@wrong("size|larger by one", lambda x: x.sum(0) * 2, (3, 4))
def size(x: Value) -> Any:
    return x.mean(0) * 6 if x.is_floating else "integers have no mean"


@wrong("with one axis more in front of x", lambda x: torch.softmax(x, 1).log(), (2, 4))
def rank(x: Value) -> Any:
    return torch.log_softmax(x, -1)


@wrong("with one axis more behind x", lambda x: torch.softmax(x, -1).log(), (2, 4))
def rank_from_the_front(x: Value) -> Any:
    return torch.log_softmax(x, 1 if x.shape[-1] == 3 else -1)


@wrong(r"without the first axis of x: at x: float64\[4, 5\] the rule raised IndexError: Dimension"
       r".*\. Ask x.ndim first", lambda x: x.sum(-1).neg(), (3, 4, 5))  # fmt: skip
def rank_that_is_too_low(x: Value) -> Any:
    return x.neg().sum(2) if x.ndim < 4 else "there are many axes"


@wrong("without the first axis of w: .* Ask w.ndim first", lambda x, w: F.linear(x, w).neg(),
       (2, 4), (3, 4), w=conditions.constant)  # fmt: skip
def rank_of_a_weight(x: Value, w: Value) -> Any:
    if x.ndim == 2 and w.shape[1] == 0:
        return "there is nothing to multiply"
    return F.linear(x, new_constant(lambda w: -w, w)) if x.is_floating else "integers"


@wrong("1 in the place of size 4: at .* raised ValueError: one. Ask x.shape first",
       lambda x: x.sum(1).neg(), (3, 4))  # fmt: skip
def size_that_is_not_asked(x: Value) -> Any:
    if x.ndim == 2 and x.shape[1] == 1:
        raise ValueError("one")
    return x.neg().sum(1)


@wrong("operands that broadcast: results differ|operands that broadcast: at",
       lambda x, w: (x * w).neg(), (3, 4), (3, 4), w=conditions.constant)  # fmt: skip
def broadcast_with_a_weight(x: Value, w: Value) -> Any:
    if x.ndim != w.ndim or x.shape == w.shape or not x.is_floating:
        return x.neg() * w
    return x.neg() * w + w.neg() - w.neg() * 1.5


@wrong("on ties: gradients of the inputs differ.*inexact_at={'kink'}",
       lambda x: torch.amax(x, -1), (2, 4))  # fmt: skip
def gradient_at_ties(x: Value) -> Any:
    return torch.max(x, -1)[0]


@wrong("with s=", lambda x, s: torch.pow(x, s) * 1.5, (3, 4), 2.0, s=conditions.number)
def number(x: Value, s: float) -> Any:
    return x * x * 1.5 if x.is_floating else "a power of integers is a float"


@wrong("with s=", lambda x, s: F.leaky_relu(x, s), (3, 4), 0.1, s=conditions.number)
def range_of_a_number(x: Value, s: float) -> Any:
    return torch.maximum(x, x * s)


@wrong("with d=", lambda x, d: torch.softmax(x.sin(), d), (3, 4), 1)
def another_dimension(x: Value, d: int) -> Any:
    return torch.softmax(x.sin() * 1.0, 1)


@wrong("with dims=", lambda x, dims: x.permute(dims).neg(), (3, 3, 3), [0, 2, 1])
def list_of_numbers(x: Value, dims: list[int]) -> Any:
    return x.neg().mT


@wrong("where padding of conv2d|where bias of conv2d|where stride",
       lambda x, w: F.conv2d(x, w, ...).relu(), (2, 3, 5, 5), (4, 3, 3, 3), w=conditions.constant)
def what_is_left_open(x: Value, w: Value) -> Any:
    return F.conv2d(x, w).clamp_min(0)


@wrong("results differ by", lambda p, d: torch.cat(each(lambda p: p.relu()), d), (3, 4), 1)
def order(p: list[Value], d: int) -> Any:
    return torch.cat(p[::-1], d).relu()


@wrong("results differ", lambda x, rest: torch.cat([x.sin(), *rest], 1), (3, 4), [(3, 2), (3, 2)])
def order_of_the_rest(x: Value, rest: list[Value]) -> Any:
    return torch.cat([x.neg().sin().neg(), *rest[::-1]], 1)


@wrong("new weights", lambda x, w: F.linear(x, w).relu(), (2, 4), (3, 4), w=conditions.constant)
def old_weight(x: Value, w: Value) -> Any:
    old = w.graph.value(w.node).detach().clone()
    return F.linear(x, new_constant(lambda _: old, w)).clamp_min(0) if x.is_floating else "integers"


@wrong("zeros", lambda x, w: F.linear(x, w) * w.sum(), (2, 4), (3, 4), w=conditions.constant)
def weight_of_zero(x: Value, w: Value) -> Any:
    both = new_constant(lambda w: w * w.sum() * w / w, w)
    return F.linear(x, both) if x.is_floating else "integers may overflow"


@wrong("size", lambda x: torch.sin(x).sum(0), (3, 4))
def symbolic_size(x: Value) -> Any:
    return torch.sin(x).mean(0) * x.shape[0] if x.shape[0] != 4 else torch.sin(x).mean(0)


@wrong("results differ", lambda x: torch.sin(x) * near(2.0, 1e-3), (3, 4))
def tolerance(x: Value) -> Any:
    return torch.sin(x) + torch.sin(x)


@wrong("with low=1.0 and high=-1.0", lambda x, low, high: x.clamp(max=high).clamp(min=low),
       (2, 3), -1.0, 1.0)  # fmt: skip
def numbers_past_each_other(x: Value, low: float, high: float) -> Any:
    return x.clamp(low, high)


@wrong("all sizes alike", lambda x, dims, more: x.permute(dims).permute(more),
       (2, 3, 4), [0, 2, 1], [0, 2, 1])  # fmt: skip
def permutes_in_the_wrong_order(x: Value, dims: list[int], more: list[int]) -> Any:
    return x.permute([more[dim] for dim in dims])


@wrong("the result is", lambda x, w, v: (F.linear(x, w), F.linear(x, v)),
       (2, 4), (3, 4), (3, 4), w=constant, v=constant)  # fmt: skip
def weights_exchanged(x: Value, w: Value, v: Value) -> Any:
    both = F.linear(x, new_constant(lambda w, v: torch.cat([v, w]), w, v))
    parts = both.split_with_sizes([w.shape[0], v.shape[0]], -1)
    return parts[0], parts[1]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(name: str) -> None:
    wrong_rule, inputs, says = WRONG[name]
    with pytest.raises(AssertionError, match=says):
        check_rule(wrong_rule, *inputs, tolerance=1e-9)


# -- right rules -----------------------------------------------------------------------------------


@rule(lambda x: torch.round(torch.round(x)))
def merge_roundings(x: Value) -> Any:
    """round(round(x)) = round(x)"""
    return torch.round(x)


@rule(lambda x, c: torch.softmax(x + c, -1))
def remove_shift(x: Value, c: Value) -> Any:
    """softmax(x + c) = softmax(x) where c is the same along the rows"""
    if c.ndim != x.ndim or not isinstance(c.shape[-1], int) or c.shape[-1] != 1:
        return "c is not known to be the same along the rows"
    return torch.softmax(x, -1) if x.dtype == c.dtype and x.is_floating else "dtypes differ"


def test_steps_and_inputs_that_do_not_matter_are_seen_to_be_so() -> None:
    assert check_rule(merge_roundings, (3, 4)).notes == []
    with pytest.raises(AssertionError, match="inexact_at={'nan'}"):
        check_rule(remove_shift, (3, 4), (3, 1))
    report = check_rule(remove_shift, (3, 4), (3, 1), inexact_at={"nan", "inf"})
    assert report.inexact_at == {"nan", "inf"}
    assert report.notes == ["the result does not depend on c"]


def test_lists_and_numbers() -> None:
    @rule(lambda x, dims: x.permute(dims).neg())
    def move_neg(x: Value, dims: list[int]) -> Any:
        return x.neg().permute(dims)

    assert check_rule(move_neg, (2, 3, 4), [0, 2, 1]).others > 3
    with pytest.raises(OptionError, match="a tuple is the shape of a tensor. Give a list: dims="):
        check_rule(move_neg, (2, 3, 4), (0, 2, 1))

    @rule(lambda x, rest: torch.cat([x.relu().relu(), *rest], 1))
    def merge_first(x: Value, rest: list[Value]) -> Any:
        return torch.cat([x.relu(), *rest], 1)

    assert check_rule(merge_first, (2, 3), [(2, 4), (2, 5)]).fired == 1
    assert check_rule(merge_first, (2, 3), (2, 4)).fired == 2  # one more item, or two


def test_a_number_in_a_comparison() -> None:
    @rule(lambda x, s: x.masked_fill(x > s, s))
    def fuse_bound(x: Value, s: float) -> Any:
        return torch.where(x > s, s, x)

    assert check_rule(fuse_bound, (2, 3), 0.5).fired == 1


def test_a_named_value_that_another_output_uses() -> None:
    @rule(lambda x, y: (named(y, x.exp()).sin(), y + 1))
    def both(x: Value) -> Any:
        y = x.exp()
        return torch.cos(y - math.pi / 2), y - -1

    assert check_rule(both, (2, 3), tolerance=1e-9, inexact_at={"large"}).fired == 1


def test_the_rules_of_a_set() -> None:
    @rule(lambda x, f: f(f(x)), family={"f": (F.relu, torch.abs)})
    def merge_repeated(x: Value, f: Any) -> Any:
        return f(x)

    assert check_rule(merge_repeated, (3, 4)).fired == 2
    with pytest.raises(OptionError, match="belong to one rule of the set"):
        check_rule(merge_repeated, examples=[Example(lambda x: x.relu(), (3,))])
    with pytest.raises(OptionError, match="a pattern without a rule.* is not a rule"):
        check_rule(rule(lambda x: F.relu(x)), (3,))


def test_what_may_be_inexact_has_a_name() -> None:
    with pytest.raises(OptionError, match="takes 'inf', 'kink', 'large', 'nan', 'zero', not 'x'"):
        check_rule(merge_relus, (3, 4), inexact_at={"x"})


def test_gradients_at_ties_may_be_shared_out_in_other_ways() -> None:
    @rule(lambda x: torch.amax(x, -1))
    def replace_amax(x: Value) -> Any:
        return torch.max(x, -1)[0]

    report = check_rule(replace_amax, (2, 4), inexact_at={"kink"})
    assert (report.fired, report.inexact_at) == (1, {"kink"})


def test_a_form_may_hold_back_with_a_reason_that_is_listed() -> None:
    @rule(lambda x, e: torch.log(optional(lambda y: y + e, F.softmax(x, 1))), e=conditions.number)
    def fuse_log_softmax(x: Value, e: float | None) -> Any:
        return "an epsilon is added" if e is not None else F.log_softmax(x, 1)

    report = check_rule(fuse_log_softmax, (2, 4), 1e-3, reasons={"an epsilon is added"})
    assert (report.fired, report.held_back) == (1, 1)
    assert report.reasons == {"an epsilon is added"}
    with pytest.raises(AssertionError, match="held back: an epsilon is added"):
        check_rule(fuse_log_softmax, (2, 4), 1e-3)
    with pytest.raises(AssertionError, match="no form of the pattern held back with .* 'never'"):
        known = {"an epsilon is added", "never"}
        check_rule(RuleSet(fuse_log_softmax), (2, 4), 1e-3, reasons=known)

    @rule(lambda x, a: repeated(lambda y, a: y * a, torch.sin(x)).neg())
    def one_product(x: Value, a: list[float]) -> Any:
        return x.sin() * -math.prod(a) if a else None

    report = check_rule(one_product, (3, 4), 1.5, reasons="gives no reason")
    assert (report.fired, report.held_back) == (2, 1)


def test_some_form_must_fire() -> None:
    @rule(lambda x: any_of(torch.sin(x), torch.cos(x)).neg())
    def never(x: Value) -> Any:
        return "it is not worth it"

    with pytest.raises(AssertionError, match="in each form of its pattern: it is not worth it"):
        check_rule(never, (2, 4), reasons={"it is not worth it"})
    with pytest.raises(AssertionError, match="has no rules, so that nothing is proven"):
        check_rule(RuleSet(name="empty"), (2, 4))


def test_examples_do_not_replace_the_shapes() -> None:
    @rule(lambda x: torch.log(F.softmax(x, 1)))
    def add_one(x: Value) -> Any:
        return F.log_softmax(x, 1) + 1 if x.ndim != 3 else "of rank 3"

    held = Example(lambda x: F.softmax(x, 1).log(), (2, 3, 4), reason="of rank 3")
    assert check_rule(add_one, examples=[held]).held_back == 1
    with pytest.raises(AssertionError, match="results differ"):
        check_rule(add_one, (2, 4), examples=[held])
    with pytest.raises(OptionError, match="`weights` are those of `function`"):
        check_rule(add_one, (2, 4), weights={"w": (3,)})


def test_other_shapes_keep_what_an_example_says() -> None:
    example = Example(
        lambda input, v: input + v, (2, 4), weights={"v": (4,)}, positive={"v"}, reason="no"
    )
    for _, _, other in other_ranks(example):
        assert (other.reason, other.positive) == ("no", {"v"})
    words = {words: str(other.inputs[0]) for words, _, other in other_ranks(example)}
    assert words["with one axis more in front of input, v"] == "(3, 2, 4)"
    assert words["with one axis more behind input"] == "(2, 4, 3)"
    assert words["without the first axis of v"] == "(2, 4)"
    (form, *_) = forms(merge_relus, {"x": (2, 4)})
    assert form.first and form.with_shapes(lambda _, shape: shape).first


def test_only_those_weights_are_positive_that_are_said_to_be() -> None:
    def drawn(**options: Any) -> torch.Tensor:
        example = Example(torch.add, (8,), weights={"my_var": (8,)}, **options)
        return example.model().state_dict()["my_var"]

    assert drawn().min() < 0 < drawn(positive="my_var").min()
    with pytest.raises(OptionError, match=r"positive=\['x'\] names no weights; there are my_var"):
        drawn(positive={"x"})


def test_a_capture_that_fails_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = asked.capture

    def fails_on_integers(model: Any, inputs: Any, **options: Any) -> Any:
        if not inputs[0].is_floating_point():
            raise RuntimeError("this capture fails")
        return capture(model, inputs, **options)

    monkeypatch.setattr(asked, "capture", fails_on_integers)
    with pytest.raises(RuntimeError, match="this capture fails"):
        check_rule(merge_relus, (2, 4))


def test_python_without_asserts_checks_as_much() -> None:
    """`python -O` leaves out every `assert`."""
    for path in Path(asked.__file__).parent.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not [n.lineno for n in nodes if isinstance(n, ast.Assert)], path


def test_a_difference_too_small_to_see_is_refused() -> None:
    with pytest.raises(AssertionError, match="y makes a difference of .*e-1.* only"):
        example = Example(lambda x, y: x.relu().relu() + 1e-12 * y, (3, 4), (3, 4))
        check_rule(merge_relus, examples=[example])
    with pytest.raises(AssertionError, match="no result is finite"):
        check_rule(merge_relus, examples=[Example(lambda x: x.relu().relu() / 0 * 0, (3, 4))])


def test_a_form_that_does_not_run_says_so() -> None:
    @rule(lambda x, y: torch.matmul(x, y).neg().neg())
    def product(x: Value, y: Value) -> Any:
        return torch.matmul(x, y)

    with pytest.raises(OptionError, match=r"does not run on x: float64\[2, 3\], y: "):
        check_rule(product, (2, 3), (2, 3))


def test_the_line_of_an_example_is_where_it_was_written() -> None:
    held = Example(lambda x: F.relu(x + 1), (3, 4), reason="test_check_rule.py:")
    check_rule(merge_relus, examples=[held])


def test_running_statistics_are_buffers_and_variances_positive() -> None:
    @rule(
        lambda x, m, v, e: F.batch_norm(x, m, v, None, None, False, ..., e).neg(),
        m=conditions.constant, v=conditions.constant,
    )  # fmt: skip
    def write_out(x: Value, m: Value, v: Value, e: float) -> Any:
        if not x.is_floating or x.dtype != m.dtype or x.ndim != 3:
            return "the scale is for other inputs"
        scale = new_constant(lambda v: (-1 / (v.double() + e).sqrt()).to(v.dtype)[:, None], v)
        return (x - new_constant(lambda m: m[:, None], m)) * scale

    assert check_rule(write_out, (2, 3, 4), (3,), (3,), 0.1).fired == 1


# -- examples --------------------------------------------------------------------------------------


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
    with pytest.raises(OptionError, match="give 'f' an operator, or give function="):
        check_rule(rule(lambda x, f: f(f(x)))(lambda x, f: f(x)), (2, 4))
    with pytest.raises(FxoptError, match="has the symbols x, w, s"):
        check_rule(scale_weight, (2, 4), (3, 4), 2.0, 3.0)
