"""Integers chosen together: nearer to what layers returned in floats, and still integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import dialect
from fxopt.errors import OptionError, PreconditionError
from fxopt.graph_module import GraphModule
from fxopt.passes import InsertFakeQuant, RoundWeights
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.rounding import Grid, round_together
from fxopt.testing import noisy

aten = torch.ops.aten


class Net(nn.Module):
    """A residual block, groups, a depthwise convolution, a layer without bias, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.SiLU())
        self.outer = nn.Conv2d(12, 8, 1, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        y = F.relu(self.outer(self.depth(self.inner(y))) + y)
        return self.head(y.mean((2, 3)))


def images(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 12, 12, generator=generator).cumsum(2) / 2 for _ in range(count)]


def quantized(*more: Any, bits: str = "w3a8") -> GraphModule:
    graph = fxopt.optimize(
        noisy(Net()).eval(), images(1)[0],
        passes=["default", InsertFakeQuant(images(64), bits=bits), *more],
    )  # fmt: skip
    dialect.check(graph)
    return graph


def noise(graph: GraphModule) -> float:
    """The mean squared error on other data."""
    model = noisy(Net()).eval()
    with torch.no_grad():
        errors = [(graph(x) - model(x)).square().mean() for x in images(16, seed=1)]
    return float(torch.stack(errors).mean())


def test_it_comes_nearer_to_the_floats_on_data_that_it_has_not_seen() -> None:
    before, after = quantized(), quantized(RoundWeights(images(64)))
    assert noise(after) < 0.5 * noise(before)
    record = after.story.steps[-1].details
    assert len(record.fits) == 5 and all(fit.after <= fit.before for fit in record.fits)
    assert "5 layers" in str(record)


def test_weights_are_integers_of_the_same_scales() -> None:
    before, after = quantized(), quantized(RoundWeights(images(64)))
    changed = 0
    for old, new in zip(before.find(fake_quantize), after.find(fake_quantize), strict=True):
        if old.all_input_nodes[0].op != "get_attr":
            continue
        weight, scale, zero_point = map(after.value, new.all_input_nodes)
        assert torch.equal(scale, before.value(old.all_input_nodes[1]))
        assert torch.equal(fake_quantize(weight, scale, zero_point, -3, 3), weight)
        first = fake_quantize(
            *map(before.value, old.all_input_nodes), -3, 3
        )
        assert isinstance(weight, nn.Parameter)
        changed += not torch.equal(first, weight)
    assert changed == 5


def test_what_it_makes_trains_and_refuses_new_weights() -> None:
    graph = quantized(RoundWeights(images(64)))
    graph(images(1)[0]).square().sum().backward()
    assert all(p.grad is not None for p in graph.parameters())
    compiled = fxopt.compile(graph, passes=[])
    with pytest.raises(OptionError, match="fit to data"):
        compiled.update(noisy(Net()).state_dict())


def test_two_runs_choose_the_same() -> None:
    one, other = (quantized(RoundWeights(images(64))) for _ in range(2))
    assert all(map(torch.equal, one.constants().values(), other.constants().values()))


def test_it_needs_rounded_weights_and_data() -> None:
    with pytest.raises(PreconditionError, match="InsertFakeQuant"):
        fxopt.optimize(Net().eval(), images(1)[0], passes=[RoundWeights(images(4))])
    with pytest.raises(OptionError, match="needs data"):
        quantized(RoundWeights())
    with pytest.raises(OptionError, match="above 0"):
        RoundWeights(images(1), samples=0)


def test_too_few_positions_leave_a_layer_as_it_is() -> None:
    few = RoundWeights(images(1))
    graph = quantized(few)
    (miss, *_) = graph.story.steps[-1].misses
    assert "too few" in miss.reason


def test_a_weight_that_two_layers_read_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).sigmoid())

    data = [torch.randn(64, 6) for _ in range(8)]
    insert = InsertFakeQuant(data)
    graph = fxopt.optimize(Shared().eval(), data[0], passes=[insert, RoundWeights(data)])
    assert graph.story.steps[-1].rewrites == 0
    assert any("something else uses" in miss.reason for miss in graph.story.steps[-1].misses)


# -- the algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("inputs", [2, 4])
def test_nearly_as_good_as_trying_all_integers(groups: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(inputs)
    lost, by_itself = 0.0, 0.0
    for _ in range(20):
        rows = torch.randn(groups, 40, inputs, generator=generator, dtype=torch.float64)
        rows = rows @ torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
        hessian = rows.mT @ rows
        target = torch.randn(groups, 5, inputs, generator=generator, dtype=torch.float64)
        ones = torch.ones_like(target)
        grid = Grid(0.7 * ones, torch.zeros_like(ones, dtype=torch.int32), -3, 3)
        found = round_together(target, hessian, grid)
        assert torch.equal(grid.nearest(found), found)
        levels = 0.7 * torch.arange(-3, 4, dtype=torch.float64)
        every = torch.cartesian_prod(*[levels] * inputs)  # [7 ** inputs, inputs]
        off = every[:, None, None] - target
        costs = torch.einsum("ngoi,gij,ngoj->ngo", off, hessian, off)
        off = found - target
        cost = torch.einsum("goi,gij,goj->go", off, hessian, off)
        off = grid.nearest(target) - target
        nearest = torch.einsum("goi,gij,goj->go", off, hessian, off)
        best = costs.amin(0)
        assert (cost >= best - 1e-9).all()
        lost += float((cost - best).mean())
        by_itself += float((nearest - best).mean())
    assert lost < 0.5 * by_itself


def test_a_long_row_in_blocks_and_an_order_that_matters() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 400, 150, generator=generator, dtype=torch.float64)
    rows = rows * torch.linspace(0.01, 5, 150, dtype=torch.float64)
    rows = rows + rows.roll(1, 2)
    hessian = rows.mT @ rows + 1e-3 * torch.eye(150, dtype=torch.float64)
    target = torch.randn(1, 6, 150, generator=generator, dtype=torch.float64)
    scale = target.abs().amax(-1, keepdim=True).expand_as(target) / 3
    grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32), -3, 3)

    def cost(weight: torch.Tensor) -> float:
        off = weight - target
        return float(torch.einsum("goi,gij,goj->", off, hessian, off))

    found = round_together(target, hessian, grid)
    assert torch.equal(grid.nearest(found), found)
    assert cost(found) < 0.7 * cost(grid.nearest(target))
