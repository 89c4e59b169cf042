"""remove-no-ops: what goes, what stays and why, and that no bit changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt import dialect
from fxopt.capture import capture
from fxopt.contract import PassResult
from fxopt.explain import explain
from fxopt.graph_module import GraphModule
from fxopt.passes.remove_no_ops import RULES, RemoveNoOps
from fxopt.testing import check_pass, op_counts, relative_error
from fxopt.text import graph_text
from tests.models import Function

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -3e38, 2.5])


def run(
    function: Callable[[Any], Any], x: torch.Tensor, **options: Any
) -> tuple[GraphModule, PassResult]:
    """Run the pass on the function as it is, without doubling, and check dialect and numbers."""
    graph = capture(Function(function).eval(), x, **options)
    result = RemoveNoOps().run(graph)
    dialect.check(graph)
    assert relative_error(graph(x), function(x)) == 0
    return graph, result


# What goes, by rule; each is followed by an operator, so that no output becomes an input.
GOES: list[tuple[str, Callable[[Any], Any], torch.Tensor]] = [
    ("remove_dropout", lambda x: F.dropout(x, 0.5, False), X),
    ("remove_dropout", lambda x: F.dropout2d(x, 0.5, False), IMAGE),
    ("remove_dropout", lambda x: F.alpha_dropout(x, 0.5, False), X),
    ("remove_dropout", lambda x: F.feature_alpha_dropout(x, 0.5, False), IMAGE),
    ("remove_copy", lambda x: x.clone(), X),
    ("remove_copy", lambda x: x.transpose(0, 1).contiguous(), X),
    ("remove_copy", lambda x: torch.clone(x, memory_format=torch.contiguous_format), X),
    ("remove_cast", lambda x: x.to(x.dtype), X),
    ("remove_cast", lambda x: x.to("cpu"), X),
    ("remove_cast", lambda x: x.type_as(x), X),
    ("remove_cast", lambda x: aten.alias(x), X),
    ("remove_cast", lambda x: +x, X),
    ("remove_detach", lambda x: (x > 0).detach() * x, X),
    ("remove_detach", lambda x: torch.ones(4).detach() + x, X),
    ("remove_reshape", lambda x: x.reshape(2, -1, 4), X),
    ("remove_reshape", lambda x: x.view(x.shape), X),
    ("remove_reshape", lambda x: x.expand(2, -1, 4), X),
    ("remove_reshape", lambda x: x.flatten(2), X),
    ("remove_reshape", lambda x: x.unflatten(1, (3,)), X),
    ("remove_reshape", lambda x: x.expand_as(x), X),
    ("remove_reshape", lambda x: aten.view_as(x, x), X),
    ("remove_reshape", lambda x: aten.reshape_as(x, x), X),
    ("remove_reshape", lambda x: x.repeat(1, 1, 1), X),
    ("remove_reshape", lambda x: aten.tile(x, [1, 1]), X),
    ("remove_reshape", lambda x: aten.slice(x, 1, 0, 9223372036854775807), X),
    ("remove_reshape", lambda x: aten.slice(x, 1, 0, 3), X),
    ("remove_reshape", lambda x: aten.atleast_2d(x), X),
    ("remove_reshape", lambda x: F.adaptive_avg_pool1d(x, 4), X),
    ("remove_reshape", lambda x: F.adaptive_avg_pool2d(x, (None, 4)), IMAGE),
    ("remove_reshape", lambda x: F.adaptive_avg_pool3d(x, (3, 4, 4)), IMAGE),
    ("remove_pad", lambda x: F.pad(x, (0, 0, 0, 0)), X),
    ("remove_pad", lambda x: F.pad(x, (0, 0), value=1.0), X),
    ("remove_roll", lambda x: torch.roll(x, (0, 0), (0, 2)), X),
    ("remove_flip", lambda x: torch.flip(x, ()), X),
    ("remove_flip", lambda x: torch.flip(x[:, :1], (1,)), X),
    ("remove_permute", lambda x: x.permute(0, 1, 2), X),
    ("merge_permutes", lambda x: x.permute(1, 2, 0).permute(2, 0, 1), X),
    ("merge_permutes", lambda x: x.mT.mT, X),
    ("remove_upsample", lambda x: F.interpolate(x, size=(4, 4)), IMAGE),
    ("remove_upsample", lambda x: F.interpolate(x, scale_factor=1), IMAGE),
    ("remove_upsample", lambda x: F.interpolate(x, size=4), X),
    ("remove_upsample", lambda x: F.interpolate(x, size=(2, 3, 4)), X[None, None]),
    ("remove_upsample", lambda x: F.interpolate(x, size=4, mode="nearest-exact"), IMAGE),
    ("remove_upsample", lambda x: F.interpolate(x, size=4, mode="nearest-exact"), X),
    ("remove_zero", lambda x: x + 0, X),
    ("remove_zero", lambda x: 0.0 + x, X),
    ("remove_zero", lambda x: torch.add(x, 0, alpha=3), X),
    ("remove_zero", lambda x: x - 0, X),
    ("remove_zero", lambda x: x + torch.zeros(4), X),
    ("remove_zero", lambda x: x - torch.zeros_like(x), X),
    ("remove_one", lambda x: x * 1, X),
    ("remove_one", lambda x: 1.0 * x, X),
    ("remove_one", lambda x: x / 1, X),
    ("remove_one", lambda x: x**1, X),
    ("remove_one", lambda x: x * torch.ones(3, 1), X),
    ("remove_one", lambda x: x / torch.full((), 1.0), X),
    ("remove_single_cat", lambda x: torch.cat([x]), X),
    ("remove_single_split", lambda x: x.split(4, 1)[0], X),
    ("remove_single_split", lambda x: x.split([3], 1)[0], X),
    ("remove_single_split", lambda x: x.chunk(1, 1)[0], X),
    ("remove_split_of_cat", lambda x: torch.cat([x, x.sin()], 1).split([3, 3], 1)[1], X),
    ("remove_unbind_of_stack", lambda x: torch.stack([x, x.sin()], 1).unbind(1)[1], X),
    ("remove_cat_of_split", lambda x: torch.cat(x.split([1, 2], 1), 1), X),
    ("remove_cat_of_split", lambda x: torch.cat(x.chunk(2, 2), -1), X),
    ("remove_cat_of_split", lambda x: torch.stack(x.unbind(1), 1), X),
]
ELSE_NEEDED = {"sin": 1, "cos": 1, "permute": 1, "slice": 1, "full": 1, "gt": 1, "add": 1, "mul": 1}


@pytest.mark.parametrize(("rule", "function", "x"), GOES)
def test_no_ops_go(rule: str, function: Callable[[Any], Any], x: torch.Tensor) -> None:
    graph, result = check_pass(RemoveNoOps(), Function(lambda x: function(x).cos()), x, misses=[])
    assert result.rules[rule].rewritten > 0
    left = op_counts(graph)
    assert left.pop("cos") == 1 and len(left) <= 2, graph_text(graph)
    assert all(op in ELSE_NEEDED and count == 1 for op, count in left.items()), graph_text(graph)


def test_every_rule_has_a_test() -> None:
    others = {"remove_single_stack", "keep_smooth_upsample"}
    assert {name for name, _, _ in GOES} | others == {one.name for one in RULES}


@pytest.mark.parametrize(
    ("upsample", "x", "reason"),
    [
        (lambda x: F.interpolate(x, scale_factor=1.1), IMAGE, "may read other pixels"),
        (lambda x: F.interpolate(x, scale_factor=2), IMAGE, None),
        (lambda x: F.interpolate(x, size=(5, 4)), IMAGE, None),
        (lambda x: F.interpolate(x, size=4, mode="linear"), X, "beside an infinite pixel"),
        (lambda x: F.interpolate(x, size=4, mode="bilinear"), IMAGE, "beside an infinite pixel"),
        (lambda x: F.interpolate(x, size=4, mode="bicubic"), IMAGE, "beside an infinite pixel"),
        (lambda x: F.interpolate(x, size=(8, 8), mode="bilinear"), IMAGE, None),
    ],
)
def test_upsampling_that_does_more_stays(
    upsample: Callable[[Any], Any], x: torch.Tensor, reason: str | None
) -> None:
    wanted = [] if reason is None else [reason]
    check_pass(RemoveNoOps(), Function(upsample), x, rewrites=0, misses=wanted)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_smooth_upsampling_to_the_same_size_is_no_identity(mode: str) -> None:
    x = torch.zeros(1, 1, 3, 3)
    x[0, 0, 1, 1] = float("inf")
    assert F.interpolate(x, size=3, mode=mode).isnan().any()


def test_neither_pools_nor_upsamples_are_merged_with_what_follows() -> None:
    """A convolution of repeated pixels is none of the pixels, and a pool of a pool is another."""

    def model(x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(F.interpolate(x, scale_factor=2), x.new_ones(1, 3, 3, 3), padding=1)
        x = F.max_pool2d(F.max_pool2d(x, 2), 2)
        return F.interpolate(F.interpolate(F.avg_pool2d(x, 1, 1), scale_factor=2), scale_factor=2)

    from fxopt.compile import optimize

    graph = optimize(Function(model), IMAGE)
    counts = op_counts(graph)
    assert counts["upsample_nearest2d"] == 3 and counts["max_pool2d"] == 2
    assert counts["conv2d"] == 1


def test_permutes_compose() -> None:
    graph, _ = check_pass(
        RemoveNoOps(), Function(lambda x: x.permute(1, 2, 0).transpose(0, 1).mT), X,
        before={"permute": 3}, after={"permute": 1}, misses=[],
    )  # fmt: skip
    assert graph.find(aten.permute.default)[0].args[1] == [2, 0, 1]


def test_a_stack_of_one_is_a_view() -> None:
    check_pass(
        RemoveNoOps(), Function(lambda x: torch.stack([x], -1) + 1), X,
        before={"stack": 1}, after={"stack": 0, "unsqueeze": 1}, misses=[],
    )  # fmt: skip


def test_what_undoes_each_other_only_behind_another_no_op_goes() -> None:
    def function(x: torch.Tensor) -> Any:
        y = F.dropout(x.transpose(1, 2), 0.1, False).clone() * 1
        return (y.transpose(1, 2) + 0).relu()

    check_pass(RemoveNoOps(), Function(function), X, after={"relu": 1, "permute": 0}, misses=[])


def test_a_model_of_modules() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Dropout2d(), torch.nn.Identity(), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Dropout(),
        torch.nn.Linear(16, 2),
    )  # fmt: skip
    check_pass(
        RemoveNoOps(), model, IMAGE, misses=[], rewrites=3,
        before={"dropout": 1, "feature_dropout": 1, "adaptive_avg_pool2d": 1},
        after={"dropout": 0, "feature_dropout": 0, "adaptive_avg_pool2d": 0, "conv2d": 1},
    )  # fmt: skip


# -- what stays ------------------------------------------------------------------------------------

STAYS: list[tuple[Callable[[Any], Any], torch.Tensor, list[str]]] = [
    (lambda x: F.dropout(x, 0.0, True).cos(), X, []),
    (lambda x: x.contiguous(memory_format=torch.channels_last).cos(), IMAGE, ["memory layout"]),
    (lambda x: x.clone(memory_format=torch.channels_last).cos(), IMAGE, ["memory layout"]),
    (lambda x: x.sin().detach() * x, X, ["it stops the gradient of sin"]),
    (lambda x: torch.polar(x, x).detach().abs() * x, X, ["it stops the gradient of polar"]),
    (lambda x: x.float().cos(), X.double(), []),
    (lambda x: x.reshape(2, 4, 3).cos(), X, []),
    (lambda x: x.unsqueeze(0).expand(2, -1, -1, -1).cos(), X, []),
    (lambda x: x[:, 1:].cos(), X, []),
    (lambda x: x.repeat(1, 2, 1).cos(), X, []),
    (lambda x: F.adaptive_avg_pool2d(x, (4, 2)).cos(), IMAGE, []),
    (lambda x: F.pad(x, (1, -1)).cos(), X, []),
    (lambda x: F.pad(x, (0, 0, 1, 1)).cos(), X, []),
    (lambda x: torch.roll(x, (0, 1), (0, 2)).cos(), X, []),
    (lambda x: torch.roll(x, 5).cos(), X, []),
    (lambda x: torch.flip(x, (1,)).cos(), X, []),
    (lambda x: x.permute(0, 1, 3, 2).cos(), IMAGE, []),
    (lambda x: (x + 1).cos(), X, []),
    (lambda x: (0 - x).cos(), X, []),
    (lambda x: (1**x).cos(), X, []),
    (lambda x: torch.div(x, 1, rounding_mode="floor").cos(), X, []),
    (lambda x: (x * True).cos(), X, []),
    (lambda x: (x + torch.zeros(5, 2, 3, 4)).cos(), X, ["the result would be"]),
    (lambda x: torch.cat(x.split([1, 2], 1)[::-1], 1).cos(), X, ["in their order"]),
    (lambda x: torch.cat(x.split([1, 1, 1], 1)[:2], 1).cos(), X, ["all parts"]),
    (lambda x: torch.cat(x.split([2, 2], 2), 1).cos(), X, ["another dimension"]),
    (lambda x: torch.stack(x.unbind(1), 0).cos(), X, ["another dimension"]),
    (lambda x: torch.cat(x.unbind(1), 1).cos(), X, []),
    (lambda x: torch.cat([x, x.sin()], 1).split([2, 4], 1)[1].cos(), X, ["not known to have"]),
    (lambda x: torch.cat([x.new_zeros(0), x], 1).split([1, 2], 1)[1].cos(), X, ["not known"]),
    (lambda x: torch.stack([x, x.sin()], 1).unbind(2)[1].cos(), X, []),
    (lambda x: torch.ones(4, dtype=x.dtype) * 3 + x, X, []),
    (lambda x: torch.zeros(4, dtype=x.dtype) + 3 + x, X, []),
    (lambda x: x.split([1, 2], 1)[0].cos(), X, []),
]


@pytest.mark.parametrize(("function", "x", "reasons"), STAYS)
def test_what_changes_something_stays(
    function: Callable[[Any], Any], x: torch.Tensor, reasons: list[str]
) -> None:
    check_pass(
        RemoveNoOps(), Function(function), x, rewrites=0, misses=reasons,
        double=x.dtype == torch.float32, add_noise=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("function", "x", "reason"),
    [
        (lambda x: (x * 1.0) + 1, torch.arange(3), "i64[3], and mul is f32[3]"),
        (lambda x: (x / 1) + 1, torch.arange(3), "i64[3], and div is f32[3]"),
        (lambda x: (x**1.0) + 1, torch.arange(3), "i64[3], and pow_1 is f32[3]"),
        (lambda x: (x + 0.0) + 1, torch.arange(3), "i64[3], and add is f32[3]"),
        (lambda x: (x + 0) + 1, torch.tensor([True, False]), "bool[2], and add is i64[2]"),
        (lambda x: (x * 1) + 1, torch.tensor([True, False]), "bool[2], and mul is i64[2]"),
        (lambda x: (x * torch.ones(3)).cos(), torch.ones(3).half(), "f16[3], and mul is f32[3]"),
        (lambda x: (x + torch.zeros(1)).cos(), torch.tensor(2.0), "f32[], and add is f32[1]"),
        (lambda x: (x * 1).cos(), torch.tensor([1 + 2j, 3j]), "complex infinities"),
        (lambda x: (x / 1).cos(), torch.tensor([1 + 2j, 3j]), "complex infinities"),
        (lambda x: x * 1 + 1, torch.arange(3), None),
        (lambda x: x + 0 + 1, torch.arange(3, dtype=torch.uint8), None),
        (lambda x: x**1 + 1, torch.arange(3, dtype=torch.int8), None),
        (lambda x: (x * torch.ones(())).cos(), torch.ones(3).half(), None),
        (lambda x: (x * 1.0).cos(), torch.tensor(2.0), None),
        (lambda x: (x * 1.0).cos(), torch.ones(3).bfloat16(), None),
        (lambda x: (x + 0).cos(), torch.tensor([1 + 2j, 3j]), None),
        (lambda x: (x * 1).cos(), torch.empty(0, 3), None),
        (lambda x: x.repeat(2, 1).cos(), torch.empty(0, 3), None),
    ],
)
def test_dtypes(function: Callable[[Any], Any], x: torch.Tensor, reason: str | None) -> None:
    _, result = run(function, x)
    assert result.rewrites == (reason is None)
    assert (
        [reason in miss.reason for miss in result.misses] == [True] if reason else not result.misses
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_bit_stays_but_the_sign_of_zero_plus_zero(dtype: torch.dtype) -> None:
    x = SPECIAL.to(dtype)
    neutral = [
        lambda x: x * 1,
        lambda x: x / 1,
        lambda x: x**1,
        lambda x: x - 0,
        lambda x: x * torch.ones(()),
        lambda x: F.dropout(x, 0.5, False),
        lambda x: torch.cat(x.split([3, 5])),
        lambda x: x.clone(),
    ]
    loses_sign = [lambda x: F.adaptive_avg_pool1d(x[None], 8)[0], lambda x: x + 0]

    def every(x: torch.Tensor) -> tuple[Any, ...]:
        return tuple(function(x).neg() for function in neutral + loses_sign)

    graph = capture(Function(every), x)
    assert RemoveNoOps().run(graph).rewrites >= len(neutral + loses_sign)
    assert op_counts(graph)["neg"] == len(neutral + loses_sign)
    for index, (found, expected) in enumerate(zip(graph(x), every(x), strict=True)):
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = found[~found.isnan()], expected[~found.isnan()]
        assert torch.equal(found, expected)
        assert torch.equal(found.signbit(), expected.signbit()) == (index < len(neutral))


def test_values_of_constants_are_not_looked_at() -> None:
    model = torch.nn.Module()
    model.register_buffer("one", torch.ones(4))
    model.weight = torch.nn.Parameter(torch.zeros(4))
    model.forward = lambda x: x * model.one + model.weight  # type: ignore[method-assign]
    graph = capture(model, X)
    assert not RemoveNoOps().run(graph).modified


# -- dynamic shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "rewrites"),
    [
        (lambda x: x.reshape(x.shape[0], 3, 4).cos(), 1),
        (lambda x: x.flatten(0, 0).expand(-1, 3, 4).cos(), None),
        (lambda x: x[: x.shape[0]].cos(), None),
        (lambda x: aten.slice(x, 0, 0, 9223372036854775807).cos(), 1),
        (lambda x: (x * torch.ones_like(x)).cos(), 1),
        (lambda x: (x + torch.zeros(x.shape[0], 3, 4)).cos(), 1),
        (lambda x: x.reshape(3, x.shape[0], 4).cos(), 0),
        (lambda x: x[1:].cos(), 0),
        (lambda x: x[: x.shape[0] - 1].cos(), 0),
        (lambda x: x.reshape(x.shape[0] * 3, 4).cos(), 0),
        (lambda x: x.expand(x.shape[0], 3, 4).cos(), 1),
        (lambda x: x.repeat(x.shape[0], 1, 1).cos(), 0),
    ],
)
def test_symbolic_sizes(function: Callable[[Any], Any], rewrites: int | None) -> None:
    graph = capture(Function(function), torch.randn(4, 3, 4), dynamic_shapes={0: "n"})
    result = RemoveNoOps().run(graph)
    dialect.check(graph)
    assert rewrites is None or result.rewrites == rewrites, graph_text(graph)
    for size in (4, 3, 5):
        x = torch.randn(size, 3, 4)
        assert relative_error(graph(x), function(x)) == 0


# -- memory and state ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(), lambda x: x * 1, lambda x: x + 0, lambda x: torch.cat([x]),
        lambda x: x.clone().mT, lambda x: x.mT.clone(), lambda x: x.mT.contiguous(),
        lambda x: torch.cat(x.split(1)), lambda x: torch.stack([x]), lambda x: x.repeat(1, 1, 1),
        lambda x: F.pad(x, (0, 0)), lambda x: torch.flip(x, ()), lambda x: x.clone().clone(),
        lambda x: F.adaptive_avg_pool1d(x, 4), lambda x: torch.cat([x, x.sin()]).split([2, 2])[0],
    ],
)  # fmt: skip
def test_an_output_never_becomes_the_callers_own_tensor(function: Callable[[Any], Any]) -> None:
    graph, result = run(function, X)
    assert any("the output would be x itself" in miss.reason for miss in result.misses)
    x = X.clone()
    graph(x).zero_()
    assert torch.equal(x, X)


def test_a_view_that_eager_returns_too_may_be_the_input() -> None:
    _, result = run(lambda x: F.dropout(x.reshape(2, 3, 4), 0.5, False), X)
    assert result.rewrites == 2


class Cache(torch.nn.Module):
    """Returns or uses what its state was before it changed it."""

    def __init__(self, use: Callable[[Any], Any]) -> None:
        super().__init__()
        self.use = use
        self.register_buffer("state", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> Any:
        before = self.use(self.state)
        self.state.add_(1)
        return before, x + before


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.clone(),
        lambda s: s[None].clone()[0],
        lambda s: s * 1,
        lambda s: s.view(2, 2).clone().view(4),
    ],
)
def test_state_that_is_overwritten_is_copied_before(use: Callable[[Any], Any]) -> None:
    model, x = Cache(use), torch.ones(4)
    graph = capture(model, x)
    result = RemoveNoOps().run(graph)
    dialect.check(graph)
    assert "the output would be state itself" in result.misses[0].reason
    for _ in range(3):
        assert relative_error(graph(x), model(x)) == 0


class Shift(torch.nn.Module):
    """Moves state into other state, then overwrites it; and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("new", torch.zeros(4))
        self.register_buffer("old", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> Any:
        kept, first = self.new.clone(), x * 1
        self.new.copy_(x * 2)
        self.old.copy_(kept)
        x.add_(1)
        return first + self.old


def test_state_moves_before_it_is_overwritten() -> None:
    model = Shift()
    graph = capture(model, torch.ones(4))
    result = RemoveNoOps().run(graph)
    dialect.check(graph)
    assert any("new is overwritten at the end" in miss.reason for miss in result.misses)
    for i in range(4):
        x, y = torch.full((4,), float(i)), torch.full((4,), float(i))
        assert relative_error((graph(x), x), (model(y), y)) == 0


# -- training --------------------------------------------------------------------------------------


class Stopped(torch.nn.Module):
    """A weight whose gradient is stopped on one of two ways."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4), requires_grad=not frozen)

    def forward(self, x: torch.Tensor) -> Any:
        return x * (self.weight * 2).detach() + self.weight


@pytest.mark.parametrize("frozen", [False, True])
def test_detach_goes_only_where_no_gradient_flows(frozen: bool) -> None:
    graph, result = check_pass(RemoveNoOps(), Stopped(frozen), X, after={"detach": int(not frozen)})
    assert bool(result.misses) == (not frozen)
    if not frozen:
        graph.zero_grad()
        graph(X.double()).sum().backward()
        assert torch.equal(graph.weight.grad, torch.full((4,), 6.0, dtype=torch.float64))


def test_a_removed_dropout_stays_away_in_training() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.9))
    graph, _ = check_pass(RemoveNoOps(), model, X, after={"dropout": 0})
    assert torch.equal(graph.train()(X.double()), graph.eval()(X.double()))


def test_reasons_can_be_asked_for() -> None:
    graph = capture(Function(lambda x: x * 1), X)
    one = next(rule for rule in RULES if rule.name == "remove_one")
    assert "the output would be x itself" in str(explain(one, graph))
