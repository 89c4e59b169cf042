"""replace-pools: one form of pools over whole maps, and reductions of reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.replace_pools import RULES, ReplacePools
from fxopt.testing import check_pass, op_counts

X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
ROW = X[:, 0]


class Pool(torch.nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, pool: Callable[[Any], Any]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> Any:
        return self.pool(x)


# What goes, by rule, what it becomes, and its input.
GOES: list[tuple[str, Callable[[Any], Any], str, torch.Tensor]] = [
    ("replace_flat_pool", lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), "mean", X),
    ("replace_flat_pool", lambda x: F.adaptive_avg_pool2d(x, 1).reshape(2, 3), "mean", X),
    ("replace_flat_pool", lambda x: F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)), "mean", X),
    ("replace_flat_pool", lambda x: F.adaptive_avg_pool1d(x, 1).squeeze(-1), "mean", ROW),
    ("replace_flat_pool", lambda x: F.adaptive_avg_pool3d(x[None], 1).flatten(1), "mean", X),
    ("replace_kept_mean", lambda x: x.mean((2, 3), keepdim=True), "adaptive_avg_pool2d", X),
    ("replace_whole_window", lambda x: F.avg_pool2d(x, (4, 6)), "adaptive_avg_pool2d", X),
    ("replace_whole_window", lambda x: F.avg_pool2d(x, (4, 6), 1, 0, True, False),
     "adaptive_avg_pool2d", X),
    ("replace_whole_window", lambda x: F.avg_pool1d(x, 6), "adaptive_avg_pool1d", ROW),
    ("replace_even_windows", lambda x: F.adaptive_avg_pool2d(x, 2), "avg_pool2d", X),
    ("replace_even_windows", lambda x: F.adaptive_avg_pool2d(x, (1, 3)), "avg_pool2d", X),
    ("replace_even_windows", lambda x: F.adaptive_avg_pool1d(x, 3), "avg_pool1d", ROW),
    ("merge_reductions", lambda x: x.mean(3).mean(2), "mean", X),
    ("merge_reductions", lambda x: x.mean(-1).mean(-1), "mean", X),
    ("merge_reductions", lambda x: x.mean(1).mean((0, 2)), "mean", X),
    ("merge_reductions", lambda x: x.sum(1, True).sum((0, 1), True), "sum", X),
    ("merge_reductions", lambda x: x.amax(3).amax(2), "amax", X),
    ("merge_reductions", lambda x: x.amin(2, True).amin(3, True), "amin", X),
    ("merge_flat_reduction", lambda x: x.flatten(2).mean(-1), "mean", X),
    ("merge_flat_reduction", lambda x: x.flatten(0, 1).sum((0, 2)), "sum", X),
    ("merge_flat_reduction", lambda x: x.reshape(2, 3, 24).amax(2), "amax", X),
    ("merge_flat_reduction", lambda x: x.flatten(1).mean((0, 1)), "mean", X),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "pool", "left", "x"), GOES)
def test_what_goes(rule: str, pool: Callable[[Any], Any], left: str, x: torch.Tensor) -> None:
    graph, result = check_pass(ReplacePools(), Pool(pool), x, misses=[])
    counts = {op: n for op, n in op_counts(graph).items() if op not in ("select", "unsqueeze")}
    assert counts == {left: 1}
    assert any(count.rewritten for name, count in result.rules.items() if name.startswith(rule))


def test_every_rule_has_a_test() -> None:
    tested = {rule for rule, *_ in GOES}
    assert all(any(one.name.startswith(name) for name in tested) for one in RULES)


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(), None),
        (lambda x: F.adaptive_max_pool2d(x, 1).flatten(1), None),
        (lambda x: F.adaptive_avg_pool2d(x, 2).flatten(2)[:, :, :3], None),
        (lambda x: F.adaptive_avg_pool2d(x, (3, 6)), "windows of [4, 6] to [3, 6] overlap"),
        (lambda x: F.avg_pool2d(x, (6, 6), padding=1), None),
        (lambda x: F.avg_pool2d(x, (4, 6), divisor_override=7), None),
        (lambda x: F.avg_pool2d(x, (4, 3)), None),
        (lambda x: x.mean((1, 2), keepdim=True), None),
        (lambda x: x[0].mean((1, 2), keepdim=True), None),
        (lambda x: x.mean(3, dtype=torch.float32).mean(2), None),
        (lambda x: x.mean(3).sum(2), None),
        (lambda x: x.sum((0, 1)).sum(()), None),
        (lambda x: x.mean(3, keepdim=True).mean(2), None),
        (lambda x: x.flatten(2).mean(1), None),
        (lambda x: x.flatten(2).mean(-1, keepdim=True), None),
        (lambda x: x.reshape(2, 6, 12).mean(1), None),
    ],
)
def test_what_stays(pool: Callable[[Any], Any], reason: str | None) -> None:
    check_pass(
        ReplacePools(), Pool(pool), X, rewrites=0 if reason is not None else None,
        after={"adaptive_max_pool2d": "max_pool" in str(pool.__code__.co_names)},
        misses=None if reason is None else [reason],
    )  # fmt: skip


def test_no_dimensions_are_all_of_them() -> None:
    x = torch.randn(2, 3, 4, 6)
    for pool in (lambda x: x.sum(3).sum(()), lambda x: x.amax(()).cos()):
        graph, _ = check_pass(ReplacePools(), Pool(pool), x)
        assert torch.allclose(graph(x.double()), pool(x.double()))


@pytest.mark.parametrize(
    "both",
    [
        lambda x: (lambda y: (y.flatten(1), y * 2))(F.adaptive_avg_pool2d(x, 1)),
        lambda x: (lambda y: (y.mean(2), y * 2))(x.mean(3)),
        lambda x: (lambda y: (y.mean(2), y * 2))(x.flatten(2)),
    ],
)
def test_shared_values_are_not_computed_twice(both: Callable[[Any], Any]) -> None:
    check_pass(ReplacePools(), Pool(both), X, rewrites=0, misses=["is used elsewhere too"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    def pool(x: torch.Tensor) -> torch.Tensor:
        y = x.to(dtype)
        return F.adaptive_avg_pool2d(y, 1).flatten(1) + y.mean(3).mean(2)

    check_pass(
        ReplacePools(), Pool(pool), X, rewrites=2, double=False, gradients=False, tolerance=2e-2
    )


def test_integers() -> None:
    model = Pool(lambda x: (x * 9).int().sum(3).sum(2) + (x * 9).int().amax(3).amax(2))
    check_pass(ReplacePools(), model, X, rewrites=2, double=False, gradients=False, tolerance=0)


def test_symbolic_sizes() -> None:
    names = {"x": {0: "n", 2: "h", 3: "w"}}
    for pool, count in (
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), 1),
        (lambda x: x.mean((2, 3), keepdim=True), 1),
        (lambda x: x.mean(3).mean(2), 1),
        (lambda x: x.flatten(2).mean(2), 1),
        (lambda x: F.adaptive_avg_pool2d(x, 2), 0),
    ):
        graph, _ = check_pass(ReplacePools(), Pool(pool), X, rewrites=count, dynamic_shapes=names)
        x = torch.randn(3, 3, 8, 7, dtype=torch.float64)
        assert torch.allclose(graph(x), pool(x))


def test_special_values() -> None:
    x = X.clone()
    x[0, 0, 0, 0], x[0, 1, 2, 3], x[1, 0, 0, 1] = float("nan"), float("inf"), -float("inf")
    for pool in (lambda x: x.mean(3).mean(2), lambda x: x.amax(3).amax(2)):
        graph, _ = check_pass(ReplacePools(), Pool(pool), X)
        torch.testing.assert_close(graph(x.double()), pool(x.double()), equal_nan=True)
