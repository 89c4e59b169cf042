"""fuse-activations: every spelling fires, every guard holds, special values come out the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt import dialect
from fxopt.capture import capture
from fxopt.contract import PassResult
from fxopt.graph_module import GraphModule
from fxopt.passes.fuse_activations import RULES, FuseActivations
from fxopt.testing import check_pass, op_counts, relative_error
from fxopt.text import graph_text
from tests.models import Function

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)) * 3
INF, NAN = float("inf"), float("nan")
ROOT2, KAPPA = math.sqrt(2), math.sqrt(2 / math.pi)
SPECIAL = torch.tensor([
    NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45, 1e-20, -1e-20, 1e-8, -1e-8, 1e37, -1e37, 0.5, -0.5,
    1.0, -1.0, 2.5, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 100.0, -100.0, 1e13, -1e13,
])  # fmt: skip


def run(
    function: Callable[[Any], Any], x: torch.Tensor, **options: Any
) -> tuple[GraphModule, PassResult]:
    """Run the pass on the function as it is, without doubling, and check the dialect."""
    graph = capture(Function(function).eval(), x, **options)
    result = FuseActivations().run(graph)
    dialect.check(graph)
    return graph, result


def softly(x: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x - top)
    return e / e.sum(1, keepdim=True)


def gated(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


def bounded(x: torch.Tensor, high: float) -> torch.Tensor:
    return torch.clamp(x, min=0, max=high)


def tanh_of(x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(inner))


# Each rule, what it is given, and the one call that is left.
FIRES: list[tuple[str, Callable[[Any], Any], str]] = [
    ("fuse_gelu", lambda x: 0.5 * x * (1 + torch.erf(x / ROOT2)), "gelu"),
    ("fuse_gelu", lambda x: x * 0.5 * (1.0 + torch.erf(x / ROOT2)), "gelu"),
    ("fuse_gelu", lambda x: x / 2 * (torch.special.erf(x * math.sqrt(0.5)) + 1), "gelu"),
    ("fuse_gelu", lambda x: x.div(ROOT2).erf().add(1).mul(x).mul(0.5), "gelu"),
    ("fuse_gelu", lambda x: x * (1 + torch.erf(x * math.sqrt(0.5))) / 2, "gelu"),
    ("fuse_gelu", lambda x: x * (0.5 * (1 + torch.erf(torch.div(x, ROOT2)))), "gelu"),
    ("fuse_gelu", lambda x: (1 + torch.erf(math.sqrt(0.5) * x)) / 2 * x, "gelu"),
    ("fuse_gelu", lambda x: x * (0.5 + 0.5 * torch.erf(x / ROOT2)), "gelu"),
    ("fuse_gelu", lambda x: (torch.erf(x / ROOT2) / 2 + 0.5) * x, "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, KAPPA * (x + 0.044715 * torch.pow(x, 3))), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, KAPPA * (x + 0.044715 * x**3.0)), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, (x + 0.044715 * x * x * x) * KAPPA), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, KAPPA * (0.044715 * (x * x * x) + x)), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, KAPPA * (x + x.square() * x * 0.044715)), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, KAPPA * (x + 0.044715 * x**2 * x)), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, x * KAPPA * (1 + 0.044715 * x * x)), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, KAPPA * x * (0.044715 * x.pow(2) + 1)), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, KAPPA * (x * (1 + 0.044715 * (x * x)))), "gelu"),
    ("fuse_gelu_tanh", lambda x: tanh_of(x, x * (KAPPA * (1 + 0.044715 * x * x))), "gelu"),
    ("fuse_sigmoid", lambda x: (1 + torch.exp(-x)).reciprocal(), "sigmoid"),
    ("fuse_sigmoid", lambda x: torch.reciprocal(x.neg().exp() + 1.0), "sigmoid"),
    ("fuse_silu", lambda x: x.sigmoid() * x, "silu"),
    ("fuse_silu", lambda x: torch.mul(x, other=torch.special.expit(x)), "silu"),
    ("fuse_silu", lambda x: x / (1 + torch.exp(-x)), "silu"),
    ("fuse_silu", lambda x: x * torch.reciprocal(torch.exp(-x) + 1), "silu"),
    ("fuse_glu", gated, "glu"),
    ("fuse_glu", lambda x: torch.sigmoid(x[:, :, 3:]) * x[:, :, :3], "glu"),
    ("fuse_hardsigmoid", lambda x: F.relu6(x + 3) / 6, "hardsigmoid"),
    ("fuse_hardsigmoid", lambda x: F.relu6(3 + x) * (1 / 6), "hardsigmoid"),
    ("fuse_hardsigmoid", lambda x: bounded(x + 3.0, 6.0).div(6), "hardsigmoid"),
    ("fuse_hardsigmoid", lambda x: F.hardtanh(x + 3, 0, 6) / 6, "hardsigmoid"),
    ("fuse_hardsigmoid", lambda x: bounded(x / 6 + 0.5, 1), "hardsigmoid"),
    ("fuse_hardsigmoid", lambda x: F.hardtanh(0.5 + x * (1 / 6), min_val=0), "hardsigmoid"),
    ("fuse_hardswish", lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
    ("fuse_hardswish", lambda x: x * F.relu6(x + 3) * (1 / 6), "hardswish"),
    ("fuse_hardswish", lambda x: (F.relu6(x + 3) / 6) * x, "hardswish"),
    ("fuse_hardswish", lambda x: x / 6 * bounded(x + 3, 6), "hardswish"),
    ("fuse_hardswish", lambda x: x * bounded(x / 6 + 0.5, 1), "hardswish"),
    ("fuse_hardswish", lambda x: F.hardsigmoid(x) * x, "hardswish"),
    ("fuse_leaky_relu", lambda x: torch.where(x > 0, x, 0.1 * x), "leaky_relu"),
    ("fuse_leaky_relu", lambda x: torch.where(x <= 0, x * -2, x), "leaky_relu"),
    ("fuse_leaky_relu", lambda x: x.where(x.gt(0), x.mul(0.3)), "leaky_relu"),
    ("fuse_elu", lambda x: torch.where(x > 0, x, torch.expm1(x)), "elu"),
    ("fuse_elu", lambda x: torch.where(x > 0, x, 1.5 * torch.expm1(x)), "elu"),
    ("fuse_elu", lambda x: torch.where(x < 0, torch.expm1(x), x), "elu"),
    ("fuse_clamp", lambda x: torch.where(x < -1, -1.0, x), "clamp"),
    ("fuse_clamp", lambda x: torch.where(x > 2.5, 2.5, x), "clamp"),
    ("fuse_clamp", lambda x: x.masked_fill(x < 0, 0), "clamp"),
    ("fuse_clamp", lambda x: x.masked_fill(mask=x > 3, value=3), "clamp"),
    ("fuse_softmax", lambda x: softly(x, x.amax(1, keepdim=True)), "softmax"),
    ("fuse_softmax", lambda x: softly(x, x.amax(dim=(-2,), keepdim=True).detach()), "softmax"),
    ("remove_shift_of_softmax", lambda x: F.softmax(x - x.amax(2, True), -1), "softmax"),
    ("remove_shift_of_softmax", lambda x: (x - x.amax(-1, True)).log_softmax(2), "log_softmax"),
]  # fmt: skip
# PyTorch computes the gradient of hardsigmoid with 1/6 in float32, in every dtype.
TOLERANCE = {"fuse_hardsigmoid": 1e-7, "fuse_hardswish": 1e-7}


@pytest.mark.parametrize(("rule", "function", "left"), FIRES)
def test_rules_fire(rule: str, function: Callable[[Any], Any], left: str) -> None:
    graph, result = check_pass(
        FuseActivations(), Function(function), X, misses=[], tolerance=TOLERANCE.get(rule, 1e-10)
    )
    assert result.rules[rule].rewritten > 0
    assert op_counts(graph) == {left: 1}, graph_text(graph)


class Prelu(torch.nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.ones(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, self.slope * x)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4, 1), (1, 4, 1)])
def test_prelu(shape: tuple[int, ...]) -> None:
    check_pass(FuseActivations(), Prelu(*shape), X, after={"prelu": 1, "where": 0}, rewrites=1)


@pytest.mark.parametrize("shape", [(6,), (2, 1, 1), (4, 6)])
def test_a_slope_that_varies_along_other_dimensions(shape: tuple[int, ...]) -> None:
    check_pass(FuseActivations(), Prelu(*shape), X, rewrites=0, misses=["dimension 1 alone"])


def test_every_rule_has_a_test() -> None:
    held = {"keep_" + one for one in (
        "x_times_ndtr", "leaky_relu_of_other_gradient", "elu_without_expm1", "relu_of_other_nan",
        "softmax_that_overflows", "log_of_underflow", "softplus_that_overflows",
    )}  # fmt: skip
    assert {name for name, *_ in FIRES} | held | {"fuse_prelu"} == {one.name for one in RULES}


# -- constants -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "constant", "fires"),
    [
        (torch.float32, 0.70710678, True), (torch.float32, 0.7071068, True),
        (torch.float32, 0.70711, False), (torch.float32, 0.7071, False),
        (torch.float64, 0.70710678, False), (torch.float64, 0.7071067811865476, True),
        (torch.float16, 0.7071, True), (torch.float16, 0.707, True),
        (torch.float16, 0.71, False), (torch.bfloat16, 0.71, True),
    ],
)  # fmt: skip
def test_constants_are_exact_to_the_precision_of_the_dtype(
    dtype: torch.dtype, constant: float, fires: bool
) -> None:
    _, result = run(lambda x: x * 0.5 * (1 + torch.erf(x * constant)), X.to(dtype))
    assert result.rewrites == fires
    assert fires or "to the precision of" in result.misses[0].reason


def test_constants_of_the_tanh_form() -> None:
    for kappa, cubic, fires in (
        (0.7978845608, 0.044715, 1), (0.79788456, 0.044715, 1), (0.797885, 0.044715, 0),
        (KAPPA, 0.0447, 0), (KAPPA, 0.05, 0), (0.8, 0.044715, 0),
    ):  # fmt: skip
        graph, result = run(lambda x: tanh_of(x, x * kappa * (1 + cubic * x * x)), X)  # noqa: B023
        assert result.rewrites == fires, (kappa, cubic)
        assert relative_error(graph(X), graph.copy()(X)) == 0
        assert fires or not result.misses or "precision" in result.misses[0].reason


class WithConstants(torch.nn.Module):
    """Half, and the square root of two, as tensors; part of the weights if `persistent`."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.5), persistent=persistent)
        self.register_buffer("root", torch.tensor([ROOT2]), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x * (1 + torch.erf(x / self.root))


def test_constants_that_are_tensors() -> None:
    graph = capture(WithConstants(persistent=False), X)
    assert FuseActivations().run(graph).rewrites == 1
    assert relative_error(graph(X), F.gelu(X)) < 1e-6
    graph = capture(WithConstants(persistent=True), X)
    assert not FuseActivations().run(graph).modified, "new weights may change them"


def test_constants_that_are_computed() -> None:
    def written(x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / torch.sqrt(torch.tensor(2.0))))

    compiled = fxopt.compile(Function(written), X)
    assert op_counts(compiled.graph) == {"gelu": 1}


