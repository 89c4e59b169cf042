"""sink-permutes: regions that are flipped, and regions where that would save nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxopt import dialect
from fxopt.capture import capture
from fxopt.passes.sink_permutes import SinkPermutes
from fxopt.testing import check_pass, op_counts, relative_error

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


class Model(torch.nn.Module):
    """A function of a tensor, with a weight per channel and one with four dimensions."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.per_channel = torch.nn.Parameter(torch.randn(3))
        self.table = torch.nn.Parameter(torch.randn(4, 5, 1))
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


# A function, and how many permutes are left of it.
FLIPS: list[tuple[Callable[[Any, Any], Any], int]] = [
    (lambda m, x: first(last(x).relu()), 0),
    (lambda m, x: first((last(x) + m.per_channel).sigmoid() * m.table), 0),
    (lambda m, x: first((last(x) * m.factor).clamp(-1, 1).to(torch.float64)), 0),
    (lambda m, x: first(last(x).softmax(-1)), 0),
    (lambda m, x: first(F.log_softmax(last(x), 1)), 0),
    (lambda m, x: first(F.pad(last(x), (0, 0, 1, 2, 3, 0))), 0),
    (lambda m, x: first(F.pad(last(x), (1, 1), value=2.0)), 0),
    (lambda m, x: first(torch.cat([last(x), last(x).exp()], -1)), 0),
    (lambda m, x: first(last(x) * last(x).mean((1, 2), True)), 0),
    (lambda m, x: first(last(x) - last(x).amax(-1, True)), 0),
    (lambda m, x: first(last(x)[:, 1:3].flip(1).roll(1, 2)), 0),
    (lambda m, x: first(last(x).cumsum(3)), 0),
    (lambda m, x: first(F.glu(last(x), 1)), 0),
    (lambda m, x: first(torch.where(last(x) > 0, last(x), last(x).neg())), 0),
    (lambda m, x: sum(first(part) for part in last(x).split([2, 2], 1)), 0),
    (lambda m, x: (lambda p: first(p * p.sigmoid() + p))(last(x)), 0),
    (lambda m, x: (lambda p: (first(p), p.reshape(2, -1)))(last(x).relu()), 1),
    (lambda m, x: (last(x) + last(x.sin())).cos(), 1),
    (lambda m, x: (last(x) + last(x.sin()) * last(x.cos())).flatten(1), 1),
    (lambda m, x: first(last(x).relu()) + first(last(x.sin()).tanh()), 0),
    (lambda m, x: x.permute(0, 2, 3, 1).relu().permute(0, 2, 1, 3), 1),
    (lambda m, x: last(x).mean((1, 2)), 0),
    (lambda m, x: last(x).sum(3), 0),
    (lambda m, x: last(x).amax((1, 2, 3)), 0),
    (lambda m, x: first(last(x).relu()).mean((2, 3)), 0),
    (lambda m, x: last(x).relu().mean((1, 2)), 0),
    (lambda m, x: (lambda y: y.amax((1, 2)) + first(y).sum((2, 3)))(last(x).relu()), 0),
]


@pytest.mark.parametrize(("function", "left"), FLIPS)
def test_permutes_meet(function: Callable[[Any, Any], Any], left: int) -> None:
    graph, result = check_pass(SinkPermutes(), Model(function), X)
    assert op_counts(graph).get("permute", 0) == left
    assert result.modified


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: last(x).relu(),
        lambda m, x: first(x.relu()),
        lambda m, x: first(F.layer_norm(last(x), (3,), m.per_channel)),
        lambda m, x: first(F.linear(last(x), m.per_channel[None])),
        lambda m, x: last(first(x.mT).softmax(-1)),
        lambda m, x: last(x).relu() + x.reshape(2, 4, 5, 3),
        lambda m, x: first(F.pad(last(x), (1, 1, 1, 1), mode="reflect")),
        lambda m, x: first(last(x) + x[0, :, 0, 0]),
        lambda m, x: last(x).sum(1),
        lambda m, x: F.prelu(last(x), m.table[:, 0, 0]).permute(0, 3, 1, 2),
    ],
)
def test_what_stays(function: Callable[[Any, Any], Any]) -> None:
    check_pass(SinkPermutes(), Model(function), X, rewrites=0)


