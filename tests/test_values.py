"""What a rule gets: values to ask and to compute with, constants to read, and what is left over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt import dialect
from fxopt.conditions import constant
from fxopt.errors import FxoptError, OptionError, RuleError
from fxopt.rules import Rule, Value, apply_rules, new_constant, rule
from fxopt.testing import op_counts, relative_error

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Function(torch.nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Layer(torch.nn.Module):
    """A linear layer and a relu."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4, 4), weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.linear(x, self.weight))


# -- computing with values -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, 1:],
        lambda x: x[0],
        lambda x: x[-1, 1],
        lambda x: x[..., 0],
        lambda x: x[..., 1:, 0],
        lambda x: x[None],
        lambda x: x[:, None, 1],
        lambda x: x[..., None, ::2],
        lambda x: x[1, ..., None],
        lambda x: x[:],
        lambda x: x.max(1).values,
        lambda x: x.max(1).indices.float(),
        lambda x: x.topk(2)[0],
        lambda x: sum(x.chunk(2, -1)),
        lambda x: (lambda a, b: a * b)(*x.split([2, 2], -1)),
        lambda x: torch.stack(list(x)),
        lambda x: torch.where(x == x.relu(), x, 0.0),
        lambda x: (x != 0.5).to(x.dtype),
        lambda x: torch.where((x > 0) ^ (x < 1), x, 0.0),
        lambda x: x.double().float() + x.half().type_as(x),
        lambda x: x.to(torch.float64).to(x),
        lambda x: x.long().bool().int(),
        lambda x: x.norm(dim=1) + x.norm(),
        lambda x: F.adaptive_max_pool1d(x, 2) + F.max_pool1d(x, 2),
        lambda x: F.batch_norm(x, None, None, training=True),
        lambda x: F.instance_norm(x),
        lambda x: F.embedding(x.long().clamp(0, 1), x[0, :2]),
    ],
)  # fmt: skip
def test_a_rule_computes_as_with_tensors(part: Callable[[Any], Any]) -> None:
    graph = fxopt.capture(Function(lambda x: torch.sin(x)).eval(), (X,))
    seen: list[Any] = []

    @rule(lambda x: torch.sin(x))
    def spelled(x: Value) -> str:
        seen.append(part(x).fake)
        return "of the test"

    assert apply_rules(graph, [spelled]).rewrites == 0
    expected = part(X)
    assert (tuple(seen[0].shape), seen[0].dtype) == (tuple(expected.shape), expected.dtype)

    @rule(lambda x: torch.sin(x))
    def built(x: Value) -> Any:
        return x.cos() * 0 + part(x).double().flatten()[0].float()

    assert apply_rules(graph, [built]).rewrites == 1
    dialect.check(graph)
    with torch.no_grad():
        assert relative_error(graph(X), expected.float().flatten()[0].expand_as(X)) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        (lambda x: x if x > 0 else None, "neither true nor false"),
        (lambda x: x if x == x else None, "neither true nor false"),
        (lambda x: x[x > 0], "an index is a number"),
        (lambda x: x[torch.tensor([0])], "an index is a number"),
        (lambda x: x + torch.ones(4), "becomes a constant by new_constant"),
        (lambda x: F.grid_sample(x, x), "not one ATen operator"),
        (lambda x: new_constant(torch.sin, x), "args_0 is not a constant"),
    ],
)
def test_an_error_names_the_rule_and_the_node(wrong: Callable[[Value], Any], part: str) -> None:
    @rule(lambda x: torch.sin(x))
    def mistaken(x: Value) -> Any:
        return wrong(x)

    graph = fxopt.capture(Function(lambda x: torch.sin(x)).eval(), (X,))
    with pytest.raises(OptionError) as caught:
        apply_rules(graph, [mistaken])
    assert part in str(caught.value)
    assert "rule mistaken (" in str(caught.value) and "failed at sin (" in str(caught.value)


def test_an_error_in_a_condition_names_the_rule_and_the_node() -> None:
    @rule(lambda x: torch.sin(x), x=lambda x: x > 0)
    def mistaken(x: Value) -> Any:
        return x

    graph = fxopt.capture(Function(lambda x: torch.sin(x)).eval(), (X,))
    with pytest.raises(OptionError, match=r"condition of the rule mistaken .* at sin .*asks"):
        apply_rules(graph, [mistaken])


def test_a_value_answers_as_a_tensor_does() -> None:
    @rule(lambda x: torch.sin(x))
    def asking(x: Value) -> str:
        assert (x.size(), x.size(1), x.dim(), x.numel()) == ((2, 3, 4), 3, 3, 24)
        assert x.device == torch.device("cpu") and x.is_floating_point() and not x.is_complex()
        assert x in {x} and x.relu() not in {x}
        return f"{x!r}"

    graph = fxopt.capture(Function(lambda x: torch.sin(x)).eval(), (X,))
    assert apply_rules(graph, [asking]).misses[0].reason == "asking: <value of args_0>"


# -- reading constants -----------------------------------------------------------------------------


