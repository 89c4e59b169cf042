"""Verification runs the user's own model, and leaves all that the model changes as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt


class WritesParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.state += 1
        return x + self.state


class WritesBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state += 1
        return x + self.state


@pytest.mark.parametrize(
    "model", [WritesParameter(), WritesBuffer()], ids=lambda m: type(m).__name__
)
def test_state_is_that_before_compiling(model: nn.Module) -> None:
    compiled = fxopt.compile(model, torch.ones(3))
    assert torch.equal(model.state.detach(), torch.zeros(3))
    assert [compiled(torch.ones(3))[0].item() for _ in range(2)] == [2.0, 3.0]


def test_max_norm_leaves_the_embedding() -> None:
    model = nn.Embedding(4, 4, max_norm=0.5)
    before = model.weight.detach().clone()
    fxopt.compile(model, torch.tensor([0, 1]))
    assert torch.equal(model.weight.detach(), before)


def test_python_attributes_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.seen = 0, []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.seen.append(x)
            return x * 2

    model = Counts()
    fxopt.compile(model, torch.ones(3))
    assert (model.calls, model.seen) == (0, [])
