"""Verification: what counts as equal, and what the bound is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt.testing import relative_error
from fxopt.verify import compare, own_error, runner


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 0.0),
        (torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0]), 0.1),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), math.inf),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), math.inf),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), math.inf),
        (torch.tensor([math.nan]), torch.tensor([1.0]), math.inf),
        (torch.tensor([math.nan, 1]), torch.tensor([math.nan, 1]), 0.0),
        (torch.tensor([math.nan]), torch.tensor([math.inf]), math.inf),
        (torch.tensor([-math.inf]), torch.tensor([math.inf]), math.inf),
        (torch.zeros(3), torch.zeros(3), 0.0),
        (torch.zeros(0), torch.zeros(0), 0.0),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], math.inf),
        ({"a": torch.ones(1)}, {"a": torch.ones(1)}, 0.0),
        ((1, None), (1, None), 0.0),
        ((1, None), (2, None), math.inf),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 1j]), 0.0),
    ],
)
def test_relative_error(found: object, expected: object, error: float) -> None:
    assert relative_error(found, expected) == pytest.approx(error, rel=1e-6)


class IllConditioned(nn.Module):
    """Loses seven digits, in whatever order it is computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x + 1000.0) ** 2 - 1_000_000.0) - 2000.0 * x


def test_the_bound_follows_the_models_own_error() -> None:
    graph = fxopt.capture(IllConditioned(), torch.rand(50))
    flat = graph.info.example_inputs
    expected = graph.run(*flat)
    own = own_error(graph, flat, expected)
    assert own > 1e-3

    def slightly_off(inputs: object) -> list[torch.Tensor]:
        return [expected[0] * (1 + own)]

    verdict = compare("test", slightly_off, runner(graph), graph, [flat], None)
    assert verdict.passed and verdict.bound == pytest.approx(20 * own, rel=0.2)

    def far_off(inputs: object) -> list[torch.Tensor]:
        return [expected[0] * (1 + 100 * own)]

    assert not compare("test", far_off, runner(graph), graph, [flat], None).passed
    assert not compare("test", slightly_off, runner(graph), graph, [flat], 1e-6).passed


def test_dtypes_have_bounds_of_their_own() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(0).tanh()

    for dtype, off in ((torch.float32, 3e-5), (torch.float64, 1e-9), (torch.bfloat16, 0.3)):
        graph = fxopt.capture(Sum(), torch.randn(4).to(dtype))
        flat = graph.info.example_inputs
        expected = graph.run(*flat)
        wrong = [expected[0] + off * expected[0].abs().max()]
        verdict = compare("test", lambda inputs, w=wrong: w, runner(graph), graph, [flat], None)  # type: ignore[misc]
        assert not verdict.passed, dtype
        assert compare("test", runner(graph), runner(graph), graph, [flat], None).error == 0.0


def test_random_models_are_compared_with_one_seed() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    x = torch.randn(5)
    state = torch.random.get_rng_state()
    graph = fxopt.optimize(Noisy(), x)
    assert graph.story.verifications[0].error == 0.0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_writes_to_its_input_is_compared_on_copies() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.add_(1)
            return x * 2

    x = torch.zeros(3)
    compiled = fxopt.compile(Writes(), x)
    assert torch.equal(x, torch.zeros(3))
    assert torch.equal(compiled(x), torch.full((3,), 2.0))
    assert torch.equal(x, torch.ones(3))  # as the model itself does
