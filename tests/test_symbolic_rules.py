"""Rules on symbolic sizes: what they may ask, what they build from them, what stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxopt
from fxopt import dialect
from fxopt.contract import PassResult
from fxopt.graph_module import GraphModule
from fxopt.rules import Rule, Value, apply_rules, rule
from fxopt.testing import op_counts, relative_error

aten = torch.ops.aten
X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
OTHER_SIZES = (1, 2, 3, 5, 8)


class Function(torch.nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def known(graph: GraphModule) -> Any:
    """Return all that PyTorch has written down about the sizes of a graph."""
    env = graph.info.fake_mode.shape_env
    assert env is not None
    return (
        [str(guard.expr) for guard in env.guards], dict(env.replacements), dict(env.var_to_range),
        len(env.axioms), len(env.deferred_runtime_asserts), len(env.divisible),
    )  # fmt: skip


def applied(
    function: Callable[..., Any], one: Rule, inputs: tuple[torch.Tensor, ...] = (X,)
) -> tuple[GraphModule, PassResult]:
    """Apply a rule to a function of any batch size; check other sizes, and that none is decided."""
    sizes: Any = {"args": tuple({0: f"n{place}"} for place in range(len(inputs)))}
    graph = fxopt.capture(Function(function).eval(), inputs, dynamic_shapes=sizes)
    before = known(graph)
    result = apply_rules(graph, (one,))
    dialect.check(graph)
    assert known(graph) == before
    for size in OTHER_SIZES:
        others = tuple(x[:1].expand(size, *x.shape[1:]).clone() for x in inputs)
        with torch.no_grad():
            assert relative_error(graph(*others), function(*others)) < 1e-6
    return graph, result


# -- what a rule asks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "question"),
    [
        (lambda x: x.shape[0] < 5, "it asks whether n0 < 5, which depends on the size"),
        (lambda x: x.shape[0] == 4, "it asks whether n0 == 4"),
        (lambda x: x.shape[0] in (4, 8), "it asks whether n0 == 4"),
        (lambda x: x.size(0) % 2 == 0, "it asks whether Mod(n0, 2) == 0"),
        (lambda x: int(x.shape[0]), "it asks for the number n0"),
        (lambda x: list(range(x.shape[0])), "it asks for the number n0"),
        (lambda x: x.shape == (4, 3, 2), "it asks whether n0 == 4"),
        (lambda x: x.numel() > 20, "it asks whether 6*n0 > 20"),
        (lambda x: x.fake.shape[0] == 4, "it asks whether n0 == 4"),
    ],
)
def test_a_question_that_sizes_answer_differently_holds_the_rule_back(
    ask: Callable[[Value], Any], question: str
) -> None:
    @rule(lambda x: torch.flatten(x, 1))
    def wrong(x: Value) -> Any:
        return x.sum().expand(x.shape[0], 6) if ask(x) else x.reshape(-1, 6)

    _, result = applied(lambda x: torch.flatten(x, 1) + 1, wrong)
    assert result.rewrites == 0
    assert [question in miss.reason for miss in result.misses] == [True]


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.shape[1] == 3,
        lambda x: x.shape[0] == x.shape[0],
        lambda x: x.shape[0] >= 0,
        lambda x: x.shape == x.relu().shape,
        lambda x: x.numel() == x.shape[0] * 6,
        lambda x: x.ndim == 3 and x.size(-1) == 2,
    ],
)
def test_a_question_with_one_answer_is_answered(ask: Callable[[Value], Any]) -> None:
    @rule(lambda x: torch.flatten(x, 1))
    def right(x: Value) -> Any:
        return x.reshape(-1, 6) if ask(x) else "of the test"

    _, result = applied(lambda x: torch.flatten(x, 1) + 1, right)
    assert (result.rewrites, result.misses) == (1, ())


def test_a_condition_that_asks_for_a_symbolic_size_does_not_hold() -> None:
    @rule(lambda x: torch.flatten(x, 1), x=lambda x: x.shape[0] > 3)
    def small(x: Value) -> Any:
        return x.reshape(-1, 6)

    graph, result = applied(lambda x: torch.flatten(x, 1) + 1, small)
    assert result.rewrites == 0
    assert "and it asks whether n0 > 3, which depends" in str(fxopt.explain(small, graph))
    graph = fxopt.capture(Function(lambda x: torch.flatten(x, 1)).eval(), (X,))
    assert apply_rules(graph, (small,)).rewrites == 1


def test_a_condition_on_a_list_asks_no_symbolic_size_either() -> None:
    @rule(lambda x: torch.cat(x, 1), x=lambda x: x[0].shape[0] == 4)
    def first(x: list[Value]) -> Any:
        return x[0]

    _, result = applied(lambda x: torch.cat([x, x.relu()], 1), first)
    assert result.rewrites == 0


def test_an_operator_that_needs_certain_sizes_holds_the_rule_back() -> None:
    @rule(lambda x: torch.flatten(x, 1))
    def even(x: Value) -> Any:
        return x.reshape(12, -1).reshape(-1, 6)

    @rule(lambda x, y: torch.maximum(x, torch.neg(y)))
    def alike(x: Value, y: Value) -> Any:
        return aten.minimum(x.neg(), y).neg()

    _, result = applied(lambda x: torch.flatten(x, 1) + 1, even)
    assert result.rewrites == 0 and "it asks whether" in result.misses[0].reason
    _, result = applied(lambda x: torch.maximum(x, -x.sin()) + x.sum(0, keepdim=True), alike)
    assert result.rewrites == 1


def test_operators_may_tell_one_from_larger_sizes() -> None:
    @rule(lambda x: torch.flatten(x, 1))
    def broadcasting(x: Value) -> Any:
        return (x + x.sum(1, keepdim=True) - x.sum(1, keepdim=True)).reshape(-1, 6)

    _, result = applied(lambda x: torch.flatten(x, 1) + 1, broadcasting)
    assert result.rewrites == 1


# -- what a rule builds from sizes -----------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape([x.size(0), 6]),
        lambda x: x.reshape(x.shape[0], x.numel() // x.shape[0]),
        lambda x: x.reshape(-1, 6) + torch.zeros(x.shape[0], 6),
        lambda x: x.reshape(-1, 6) * torch.ones([x.shape[0], 6]),
        lambda x: x.reshape(-1, 6) + torch.full((x.shape[0], 1), 0.0),
        lambda x: x.reshape(-1, 6) + (torch.arange(x.shape[0]) * 0)[:, None],
        lambda x: x.reshape(-1, 6) + x.new_zeros(x.shape[0], 6),
        lambda x: x.reshape(-1, 6)[: x.shape[0]],
        lambda x: torch.cat([x, x]).reshape(x.shape[0] * 2, -1)[x.shape[0] :],
        lambda x: (x.reshape(-1, 6) * x.shape[0]) / x.shape[0],
        lambda x: x.reshape(-1, 6) + (x.sum() / x.numel() - x.mean()),
        lambda x: x.reshape(-1, 6) + 0 * (x.shape[0] ** 2 - 3),
    ],
)
def test_a_symbolic_size_becomes_nodes(build: Callable[[Value], Any]) -> None:
    @rule(lambda x: torch.flatten(x, 1))
    def built(x: Value) -> Any:
        return build(x)

    _, result = applied(lambda x: torch.flatten(x, 1) + 1, built)
    assert (result.rewrites, result.misses) == (1, ())


def test_a_size_that_the_graph_has_asked_for_is_used_again() -> None:
    @rule(lambda x: torch.flatten(x, 1))
    def built(x: Value) -> Any:
        return x.reshape(x.shape[0], x.shape[0] * 6 // x.shape[0])

    model = lambda x: torch.flatten(x.reshape(x.shape[0], 2, 3), 1) + 1  # noqa: E731
    graph, _ = applied(model, built)
    assert op_counts(graph)["sym_size"] == 1


def test_a_rule_with_a_size_does_not_keep_what_it_replaces() -> None:
    @rule(lambda x: torch.cat([x, x]))
    def doubled(x: Value) -> Any:
        return x.repeat(2, 1, 1).reshape(x.shape[0] * 2, 3, 2)

    graph, result = applied(lambda x: torch.cat([x, x]).relu(), doubled)
    assert result.rewrites == 1 and "cat" not in op_counts(graph)


def test_static_graphs_know_no_difference() -> None:
    @rule(lambda x: torch.flatten(x, 1))
    def four(x: Value) -> Any:
        return x.reshape(int(x.shape[0]), -1) if x.shape[0] == 4 else "not four"

    graph = fxopt.capture(Function(lambda x: torch.flatten(x, 1)).eval(), (X,))
    assert apply_rules(graph, (four,)).rewrites == 1
