from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.graph_module import GraphModule
from fxopt.objective import ObjectiveError
from tests.finetuning.subjects import graph, images, network, same, weights

each_kind = pytest.mark.parametrize("make", [network, graph], ids=["module", "graph"])
STATISTICS = {f"{layer}.running_{kind}" for layer in (1, 4) for kind in ("mean", "var")}


def uneven() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y = images(50)
    return list(zip(x.split(16), y.split(16), strict=True))  # 16, 16, 16 and 2


def moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = values.double().transpose(0, 1).flatten(1)
    return rows.mean(1).float(), rows.var(1).float()


@each_kind
def test_the_first_gets_the_exact_mean_and_variance_of_all_data(make: Any) -> None:
    model = make()
    found = weights(fxopt.reestimate_batch_norms(model, uneven()))
    with torch.no_grad():
        mean, variance = moments(network()[0](images(50)[0]))
    torch.testing.assert_close(found["1.running_mean"], mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["1.running_var"], variance, rtol=1e-6, atol=1e-7)


@each_kind
def test_later_ones_see_what_the_earlier_make_of_each_batch(make: Any) -> None:
    found = weights(fxopt.reestimate_batch_norms(make(), uneven()))
    plain = network().train()
    with torch.no_grad():
        seen = torch.cat([plain[:4](x) for x, _ in uneven()])
    mean, variance = moments(seen)
    torch.testing.assert_close(found["4.running_mean"], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["4.running_var"], variance, rtol=1e-5, atol=1e-6)


@each_kind
def test_nothing_else_changes(make: Any) -> None:
    model = make()
    before, flags = weights(model), [module.training for module in model.modules()]
    twin = fxopt.reestimate_batch_norms(model, uneven())
    assert same(weights(model), before)
    assert [module.training for module in model.modules()] == flags
    assert [module.training for module in twin.modules()] == flags
    after = weights(twin)
    assert {name for name in after if not torch.equal(after[name], before[name])} == STATISTICS


@each_kind
def test_the_copy_uses_its_statistics_and_still_trains(make: Any) -> None:
    twin = fxopt.reestimate_batch_norms(make().eval(), uneven())
    x, y = images(16)
    kept = weights(twin)
    twin(x)
    assert same(weights(twin), kept)
    result = fxopt.finetune(twin, [(x, y)], loss=F.cross_entropy, epochs=1, progress=False)
    assert not torch.equal(weights(result.model)["1.running_mean"], kept["1.running_mean"])


def test_a_graph_says_afterwards_what_its_module_says() -> None:
    x, _ = images()
    module = fxopt.reestimate_batch_norms(network(), uneven()).eval()
    torch.testing.assert_close(fxopt.reestimate_batch_norms(graph(), uneven())(x), module(x))


def test_fewer_batches_and_inputs_alone() -> None:
    x, _ = images(32)
    two = fxopt.reestimate_batch_norms(network(), uneven(), batches=2)
    alone = fxopt.reestimate_batch_norms(network(), x.split(16))
    named = fxopt.reestimate_batch_norms(network(), [{"input": part} for part in x.split(16)])
    assert same(weights(two), weights(alone)) and same(weights(two), weights(named))
    assert not same(weights(two), weights(fxopt.reestimate_batch_norms(network(), uneven())))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.norm(2 * x + 1)


@pytest.mark.parametrize("captured", [False, True])
def test_one_that_is_called_twice_gets_both(captured: bool) -> None:
    x = torch.randn(20, 3)
    model: Any = fxopt.capture(Shared(), x) if captured else Shared()
    twin = fxopt.reestimate_batch_norms(model, [x])
    mean, variance = moments(torch.cat([x, 2 * x + 1]))
    torch.testing.assert_close(weights(twin)["norm.running_mean"], mean)
    torch.testing.assert_close(weights(twin)["norm.running_var"], variance)


class Frozen(nn.Module):
    """Keeps its first batch norm in evaluation mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.first.eval()
        return self


@pytest.mark.parametrize("captured", [False, True])
def test_one_that_training_leaves_alone_is_left_alone(captured: bool) -> None:
    x = torch.randn(20, 3) + 5
    model: Any = fxopt.capture(Frozen(), x) if captured else Frozen()
    found = weights(fxopt.reestimate_batch_norms(model, [x]))
    assert torch.equal(found["first.running_mean"], torch.zeros(3))
    torch.testing.assert_close(found["second.running_mean"], moments(x)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("captured", [False, True])
def test_a_model_without_batch_norm_is_refused(captured: bool) -> None:
    for model in (nn.Linear(3, 2), nn.BatchNorm1d(3, track_running_stats=False)):
        given: Any = fxopt.capture(model, torch.randn(4, 3)) if captured else model
        with pytest.raises(fxopt.OptionError, match="no batch norm"):
            fxopt.reestimate_batch_norms(given, [torch.randn(4, 3)])


def test_data_that_cannot_do() -> None:
    with pytest.raises(ObjectiveError, match="no batches"):
        fxopt.reestimate_batch_norms(network(), [])
    with pytest.raises(fxopt.OptionError, match="above 0"):
        fxopt.reestimate_batch_norms(network(), uneven(), batches=0)
    linear = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ObjectiveError, match="no variance"):
        fxopt.reestimate_batch_norms(linear, [torch.randn(1, 3)])


def test_it_repairs_statistics_that_belong_to_other_weights() -> None:
    model = network().eval()
    with torch.no_grad():
        model[0].weight *= 5
    x, _ = images(50)
    repaired = fxopt.reestimate_batch_norms(graph(model), [x])
    assert isinstance(repaired, GraphModule)
    with torch.no_grad():
        expected = F.batch_norm(model[0](x), None, None, training=True)
        y = F.batch_norm(
            model[0](x), repaired.constant("1.running_mean"), repaired.constant("1.running_var")
        )
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