@rule(lambda x, w: F.relu(F.linear(x, w)), w=constant)
def normalise(x: Value, w: Value) -> Any:
    """relu(x·Wᵀ) = max(x·(W/s)ᵀ·s, 0), with a number s that stays when W changes"""
    largest = float(w.tensor.abs().max())
    return (F.linear(x, new_constant(lambda w: w / largest, w)) * largest).clamp(min=0)


@rule(lambda x, w: F.relu(F.linear(x, w)), w=lambda w: w.is_constant and float(w.tensor.min()) > 0)
def when_positive(x: Value, w: Value) -> Any:
    """A condition that new weights may not meet."""
    return F.linear(x, w).clamp(min=0)


@pytest.mark.parametrize("one", [normalise, when_positive])
def test_a_weight_that_a_rule_has_looked_at_is_not_replaced(one: Rule, tmp_path: Any) -> None:
    compiled = fxopt.compile(Layer(1.0), X, passes=[one])
    assert compiled.story is not None and compiled.story.steps[0].rewrites == 1
    compiled.update(Layer(1.0).state_dict())
    with pytest.raises(OptionError, match=f"{one.name} has looked at the numbers of 'weight'"):
        compiled.update(Layer(2.0).state_dict())
    assert relative_error(compiled(X), Layer(1.0)(X)) < 1e-6
    compiled.save(tmp_path / "model.fxopt")
    loaded = fxopt.load(tmp_path / "model.fxopt")
    with pytest.raises(FxoptError):
        loaded.update(Layer(2.0).state_dict())


def test_what_new_constant_computes_is_not_looked_at() -> None:
    @rule(lambda x, w: F.relu(F.linear(x, w)), w=constant)
    def doubled(x: Value, w: Value) -> Any:
        return (F.linear(x, new_constant(lambda w: w * 2, w)) / 2).clamp(min=0)

    compiled = fxopt.compile(Layer(1.0), X, passes=[doubled])
    compiled.update(Layer(2.0).state_dict())
    assert relative_error(compiled(X), Layer(2.0)(X)) < 1e-6


def test_a_fixed_constant_may_be_looked_at() -> None:
    @rule(lambda x, w: torch.sin(x * w), w=constant)
    def read(x: Value, w: Value) -> Any:
        return torch.cos(x * float(w.tensor) - torch.pi / 2)

    model = Function(lambda x: torch.sin(x * torch.tensor(0.5))).eval()
    graph = fxopt.optimize(model, X, passes=["fold-constants"])
    assert apply_rules(graph, [read]).rewrites == 1
    assert relative_error(graph(X), model(X)) < 1e-6
    assert graph.info.looked_at == {}


def test_a_weight_that_a_rule_only_held_back_for_is_free() -> None:
    @rule(lambda x, w: F.relu(F.linear(x, w)), w=constant)
    def reading(x: Value, w: Value) -> Any:
        return f"{float(w.tensor.max())}"

    graph = fxopt.capture(Layer().eval(), (X,))
    assert apply_rules(graph, [reading]).misses[0].reason == "reading: 1.0"
    assert graph.info.looked_at == {}


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.tensor.mul_(2),
        lambda w: w.tensor.fill_(1),
        lambda w: new_constant(lambda w: w.mul_(2), w),
    ],
)
def test_a_rule_that_writes_to_a_weight_is_named(write: Callable[[Value], Any]) -> None:
    @rule(lambda x, w: F.relu(F.linear(x, w)), w=constant)
    def writing(x: Value, w: Value) -> Any:
        write(w)
        return F.linear(x, w).clamp(min=0)

    graph = fxopt.capture(Layer().eval(), (X,))
    with pytest.raises(RuleError, match=r"rule writing \(.* at relu.* the model's own"):
        apply_rules(graph, [writing])


def test_a_condition_that_writes_to_a_weight_is_named() -> None:
    @rule(lambda x, w: F.relu(F.linear(x, w)), w=lambda w: float(w.tensor.zero_().sum()) > 0)
    def writing(x: Value, w: Value) -> Any:
        return F.linear(x, w)

    graph = fxopt.capture(Layer().eval(), (X,))
    with pytest.raises(RuleError, match=r"The rule writing .* wrote to 'weight'"):
        apply_rules(graph, [writing])


# -- what is not needed ----------------------------------------------------------------------------


@pytest.mark.parametrize("holds_back", [False, True])
def test_what_a_rule_builds_in_vain_goes(holds_back: bool) -> None:
    @rule(lambda x, w: F.relu(F.linear(x, w)), w=constant)
    def wasteful(x: Value, w: Value) -> Any:
        F.linear(x.sin(), new_constant(lambda w: w * 2, w)).cos()
        new_constant(lambda w: w * 3, w, name="three")
        return "of the test" if holds_back else F.linear(x, w).clamp(min=0)

    graph = fxopt.capture(Layer().eval(), (X,))
    result = apply_rules(graph, [wasteful])
    assert result.rewrites == 1 - holds_back
    assert op_counts(graph) == {"linear": 1, "relu" if holds_back else "clamp": 1}
    assert list(graph.constants()) == ["weight"] and graph.info.recipes == []
    dialect.check(graph)
