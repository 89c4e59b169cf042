"""Layers fit to what the original returned: exact where that can be, else not worse than before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.objective import ObjectiveError
from fxopt.reconstruction import Reconstruction
from fxopt.reconstruction.least_squares import solve
from fxopt.reconstruction.rows import position_count, read, returned
from fxopt.testing import noisy, relative_error


def halves(layer: Any) -> Any:
    """Return a layer whose channels i and i + half compute the same."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.dim():
                tensor[len(tensor) // 2 :] = tensor[: len(tensor) // 2]
    return layer


def second_half(graph: fxopt.GraphModule, family: Any) -> torch.Tensor:
    """Score the channels so that the second half goes."""
    return -torch.arange(family.channels, dtype=torch.float64)


def reconstruction(graph: fxopt.GraphModule) -> Reconstruction:
    found = fxopt.pruning_record(graph).reconstruction
    assert found is not None
    return found


def redundant(make: Callable[..., Any], read_by: Callable[..., Any], norm: Any) -> nn.Module:
    """Return layers of which the middle computes every channel twice, and the last reads both."""
    torch.manual_seed(0)
    return nn.Sequential(
        halves(make(4, 16)), halves(noisy(norm(16))), nn.SiLU(), read_by(16, 6), nn.Tanh(),
        nn.Flatten(1), nn.LazyLinear(5),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: redundant(nn.Linear, nn.Linear, nn.LayerNorm), (4,)),
    "conv1d": (
        lambda: redundant(
            lambda i, o: nn.Conv1d(i, o, 3), lambda i, o: nn.Conv1d(i, o, 5, 2, 3), nn.BatchNorm1d
        ),
        (4, 17),
    ),
    "conv2d": (
        lambda: redundant(
            lambda i, o: nn.Conv2d(i, o, 3, padding=1),
            lambda i, o: nn.Conv2d(i, o, (3, 2), (2, 1), (1, 0), (1, 2), bias=False),
            nn.BatchNorm2d,
        ),
        (4, 9, 8),
    ),
    "conv2d, same": (
        lambda: redundant(
            lambda i, o: nn.Conv2d(i, o, 1),
            lambda i, o: nn.Conv2d(i, o, 3, padding="same", dilation=2), nn.BatchNorm2d,
        ),
        (4, 7, 7),
    ),
    "conv3d": (
        lambda: redundant(
            lambda i, o: nn.Conv3d(i, o, 1), lambda i, o: nn.Conv3d(i, o, (1, 3, 2)),
            nn.BatchNorm3d,
        ),
        (4, 3, 5, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear"])
def test_what_is_said_twice_can_go_without_any_loss(name: str) -> None:
    make, shape = CASES[name]
    data = [torch.randn(16, *shape) for _ in range(40)]
    with torch.no_grad():
        (model := make().eval())(data[0])
    plain = fxopt.prune(model, data[0], importance=second_half, keep=("3",))
    fit = fxopt.prune(model, data[0], importance=second_half, keep=("3",), reconstruct=data)
    x = torch.randn(16, *shape)
    wanted = model(x)
    assert fxopt.pruning_record(fit).channels == (22, 14)
    assert relative_error(plain(x), wanted) > 0.1
    assert relative_error(fit(x), wanted) < 2e-3
    first = reconstruction(fit).fits[0]
    assert (first.layer, first.after < 1e-5 < 0.01 < first.before) == ("3", True)


def test_a_linear_layer_is_fit_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(halves(nn.Linear(4, 16)), nn.GELU(), nn.Linear(16, 5)).eval()
    data = [torch.randn(64, 4) for _ in range(4)]
    fit = fxopt.prune(model, data[0], importance=second_half, reconstruct=data)
    assert relative_error(fit(data[0]), model(data[0])) < 1e-3


def test_each_layer_makes_good_what_those_before_it_lost() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *[part for i in range(4) for part in (nn.Conv2d(3 if i == 0 else 16, 16, 3), nn.ReLU())],
        nn.Flatten(), nn.Linear(16 * 4, 8),
    ).eval()  # fmt: skip
    data = [torch.randn(32, 3, 10, 10) for _ in range(16)]
    x = torch.randn(64, 3, 10, 10)
    example = data[0]
    plain = fxopt.prune(model, example, dynamic_shapes={0: "batch"})
    fit = fxopt.prune(model, example, dynamic_shapes={0: "batch"}, reconstruct=data)
    with torch.no_grad():
        wanted = model(x)

    def off(graph: Any) -> float:
        with torch.no_grad():
            wrong = graph(x) - wanted
        return float(wrong.square().sum() / (wanted - wanted.mean(0)).square().sum())

    assert off(fit) < 0.5 * off(plain)
    found = reconstruction(fit)
    assert [one.layer for one in found.fits] == ["2", "4", "6", "9"]  # "0" is exact
    assert all(one.after <= one.before for one in found.fits)
    assert "reconstructed: 4 layers, mean error" in str(fit.report)


class Residual(nn.Module):
    """Blocks whose last layer is added to a stream that has lost something."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1),
                nn.BatchNorm2d(12) if norm else nn.Identity(),
            )
            for _ in range(3)
        )  # fmt: skip
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (x + block(x)).relu()
        return self.head(x)


class Compensated(nn.Module):
    """Two layers that are added up, of which the first shares its weights and is not fit."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.up = halves(nn.Linear(4, 16))
        self.shared, self.own = nn.Linear(16, 6), nn.Linear(16, 6)
        self.norm = noisy(nn.BatchNorm1d(6)) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.up(x).sigmoid()
        return self.shared(h) + self.norm(self.own(h)), self.shared(h.square())


@pytest.mark.parametrize("norm", [False, True])
def test_a_sum_is_what_is_fit_not_its_summand(norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Compensated(norm).eval()
    data = [torch.randn(64, 4) for _ in range(8)]
    x = torch.randn(64, 4)
    options: dict[str, Any] = {"importance": second_half, "reconstruct": data}
    summed = fxopt.prune(model, x, **options)
    assert relative_error(summed(x)[0], model(x)[0]) < 1e-3
    assert relative_error(summed(x)[1], model(x)[1]) > 0.1
    monkeypatch.setattr("fxopt.reconstruction.layers._sum", lambda graph, layer: None)
    alone = fxopt.prune(model, x, **options)
    assert relative_error(alone(x)[0], model(x)[0]) > 0.1


def test_the_model_stays_as_it_is_and_so_do_graphs_that_share_its_weights() -> None:
    torch.manual_seed(0)
    model = Residual(norm=True).eval()
    before = copy.deepcopy(model.state_dict())
    data = [torch.randn(4, 3, 8, 8)]
    graph = fxopt.capture(model, data[0])
    fit = fxopt.prune(graph, reconstruct=data)
    assert reconstruction(fit).fits
    for state in (model.state_dict(), graph.state_dict()):
        assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_it_trains_and_prunes_on_and_is_the_same_every_time() -> None:
    torch.manual_seed(0)
    model = Residual(norm=True).eval()
    data = [(torch.randn(4, 3, 8, 8), None) for _ in range(3)]  # targets are not needed

    def pruned() -> fxopt.GraphModule:
        return fxopt.prune(model, data[0][0], ratio=0.4, steps=2, reconstruct=data)

    one, two = pruned(), pruned()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    one.train()
    one(data[0][0]).square().mean().backward()
    assert all(p.grad is not None for p in one.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(halves(nn.Linear(4, 16)), nn.GELU(), nn.Linear(16, 5)).eval().to(dtype)
    data = [torch.randn(64, 4, dtype=dtype) for _ in range(8)]
    fit = fxopt.prune(model, data[0], importance=second_half, reconstruct=data)
    error = relative_error(fit(data[0]), model(data[0]))
    assert error < (1e-3 if dtype == torch.float64 else 0.05)
    assert {p.dtype for p in fit.parameters()} == {dtype}


def test_weights_that_two_layers_share_stay() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.down = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.mix(self.mix(self.up(x)).relu()).relu())

    torch.manual_seed(0)
    data = [torch.randn(32, 3)]
    fit = fxopt.prune(Shared().eval(), data[0], reconstruct=data)
    found = reconstruction(fit)
    assert [one.layer for one in found.fits] == ["down"]
    assert {layer for layer, _ in found.skipped} == {"mix"}
    assert "something else uses 'mix.weight" in found.skipped[0][1]


@pytest.mark.parametrize(
    ("data", "error", "part"),
    [
        ([], ObjectiveError, "has no batches"),
        (torch.randn(2, 3), fxopt.FxoptError, "shape"),
        ([torch.randn(4, 7)], fxopt.FxoptError, "7"),
        ([torch.full((4, 3), torch.nan)], ObjectiveError, "nan or infinite"),
        (["words"], ObjectiveError, "pair"),
        (3, ObjectiveError, "iterable"),
        (iter([torch.randn(4, 3)] * 2), None, ""),
    ],
)
def test_data_that_cannot_be_used_changes_nothing(data: Any, error: Any, part: str) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    graph = fxopt.capture(model, torch.randn(4, 3))
    code, before = graph.code, copy.deepcopy(model.state_dict())
    if error is None:
        fxopt.prune(graph, reconstruct=data)
        return
    with pytest.raises(error, match=part):
        fxopt.optimize(graph, passes=[fxopt.passes.PruneChannels(reconstruct=data)])
    assert graph.code == code
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- rows, and least squares -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (5, 2, 4)),
        (nn.Conv1d(4, 6, 3, 2, 1, groups=2), (3, 4, 9)),
        (nn.Conv2d(4, 8, (2, 3), (1, 2), (2, 0), (2, 1), groups=4), (2, 4, 7, 8)),
        (nn.Conv2d(4, 6, 3), (4, 6, 7)),  # without a batch
        (nn.Conv3d(4, 2, (1, 2, 3), padding=(0, 1, 2)), (2, 4, 3, 4, 5)),
    ],
)
def test_rows_times_weights_are_what_the_layer_returns(layer: Any, shape: tuple[int, ...]) -> None:
    from fxopt.kernels import kernel_of

    x = torch.randn(shape, dtype=torch.float64)
    layer = layer.double().eval()
    graph = fxopt.capture(layer, x)
    kernel = next(k for n in graph.graph.nodes if (k := kernel_of(graph, n)) is not None)
    assert not isinstance(kernel, str)
    y = layer(x)
    space = len(kernel.axes)
    positions = torch.randperm(position_count(y.shape, space))
    weight = layer.weight.reshape(kernel.groups, -1, math.prod(kernel.shape[1:]))
    found = torch.einsum("rgi,goi->rgo", read(x, kernel, positions), weight)
    found = found + layer.bias.reshape(kernel.groups, -1)
    assert relative_error(found, returned(y, kernel.groups, space, positions)) < 1e-12


def test_weights_stay_where_none_are_better_on_rows_held_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 1, 200)  # fewer rows than unknowns: what fits them fits nothing else
    weight = torch.randn(1, 3, 200)
    y = torch.einsum("rgi,goi->rgo", x, weight) + 1e-3 * torch.randn(16, 1, 3)
    found = solve(x, y, weight, None)
    assert found.after <= found.before < 1e-5


def test_a_constant_input_is_no_obstacle() -> None:
    torch.manual_seed(0)
    x = torch.randn(800, 1, 4)
    x[..., 1:3] = 1.0  # two columns alike, and constant
    wanted = torch.randn(1, 2, 4)
    y = torch.einsum("rgi,goi->rgo", x, wanted) + 3
    found = solve(x, y, torch.zeros(1, 2, 4), torch.zeros(1, 2))
    assert found.weight is not None
    assert found.after < 1e-6
