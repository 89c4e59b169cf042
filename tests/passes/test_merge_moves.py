"""merge-moves: chains of reshapes and permutes, written out and drawn by chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt import dialect
from fxopt.capture import capture
from fxopt.passes.merge_moves import MergeMoves
from fxopt.testing import check_pass, op_counts

MOVES = ("reshape", "permute", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "select")
X = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))


class Moved(torch.nn.Module):
    """Moves what a sine made, so that neither end is an input or output."""

    def __init__(self, move: Callable[[Any], Any]) -> None:
        super().__init__()
        self.move = move

    def forward(self, x: torch.Tensor) -> Any:
        return self.move(x.sin()).cos()


def moves(counts: dict[str, int]) -> int:
    return sum(count for op, count in counts.items() if op not in ("sin", "cos", "add", "clone"))


# A chain, and how many calls are left of it.
CHAINS: list[tuple[Callable[[Any], Any], int]] = [
    (lambda x: x.reshape(12, 20).reshape(2, 6, 4, 5), 0),
    (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), 0),
    (lambda x: x.flatten(1).unflatten(1, (3, 40)).flatten(0, 1), 1),
    (lambda x: x.unsqueeze(0).squeeze(0), 0),
    (lambda x: x.permute(0, 2, 1, 3).unsqueeze(1).transpose(1, 2).squeeze(2), 1),
    (lambda x: x.reshape(2, 3, 2, 4, 5).permute(0, 1, 2, 4, 3).reshape(2, 6, 5, 4), 1),
    (lambda x: x.reshape(2, 24, 5).transpose(1, 2).reshape(2, 5, 6, 4), 1),
    (lambda x: x.permute(0, 2, 3, 1).reshape(2, 20, 6).transpose(1, 2).reshape(2, 6, 4, 5), 0),
    (lambda x: x.reshape(2, 3, 2, 20).permute(0, 2, 1, 3).reshape(2, 6, 20).flatten(1), 3),
    (lambda x: x.reshape(2, 2, 3, 4, 5).permute(0, 2, 1, 3, 4).permute(0, 2, 1, 3, 4), 1),
    (lambda x: x[:, :, :, :1].select(3, 0)[:, None].transpose(1, 2).reshape(12, 4), 1),
    (lambda x: x.reshape(12, 20).view_as(x), 0),
    (lambda x: x.permute(1, 0, 2, 3).reshape(3, 4, 20).reshape(6, 2, 4, 5).transpose(0, 1), 0),
    (lambda x: x.reshape(4, 60).t().reshape(6, 10, 4).t() if x.dim() == 2 else x.mT.mT.mT, 1),
]


@pytest.mark.parametrize(("chain", "left"), CHAINS)
def test_chains_get_shorter(chain: Callable[[Any], Any], left: int) -> None:
    graph, result = check_pass(MergeMoves(), Moved(chain), X)
    counts = op_counts(graph)
    counts.pop("slice", None)
    assert moves(counts) == left, counts
    assert result.modified


def test_windows_become_a_grid() -> None:
    """Window reverse, then grid partition: [8, 7] as [7, 8] cannot be cut; the rest merges."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(1, 4, 4, 3, 3, 2).permute(0, 5, 1, 3, 2, 4).reshape(1, 2, 12, 12)
        x = x.reshape(1, 2, 3, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(1, 9, 16, 2)
        return x.permute(0, 2, 1, 3)

    x = torch.randn(1, 16, 9, 2)
    check_pass(
        MergeMoves(), Moved(change), x,
        before={"reshape": 4, "permute": 3}, after={"reshape": 3, "permute": 2},
    )  # fmt: skip


# -- what stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chain",
    [
        lambda x: x.flatten(1),
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.reshape(2, 6, 20).transpose(1, 2),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
        lambda x: x.reshape(2, 2, 3, 20).transpose(1, 2).reshape(2, 6, 4, 5),
        lambda x: x.permute(0, 2, 1, 3).reshape(2, 3, 8, 5).permute(0, 2, 1, 3),
    ],
)
def test_short_chains_stay_as_they_are(chain: Callable[[Any], Any]) -> None:
    check_pass(MergeMoves(), Moved(chain), X, rewrites=0, misses=[])


class Shared(torch.nn.Module):
    """A value inside of a chain is used elsewhere too."""

    def __init__(self, last: Callable[[Any], Any]) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: torch.Tensor) -> Any:
        inner = x.sin().permute(0, 2, 3, 1).reshape(2, 20, 6)
        return inner.cos().sum() + self.last(inner).cos()


