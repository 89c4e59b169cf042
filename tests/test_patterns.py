"""The language of patterns: alternatives, parts, lists, conditions, several outputs, families."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt import conditions, dialect, matching
from fxopt.contract import PassResult
from fxopt.errors import OptionError, RuleError
from fxopt.graph_module import GraphModule
from fxopt.pattern import (
    Outputs,
    any_of,
    each,
    named,
    near,
    optional,
    pattern_text,
    repeated,
    symbols,
)
from fxopt.recording import record
from fxopt.rules import Match, Rule, RuleSet, Value, apply_rules, new_constant, rule
from fxopt.testing import op_counts, relative_error

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
Y = X.flip(0)


class Function(torch.nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any], **weights: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight))

    def forward(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.named_parameters()))


def applied(
    function: Callable[..., Any], *rules: Any, inputs: tuple[Any, ...] = (X,), **weights: Any
) -> tuple[GraphModule, PassResult]:
    """Apply rules to a captured function; check the dialect and the numbers."""
    model = Function(function, **weights).eval()
    graph = fxopt.capture(model, inputs)
    result = apply_rules(graph, RuleSet(*rules))
    dialect.check(graph)
    with torch.no_grad():
        assert relative_error(graph(*inputs), model(*inputs)) < 1e-6
    return graph, result


def seen(pattern: Any, function: Callable[..., Any], *inputs: Any, **options: Any) -> list[Any]:
    """Return what the symbols of a pattern stand for at each match, tensors by name."""
    found: list[Any] = []

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.node.name if isinstance(value, Value) else value

    @rule(pattern, **options)
    def note(match: Match) -> None:
        from fxopt.values import values_of

        found.append({name: plain(values_of(value)) for name, value in match.values.items()})

    apply_rules(fxopt.capture(Function(function).eval(), inputs or (X,)), [note])
    return found


# -- alternatives and parts ------------------------------------------------------------------------


def test_any_of_matches_each_choice() -> None:
    pattern = lambda x, n: any_of(x.relu(), x * n).neg()  # noqa: E731
    assert seen(pattern, lambda x: -x.relu()) == [{"x": "args_0"}]
    assert seen(pattern, lambda x: -(x * 5)) == [{"x": "args_0", "n": 5}]
    assert seen(pattern, lambda x: -x.tanh()) == []


def test_any_of_may_stand_at_the_root() -> None:
    pattern = lambda x: any_of(x.relu().neg(), x.sin())  # noqa: E731
    assert len(seen(pattern, lambda x: (x.sin(), -x.relu(), x.cos()))) == 2


def test_an_optional_part_may_be_missing() -> None:
    pattern = lambda s, mask: torch.softmax(optional(lambda y: y + mask, s.sin()), -1)  # noqa: E731
    assert seen(pattern, lambda x, m: (x.sin() + m).softmax(-1), X, Y) == [
        {"s": "args_0", "mask": "args_1"}
    ]
    assert seen(pattern, lambda x: x.sin().softmax(-1)) == [{"s": "args_0"}]
    assert seen(pattern, lambda x, m: (x.cos() + m).softmax(-1), X, Y) == []


def test_what_an_optional_part_lacks_is_none() -> None:
    @rule(lambda s, mask: torch.softmax(optional(lambda y: y + mask, s.sin()), -1))
    def note(s: Value, mask: Any) -> str:
        return "no mask" if mask is None else "masked"

    _, result = applied(lambda x: (x.sin().softmax(-1), (x.sin() + 1).softmax(-1)), note)
    assert [miss.reason for miss in result.misses] == ["note: no mask", "note: masked"]


@pytest.mark.parametrize(
    ("function", "factors"),
    [
        (lambda x: x.sin() * 2, [2]),
        (lambda x: x.sin() * 2 * 3 * 4, [4, 3, 2]),
        (lambda x: 4 * (3 * x.sin()), [4, 3]),
    ],
)
def test_a_part_repeats_and_its_symbols_are_lists(
    function: Callable[..., Any], factors: list[int]
) -> None:
    @rule(lambda x, a: repeated(lambda y, a: y * a, torch.sin(x), at_least=1).neg())
    def merge(x: Value, a: list[Any]) -> Any:
        return (x.sin() * torch.tensor(a).prod().item()).neg() if len(a) > 1 else f"only {a}"

    graph, result = applied(lambda x: -function(x), merge)
    assert op_counts(graph)["mul"] == 1
    assert result.rewrites == (len(factors) > 1)


def test_a_repetition_may_be_empty_and_ends() -> None:
    pattern = lambda x: repeated(lambda y: torch.relu(y), torch.sin(x)).neg()  # noqa: E731
    assert len(seen(pattern, lambda x: (-x.sin(), -x.sin().relu().relu(), -x.relu()))) == 2
    with pytest.raises(OptionError, match="has to compute something"):
        record(lambda x: repeated(lambda y: x.relu(), x).neg())


def test_what_a_repetition_hides_is_asked_again_when_it_changes() -> None:
    @rule(lambda x: repeated(lambda y: y.neg(), torch.sin(x), at_least=6).cos())
    def six(x: Value) -> Any:
        return x.sin().cos()

    @rule(lambda x: x.exp().log())
    def neg_twice(x: Value) -> Any:  # not the same function: only the order of events is asked
        return x.neg().neg()

    graph = fxopt.capture(
        Function(lambda x: x.sin().exp().log().neg().neg().neg().neg().cos()).eval(), (X,)
    )
    assert apply_rules(graph, [six, neg_twice]).rewrites == 2
    assert op_counts(graph) == {"cos": 1, "sin": 1}


# -- lists -----------------------------------------------------------------------------------------


def test_the_rest_of_a_list_is_captured() -> None:
    pattern = lambda x, rest, d: torch.cat([x.relu(), *rest], d)  # noqa: E731
    assert seen(pattern, lambda x, y: torch.cat([x.relu(), y, x], 1), X, Y) == [
        {"x": "args_0", "rest": ["args_1", "args_0"], "d": 1}
    ]
    assert seen(pattern, lambda x: torch.cat([x.relu()], 1)) == [
        {"x": "args_0", "rest": [], "d": 1}
    ]
    assert seen(pattern, lambda x, y: torch.cat([y, x.relu()], 1), X, Y) == []


def test_dots_in_a_list_are_any_items() -> None:
    pattern = lambda x: torch.cat([..., x.relu(), ...], 1)  # noqa: E731
    assert len(seen(pattern, lambda x, y: torch.cat([y, x.relu(), y], 1), X, Y)) == 1
    assert seen(pattern, lambda x, y: torch.cat([y, y], 1), X, Y) == []


@pytest.mark.parametrize(
    "pattern",
    [
        lambda p, d: torch.cat(each(lambda p: torch.relu(p)), d),
        lambda p, d: torch.cat([*each(lambda p: torch.relu(p))], d),
    ],
)
def test_every_item_of_a_list_matches(pattern: Callable[..., Any]) -> None:
    @rule(pattern)
    def relu_last(p: list[Value], d: int) -> Any:
        return torch.cat(p, d).relu()

    graph, _ = applied(lambda x, y: torch.cat([x.relu(), y.relu()], 1), relu_last, inputs=(X, Y))
    assert op_counts(graph) == {"cat": 1, "relu": 1}
    _, result = applied(lambda x, y: torch.cat([x.relu(), y], 1), relu_last, inputs=(X, Y))
    assert not result.modified


def test_items_may_share_a_symbol_and_hold_parts_of_their_own() -> None:
    pattern = lambda x, a, b: torch.cat(each(lambda a, b: x * a + b), 0)  # noqa: E731
    found = seen(pattern, lambda x, y: torch.cat([x * 2 + y, x * 3 + 1], 0), X, Y)
    assert found == [{"x": "args_0", "a": [2, 3], "b": ["args_1", 1]}]
    assert seen(pattern, lambda x, y: torch.cat([x * 2 + y, y * 3 + 1], 0), X, Y) == []


def test_repetitions_may_stand_in_items() -> None:
    pattern = lambda x, a: torch.stack(  # noqa: E731
        each(lambda x: repeated(lambda y, a: y * a, torch.sin(x))), 0
    )
    found = seen(pattern, lambda x, y: torch.stack([x.sin() * 2 * 3, y.sin(), y.sin() * 4]), X, Y)
    assert found == [{"x": ["args_0", "args_1", "args_1"], "a": [[3, 2], [], [4]]}]


def test_a_list_keeps_the_places_of_what_is_missing() -> None:
    pattern = lambda x, b: torch.cat(  # noqa: E731
        each(lambda x, b: optional(lambda y: y + b, torch.relu(x))), 0
    )
    found = seen(pattern, lambda x: torch.cat([x.relu(), x.relu() + 4, x.relu()], 0))
    assert found == [{"x": ["args_0"] * 3, "b": [None, 4, None]}]


def test_lists_in_lists_are_nested() -> None:
    pattern = lambda p: torch.stack(  # noqa: E731
        each(lambda: torch.cat(each(lambda p: torch.relu(p)), 0)), 0
    )
    model = lambda x, y: torch.stack(  # noqa: E731
        [torch.cat([x.relu(), y.relu()]), torch.cat([y.relu(), y.relu()])]
    )
    assert seen(pattern, model, X, Y) == [{"p": [["args_0", "args_1"], ["args_1", "args_1"]]}]


def test_no_repetition_is_an_empty_list() -> None:
    pattern = lambda x, a: repeated(lambda y, a: y * a, torch.sin(x))  # noqa: E731
    assert seen(pattern, lambda x: x.sin()) == [{"x": "args_0", "a": []}]
    one_of = lambda x, a: any_of(torch.exp(x), repeated(lambda y, a: y * a, torch.sin(x)))  # noqa: E731
    assert seen(one_of, lambda x: x.exp()) == [{"x": "args_0"}]


@pytest.mark.parametrize("times", [-1, 17])
def test_a_repetition_is_not_cut_silently(times: int) -> None:
    with pytest.raises(OptionError, match=f"at_least is {times}; .* at most 16 times"):
        record(lambda x, a: repeated(lambda y, a: y * a, torch.sin(x), at_least=times))


# -- how long a search takes -----------------------------------------------------------------------


def steps(pattern: Any, function: Callable[..., Any]) -> tuple[int, int]:
    """Return the nodes of a graph, and the most steps that a search makes at any of them."""
    graph = fxopt.capture(Function(function).eval(), (X,))
    made: list[matching._Search] = []
    for node in graph.graph.nodes:
        search = matching._Search({}, matching.Attempt())
        made.append(search)
        roots = pattern.patterns if isinstance(pattern, Outputs) else (pattern,)
        with contextlib.suppress(matching._TooLong):
            list(search.outputs(roots[1:], (node,), roots[0]))
    return len(graph.graph.nodes), max(search.steps for search in made)


def fibonacci(x: torch.Tensor) -> torch.Tensor:
    a, b = x, x.sin() + x.relu()
    for _ in range(24):
        a, b = b, a + b
    return b


def doubled(x: torch.Tensor) -> torch.Tensor:
    for _ in range(24):
        x = x + x
    return x


def negated(x: torch.Tensor) -> torch.Tensor:
    for _ in range(30):
        x = -x
    return x.relu()


@pytest.mark.parametrize("function", [fibonacci, doubled])
def test_a_repetition_is_not_tried_twice_at_a_node(function: Callable[..., Any]) -> None:
    pattern = record(lambda x, a: repeated(lambda y, a: y + a, torch.exp(x)))
    nodes, most = steps(pattern, function)
    assert most < 40 * nodes


def test_repetitions_in_repetitions_end() -> None:
    pattern = record(
        lambda x: torch.relu(
            repeated(lambda y: torch.neg(repeated(lambda z: torch.neg(z), y)), torch.exp(x))
        )
    )
    _, most = steps(pattern, negated)
    assert most < matching.MOST_STEPS


def test_a_search_that_is_cut_off_says_so() -> None:
    @rule(lambda x, a, b, c, d: (x.relu() + a, x.relu() + b, x.relu() + c, x.relu() * d))
    def four(x: Value) -> None:
        return None

    def fan(x: torch.Tensor) -> Any:
        y = x.relu()
        return tuple(y + float(i) for i in range(40))

    graph = fxopt.capture(Function(fan).eval(), (X,))
    node = graph.find(aten.add.Tensor)[0]
    attempt = matching.Attempt()
    assert four.match(node, attempt) is None
    assert attempt.failure.endswith("the search was cut off after 20000 steps")
    assert steps(four.patterns[0], lambda x: (x.relu() + 1, x.relu() + 2))[1] < 100


def test_what_failed_with_other_symbols_is_tried_again() -> None:
    pattern = lambda x, y, a: (y * a) + repeated(lambda z, b: z + b * a, torch.sin(x))  # noqa: E731
    found = seen(pattern, lambda x, y: (x.sin() + y * 3) + y * 3, X, Y)
    assert found[-1]["a"] == 3


# -- spellings that depend on what a symbol is -----------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "with_number", "with_tensor"),
    [
        (lambda x, s: s - x.sin(), lambda x, y: 3.0 - x.sin(), lambda x, y: y - x.sin()),
        (lambda x, s: s / x.sin(), lambda x, y: 3.0 / x.sin(), lambda x, y: y / x.sin()),
        (lambda x, s: x.sin() / s, lambda x, y: x.sin() / 3.0, lambda x, y: x.sin() / y),
        (lambda x, s: x.sin() > s, lambda x, y: x.sin() > 3.0, lambda x, y: x.sin() > y),
        (lambda x, s: x.sin() == s, lambda x, y: x.sin() == 3.0, lambda x, y: x.sin() == y),
        (lambda x, s: x.sin() != s, lambda x, y: x.sin() != 3.0, lambda x, y: x.sin() != y),
        (lambda x, s: x.sin() ** s, lambda x, y: x.sin() ** 3.0, lambda x, y: x.sin() ** y),
        (lambda x, s: s ** x.sin(), lambda x, y: 3.0 ** x.sin(), lambda x, y: y ** x.sin()),
        (lambda x, s: x.sin() % s, lambda x, y: x.sin() % 3.0, lambda x, y: x.sin() % y),
        (
            lambda x, s: torch.where(x.sin() > 0, x, s),
            lambda x, y: torch.where(x.sin() > 0, x, 3.0),
            lambda x, y: torch.where(x.sin() > 0, x, y),
        ),
        (
            lambda x, s: torch.clamp(x.sin(), s, s),
            lambda x, y: x.sin().clamp(3.0, 3.0),
            lambda x, y: x.sin().clamp(y, y),
        ),
    ],
)
def test_a_symbol_is_a_number_or_a_tensor(
    pattern: Any, with_number: Callable[..., Any], with_tensor: Callable[..., Any]
) -> None:
    assert seen(pattern, with_number, X, Y) == [{"x": "args_0", "s": 3.0}]
    assert seen(pattern, with_tensor, X, Y) == [{"x": "args_0", "s": "args_1"}]


def test_a_product_with_a_reciprocal_is_no_quotient_of_tensors() -> None:
    assert seen(lambda x, s: s / x.sin(), lambda x, y: x.sin().reciprocal() * y, X, Y) == []


IMAGE = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("pattern", "function"),
    [
        (lambda x: torch.neg(x[:, 1:]), lambda x: -x[:, 1:]),
        (lambda x: x.sin()[:, 1:], lambda x: x.sin()[:, 1:]),
        (lambda x: x.sin()[..., 0], lambda x: x.sin()[..., 0]),
        (lambda x: torch.neg(x[0]), lambda x: -x[0]),
        (lambda x: torch.neg(x[0]), lambda x: -x.unbind(0)[0]),
        (lambda x: torch.neg(x[None]), lambda x: -x[None]),
        (lambda x, i: x.sin()[..., i], lambda x: x.sin()[..., 2]),
        (lambda x, a, b: x.sin()[:, a:b], lambda x: x.sin()[:, 1:3]),
        (lambda x: torch.neg(x.max(1).values), lambda x: -x.max(1).values),
        (lambda x: operator.mul(*x.chunk(2, 1)), lambda x: operator.mul(*x.chunk(2, 1))),
        (lambda x: (x > 0) ^ (x < 1), lambda x: (x > 0) ^ (x < 1)),
        (lambda x: torch.neg(x.double()), lambda x: -x.double()),
        (lambda x: x.norm(dim=1), lambda x: x.norm(dim=1)),
        (lambda x: torch.norm(x), lambda x: torch.norm(x)),
        (lambda x: F.adaptive_max_pool2d(x, 1), lambda x: F.adaptive_max_pool2d(x, 1)),
        (lambda x: F.adaptive_avg_pool2d(x, 1), lambda x: F.adaptive_avg_pool2d(x, (1, 1))),
        (lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 2)),
        (lambda x: F.max_pool2d(x, 2, 2, 0, 1, False), lambda x: F.max_pool2d(x, 2)),
        (lambda x: F.instance_norm(x), lambda x: F.instance_norm(x)),
        (lambda x, m, v: F.batch_norm(x, m, v), lambda x: F.batch_norm(x, *x[0, :, 0, :2].T)),
        (lambda *xs: torch.cat(xs), lambda x: torch.cat([x, x])),
        (lambda x, *, s: x.sin() * s, lambda x: x.sin() * 2),
        (lambda x: torch.nn.functional.max_pool2d(x, 2, ...), lambda x: F.max_pool2d(x, 2)),
        (lambda x, w: conv2d(x, w, ...), lambda x: conv2d(x, x.relu(), padding=1)),
        (lambda x, w: _convolved(x, w), lambda x: conv2d(x, x.relu(), padding=1)),
        (F.relu, lambda x: F.relu(x)),
    ],
)  # fmt: skip
def test_a_pattern_is_spelled_as_the_model(pattern: Any, function: Callable[..., Any]) -> None:
    assert len(seen(pattern, function, IMAGE)) == 1


conv2d = F.conv2d


def _convolved(x: Any, w: Any) -> Any:
    return conv2d(x, w, ...)


def test_a_padding_index_is_no_detail() -> None:
    ids, table = torch.tensor([1, 2]), torch.randn(4, 2)
    plain = lambda ids, w: F.embedding(ids, w)  # noqa: E731
    padded = lambda ids, w: F.embedding(ids, w, padding_idx=0)  # noqa: E731
    assert len(seen(plain, plain, ids, table)) == len(seen(padded, padded, ids, table)) == 1
    assert seen(plain, padded, ids, table) == seen(padded, plain, ids, table) == []


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (lambda x: torch.maximum(x, torch.zeros_like(x)), r"zeros_like\(x\) does not stand"),
        (lambda x: torch.maximum(x, torch.tensor(0.0)), "Write the number alone"),
        (lambda x: torch.relu(x[x > 0]), "an index is a number"),
        (lambda x: x.reshape(x.shape[0], -1), "cannot ask for 'shape'"),
        (lambda x: x.reshape(x.size(0), -1), "cannot ask for 'size'"),
        (lambda x: x.relu() if x == 0 else x.sin(), "cannot branch"),
        (lambda x, **more: torch.relu(x), "'\\*\\*more' is no symbol"),
        (lambda x, w, f=F.conv2d: f(x, w, ...), "Spell a call with `...`"),
    ],
)
def test_a_pattern_that_cannot_match_is_refused(pattern: Any, part: str) -> None:
    with pytest.raises(OptionError, match=part):
        record(pattern)


# -- names, numbers and constants ------------------------------------------------------------------


def test_a_value_inside_may_have_a_name() -> None:
    pattern = lambda x, y: named(y, x.sin()) * torch.sigmoid(y)  # noqa: E731
    assert seen(pattern, lambda x: x.sin() * x.sin().sigmoid()) == []  # two sines
    assert seen(pattern, lambda x: (lambda y: y * y.sigmoid())(x.sin())) == [
        {"x": "args_0", "y": "sin"}
    ]
    with pytest.raises(OptionError, match="is a symbol"):
        record(lambda x: named(x.relu(), x.sin()).neg())


def test_numbers_have_a_tolerance() -> None:
    rough = lambda x: x * near(1.702, 1e-3)  # noqa: E731
    assert len(seen(rough, lambda x: (x * 1.7025, x * 1.71))) == 1
    exact = lambda x: x * 1.702  # noqa: E731
    assert len(seen(exact, lambda x: (x * 1.702, x * 1.7020001))) == 1


def test_a_number_matches_a_fixed_constant_of_one_element() -> None:
    pattern = lambda x: x * 0.1  # noqa: E731
    assert len(seen(pattern, lambda x: x * torch.tensor(0.1))) == 1
    assert len(seen(pattern, lambda x: x * torch.tensor([0.1]))) == 1
    assert len(seen(pattern, lambda x: x * torch.tensor([0.1, 0.1, 0.1, 0.1]))) == 0
    assert len(seen(pattern, lambda x: x * torch.tensor(0.1001))) == 0
    graph = fxopt.capture(
        Function(lambda x, w: x * w, w=torch.tensor(0.1)).eval(), (X,)
    )  # a weight of the same value may be trained to another one
    matched = rule(pattern)(lambda x: x).match(graph.find(aten.mul.Tensor)[0])
    assert matched is None


def test_new_constants_are_computed_and_recorded() -> None:
    @rule(lambda x, w, s: F.linear(x, w) * s, w=conditions.constant, s=conditions.number)
    def scale_weight(x: Value, w: Value, s: float) -> Any:
        scaled = new_constant(lambda w: (w.double() * s).to(w.dtype), w, name="scaled")
        return F.linear(x, scaled)

    graph, _ = applied(
        lambda x, w: F.linear(x, w) * 3.0, scale_weight, w=torch.randn(5, 4)
    )
    assert op_counts(graph) == {"linear": 1}
    assert graph.info.recipes[-1].sources == ("w",)
    assert isinstance(graph.constant("scaled"), torch.nn.Parameter)


def test_a_new_constant_comes_from_constants() -> None:
    @rule(lambda x: torch.sin(x))
    def bad(x: Value) -> Any:
        return new_constant(torch.sin, x)

    with pytest.raises(OptionError, match="is not a constant"):
        applied(lambda x: x.sin(), bad)


# -- operators as symbols --------------------------------------------------------------------------


def test_a_symbol_may_stand_for_an_operator() -> None:
    @rule(lambda f, x, d: f(x.permute(d)), f={torch.relu, F.silu, aten.tanh})
    def permute_last(f: Any, x: Value, d: list[int]) -> Any:
        return f(x).permute(d)

    graph, result = applied(
        lambda x: x.permute(2, 0, 1).relu().tanh().cos(), permute_last
    )
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        aten.relu.default, aten.tanh.default, aten.permute.default, aten.cos.default,
    ]  # fmt: skip
    assert permute_last.targets and aten.relu.default in permute_last.targets
    assert result.rules["permute_last"].tried < 8  # only at these operators


def negation_out(**asked: Any) -> Any:
    """Return a rule that takes a negation through an odd function of one argument."""

    @rule(lambda f, x: f(-x, ...), **asked)
    def take_out(f: Any, x: Value) -> Any:
        return -f(x)

    return take_out


@pytest.mark.parametrize("asked", [{F.tanh}, [torch.tanh], F.tanh, torch.tanh, aten.tanh, "tanh",
                                   torch.Tensor.tanh, torch.tanh_])  # fmt: skip
def test_operators_may_be_named_as_one_calls_them(asked: Any) -> None:
    _, result = applied(lambda x: (-x).tanh(), negation_out(f=asked))
    assert result.rewrites == 1


@pytest.mark.parametrize(
    ("asked", "function"),
    [
        (torch.subtract, lambda x, y: -x - y),
        (torch.sub, lambda x, y: torch.subtract(-x, y)),
        (torch.multiply, lambda x, y: -x * y),
        (torch.true_divide, lambda x, y: -x / y),
        (F.max_pool1d, lambda x, y: F.max_pool1d(-x, 2)),
    ],
)
def test_a_synonym_is_the_operator_that_it_stands_for(asked: Any, function: Any) -> None:
    heard = []

    @rule(lambda f, x: f(-x, ...), f={asked})
    def listen(f: Any, x: Value) -> None:
        heard.append(f)

    applied(function, listen, inputs=(X, Y))
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({F.relu6}, r"'relu6' stands in a graph as hardtanh\(x, 0.0, 6.0\); write that call"),
        (F.relu6, "hardtanh"),
        (aten.relu6.default, "hardtanh"),
        ({torch.relu, torch.transpose}, "'transpose' stands in a graph as permute"),
        (torch.zeros_like, "'zeros_like' stands in a graph as full"),
        ({torch.relu, len}, "'len' is not one ATen operator"),
    ],
)
def test_an_operator_that_is_written_as_another_is_refused(asked: Any, written: str) -> None:
    with pytest.raises(OptionError, match=written):
        negation_out(f=asked)


@pytest.mark.parametrize("asked", [F.hardtanh, torch.relu, {F.relu}, aten.relu, aten.relu.default])
def test_a_symbol_that_is_not_called_stands_for_no_operator(asked: Any) -> None:
    with pytest.raises(OptionError, match="'x' is not called in the pattern, so it stands for no"):
        negation_out(x=asked)


@pytest.mark.parametrize("good", [True, False])
def test_a_called_symbol_may_have_a_predicate(good: bool) -> None:
    class Odd:
        """An object to call."""

        def __call__(self, target: Any) -> bool:
            return target is aten.tanh.default if good else False

    for asked in (Odd(), lambda target: Odd()(target), functools.partial(Odd.__call__, Odd())):
        _, result = applied(lambda x: (-x).tanh(), negation_out(f=asked))
        assert result.rewrites == int(good)


def test_an_operator_may_be_asked_by_a_condition() -> None:
    pattern = lambda f, x: f(torch.sin(x))  # noqa: E731
    named_cos = lambda target: "cos" in str(target) or "no cosine"  # noqa: E731
    assert len(seen(pattern, lambda x: (x.sin().cos(), x.sin().exp()), f=named_cos)) == 1
    both = lambda x: (x.sin().cos(), x.sin() + 1)  # noqa: E731
    assert len(seen(pattern, both)) == 1
    assert len(seen(lambda x, f: f(torch.sin(x), ...), both)) == 2


# -- conditions ------------------------------------------------------------------------------------


def test_a_condition_chooses_the_operand() -> None:
    found = seen(lambda a, b: a + b, lambda x: 1 + x.sin() * 1.0, a=conditions.tensor)
    assert found == [{"a": "mul", "b": 1}]


@pytest.mark.parametrize(
    ("condition", "good", "part"),
    [
        (conditions.floating, True, ""),
        (conditions.constant, False, "not a constant"),
        (conditions.fixed, False, "neither a number nor"),
        (conditions.number, False, "not a plain number"),
        (conditions.used_once, True, ""),
        (conditions.rank(3), True, ""),
        (conditions.rank(2, 4), False, "3 dimensions, not 2 or 4"),
        (conditions.shape(2, None, 4), True, ""),
        (conditions.shape(2, None), False, r"its shape is \[2, 3, 4\]"),
        (conditions.dtype(torch.float32), True, ""),
        (conditions.dtype(torch.float16), False, "float32, not float16"),
        (conditions.every(conditions.floating, conditions.rank(3)), True, ""),
        (conditions.every(conditions.floating, conditions.rank(2)), False, "not 2"),
        (conditions.some(conditions.number, conditions.rank(3)), True, ""),
        (conditions.some(conditions.number, conditions.rank(2)), False, "number, and it has 3"),
        (lambda value: value.shape[0] == 2, True, ""),
        (lambda value: False, False, "which is not"),
    ],
)
def test_conditions_say_why_not(condition: Any, good: bool, part: str) -> None:
    @rule(lambda x: torch.sin(x), x=condition)
    def note(x: Value) -> Any:
        return "seen"

    graph = fxopt.capture(Function(lambda x: x.sin()).eval(), (X,))
    explanation = str(fxopt.explain(note, graph))
    assert ("seen" in explanation) is good, explanation
    if not good:
        import re

        assert re.search(part, explanation)


def test_a_condition_may_be_a_value() -> None:
    permuted = lambda x, d: x.permute(d)  # noqa: E731
    both = lambda x: (x.permute(2, 0, 1), x.permute(1, 0, 2))  # noqa: E731
    assert len(seen(permuted, both, d=[2, 0, 1])) == 1
    softmax = lambda x, d: torch.softmax(x, d)  # noqa: E731
    assert len(seen(softmax, lambda x: (x.softmax(0), x.softmax(1), x.softmax(2)), d={0, 2})) == 2


def test_a_condition_that_no_symbol_has_or_that_computes_is_an_error() -> None:
    with pytest.raises(OptionError, match="asks for 'w'"):
        rule(lambda x: torch.sin(x), w=conditions.constant)(lambda x: x)

    @rule(lambda x: torch.sin(x), x=lambda x: x + 1)
    def computes(x: Value) -> Any:
        return x

    with pytest.raises(OptionError, match="A condition only asks"):
        applied(lambda x: x.sin(), computes)


def test_an_error_names_the_rule_and_the_node() -> None:
    @rule(lambda x: torch.sin(x))
    def broken(x: Value) -> Any:
        return x.shape[7]

    with pytest.raises(RuleError, match=r"broken \(.*test_patterns.py:\d+\) failed at sin .*Index"):
        applied(lambda x: x.sin(), broken)

    @rule(lambda x: torch.sin(x), x=lambda x: 1 / 0)
    def asks(x: Value) -> Any:
        return x

    with pytest.raises(RuleError, match="A condition of the rule asks"):
        applied(lambda x: x.sin(), asks)


# -- several outputs -------------------------------------------------------------------------------


@rule(
    lambda x, w, v: (F.linear(x, w), F.linear(x, v)),
    w=conditions.constant, v=conditions.constant,
)  # fmt: skip
def merge_linears(x: Value, w: Value, v: Value) -> Any:
    """x·Wᵀ, x·Vᵀ = split(x·[W; V]ᵀ)"""
    both = new_constant(lambda *parts: torch.cat(parts), w, v, name="both")
    parts = F.linear(x, both).split_with_sizes([w.shape[0], v.shape[0]], -1)
    return parts[0], parts[1]


def test_several_outputs_are_replaced_together() -> None:
    graph, result = applied(
        lambda x, w, v: F.linear(x, w).relu() @ F.linear(x, v).mT, merge_linears,
        w=torch.randn(5, 4), v=torch.randn(5, 4),
    )  # fmt: skip
    assert result.rewrites == 1
    assert op_counts(graph)["linear"] == 1


def test_one_output_that_needs_the_other_holds_the_rule_back() -> None:
    @rule(lambda x, y: (torch.sin(x), torch.cos(x) + y))
    def both(x: Value, y: Value) -> Any:
        return torch.sin(x), y + torch.cos(x)

    _, result = applied(lambda x: x.cos() + x.sin().exp(), both)
    assert "depends on another" in result.misses[0].reason


def test_inputs_that_come_late_are_moved() -> None:
    @rule(lambda x, y: (torch.sin(x), torch.cos(x) + y))
    def both(x: Value, y: Value) -> Any:
        return torch.sin(x), torch.cos(x) - torch.neg(y)

    graph, result = applied(lambda x: (x.sin().relu(), x.cos() + x.exp().log()), both)
    assert result.rewrites == 1
    assert op_counts(graph)["neg"] == 1


def test_a_rule_that_holds_back_moves_nothing() -> None:
    @rule(lambda x, y: (torch.sin(x), torch.cos(x) + y))
    def both(x: Value, y: Value) -> Any:
        return "no"

    graph = fxopt.capture(
        Function(lambda x: (x.sin().relu(), x.cos() + x.exp().log())).eval(), (X,)
    )
    before = str(graph)
    assert not apply_rules(graph, [both]).modified
    assert str(graph) == before


def test_outputs_need_as_many_values() -> None:
    @rule(lambda x: (torch.sin(x), torch.cos(x)))
    def one(x: Value) -> Any:
        return torch.sin(x)

    with pytest.raises(OptionError, match="must return 2 values"):
        applied(lambda x: x.sin() + x.cos(), one)


def test_thousands_of_users_cost_no_square() -> None:
    def wide(x: Any) -> Any:
        return torch.stack([torch.cos(x).exp(), *(torch.sin(x) * i for i in range(300))])

    @rule(lambda x, a, b: (x * a, torch.cos(x) * b))
    def never(x: Value) -> Any:
        return None

    _, result = applied(wide, never)
    assert result.rules["never"].tried == 300


# -- families and sets -----------------------------------------------------------------------------


def test_a_family_is_a_set_of_rules() -> None:
    @rule(lambda x, f: f(f(x)), family={"f": (torch.relu, torch.abs, torch.floor)})
    def merge_repeated(x: Value, f: Any) -> Any:
        """f(f(x)) = f(x)"""
        return f(x)

    assert isinstance(merge_repeated, RuleSet)
    assert [one.name for one in merge_repeated] == [
        "merge_repeated[relu]", "merge_repeated[abs]", "merge_repeated[floor]",
    ]  # fmt: skip
    graph, result = applied(lambda x: x.abs().abs().relu().relu().floor(), merge_repeated)
    assert op_counts(graph) == {"abs": 1, "floor": 1, "relu": 1}
    assert result.rules["merge_repeated[abs]"].rewritten == 1


@rule(lambda x: torch.sin(torch.sin(x)))
def sin_sin(x: Value) -> str:
    return "no"


@rule(lambda x: torch.relu(torch.relu(x)))
def relu_relu(x: Value) -> Any:
    """relu(relu(x)) = relu(x)"""
    return x.relu()


def test_sets_add_up() -> None:
    both = RuleSet(sin_sin, name="mine") + relu_relu
    assert [one.name for one in both] == ["sin_sin", "relu_relu"] and both.name == "mine"
    assert len(both + both) == 2
    assert len(sin_sin + relu_relu) == 2
    assert [one.name for one in both.without("sin_sin")] == ["relu_relu"]
    with pytest.raises(OptionError, match="no rule 'nothing'"):
        both.without("nothing")
    with pytest.raises(OptionError, match="not a rule"):
        RuleSet(len)

    def sin_sin_again() -> Rule:
        @rule(lambda x: torch.sin(x))
        def sin_sin(x: Value) -> Any:
            return x

        return sin_sin

    with pytest.raises(OptionError, match="Two rules are called 'sin_sin'"):
        RuleSet(sin_sin, sin_sin_again())


def test_a_rule_is_a_pass() -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.ReLU())
    compiled = fxopt.compile(model, X, passes=[relu_relu, *fxopt.default_passes()])
    assert compiled.story.steps[0].name == "relu_relu"
    assert compiled.story.steps[0].rewrites == 1
    compiled = fxopt.compile(model, X, passes=[sin_sin + relu_relu])
    assert compiled.story.steps[0].rules["relu_relu"].rewritten == 1
    assert compiled.story.steps[0].rules["relu_relu"].seconds > 0


def test_a_parameter_with_a_default_is_no_symbol() -> None:
    for function in (torch.relu, torch.abs):
        found = seen(lambda x, f=function: f(f(x)), lambda x: (x.relu().relu(), x.abs().abs()))
        assert found == [{"x": "args_0"}]


# -- expressions and texts -------------------------------------------------------------------------


def test_a_pattern_may_be_an_expression() -> None:
    x, y = symbols("x y")
    assert seen(torch.relu(x + 1) * y, lambda x: (x + 1).relu() * 5) == [{"x": "args_0", "y": 5}]
    with pytest.raises(OptionError, match="write names"):
        symbols("1x")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (lambda q, k, s: torch.softmax((q @ k) * s, -1), "softmax(((q @ k) · s), -1)"),
        (lambda x, w: F.linear(x, w, ...), "linear(x, w, …)"),
        (lambda x: any_of(x.sin(), x.cos()).neg(), "neg((sin(x) | cos(x)))"),
        (lambda p, d: torch.cat(each(lambda p: torch.relu(p)), d), "cat([relu(p), …], d)"),
        (lambda x, r: torch.cat([x, *r], 0), "cat([x, *r], 0)"),
        (lambda x: repeated(lambda y: y.neg(), x).sin(), "sin((neg(y))* around x)"),
        (lambda x: x * near(1.702, 1e-3), "(x · ≈1.702)"),
    ],
)
def test_patterns_have_texts(pattern: Callable[..., Any], text: str) -> None:
    assert pattern_text(record(pattern)) == text


# -- what must not be taken for something else ----------------------------------------------------


def test_a_number_is_not_its_neighbour_in_half_precision() -> None:
    pattern = lambda x: x * 1.0  # noqa: E731
    for dtype, near_one in ((torch.bfloat16, 0.9961), (torch.float16, 0.9995)):
        c = torch.tensor(near_one, dtype=dtype)
        assert seen(pattern, lambda x, c=c: x * c, X.to(dtype)) == []
    third = torch.tensor(1 / 3, dtype=torch.bfloat16)
    assert len(seen(lambda x: x * (1 / 3), lambda x: x * third, X.bfloat16())) == 1


def test_an_operator_with_arguments_that_are_not_written_does_not_match() -> None:
    add = lambda x, y, f: f(torch.relu(x), y)  # noqa: E731
    some = {torch.add, torch.sub}
    assert len(seen(add, lambda x, y: torch.add(x.relu(), y), X, Y, f=some)) == 1
    assert seen(add, lambda x, y: torch.add(x.relu(), y, alpha=2), X, Y, f=some) == []
    gelu = lambda x, f: f(torch.relu(x))  # noqa: E731
    assert seen(gelu, lambda x: F.gelu(x.relu(), approximate="tanh"), f={F.gelu}) == []
    assert len(seen(gelu, lambda x: F.gelu(x.relu()), f={F.gelu})) == 1
    rest = lambda x, f: f(torch.relu(x), ...)  # noqa: E731
    assert len(seen(rest, lambda x: F.gelu(x.relu(), approximate="tanh"), f={F.gelu})) == 1


def test_an_output_may_not_be_an_input_of_another() -> None:
    @rule(lambda x, y: (x * 2.0, y * 3.0 + x))
    def two(x: Value, y: Value) -> Any:
        return x + x, y * 3.0 + x * 1.0

    def function(x: Any) -> Any:
        a = x * 2.0
        return a * 3.0 + x, a + 1

    _, result = applied(function, two)
    assert "depends on another" in result.misses[0].reason


def test_a_rule_that_builds_more_and_more_of_itself_is_stopped() -> None:
    @rule(lambda x: torch.relu(x))
    def grows(x: Value) -> Any:
        y = torch.relu(x * 1.5)
        for i in range(3):
            y = y + torch.relu(x * i)
        return y

    graph = fxopt.capture(Function(lambda x: x.relu()).eval(), (X,))
    with pytest.raises(fxopt.FxoptError, match="come to no end"):
        apply_rules(graph, [grows])


def test_growth_is_noticed_long_before_the_graph_is_large() -> None:
    calls = []

    @rule(lambda x: torch.relu(x))
    def grows(x: Value) -> Any:
        calls.append(x)
        return torch.relu(x.exp())

    graph = fxopt.capture(Function(_many_relus).eval(), (X,))
    with pytest.raises(fxopt.FxoptError, match=r"come to no end: grows \(\d+ times\)"):
        apply_rules(graph, [grows])
    assert len(calls) < 1200


def _many_relus(x: Any) -> Any:
    for _ in range(50):
        x = x.relu() + 1
    return x


def test_a_long_way_down_is_no_endless_growth() -> None:
    @rule(lambda x, n: torch.pow(x, n), n=lambda n: n > 1)
    def as_products(x: Value, n: int) -> Any:
        return x * torch.pow(x, n - 1)

    @rule(lambda x: torch.pow(x, 1))
    def itself(x: Value) -> Any:
        return x

    graph, _ = applied(lambda x: x.pow(300), as_products, itself)
    assert len(graph.graph.nodes) == 301


def test_each_node_of_a_long_chain_may_be_rewritten_several_times() -> None:
    forms = [torch.abs, torch.sin, torch.cos, torch.tan, torch.exp]
    steps = [
        rule(lambda x, f=f: f(x))(_named(f"to_{g.__name__}", lambda x, g=g: g(x) * 1.0))
        for f, g in itertools.pairwise(forms)
    ]

    @rule(lambda x: x * 1.0)
    def drop(x: Value) -> Any:
        return x

    graph = fxopt.capture(Function(lambda x: x.abs()).eval(), (X,))
    at = next(n for n in graph.graph.nodes if n.target is aten.abs.default)
    for _ in range(499):
        with graph.graph.inserting_after(at):
            more = graph.graph.call_function(at.target, (at,))
        more.meta = dict(at.meta)
        at.replace_all_uses_with(more, delete_user_cb=lambda user, more=more: user is not more)
        at = more
    result = apply_rules(graph, [*steps, drop])
    assert result.rewrites == 4_000


def _named(name: str, function: Any) -> Any:
    function.__name__ = name
    return function