# -- guards ----------------------------------------------------------------------------------------

STAYS: list[tuple[Callable[[Any], Any], list[str]]] = [
    (lambda x: ((y := torch.erf(x / ROOT2)) + y.sin(), 0.5 * x * (1 + y)), ["used elsewhere too"]),
    (lambda x: 0.5 * x * (1 + torch.erf(x.sin() / ROOT2)), []),
    (lambda x: 0.5 * x * (1 - torch.erf(x / ROOT2)), []),
    (lambda x: x * (1 + torch.erf(x / ROOT2)), []),
    (lambda x: 0.5 * x * (2 + torch.erf(x / ROOT2)), []),
    (lambda x: 0.5 * x * (1 + torch.erf(x / 2)), []),
    (lambda x: 0.5 * x * torch.add(torch.erf(x / ROOT2), 1, alpha=2), []),
    (lambda x: x * torch.special.ndtr(x), ["far below zero it keeps digits"]),
    (lambda x: tanh_of(x, KAPPA * (x - 0.044715 * x**3)), []),
    (lambda x: tanh_of(x, KAPPA * (x + 0.044715 * x**4)), []),
    (lambda x: ((y := x**3).sin(), tanh_of(x, KAPPA * (x + 0.044715 * y))), ["used elsewhere too"]),
    (lambda x: ((y := x.sigmoid()) * x, y + 1), ["sigmoid is used elsewhere too"]),
    (lambda x: x.sigmoid() * x.cos(), []),
    (lambda x: x * torch.sigmoid(1.702 * x), []),
    (lambda x: ((y := torch.exp(-x)).sin(), 1 / (1 + y)), ["exp is used elsewhere too"]),
    (lambda x: 1 / (1 + torch.exp(x)), []),
    (lambda x: x[:, :1] * x[:, 1:2].sigmoid(), []),
    (lambda x: x[:, 2:] * x[:, :2].sigmoid(), []),
    (lambda x: x.split([1, 3], 1)[0] * x.split([1, 3], 1)[1].sigmoid(), []),
    (lambda x: ((y := x.chunk(2, 1))[0] * y[1].sigmoid(), y[0] + 1), ["used elsewhere too"]),
    (lambda x: ((y := F.relu6(x + 3)) / 6, y + 1), ["hardtanh is used elsewhere too"]),
    (lambda x: F.relu6(x + 2) / 6, []),
    (lambda x: F.relu6(x + 3) / 5, []),
    (lambda x: ((y := F.hardsigmoid(x)) * x, y + 1), ["hardsigmoid is used elsewhere too"]),
    (lambda x: torch.where(x >= 0, x, 0.1 * x), ["its gradient is not a"]),
    (lambda x: torch.where(x < 0, 0.1 * x, x), ["its gradient is not a"]),
    (lambda x: torch.maximum(0.1 * x, x), ["its gradient is not a"]),
    (lambda x: torch.where(x > 1, x, 0.1 * x), []),
    (lambda x: torch.where(x > 0, x, 0.1 * x.sin()), []),
    (lambda x: torch.where(x > 0, x, x.sin() * x), []),
    (lambda x: ((y := x > 0), torch.where(y, x, 0.1 * x)), ["gt is used elsewhere too"]),
    (lambda x: torch.where(x > 0, x, torch.exp(x) - 1), ["lost what elu keeps"]),
    (lambda x: torch.where(x < 0, 2 * (torch.exp(x) - 1), x), ["lost what elu keeps"]),
    (lambda x: torch.where(x >= 0, x, 2 * torch.expm1(x)), []),
    (lambda x: torch.where(x > 0, x, 0.0), ["it is not what relu is for nan"]),
    (lambda x: torch.where(x >= 0, x, 0), ["it is not what relu is for nan"]),
    (lambda x: x * (x > 0), ["it is not what relu is for nan"]),
    (lambda x: torch.where(x < 1, 2, x), []),
    (lambda x: torch.where(x < NAN, NAN, x), []),
    (lambda x: x.masked_fill(x < 1, -INF), []),
    (lambda x: softly(x, x.amax(2, True)), []),
    (lambda x: softly(x, x.mean(1, True)), []),
    (lambda x: ((e := torch.exp(x - x.amax(1, True))) / e.sum(1, True), e), ["used elsewhere"]),
    (lambda x: torch.exp(x) / torch.exp(x).sum(1, True), ["overflows where softmax does not"]),
    (lambda x: F.softmax(x - x.amax(1, True), 2), []),
    (lambda x: F.softmax(x - 3.0, 2), []),
    (lambda x: (F.softmax(x - (y := x.amax(1, True)), 1), y), ["amax is used elsewhere too"]),
    (lambda x: torch.log(F.softmax(x, 1)), ["what is inside underflows"]),
    (lambda x: x.sigmoid().log(), ["what is inside underflows"]),
    (lambda x: torch.log(1 + x.exp()), ["overflows where softplus does not"]),
    (lambda x: torch.log1p(torch.exp(x)), ["overflows where softplus does not"]),
    (lambda x: x * torch.tanh(F.softplus(x)), []),
    (lambda x: x - torch.tanh(x), []),
]