def test_shared_values_are_not_computed_twice() -> None:
    def last(inner: torch.Tensor) -> torch.Tensor:
        return inner.reshape(2, 4, 5, 6).permute(0, 2, 1, 3)

    check_pass(MergeMoves(), Shared(last), X, rewrites=1, after={"permute": 2, "reshape": 1})
    check_pass(
        MergeMoves(), Shared(lambda inner: inner.reshape(40, 6)), X,
        rewrites=0, misses=["is used elsewhere too"],
    )  # fmt: skip


def test_a_shared_value_may_cancel_all_the_same() -> None:
    def last(inner: torch.Tensor) -> torch.Tensor:
        return inner.transpose(1, 2).reshape(2, 6, 4, 5)

    check_pass(MergeMoves(), Shared(last), X, rewrites=1, after={"permute": 1, "reshape": 1})


def test_an_output_does_not_become_the_input() -> None:
    class Copies(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x.transpose(0, 1).contiguous().transpose(0, 1)

    graph = capture(Copies(), torch.randn(2, 3))
    assert not MergeMoves().run(graph).modified


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool])
def test_any_dtype(dtype: torch.dtype) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.cat([x, x]).mT.reshape(2, 10, 24).mT.reshape(2, 2, 12, 10).flatten(1, 2)

    x = (X > 0).to(dtype)
    graph, _ = check_pass(
        MergeMoves(), Doubled(), x, add_noise=False, double=False, gradients=False, tolerance=0
    )
    assert moves(op_counts(graph)) < 6


def test_symbolic_sizes() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        n, h = x.shape[0], x.shape[2]
        y = x.reshape(n, 2, 3, h, 5).permute(0, 2, 1, 3, 4).reshape(n, 6, h, 5)
        return y.reshape(n, 3, 2, h, 5).transpose(1, 2).reshape(n * 6, h, 5)

    graph, result = check_pass(
        MergeMoves(), Moved(chain), X, dynamic_shapes={"x": {0: "n", 2: "h"}}
    )
    assert result.rewrites == 0 or moves(op_counts(graph)) <= 4

    def windows(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        y = x.reshape(n, 2, 3, 2, 2, 5).permute(0, 1, 3, 2, 4, 5).reshape(n * 4, 6, 5)
        y = y.reshape(n, 2, 2, 3, 2, 5).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(n, 6, 4, 5)

    graph, _ = check_pass(MergeMoves(), Moved(windows), X, dynamic_shapes={"x": {0: "n"}})
    assert moves(op_counts(graph)) == 0
    y = torch.randn(5, 6, 4, 5, dtype=torch.float64)
    assert torch.equal(graph(y), Moved(windows)(y))


def test_empty_tensors() -> None:
    x = torch.randn(0, 4, 6)
    check_pass(
        MergeMoves(), Moved(lambda x: x.transpose(1, 2).reshape(0, 24).reshape(0, 2, 12)), x
    )


# -- chains drawn by chance ------------------------------------------------------------------------


def draw_shape(rng: random.Random, factors: list[int]) -> list[int]:
    """Distribute prime factors over some dimensions."""
    dims = [1] * rng.randint(1, 5)
    for factor in factors:
        dims[rng.randrange(len(dims))] *= factor
    return dims


@pytest.mark.parametrize("seed", range(8))
def test_chains_drawn_by_chance(seed: int) -> None:
    rng = random.Random(seed)
    factors = rng.choice([[2, 2, 3, 5], [2, 3, 7], [2, 2, 2, 3], [5], []])
    shape = draw_shape(rng, factors)
    steps: list[tuple[str, list[int]]] = []
    rank = len(shape)
    for _ in range(rng.randint(2, 7)):
        if rng.random() < 0.5:
            steps.append(("permute", rng.sample(range(rank), rank)))
        else:
            steps.append(("reshape", draw_shape(rng, rng.sample(factors, len(factors)))))
            rank = len(steps[-1][1])

    def chain(x: torch.Tensor) -> torch.Tensor:
        for name, argument in steps:
            x = getattr(x, name)(argument)
        return x

    graph = capture(Moved(chain), torch.randn(shape))
    before = moves(op_counts(graph))
    MergeMoves().run(graph)
    dialect.check(graph)
    x = torch.randn(shape)
    assert torch.equal(graph(x), Moved(chain)(x))
    assert moves(op_counts(graph)) <= before
    assert not MergeMoves().run(graph).modified


def test_long_chains_cost_no_more_than_their_length() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(120):
            x = x.permute(0, 2, 1, 3).reshape(2, 4, 30).unflatten(2, (6, 5)).permute(0, 2, 1, 3)
        return x

    graph = capture(Moved(chain), X)
    MergeMoves().run(graph)
    assert moves(op_counts(graph)) == 0
