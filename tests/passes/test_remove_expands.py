"""remove-expands: where broadcasting does the same, and where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt.passes.remove_expands import RemoveExpands
from fxopt.testing import check_pass, op_counts

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 4, 5, generator=GENERATOR)
S = torch.randn(2, 3, 1, 1, generator=GENERATOR)
ROW = torch.randn(5, generator=GENERATOR)
EXPANDS = {"expand", "expand_as", "repeat", "tile", "repeat_interleave"}


class Pair(torch.nn.Module):
    """A function of two tensors as a module."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        return self.function(x, y)


GOES: list[tuple[Callable[[Any, Any], Any], torch.Tensor]] = [
    (lambda x, s: x * s.expand(2, 3, 4, 5), S),
    (lambda x, s: s.expand_as(x) - x, S),
    (lambda x, s: x + s.expand_as(x).sigmoid(), S),
    (lambda x, s: x + (1.0 - s.expand_as(x)) * -10, S),
    (lambda x, s: x / s.repeat(1, 1, 4, 5).exp(), S),
    (lambda x, s: x * s.tile(4, 1), S),
    (lambda x, s: x * s.repeat_interleave(4, 2), S),
    (lambda x, s: torch.maximum(x, s.broadcast_to(2, 3, 4, 5)), S),
    (lambda x, s: torch.where(s.expand_as(x) > 0, x, 0.0), S),
    (lambda x, s: x.masked_fill(s.expand_as(x) > 0, -1.0), S),
    (lambda x, s: (x > s.expand_as(x)) * x, S),
    (lambda x, s: torch.lerp(x, s.expand_as(x), 0.3), S),
    (lambda x, r: x * r.expand(4, 5), ROW),
    (lambda x, r: x * r.repeat(2, 3, 4, 1), ROW),
    (lambda x, w: x @ w.expand(2, 3, 5, 6), torch.randn(5, 6)),
    (lambda x, w: w.expand(2, 3, 6, 4) @ x, torch.randn(1, 1, 6, 4)),
    (lambda x, m: F.scaled_dot_product_attention(x, x, x, m.expand(2, 3, 4, 4)),
     torch.randn(2, 1, 1, 4)),
    (lambda x, r: x * r[0].expand(2, 3, 4, 5), ROW),
]  # fmt: skip


@pytest.mark.parametrize(("function", "y"), GOES)
def test_what_goes(function: Callable[[Any, Any], Any], y: torch.Tensor) -> None:
    graph, _ = check_pass(RemoveExpands(), Pair(function), (X, y), rewrites=1, misses=[])
    assert not op_counts(graph).keys() & EXPANDS


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, s: s.expand(2, 3, 4, 5) * 2 + s, "mul gives it its shape"),
        (lambda x, s: x * s.tile(1, 1, 1, 4, 5), "tile gives it its shape"),
        (lambda x, s: x[:, :, :1, :1] + s.expand_as(x), "expand_as gives it its shape"),
        (lambda x, s: torch.cat([x, s.expand_as(x)]), None),
        (lambda x, s: x[:, :, :1].repeat(1, 1, 4, 1) + s.repeat(1, 1, 4, 5), "its shape"),
        (lambda x, s: x[:1].repeat(2, 1, 2, 1)[:, :, :4] * x.cos(), None),
        (lambda x, s: s.expand(2, 3, 4, 1) @ x.mT[:, :, :1, :1].expand(2, 3, 1, 5), None),
        (lambda x, s: F.linear(s.expand_as(x), x[0, 0]), None),
        (lambda x, s: x + s[0, 0, 0].double().expand(2, 3, 4, 5), None),
        (lambda x, s: s.expand_as(x).sigmoid(), None),
    ],
)
def test_what_stays(function: Callable[[Any, Any], Any], reason: str | None) -> None:
    graph, _ = check_pass(
        RemoveExpands(), Pair(function), (X, S), misses=None if reason is None else [reason]
    )
    if reason is None and "to" not in op_counts(graph):
        assert op_counts(graph).keys() & {*EXPANDS, "sigmoid"}


def test_a_number_that_is_expanded_takes_part_in_promotion() -> None:
    """A tensor without dimensions does not make float32 of float16; a full one does."""

    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.half() * y.expand(2, 3, 4, 5)

    check_pass(
        RemoveExpands(), Pair(function), (X, torch.tensor(1.1)), rewrites=0, double=False,
        gradients=False, misses=["its shape or dtype"],
    )  # fmt: skip


def test_an_expansion_that_others_use_stays_for_them() -> None:
    def function(x: torch.Tensor, s: torch.Tensor) -> Any:
        e = s.expand_as(x)
        return x * e, torch.cat([e, x])

    check_pass(RemoveExpands(), Pair(function), (X, S), rewrites=1, after={"expand_as": 1})


def test_what_others_use_too_is_not_computed_twice() -> None:
    def function(x: torch.Tensor, s: torch.Tensor) -> Any:
        e = s.expand_as(x).exp()
        return x * e, torch.cat([e, x])

    check_pass(RemoveExpands(), Pair(function), (X, S), rewrites=0)


def test_one_of_two_equal_operands_stays() -> None:
    def function(x: torch.Tensor, s: torch.Tensor) -> Any:
        e = s.expand_as(x)
        return e * e

    check_pass(RemoveExpands(), Pair(function), (X, S), rewrites=1, after={"expand_as": 1})


def test_symbolic_sizes() -> None:
    def function(x: torch.Tensor, s: torch.Tensor) -> Any:
        return x * s.expand(x.shape[0], 3, x.shape[2], 5)

    names = {"x": {0: "n", 2: "h"}, "y": {0: "n"}}
    graph, _ = check_pass(RemoveExpands(), Pair(function), (X, S), rewrites=1, dynamic_shapes=names)
    x, s = torch.randn(4, 3, 7, 5).double(), torch.randn(4, 3, 1, 1).double()
    assert torch.equal(graph(x, s), x * s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    def function(x: torch.Tensor, s: torch.Tensor) -> Any:
        return (x * 9).to(dtype) + (s * 9).to(dtype).expand_as(x)

    check_pass(
        RemoveExpands(), Pair(function), (X, S), rewrites=1, double=False, gradients=False,
        tolerance=0,
    )  # fmt: skip