@pytest.mark.parametrize(("function", "reasons"), STAYS)
def test_guards_hold(function: Callable[[Any], Any], reasons: list[str]) -> None:
    graph, result = run(function, X)
    assert result.rewrites == 0, graph_text(graph)
    found = [miss.reason for miss in result.misses]
    assert len(found) == len(reasons), found
    for reason in reasons:
        assert any(reason in one for one in found), found


@pytest.mark.parametrize(
    ("dtype", "function", "reason"),
    [
        (torch.int64, lambda x: x * 0.5 * (1 + torch.erf(x / ROOT2)), "gelu does not take"),
        (torch.int64, lambda x: tanh_of(x, KAPPA * (x + 0.044715 * x**3)), "gelu does not take"),
        (torch.int64, lambda x: x * x.sigmoid(), "silu does not take torch.int64"),
        (torch.complex64, lambda x: x * x.sigmoid(), "silu does not take torch.complex64"),
        (torch.complex64, lambda x: (1 + torch.exp(-x)).reciprocal(), ""),
        (torch.int64, lambda x: F.relu6(x + 3) / 6, ""),
        (torch.int64, lambda x: x * F.relu6(x + 3) / 6, ""),
        (torch.int64, lambda x: torch.where(x > 0, x, 2 * x), "leaky_relu does not take"),
        (torch.int64, lambda x: x.masked_fill(x < 1, 1), ""),
        (torch.int64, lambda x: softly(x, x.amax(1, True)), ""),
        (torch.int64, lambda x: (x - x.amax(1, True)).softmax(1, dtype=torch.float32), ""),
        (torch.int64, gated, ""),
    ],
)
def test_integers_are_left(
    dtype: torch.dtype, function: Callable[[Any], Any], reason: str
) -> None:
    x = torch.arange(-24, 24).reshape(2, 4, 6).to(dtype)
    graph, result = run(function, x)
    assert result.rewrites == 0, graph_text(graph)
    assert bool(result.misses) == bool(reason)
    assert not reason or reason in result.misses[0].reason


