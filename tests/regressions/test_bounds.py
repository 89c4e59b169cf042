"""Bounds of verification that were so wide that they let errors through."""

from __future__ import annotations

import torch
from torch import nn

import fxopt
from fxopt.verify import bound_of, compare, own_error, runner

aten = torch.ops.aten


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + torch.rand_like(x)).tanh()


def test_random_numbers_of_another_dtype_are_no_rounding_error() -> None:
    x = torch.randn(4)
    graph = fxopt.capture(Noise(), x)
    assert own_error(graph, [x], graph.run(x)) == 0.0
    wrong = graph.copy()
    wrong.find(aten.tanh.default)[0].target = aten.sigmoid.default
    wrong.recompile()
    assert not compare("wrong", runner(wrong), runner(graph), graph, [(x,)], None).passed


def test_what_capture_gets_wrong_is_no_rounding_error() -> None:
    x = torch.rand(8)
    right = fxopt.capture(nn.Sequential(nn.Tanh()), x)
    captured = fxopt.capture(nn.Sequential(nn.Sigmoid()), x)  # by a bug of capture, say
    assert bound_of(0.3, captured, [x], None) < 1e-4
    verdict = compare("captured", runner(captured), runner(right), captured, [(x,)], None)
    assert 0.1 < verdict.error < 1.0 and not verdict.passed