def test_a_residual_stream_is_flipped_as_a_whole() -> None:
    class Stream(torch.nn.Module):
        """Adds convolutions to a stream that is kept with channels last."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            x = last(x).tanh()
            for conv in self.convs:
                x = x + last(conv(first(x).relu()))
            return first(x)

    check_pass(SinkPermutes(), Stream(), X, before={"permute": 8}, after={"permute": 0})


def test_a_stream_that_convolutions_read_keeps_their_order() -> None:
    class Stream(torch.nn.Module):
        """Normalizes channels last between convolutions, as ConvNeXt does."""

        def __init__(self) -> None:
            super().__init__()
            self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, 3, 1) for _ in range(3))
            self.norm = torch.nn.LayerNorm(3)

        def forward(self, x: torch.Tensor) -> Any:
            for conv in self.convs:
                x = x + first(self.norm(last(conv(x))))
            return self.norm(last(x))

    check_pass(SinkPermutes(), Stream(), X, rewrites=0)


def test_tied_weights_and_other_users_keep_theirs() -> None:
    def function(model: Model, x: torch.Tensor) -> Any:
        return first(last(x) * model.per_channel), last(x).sum((1, 2)) * model.per_channel

    graph, _ = check_pass(SinkPermutes(), Model(function), X, after={"permute": 0})
    assert {"per_channel", "per_channel_permuted"} <= set(graph.constants())


def test_state_is_no_constant() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1, 4, 5, 3))

        def forward(self, x: torch.Tensor) -> Any:
            self.seen.add_(1)
            return first(last(x) + self.seen)

    model = Counts()
    graph = capture(model, X)
    SinkPermutes().run(graph)
    dialect.check(graph)
    for _ in range(2):
        assert relative_error(graph(X), model(X)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_any_dtype(dtype: torch.dtype) -> None:
    def function(model: Model, x: torch.Tensor) -> Any:
        return first(last((x * 9).to(dtype)) * 2 + 1)

    check_pass(
        SinkPermutes(), Model(function), X, rewrites=1, after={"permute": 0}, double=False,
        gradients=False, tolerance=0,
    )  # fmt: skip


def test_symbolic_sizes() -> None:
    graph, _ = check_pass(
        SinkPermutes(), Model(lambda m, x: first((last(x) + m.per_channel).softmax(3))), X,
        rewrites=1, after={"permute": 0}, dynamic_shapes={"x": {0: "n", 2: "h", 3: "w"}},
    )  # fmt: skip
    assert graph(torch.randn(3, 3, 6, 7).double()).shape == (3, 3, 6, 7)


def test_dead_code_is_left_alone() -> None:
    class Dead(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            last(x).relu()
            return x.cos()

    graph = capture(Dead(), X)
    SinkPermutes().run(graph)
    dialect.check(graph)


# -- programs drawn by chance ----------------------------------------------------------------------


class Program(torch.nn.Module):
    """Applies drawn calls to the values made so far, all of shape [2, 4, 4, 4]."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4))
        self.steps = [
            (rng.choice("ppppuubbcsdxl"), *(rng.randrange(60) for _ in "abc")) for _ in range(10)
        ]

    def forward(self, x: torch.Tensor) -> Any:
        values = [x.sin()]
        for kind, a, b, c in self.steps:
            t, u = values[-1 - a % min(3, len(values))], values[-1 - b % len(values)]
            dim = 1 + c % 3
            match kind:
                case "p":
                    new = t.permute([(0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3)][c % 3])
                case "u":
                    new = (torch.relu, torch.sigmoid, torch.tanh)[c % 3](t)
                case "b":
                    new = t + u if c % 2 else t * u
                case "c":
                    new = torch.cat([t, u], dim).narrow(dim, c % 4, 4)
                case "s":
                    new = t.softmax(dim) * u.mean(dim, keepdim=True)
                case "d":
                    parts = t.split([1, 3], dim)
                    new = torch.cat([parts[1], parts[0]], dim)
                case "x":
                    new = t * self.weight
                case _:
                    new = F.layer_norm(t, (4,))
            values.append(new)
        return [value.cos() for value in values[-2:]] + [values[-1].mean((1, 2))]


@pytest.mark.parametrize("seed", range(8))
def test_programs_drawn_by_chance(seed: int) -> None:
    from fxopt.passes.remove_dead_nodes import RemoveDeadNodes

    model, x = Program(random.Random(seed)).double(), torch.randn(2, 4, 4, 4).double()
    graph = capture(model, x)
    RemoveDeadNodes().run(graph)
    before = op_counts(graph).get("permute", 0)
    SinkPermutes().run(graph)
    dialect.check(graph)
    assert relative_error(graph(x), model(x)) < 1e-12
    assert op_counts(graph).get("permute", 0) <= before
    assert not SinkPermutes().run(graph).modified