# -- values ----------------------------------------------------------------------------------------


def every(*names: str) -> Callable[[Any], Any]:
    """All functions that become one of these operators, as one function."""
    kept = [function for _, function, left in FIRES if left in names]
    return lambda x: tuple(function(x) for function in kept)


ELEMENTWISE = (
    "sigmoid", "silu", "hardsigmoid", "hardswish", "leaky_relu", "elu", "clamp",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("names", [("gelu",), ELEMENTWISE])
def test_special_values(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    x = SPECIAL.to(dtype)
    if names == ("gelu",):
        x = x[x != INF]  # where PyTorch leaves it to oneDNN, it is nan
    function = every(*names)
    graph, result = run(function, x, dynamic_shapes={0: "n"})
    assert not result.misses and set(op_counts(graph)) == set(names), graph_text(graph)
    for one in (x, x.repeat(12)):  # what vectorised kernels leave over, and what they take
        for index, (found, expected) in enumerate(zip(graph(one), function(one), strict=True)):
            where = (names, index, found, expected)
            assert torch.equal(found.isnan(), expected.isnan()), where
            assert torch.equal(found.isinf(), expected.isinf()), where
            limit = 4 * torch.finfo(dtype).eps * one.double().abs().clamp(min=1)
            assert not ((found.double() - expected.double()).abs() > limit).any(), where
            zero = (found == 0) & (expected == 0)
            assert torch.equal(found[zero].signbit(), expected[zero].signbit()), where


@pytest.mark.parametrize(
    "row", [[INF, 1, 2, 3], [-INF] * 4, [-INF, 0, 1, 2], [INF, INF, 0, 1], [NAN, 1, 2, 3],
            [3e38, -3e38, 0, 1], [88.0, 100, 1e4, 1e4], [-0.0, 0.0, 1e-45, -1e-45]],
)  # fmt: skip
def test_special_rows_of_softmax(row: list[float]) -> None:
    x = torch.tensor(row)[None, :, None].repeat(2, 1, 6)
    for function in (
        lambda x: softly(x, x.amax(1, True)),
        lambda x: F.softmax(x - x.amax(1, True), 1),
        lambda x: F.log_softmax(x - x.amax(1, True), 1),
    ):
        graph, result = run(function, x)
        assert result.rewrites == 1
        found, expected = graph(x), function(x)
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_a_softmax_into_another_dtype() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x - x.amax(-1, keepdim=True), -1, dtype=torch.float32)

    graph, result = run(function, X.half())
    assert result.rewrites == 1 and op_counts(graph) == {"softmax": 1}
    assert relative_error(graph(X.half()), function(X.half())) < 1e-2


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (3, 1, 5, 7)])
def test_scalars_empty_tensors_and_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    function = every("gelu", *ELEMENTWISE)
    graph, result = run(function, x)
    assert not result.misses and set(op_counts(graph)) == {"gelu", *ELEMENTWISE}
    assert relative_error(graph(x), function(x)) < 1e-6


