"""simplify: each rule fires, each guard holds, and special values come out as they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt import dialect
from fxopt.capture import capture
from fxopt.contract import PassResult
from fxopt.graph_module import GraphModule
from fxopt.passes.simplify import RULES, Simplify
from fxopt.testing import check_pass, op_counts, relative_error
from fxopt.text import graph_text
from tests.models import Function

aten = torch.ops.aten
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2)).double()
KERNEL, CUBE = WEIGHT[0].clone(), WEIGHT[None, :2].clone()
INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([
    NAN, INF, -INF, -0.0, 0.0, 1e-45, -1e-45, 1e-20, 3e38, -3e38, 0.5, -0.5, 1.0, -1.0, 2.5, 3.0,
    -3.0, 6.0,
])  # fmt: skip


def run(
    function: Callable[[Any], Any], x: torch.Tensor, **options: Any
) -> tuple[GraphModule, PassResult]:
    """Run the pass on the function as it is, without doubling, and check the dialect."""
    graph = capture(Function(function).eval(), x, **options)
    result = Simplify().run(graph)
    dialect.check(graph)
    return graph, result


# Each rule, what it is given, and all that is left.
FIRES: list[tuple[str, Callable[[Any], Any], torch.Tensor, dict[str, int]]] = [
    ("merge_reshapes", lambda x: x.flatten(1).reshape(4, 6), X, {"reshape": 1}),
    ("merge_reshapes", lambda x: x.flatten(1).unflatten(1, (3, 4)) + 1, X, {"add": 1}),
    ("merge_reshapes", lambda x: x.unsqueeze(1).squeeze(1) + 1, X, {"add": 1}),
    ("merge_reshapes", lambda x: x[None][None].view(6, 4)[None], X, {"reshape": 1}),
    ("merge_reshapes", lambda x: x.unflatten(2, (2, 2)).flatten(1), X, {"reshape": 1}),
    ("drop_kept_dims", lambda x: x.mean((2, 3), keepdim=True).flatten(1), IMAGE, {"mean": 1}),
    ("drop_kept_dims", lambda x: x.sum(2, keepdim=True).squeeze(2), X, {"sum": 1}),
    ("drop_kept_dims", lambda x: x.amax(-1, keepdim=True).view(2, 3), X, {"amax": 1}),
    ("drop_kept_dims", lambda x: x.logsumexp(1, keepdim=True).squeeze(), X, {"logsumexp": 1}),
    (
        "merge_expands",
        lambda x: x[0].expand(1, 3, 4).expand(5, -1, -1),
        X,
        {"select": 1, "expand": 1},
    ),
    ("merge_slices", lambda x: x[:, :, 1:][:, :, :2], X, {"slice": 1}),
    ("merge_slices", lambda x: x[:, :, :3][:, :, 1:], X, {"slice": 1}),
    ("merge_slices", lambda x: x[:, :, 3:][:, :, 2:], X, {"slice": 1}),
    ("merge_select_of_slice", lambda x: x[:, 1:][:, 1], X, {"select": 1}),
    (
        "merge_cats",
        lambda x: torch.cat([x, torch.cat([x.sin(), x], 1)], 1),
        X,
        {"cat": 1, "sin": 1},
    ),
    ("merge_casts", lambda x: x.cos().double().float(), X, {"cos": 1}),
    ("merge_casts", lambda x: x.double().bfloat16(), X, {"to": 1}),
    ("merge_casts", lambda x: (x > 0).int().float() + 1, X, {"gt": 1, "to": 1, "add": 1}),
    ("merge_bounds", lambda x: x.relu().relu(), X, {"relu": 1}),
    ("merge_bounds", lambda x: x.clamp(-1, 4).clamp(-2, 0.5), X, {"clamp": 1}),
    ("merge_bounds", lambda x: x.clamp(min=-1).clamp(max=0.5), X, {"clamp": 1}),
    ("merge_bounds", lambda x: F.hardtanh(F.hardtanh(x, -1, 4), -2, 0.5), X, {"hardtanh": 1}),
    ("merge_bounds", lambda x: F.relu6(x).relu(), X, {"hardtanh": 1}),
    ("merge_bounds", lambda x: F.hardtanh(x, -2, 2).relu(), X, {"hardtanh": 1}),
    ("merge_bounds", lambda x: x.relu().clamp(max=6), X, {"hardtanh": 1}),
    ("merge_bounds", lambda x: x.clamp(max=6).relu(), X, {"hardtanh": 1}),
    ("merge_bounds", lambda x: x.clamp(min=-1).relu(), X, {"relu": 1}),
    ("merge_bounds", lambda x: x.relu().clamp(min=1), X, {"clamp": 1}),
    ("remove_relu_of_positive", lambda x: x.sigmoid().relu(), X, {"sigmoid": 1}),
    ("remove_relu_of_positive", lambda x: x.softmax(-1).abs(), X, {"softmax": 1}),
    ("remove_relu_of_positive", lambda x: x.abs().abs(), X, {"abs": 1}),
    ("remove_relu_of_positive", lambda x: x.square().relu(), X, {"square": 1}),
    ("remove_double_negation", lambda x: torch.neg(-x).cos(), X, {"cos": 1}),
    (
        "remove_double_negation",
        lambda x: (x > 0).logical_not().logical_not() * x,
        X,
        {"gt": 1, "mul": 1},
    ),
    ("remove_double_negation", lambda x: ~~(x > 0) * x, X, {"gt": 1, "mul": 1}),
    ("merge_abs_of_neg", lambda x: (-x).abs(), X, {"abs": 1}),
    ("merge_roundings", lambda x: x.floor().round().trunc().ceil(), X, {"floor": 1}),
    ("merge_neg_into_sum", lambda x: x + (-x.cos()), X, {"cos": 1, "sub": 1}),
    ("merge_neg_into_sum", lambda x: -x.cos() + x, X, {"cos": 1, "sub": 1}),
    ("merge_neg_into_sum", lambda x: x - (-x.cos()), X, {"cos": 1, "add": 1}),
    ("merge_scalar_sums", lambda x: 1 + (x + 2.5), X, {"add": 1}),
    ("merge_scalar_sums", lambda x: (x - 1) - 2, X, {"add": 1}),
    ("merge_scalar_products", lambda x: 3 * (x * 2), X, {"mul": 1}),
    ("merge_scalar_products", lambda x: x * 3 / 7, X, {"mul": 1}),
    ("merge_scalar_products", lambda x: x / 3 * 7, X, {"mul": 1}),
    ("merge_scalar_products", lambda x: x / 3 / 7, X, {"div": 1}),
    ("merge_pads", lambda x: F.pad(F.pad(x, (1, 2)), (0, 1, 2, 3)), X, {"pad": 1}),
    ("fuse_rsqrt", lambda x: (x * x + 1).sqrt().reciprocal(), X, {"mul": 1, "add": 1, "rsqrt": 1}),
    ("fuse_rsqrt", lambda x: (x * x + 1).sqrt() ** -1, X, {"mul": 1, "add": 1, "rsqrt": 1}),
]


@pytest.mark.parametrize(("rule", "function", "x", "after"), FIRES)
def test_rules_fire(
    rule: str, function: Callable[[Any], Any], x: torch.Tensor, after: dict[str, int]
) -> None:
    double = rule != "merge_casts"
    graph, result = check_pass(Simplify(), Function(function), x, misses=[], double=double)
    assert result.rules[rule].rewritten > 0
    assert op_counts(graph) == {op: count for op, count in after.items() if count}, graph_text(
        graph
    )


def test_every_rule_has_a_test() -> None:
    assert {name for name, *_ in FIRES} == {one.name for one in RULES}


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (lambda x: x.clamp(-1, 4).clamp(-2, 0.5), [-1, 0.5]),
        (lambda x: x.clamp(-1).clamp(max=2), [-1, 2]),
        (lambda x: x.clamp(max=2).clamp(max=1), [None, 1]),
        (lambda x: x.relu().clamp(1, 3), [1, 3]),
        (lambda x: x.clamp(0, 1).relu(), [0, 1]),
        (lambda x: F.hardtanh(x, -1, 4).relu(), [0, 4]),
        (lambda x: (x + 1) - 3 + 5, None),
        (lambda x: x * 2 / 8, [0.25]),
        (lambda x: x / 2 / 4, [8]),
        (lambda x: (x - 2) - 3, [-5]),
        (lambda x: x[:, :, 1:][:, :, 1:2], [2, 2, 3, 1]),
        (lambda x: x[:, :, 1:3][:, :, 1:], [2, 2, 3, 1]),
    ],
)
def test_numbers_that_come_out(function: Callable[[Any], Any], args: list[Any] | None) -> None:
    graph, result = run(function, X)
    assert (result.rewrites > 0) == (args is not None)
    if args is not None:
        assert list(graph.output_node.all_input_nodes[0].args[1:]) == args


# -- what stays ------------------------------------------------------------------------------------

STAYS: list[tuple[Callable[[Any], Any], list[str]]] = [
    (lambda x: ((y := x.flatten(1)) + 1, y.reshape(4, 6)), ["flatten is used elsewhere too"]),
    (lambda x: x.flatten(1), []),
    (lambda x: x.mT.reshape(2, 12), []),
    (lambda x: ((y := x.mean(2, keepdim=True)) + x, y.squeeze(2)), ["mean is used elsewhere too"]),
    (lambda x: x.mean(2, keepdim=True).view(3, 2), []),
    (lambda x: x.mean(2).reshape(6), []),
    (lambda x: ((y := x[:1].expand(5, 3, 4)) + 1, y.expand(6, 5, 3, 4)), ["expand is used"]),
    (lambda x: ((y := x[:, 1:]) + 1, y[:, :1]), ["slice_1 is used elsewhere too"]),
    (lambda x: x[:, ::2][:, 1:], []),
    (lambda x: x[:, 1:][:, ::2], []),
    (lambda x: x[:, 1:][:, :, 1:], []),
    (lambda x: ((y := x[:, 1:]) + 1, y[:, 0]), ["slice_1 is used elsewhere too"]),
    (lambda x: x[:, 1:][:, :, 1], []),
    (
        lambda x: ((y := torch.cat([x, x], 1)) + 1, torch.cat([x, y], 1)),
        ["cat is used elsewhere too"],
    ),
    (lambda x: torch.cat([torch.cat([x, x], 1), torch.cat([x, x], 1)], 2), []),
    (lambda x: torch.cat([torch.cat([x, x.half()], 1), x], 1), []),
    (lambda x: ((y := x.double()) + 1, y.half()), ["to is used elsewhere too"]),
    (lambda x: x.half().float(), ["torch.float16 does not hold every value of torch.float32"]),
    (lambda x: x.bfloat16().half(), ["torch.bfloat16 does not hold every value of"]),
    (lambda x: x.half().bfloat16().float(), ["bfloat16 does not hold", "float16 does not hold"]),
    (lambda x: x.long().float(), ["torch.int64 does not hold every value of torch.float32"]),
    (lambda x: x.double().int() + 1, ["out of the range of torch.int32"]),
    (lambda x: x.to(torch.complex64).to(torch.complex128), ["torch.complex64 does not hold"]),
    (lambda x: x.clamp(-1, 1).clamp(2, 3), ["the bounds cross"]),
    (lambda x: x.clamp(1, -1).clamp(-3, 3), ["the bounds cross"]),
    (lambda x: x.clamp(-3, 3).clamp(1, -1), ["the bounds cross"]),
    (lambda x: F.hardtanh(x, -3, -1).relu(), ["the bounds cross"]),
    (lambda x: x.clamp(-3, NAN).clamp(-1, 1), ["the bounds cross"]),
    (lambda x: F.hardtanh(x.clamp(0, 2), -1, 1), ["no single call has this gradient"]),
    (lambda x: ((y := x.clamp(-1, 4)) + 1, y.clamp(0, 2)), ["clamp is used elsewhere too"]),
    (lambda x: x.clamp(x.mean(), x.amax()).clamp(0, 1), []),
    (lambda x: x.cos().relu(), []),
    (lambda x: x.relu().abs(), []),
    (lambda x: ((y := -x) + 1, y.abs()), ["neg is used elsewhere too"]),
    (lambda x: x.round(decimals=1).floor(), []),
    (lambda x: ((y := -x.cos()) * 2, x + y), ["neg is used elsewhere too"]),
    (lambda x: torch.add(x, -x.cos(), alpha=2), []),
    (lambda x: -x.cos() + 3, []),
    (lambda x: -x.cos() - x, []),
    (lambda x: (x + 8388608.0) - 8388608.0, ["is how one rounds"]),
    (lambda x: (x - 1) + 3, ["is how one rounds"]),
    (lambda x: ((y := x + 1).cos(), y + 2), ["add is used elsewhere too"]),
    (lambda x: (x + 3e38) + 3e38, ["out of the range of torch.float32"]),
    (lambda x: torch.add(x, 2, alpha=2) + 3, []),
    (lambda x: (x + x.cos()) + 3, []),
    (lambda x: x * 1e30 * 1e30, ["out of the normal range of torch.float32"]),
    (lambda x: x * 1e-30 * 1e-30, ["out of the normal range of torch.float32"]),
    (lambda x: x * 0.0 * 2, ["0.0 is out of the normal range"]),
    (lambda x: x * INF * 2, ["inf is out of the normal range"]),
    (lambda x: x / 0.0 / 2, ["0.0 is out of the normal range"]),
    (lambda x: x * NAN * 2, ["nan is out of the normal range"]),
    (lambda x: ((y := x * 3).cos(), y * 2), ["mul is used elsewhere too"]),
    (lambda x: 3 * (x * x), []),
    (lambda x: F.pad(F.pad(x, (1, 2)), (-1, 1)), ["a pad is negative"]),
    (lambda x: F.pad(F.pad(x, (1, 2)), (1, 1), value=1.0), []),
    (lambda x: F.pad(F.pad(x, (1, 2), mode="reflect"), (1, 1)), []),
    (lambda x: ((y := F.pad(x, (1, 2))) + 1, F.pad(y, (1, 1))), ["pad is used elsewhere too"]),
    (lambda x: ((y := x.abs().sqrt()).reciprocal(), y + 1), ["sqrt is used elsewhere too"]),
    (lambda x: x.abs().sqrt() ** -2, []),
]


@pytest.mark.parametrize(("function", "reasons"), STAYS)
def test_guards_hold(function: Callable[[Any], Any], reasons: list[str]) -> None:
    graph, result = run(function, X)
    assert result.rewrites == 0, graph_text(graph)
    found = [miss.reason for miss in result.misses]
    assert len(found) == len(reasons), found
    for reason in reasons:
        assert any(reason in one for one in found), found


CONVOLUTIONS: list[tuple[Callable[[Any], Any], list[str]]] = [
    (lambda x: F.conv_transpose2d(F.pad(x, (1, 1, 1, 1)), WEIGHT.mT.transpose(0, 1)), []),
]


@pytest.mark.parametrize(("function", "reasons"), CONVOLUTIONS)
def test_pads_that_are_not_a_convolutions_own(
    function: Callable[[Any], Any], reasons: list[str]
) -> None:
    check_pass(Simplify(), Function(function), IMAGE, rewrites=0, misses=reasons)


# -- values ----------------------------------------------------------------------------------------

ALGEBRA: list[Callable[[Any], Any]] = [
    lambda x: x.relu().relu(),
    lambda x: x.clamp(-1, 4).clamp(-2, 0.5),
    lambda x: x.relu().clamp(max=6),
    lambda x: x.clamp(max=6).relu(),
    lambda x: F.hardtanh(F.hardtanh(x, -1, 4), -2, 0.5),
    lambda x: x.clamp(-INF, 3).clamp(-1, INF),
    lambda x: F.relu6(x).relu(),
    lambda x: x.relu().clamp(min=1),
    lambda x: x.sigmoid().relu(),
    lambda x: x.abs().relu(),
    lambda x: x.exp().abs(),
    lambda x: x.square().relu(),
    lambda x: F.hardsigmoid(x).abs(),
    lambda x: x.softmax(-1).relu(),
    lambda x: torch.neg(-x).sin(),
    lambda x: (-x).abs(),
    lambda x: x.floor().ceil(),
    lambda x: x.trunc().round(),
    lambda x: x + (-x.cos()),
    lambda x: x - (-x),
    lambda x: x + (-x),
    lambda x: x[None][None],
]
ROUNDED: list[Callable[[Any], Any]] = [
    lambda x: (x + 1) + 2,
    lambda x: (x - 1) - 2,
    lambda x: x * 2 * 4,
    lambda x: x * 0.5 / 4,
    lambda x: x / 2 * 0.25,
    lambda x: x.abs().sqrt().reciprocal(),
    lambda x: x.sqrt() ** -1,
    lambda x: x / 3 / 7,
    lambda x: x * -1 * 3,
]


def every(x: torch.Tensor) -> tuple[Any, ...]:
    return tuple(function(x) for function in ALGEBRA + ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_special_values(dtype: torch.dtype) -> None:
    x = SPECIAL.to(dtype)
    graph, result = run(every, x)
    assert result.rewrites >= len(ALGEBRA + ROUNDED) and not result.misses
    limits = torch.finfo(dtype)
    for index, (found, expected) in enumerate(zip(graph(x), every(x), strict=True)):
        assert torch.equal(found.isnan(), expected.isnan()), (index, found, expected)
        found, expected = found[~found.isnan()], expected[~found.isnan()]
        if index < len(ALGEBRA):
            assert torch.equal(found, expected), (index, found, expected)
        else:
            close = torch.allclose(found, expected, rtol=4 * limits.eps, atol=limits.tiny)
            assert close, (index, found, expected)
        assert torch.equal(found.signbit(), expected.signbit()), (index, found, expected)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1,)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    graph, result = run(every, x)
    assert result.rewrites >= len(ALGEBRA + ROUNDED) - 1
    assert relative_error(graph(x), every(x)) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "function", "reason"),
    [
        (torch.int64, lambda x: (x + 1) - 3, ""),
        (torch.int8, lambda x: (x + 100) + 27, ""),
        (torch.int8, lambda x: (x + 100) + 100, "200 is out of the range of torch.int8"),
        (torch.int8, lambda x: (x * 100) * 100, "10000 is out of the range of torch.int8"),
        (torch.int32, lambda x: (x * 3) * 5, ""),
        (torch.uint8, lambda x: (x * 3) * 5, ""),
        (torch.uint8, lambda x: (x - 3) - 5, "-8 is out of the range of torch.uint8"),
        (torch.int64, lambda x: x / 3 / 5, None),
        (torch.int64, lambda x: (x * 0.5) * 3, None),
        (torch.int64, lambda x: (x + 1) + 0.5, None),
        (torch.bool, lambda x: (x + 1) + 2, None),
        (torch.bool, lambda x: (x * 2) * 3, None),
        (torch.complex64, lambda x: (x * 2) * 3, None),
        (torch.int64, lambda x: x.clamp(-1, 4).clamp(0, 2), ""),
        (torch.int64, lambda x: x.relu().clamp(max=2), ""),
        (torch.int64, lambda x: x.clamp(0, 4).clamp(0.5, 2.5), None),
        (torch.int8, lambda x: x.abs().relu(), None),
        (torch.int8, lambda x: (-x).abs(), ""),
        (torch.uint8, lambda x: (-x).abs(), "wraps around in torch.uint8"),
        (torch.uint8, lambda x: torch.neg(-x) + 1, ""),
        (torch.int64, lambda x: x.logical_not().logical_not(), "the result would be i64[6]"),
        (torch.int64, lambda x: ~~x + 1, ""),
        (torch.uint8, lambda x: x.long() + (-x), "wraps around in torch.uint8"),
        (torch.int64, lambda x: x + (-(x * x)), ""),
        (torch.complex64, lambda x: x.sqrt().reciprocal(), None),
        (torch.int64, lambda x: x.sqrt().reciprocal(), None),
        (torch.uint8, lambda x: x.short().int(), ""),
        (torch.uint8, lambda x: x.half().float(), ""),
        (torch.int64, lambda x: x.float().double(), "torch.float32 does not hold every value"),
        (torch.int8, lambda x: x.float().to(torch.uint8), "out of the range of torch.uint8"),
        (torch.int8, lambda x: x.float().short(), ""),
        (torch.int16, lambda x: x.int().to(torch.uint8), ""),
        (torch.bool, lambda x: x.int().double(), ""),
        (torch.complex64, lambda x: torch.neg(-x) * 2, ""),
    ],
)
def test_dtypes(dtype: torch.dtype, function: Callable[[Any], Any], reason: str | None) -> None:
    """`reason` is empty where a rule fires, and None where none has anything to say."""
    x = torch.tensor([-128, -3, 0, 1, 5, 127]).to(dtype)
    graph, result = run(function, x)
    assert (result.rewrites > 0) == (reason == ""), graph_text(graph)
    assert [miss.reason for miss in result.misses if not reason or reason not in miss.reason] == []
    assert bool(result.misses) == bool(reason)
    found, expected = graph(x), function(x)
    assert found.dtype == expected.dtype and torch.equal(
        torch.nan_to_num(found), torch.nan_to_num(expected)
    )


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu().relu(), lambda x: F.relu6(x).relu(),
        lambda x: F.hardtanh(x, -3, 3).relu(),
        lambda x: F.hardtanh(F.hardtanh(x, -3, 6), 0, 7), lambda x: x.clamp(-3, 6).clamp(0, 7),
        lambda x: x.clamp(min=-3).relu(), lambda x: x.relu().clamp(min=3), lambda x: x.abs().relu(),
        lambda x: F.hardsigmoid(x).relu(), lambda x: x.square().abs(), lambda x: (-x).abs(),
        lambda x: x.floor().ceil() * x,
        lambda x: F.hardtanh(x, 0, 6).clamp(-3, 7), lambda x: F.hardtanh(x.clamp(-3, 7), 0, 6),
    ],
)  # fmt: skip
def test_gradients_where_a_bound_is_reached(function: Callable[[Any], Any]) -> None:
    graph, result = run(function, torch.zeros(7))
    assert result.rewrites
    values = [torch.tensor([-7.0, -3, -0.0, 0, 3, 6, 7], requires_grad=True) for _ in range(2)]
    for one, value in zip((graph, function), values, strict=True):
        one(value).sum().backward()
    assert torch.allclose(values[0].grad, values[1].grad, atol=1e-6), (
        values[0].grad,
        values[1].grad,
    )


def test_a_clamp_between_relu_and_six_stops_its_gradient_at_six_only() -> None:
    for function in (lambda x: x.relu().clamp(max=6), lambda x: x.clamp(-1, 6).relu()):
        graph, _ = run(function, torch.zeros(4))
        x = torch.tensor([-1.0, 0, 5, 6], requires_grad=True)
        graph(x).sum().backward()
        assert x.grad.tolist() == [0, 0, 1, 0]


# -- dynamic shapes, real blocks -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "after"),
    [
        (lambda x: x.flatten(1).unflatten(1, (3, 4)) + 1, {"add": 1}),
        (lambda x: x.flatten(1).view(-1, 6, 2), {"reshape": 1}),
        (lambda x: x.unsqueeze(1).squeeze(1) + 1, {"add": 1}),
        (lambda x: x.mean(2, keepdim=True).squeeze(2), {"mean": 1}),
        (lambda x: x.narrow(1, 1, 2).narrow(1, 0, 1) + 1, {"slice": 1, "add": 1}),
        (lambda x: x[1:][1:] + 1, {"add": 1}),  # one slice where the sizes are provably the same
        (lambda x: x[:-1][1:] + 1, {"slice": 2, "add": 1}),
        (lambda x: x * 2 * 3, {"mul": 1}),
    ],
)
def test_symbolic_sizes(function: Callable[[Any], Any], after: dict[str, int]) -> None:
    graph = capture(Function(function), torch.randn(5, 3, 4), dynamic_shapes={0: "n"})
    Simplify().run(graph)
    dialect.check(graph)
    counts = op_counts(graph)
    assert {op: counts.get(op, 0) for op in after} == after, graph_text(graph)
    for size in (5, 4, 7):
        x = torch.randn(size, 3, 4)
        assert relative_error(graph(x), function(x)) < 1e-6


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:1].expand(x.shape[0], 3, 4).expand(2, -1, -1, -1),
        lambda x: aten.slice(x, 0, -3)[0],
        lambda x: x.clamp(0, x.shape[0]).clamp(-1, 1),
        lambda x: aten.slice(aten.slice(x, 0, -3), 0, 1),
    ],
)
def test_places_that_depend_on_a_symbolic_size_are_left(function: Callable[[Any], Any]) -> None:
    graph = capture(Function(function), torch.randn(5, 3, 4), dynamic_shapes={0: "n"})
    result = Simplify().run(graph)
    assert not result.modified and not result.misses, graph_text(graph)
    x = torch.randn(3, 3, 4)
    assert relative_error(graph(x), function(x)) == 0


def test_a_shape_with_two_symbolic_sizes_is_left() -> None:
    x = torch.randn(5, 6, 4)
    graph = capture(
        Function(lambda x: x.flatten(1).view(x.shape[0], x.shape[1], 2, 2)), x,
        dynamic_shapes={0: "n", 1: "m"},
    )  # fmt: skip
    assert not Simplify().run(graph).modified


def test_a_block_of_mobilenet_v3() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, stride=2)
            self.squeeze = torch.nn.Conv2d(8, 8, 1)
            self.scale = torch.nn.Parameter(torch.ones(8, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.hardswish(self.conv(F.pad(F.pad(x, (1, 1)), (0, 0, 1, 1))))
            gate = F.hardsigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
            return (y * gate * self.scale).mean((2, 3), keepdim=True).flatten(1) * 2 / 4

    check_pass(
        Simplify(), Block(), IMAGE, misses=[], tolerance=1e-7,
        after={"pad": 1, "flatten": 0, "div": 0, "mul": 3},
    )  # fmt: skip
