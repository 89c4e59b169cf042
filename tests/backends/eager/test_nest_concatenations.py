"""Concatenations that begin with an earlier one."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.backends.eager.cpu.nest_concatenations import NestConcatenations
from tests.backends.eager.lowered import check_lowering, graph_of


class Dense(nn.Module):
    """Each sum sees all that came before, along one dimension; `then` is another use."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = torch.cat([x, y], 1)
        s = a.sin()
        b = torch.cat([x, y, s], 1)
        c = torch.cat([x, y, s, b.cos(), x], 1)
        d = torch.cat([x, y, x], 0)  # another dimension
        e = torch.cat([y, x, y], 1)  # another order
        return a, b, c, d, e


def pieces(graph: object) -> list[int]:
    found = graph.find(torch.ops.aten.cat.default)  # type: ignore[attr-defined]
    return [len(node.args[0]) for node in found]


def test_the_longest_beginning_is_taken() -> None:
    graph = graph_of(Dense(), (torch.randn(2, 3, 4), torch.randn(2, 3, 4)))
    before = pieces(graph)
    lowered, _ = check_lowering(graph, NestConcatenations(), bound=0.0)
    assert sorted(before) == [2, 3, 3, 3, 5] and sorted(pieces(lowered)) == [2, 2, 3, 3, 3]
    assert not NestConcatenations().run(lowered).modified