# -- gradients where a bound is reached ------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: torch.where(x <= 0, -2 * x, x),
        lambda x: torch.where(x > 0, x, 1.5 * torch.expm1(x)),
        lambda x: torch.where(x >= 0, x, torch.expm1(x)),
        lambda x: torch.where(x < -3, -3.0, x), lambda x: x.masked_fill(x > 3, 3),
        lambda x: x.masked_fill(x < 0, 0),
        lambda x: F.relu6(x + 3) / 6, lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * F.hardsigmoid(x),
    ],
)  # fmt: skip
def test_gradients_where_a_bound_is_reached(function: Callable[[Any], Any]) -> None:
    graph, result = run(function, torch.zeros(7))
    assert result.rewrites
    values = [torch.tensor([-7.0, -3, -0.0, 0, 3, 6, 7], requires_grad=True) for _ in range(2)]
    for one, value in zip((graph, function), values, strict=True):
        one(value).sum().backward()
    assert torch.allclose(values[0].grad, values[1].grad, atol=1e-6), values


def test_a_clamp_passes_its_gradient_at_the_ends_of_hardsigmoid() -> None:
    graph, _ = run(lambda x: bounded(x + 3, 6) / 6, torch.zeros(3))
    x = torch.tensor([-3.0, 0, 3], requires_grad=True)
    graph(x).sum().backward()
    assert torch.allclose(x.grad, torch.tensor([0, 1 / 6, 0]))


