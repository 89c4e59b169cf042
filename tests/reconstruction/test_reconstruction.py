"""Layers fit to what the original returned: exact where that can be, else not worse than before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.objective import ObjectiveError
from fxopt.reconstruction import Reconstruction
from fxopt.reconstruction.least_squares import Linear, Rows, fit
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
    fit = fxopt.prune(model, data[0], importance=second_half, reconstruct=iter(data))
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
    monkeypatch.setattr("fxopt.reconstruction.layers._sum", lambda *_: None)
    alone = fxopt.prune(model, x, **options)
    assert relative_error(alone(x)[0], model(x)[0]) > 0.1


def test_the_model_stays_as_it_is_and_so_do_graphs_that_share_its_weights() -> None:
    torch.manual_seed(0)
    model = Residual(norm=True).eval()
    before = copy.deepcopy(model.state_dict())
    data = [torch.randn(4, 3, 8, 8) for _ in range(4)]
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
    data = [torch.randn(512, 3)]
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
    ],
)
def test_data_that_cannot_be_used_changes_nothing(data: Any, error: Any, part: str) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    graph = fxopt.capture(model, torch.randn(4, 3))
    code, before = graph.code, copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=part):
        fxopt.optimize(graph, passes=[fxopt.passes.PruneChannels(reconstruct=data)])
    assert graph.code == code
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_fit_is_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.up = nn.ConvTranspose2d(8, 6, 2, 2)
            self.register_buffer("blur", torch.full((6, 1, 3, 3), 1 / 9), persistent=False)
            self.lstm = nn.LSTM(6, 6, batch_first=True)
            self.last = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(self.first(x).relu()).relu()
            y = nn.functional.conv2d(y, self.blur, groups=6).flatten(2).mT
            y = torch.cond(y.sum() > 0, lambda y: y * 2, lambda y: y.sin(), (self.lstm(y)[0],))
            return self.last(y)

    model = Mixed().eval()
    data = [torch.randn(16, 3, 4, 4) for _ in range(4)]
    fit = fxopt.prune(model, data[0], reconstruct=data)
    found = reconstruction(fit)
    assert [one.layer for one in found.fits] == ["last"]
    words = dict(found.skipped)
    assert "not transposed" in words["up"]
    assert any("is no parameter" in word for word in words.values())
    assert "not transposed" in words["lstm"]
    assert any("branches" in word for word in words.values())


@pytest.mark.parametrize("fill", [-1e9, -float("inf")])
def test_a_mask_in_a_sum_hides_nothing_else(fill: float) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = halves(nn.Linear(8, 16)), nn.Linear(16, 6)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (self.down(self.up(x).relu()) + mask).softmax(-1)

    mask = torch.full((6, 6), fill).triu(1).expand(16, 6, 6).contiguous()
    data = [((torch.randn(16, 6, 8), mask), None) for _ in range(16)]
    model, (inputs, _) = Masked().eval(), data[0]
    fit = fxopt.prune(model, inputs, importance=second_half, reconstruct=data)
    assert relative_error(fit(*inputs), model(*inputs)) < 1e-3


@pytest.mark.parametrize("scale", [0.0, 1e-39, 1e-18, 1e-6])
def test_a_channel_that_its_batch_norm_drops_does_not_hold_up_the_others(scale: float) -> None:
    model = Compensated(norm=True).eval()
    with torch.no_grad():
        model.norm.weight[0] = scale
    data = [torch.randn(64, 4) for _ in range(8)]
    fit = fxopt.prune(model, data[0], importance=second_half, reconstruct=data)
    x = torch.randn(64, 4)
    assert relative_error(fit(x)[0][:, 1:], model(x)[0][:, 1:]) < 1e-3
    assert max(float(p.detach().abs().max()) for p in fit.parameters()) < 100


def test_new_weights_for_what_was_fit_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    data = [torch.randn(64, 4) for _ in range(8)]
    compiled = fxopt.compile(fxopt.prune(model, data[0], reconstruct=data), backend="eager")
    before = compiled(data[0])
    compiled.save(tmp_path / "fit.fxopt")
    for one in (compiled, fxopt.load(tmp_path / "fit.fxopt")):
        with pytest.raises(fxopt.OptionError, match="fit to data"):
            one.update(model.state_dict())
        assert torch.equal(one(data[0]), before)


def test_data_is_read_only_where_channels_go_and_is_no_part_of_what_a_pass_is() -> None:
    def unread() -> Any:
        raise AssertionError
        yield

    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    fxopt.prune(model, torch.randn(4, 3), ratio=0.0, reconstruct=unread())
    one, two = (fxopt.passes.PruneChannels(reconstruct=[torch.randn(3)]) for _ in range(2))
    assert one == two


def test_few_inputs_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    data = [torch.randn(64, 3)]
    plain, fit = fxopt.prune(model, data[0]), fxopt.prune(model, data[0], reconstruct=data)
    assert torch.equal(plain(data[0]), fit(data[0]))
    assert "too few" in str(fit.report)


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


def fitted(x: torch.Tensor, y: torch.Tensor, old: Linear) -> tuple[Linear, torch.Tensor]:
    """Return weights fit to 7/8 of the rows, and the errors of the outputs on fresh ones."""
    held = len(x) // 8
    new = fit(Rows(x[held:], y[held:]), Rows(x[:held], y[:held]), old)
    return new, new.errors(Rows(x[:held], y[:held]))


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("rgi,goi->rgo", x, weight)


def test_weights_stay_where_none_are_better_on_rows_held_out() -> None:
    x = torch.randn(80, 1, 200)  # fewer rows than unknowns: what fits them fits nothing else
    weight = torch.randn(1, 3, 200)
    y = product(x, weight) + 1e-3 * torch.randn(80, 1, 3)
    new, _ = fitted(x, y, Linear(weight, None))
    assert torch.equal(new.weight, weight)


def test_every_group_and_every_output_is_a_problem_of_its_own() -> None:
    x = torch.randn(4096, 2, 9)
    x[:, 1] *= 1e-3
    wanted = torch.randn(2, 2, 9)
    old = wanted + 0.3 * torch.randn(2, 2, 9)
    old[0, 1] = wanted[0, 1]  # exact already
    y = product(x, wanted)
    y[:, 0, 0] *= 1e4
    wanted[0, 0] *= 1e4
    new, _ = fitted(x, y, Linear(old, None))
    assert torch.equal(new.weight[0, 1], old[0, 1])
    assert ((new.weight - wanted).norm(dim=2) / wanted.norm(dim=2)).max() < 1e-3


def test_a_constant_input_is_no_obstacle() -> None:
    x = torch.randn(800, 1, 4)
    x[..., 1:3] = 1.0  # two columns alike, and constant
    y = product(x, torch.randn(1, 2, 4)) + 3
    _, errors = fitted(x, y, Linear(torch.zeros(1, 2, 4), torch.zeros(1, 2)))
    assert errors.max() < 1e-4


def test_what_is_judged_is_what_is_stored() -> None:
    weight = torch.randn(1, 4, 8)
    x = torch.randn(2000, 1, 8) + 100  # so that rounding to bfloat16 costs more than fitting gains
    old = Linear(weight.bfloat16(), torch.zeros(1, 4).bfloat16())
    y = product(x, old.weight.float()) + 0.05 * torch.randn(2000, 1, 4)
    new, errors = fitted(x, y, old)
    assert new.weight.dtype == torch.bfloat16
    assert (errors <= old.errors(Rows(x[:250], y[:250]))).all()
