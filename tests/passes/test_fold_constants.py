"""fold-constants: computed once; nothing random, nothing large, nothing that changes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes import FoldConstants
from fxopt.quantization.operator import fake_quantize
from fxopt.testing import check_pass, noisy


class Standardized(nn.Module):
    """A weight-standardized convolution, as in ResNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.conv.weight
        mean = w.mean(dim=(1, 2, 3), keepdim=True)
        std = w.var(dim=(1, 2, 3), keepdim=True).sqrt() + 1e-5
        return F.conv2d(x, (w - mean) / std, self.conv.bias)


def test_folds_weight_standardization_into_one_trainable_weight() -> None:
    graph, _ = check_pass(
        FoldConstants(), Standardized(), torch.randn(1, 3, 6, 6),
        before={"mean": 1, "var": 1, "div": 1}, after={"mean": 0, "var": 0, "div": 0, "conv2d": 1},
        rewrites=1, misses=[],
    )  # fmt: skip
    assert set(graph.constants()) == {"conv.weight_folded", "conv.bias"}
    assert isinstance(graph.constant("conv.weight_folded"), nn.Parameter)


def test_folds_weight_norm() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    check_pass(FoldConstants(), model, torch.randn(2, 4), after={"linear": 1, "_weight_norm": 0})


class Masked(nn.Module):
    """A mask built from a static shape by writes through views, and a position index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[-1], x.shape[-1], dtype=x.dtype)
        mask[2:, :2] = float("-inf")
        index = torch.arange(4)[:, None] - torch.arange(4)[None, :] + 3
        bias = self.table[index].permute(2, 0, 1)
        return (x + bias + mask).softmax(-1)


def test_folds_masks_and_position_bias() -> None:
    graph, _ = check_pass(
        FoldConstants(), Masked(), torch.randn(2, 4, 4),
        after={"add": 2, "softmax": 1, "arange": 0, "index": 0, "slice_scatter": 0},
        rewrites=2,
    )  # fmt: skip
    assert {type(t) for t in graph.constants().values()} == {nn.Parameter, torch.Tensor}


def test_never_folds_randomness() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn(3, dtype=x.dtype) * torch.ones(3, dtype=x.dtype)

    check_pass(FoldConstants(), Noise(), torch.randn(3), after={"randn": 1, "full": 0}, rewrites=1)


def test_never_folds_what_depends_on_state() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = self.count * 2 + 1
            self.count += 1
            return x * scale

    model = Counts()
    graph = fxopt.capture(model, torch.ones(2))
    result = FoldConstants().run(graph)
    assert not result.modified
    assert [graph(torch.ones(2))[0].item() for _ in range(3)] == [1, 3, 5]


class Expands(nn.Module):
    """A small constant made large, then used."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.row = nn.Parameter(torch.randn(1, side))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.row * 2).expand(self.side, self.side)


@pytest.mark.parametrize(("side", "folds"), [(16, True), (64, False)])
def test_the_size_guard_stores_the_largest_part_that_is_small(side: int, folds: bool) -> None:
    misses = [] if folds else ["are too many for a constant made of"]
    graph, _ = check_pass(
        FoldConstants(free_bytes=4096), Expands(side), torch.randn(side, side),
        after={"expand": 0 if folds else 1, "mul": 0}, misses=misses,
    )  # fmt: skip
    largest = max(t.numel() for t in graph.constants().values())
    assert largest == (side * side if folds else side)


def test_growth_allows_large_results_of_large_sources() -> None:
    class Tiles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.block.repeat(2, 1)

    x = torch.randn(64, 32)
    check_pass(FoldConstants(free_bytes=0, growth=2.0), Tiles(), x, after={"repeat": 0})
    check_pass(
        FoldConstants(free_bytes=0, growth=1.9),
        Tiles(),
        x,
        after={"repeat": 1},
        misses=["too many"],
    )


def test_parts_of_a_split_fold_and_a_list_never_becomes_a_constant() -> None:
    class Splits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = (self.both * 2).chunk(2)
            return F.linear(x, a) * F.linear(x, b)

    check_pass(
        FoldConstants(), Splits(), torch.randn(3, 4),
        after={"split_with_sizes": 0, "getitem": 0, "linear": 2}, rewrites=2,
    )  # fmt: skip


def test_buffers_stay_buffers_and_frozen_parameters_give_buffers() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.weight.exp()

    graph, _ = check_pass(FoldConstants(), Frozen(), torch.randn(3), after={"exp": 0})
    assert not isinstance(graph.constant("weight_folded"), nn.Parameter)


def test_new_weights_go_through_the_recorded_computation() -> None:
    model = noisy(Standardized()).eval()
    x = torch.randn(1, 3, 6, 6)
    compiled = fxopt.compile(model, x)
    trained = noisy(copy.deepcopy(model), seed=3)
    compiled.update(trained.state_dict())
    torch.testing.assert_close(compiled(x), trained(x), rtol=1e-4, atol=1e-5)
    assert compiled.story.renamed["conv.weight"] == ("conv.weight_folded",)


def test_dynamic_sizes_are_not_constants() -> None:
    class Positions(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[1]) + torch.arange(3)[1]

    check_pass(
        FoldConstants(), Positions(), torch.randn(2, 5), dynamic_shapes={1: "length"},
        after={"arange": 1, "select": 0},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folds_in_its_own_dtype(dtype: torch.dtype) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (self.weight * 0.3 + 1)

    check_pass(
        FoldConstants(), Scaled().to(dtype), torch.randn(4).to(dtype),
        after={"mul": 1, "add": 0}, double=False, tolerance=0.0,
    )  # fmt: skip


class Rounded(nn.Module):
    """A scaled weight, rounded in groups, and laid out for a product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.gain = nn.Parameter(torch.rand(4, 1) + 0.5)
        self.register_buffer("scale", torch.rand(4, 2, 1) / 50 + 0.01)
        self.register_buffer("zero_point", torch.zeros(4, 2, 1, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = (self.weight * self.gain).view(4, 2, 3)
        rounded = fake_quantize(groups, self.scale, self.zero_point, -127, 127)
        return x @ rounded.view(4, 6).permute(1, 0)


def test_folds_what_a_rounding_reads_and_nothing_behind_it() -> None:
    graph, _ = check_pass(
        FoldConstants(), Rounded(), torch.randn(2, 6),
        before={"mul": 1, "fake_quantize": 1},
        after={"mul": 0, "fake_quantize": 1, "permute": 1, "reshape": 1},
        rewrites=1, misses=[],
    )  # fmt: skip
    graph(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    (weight,) = (value for value in graph.constants().values() if isinstance(value, nn.Parameter))
    assert weight.grad is not None and bool(weight.grad.any()), "it goes straight through"