# -- dynamic shapes, shared modules, whole networks ------------------------------------------------


@pytest.mark.parametrize("function", [FIRES[0][1], FIRES[9][1], gated, FIRES[-5][1]])
def test_symbolic_sizes(function: Callable[[Any], Any]) -> None:
    graph, result = run(function, torch.randn(5, 4, 6), dynamic_shapes={0: "n"})
    assert result.rewrites == 1, graph_text(graph)
    for size in (5, 2, 7):
        x = torch.randn(size, 4, 6)
        assert relative_error(graph(x), function(x)) < 1e-6


def test_halves_of_a_symbolic_size_are_left() -> None:
    graph, result = run(gated, torch.randn(3, 4), dynamic_shapes={1: "n"})
    assert not result.modified, graph_text(graph)


class Gelu(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(KAPPA * (x + 0.044715 * torch.pow(x, 3.0))))


def test_a_shared_activation_between_layers() -> None:
    gelu, linear = Gelu(), torch.nn.Linear(6, 6)
    model = torch.nn.Sequential(linear, gelu, linear, gelu, torch.nn.Linear(6, 3), gelu)
    graph, _ = check_pass(
        FuseActivations(), model, X, after={"gelu": 3, "tanh": 0, "pow": 0}, rewrites=3
    )
    assert all(node.args[0].name.startswith("linear") for node in graph.graph.nodes
               if node.name.startswith("gelu"))  # fmt: skip


def test_a_block_of_mobilenet_v3() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.squeeze = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            y = y * (F.relu6(y + 3) / 6)
            return y * (F.relu6(self.squeeze(y.mean((2, 3), keepdim=True)) + 3) / 6)

    check_pass(
        FuseActivations(), Block(), torch.randn(2, 3, 8, 8), misses=[], tolerance=1e-7,
        after={"hardswish": 1, "hardsigmoid": 1, "mul": 1, "div": 0, "add": 0},
    )  # fmt: skip
