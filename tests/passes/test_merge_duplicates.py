"""merge-duplicates: equal calls and equal unchanging constants merge; draws and weights never."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes import MergeDuplicates
from fxopt.testing import check_pass, noisy, op_counts


def run(function: object, *inputs: torch.Tensor) -> dict[str, int]:
    """Run the pass on a function, checked in full, and return what is left."""

    class Wrapped(nn.Module):
        def forward(self, *xs: torch.Tensor) -> torch.Tensor:
            return function(*xs)  # type: ignore[operator]

    graph, _ = check_pass(MergeDuplicates(), Wrapped(), tuple(inputs))
    return op_counts(graph)


def test_merges_equal_calls_and_what_follows_from_them() -> None:
    x = torch.randn(3, 3)
    assert run(lambda x: x.relu().exp() + torch.relu(x).exp(), x) == {"add": 1, "exp": 1, "relu": 1}
    assert run(lambda x: x.t() @ x.transpose(0, 1), x) == {"matmul": 1, "permute": 1}


@pytest.mark.parametrize(
    ("a", "b"), [(1, 1.0), (0.0, -0.0), (True, 1), (2, 3), ("sum", "mean")]
)
def test_literals_that_behave_differently_stay_apart(a: object, b: object) -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        if isinstance(a, str):
            return F.mse_loss(x, x + 1, reduction=a) + F.mse_loss(x, x + 1, reduction=b)  # type: ignore[arg-type]
        return torch.stack([torch.full((2,), a).to(x), torch.full((2,), b).to(x)]) + x[0, 0]  # type: ignore[call-overload]

    counts = run(twice, torch.randn(3, 3))
    assert counts.get("full", counts.get("mse_loss")) == 2


def test_negative_zero_is_not_zero() -> None:
    def divides(x: torch.Tensor) -> torch.Tensor:
        return 1 / torch.full_like(x, 0.0) + 2 * (1 / torch.full_like(x, -0.0)) + x

    run(divides, torch.randn(3))  # check_pass compares infinities


def test_two_draws_are_two_draws() -> None:
    assert run(lambda x: x + torch.rand(3) - torch.rand(3), torch.zeros(3))["rand"] == 2


def test_calls_with_switchable_training_stay() -> None:
    class TwoDropouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    check_pass(MergeDuplicates(), TwoDropouts(), torch.randn(3), after={"dropout": 2}, rewrites=0)


def test_parameters_and_persistent_buffers_are_never_tied() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
            self.register_buffer("c", torch.ones(4))
            self.register_buffer("d", torch.ones(4))
            self.register_buffer("e", torch.ones(4), persistent=False)
            self.register_buffer("f", torch.ones(4), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.a + x * self.b + x / self.c + x / self.d + (x - self.e) * (x - self.f)

    graph, _ = check_pass(
        MergeDuplicates(), Twins(), torch.randn(4), add_noise=False, after={"sub": 1, "div": 2}
    )
    assert set(graph.constants()) == {"a", "b", "c", "d", "e"}


def test_what_was_computed_from_weights_is_not_tied_either() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(4), requires_grad=False)
            self.b = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.a * 2) * (x + self.b * 2)

    model = Scaled()
    graph = fxopt.optimize(model, torch.randn(4), passes=["fold-constants", "merge-duplicates"])
    assert set(graph.constants()) == {"a_folded", "b_folded"}


def test_equal_masks_of_blocks_become_one() -> None:
    class Blocks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                mask = torch.ones(5, 5, dtype=torch.bool).tril()
                x = x.masked_fill(~mask, -1e9).softmax(-1)
            return x

    graph = fxopt.optimize(
        Blocks(), torch.randn(2, 5, 5), passes=["fold-constants", "merge-duplicates"]
    )
    assert len(graph.constants()) == 1


def test_nan_constants_with_equal_bytes_merge_and_others_stay() -> None:
    class Nans(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0])
            c = torch.tensor([float("nan"), 2.0])
            return torch.nan_to_num(a) * x + torch.nan_to_num(b) * x + torch.nan_to_num(c) * x

    graph, _ = check_pass(MergeDuplicates(), Nans(), torch.randn(2), double=False, tolerance=1e-6)
    assert len(graph.constants()) == 2


def test_large_networks_of_equal_fresh_weights_keep_them() -> None:
    model = nn.Sequential(*[nn.BatchNorm1d(4) for _ in range(6)]).eval()
    graph = fxopt.capture(model, torch.randn(2, 4))
    assert not MergeDuplicates().run(graph).modified
    noisy(model)


def test_constants_with_odd_strides_are_compared() -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.arange(12.0).reshape(3, 4)
            self.register_buffer("a", base[1:2, ::3][:, :1], persistent=False)
            self.register_buffer("b", base.t()[:1, 1:2], persistent=False)
            self.register_buffer("c", base[:0], persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.a) * (x + self.b) + self.c.sum()

    check_pass(
        MergeDuplicates(), Strided(), torch.randn(2), add_noise=False, double=False,
        tolerance=1e-6, after={"add": 2},
    )  # fmt: skip
