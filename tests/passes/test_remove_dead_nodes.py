"""remove-dead-nodes: what nobody uses goes; what has an effect, and the inputs, stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes import RemoveDeadNodes
from fxopt.testing import check_pass

aten = torch.ops.aten


class Unused(nn.Module):
    """A whole branch, with weights, that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        F.relu(self.unused(y)).sum()
        return self.used(x)


def test_removes_a_dead_branch_and_its_weights() -> None:
    inputs = (torch.randn(2, 4), torch.randn(2, 4))
    graph, result = check_pass(
        RemoveDeadNodes(), Unused(), inputs,
        before={"linear": 2, "relu": 1, "sum": 1}, after={"linear": 1, "relu": 0, "sum": 0},
        rewrites=1, misses=[],
    )  # fmt: skip
    assert set(graph.constants()) == {"used.weight", "used.bias"}
    assert len(graph.placeholders) == 2  # an unused input stays: the call stays the same
    assert set(result.erased) == {"sum_1", "relu", "linear", "unused_weight", "unused_bias"}


def test_keeps_what_is_used_by_something_that_stays() -> None:
    class Shared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.relu()
            y.sigmoid()
            return y + 1

    check_pass(RemoveDeadNodes(), Shared(), torch.randn(3), after={"relu": 1, "sigmoid": 0})


def test_keeps_random_calls() -> None:
    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand(3)  # moves the generator: the next draw depends on it
            return x + torch.rand(3)

    check_pass(
        RemoveDeadNodes(), Draws(), torch.randn(3),
        after={"rand": 2}, rewrites=0, misses=["it is random"],
    )  # fmt: skip


def test_keeps_a_dropout_in_training_and_statistics_being_updated() -> None:
    class Trains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            F.dropout(x, 0.5, True)
            n = self.norm
            F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, True)
            return x + 1

    graph = fxopt.capture(Trains(), torch.randn(5, 4))
    result = RemoveDeadNodes().run(graph)
    assert not result.modified
    assert [m.reason for m in result.misses] == 2 * ["nobody uses it, but it is in training mode"]


def test_keeps_custom_operators_and_write_backs() -> None:
    with torch.library._scoped_library("fxopt_dead", "FRAGMENT") as library:
        library.define("touch(Tensor x) -> Tensor")
        library.impl("touch", lambda x: x.clone(), "CompositeExplicitAutograd")
        library.impl("touch", lambda x: torch.empty_like(x), "Meta")

        class Touches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                torch.ops.fxopt_dead.touch(x)
                self.count += 1
                return x * 2

        graph = fxopt.capture(Touches(), torch.randn(3))
        result = RemoveDeadNodes().run(graph)
        assert not result.modified
        assert "custom operator" in result.misses[1].reason
        assert "writes" in result.misses[0].reason


def test_is_linear_in_a_long_dead_chain() -> None:
    class Long(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for _ in range(300):
                y = y.relu()
            return x + 1

    check_pass(RemoveDeadNodes(), Long(), torch.randn(2), after={"relu": 0}, rewrites=1)
