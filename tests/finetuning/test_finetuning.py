from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.graph_module import GraphModule
from fxopt.objective import NotFiniteError, ObjectiveError
from tests.finetuning.subjects import (
    accuracy,
    graph,
    images,
    network,
    same,
    shuffled,
    tune,
    weights,
)

each_kind = pytest.mark.parametrize("make", [network, graph], ids=["module", "graph"])


@each_kind
def test_it_learns_and_leaves_the_given_model_alone(make: Any) -> None:
    model = make()
    before, mode = weights(model), model.training
    result = tune(model, shuffled(), epochs=12, evaluate=accuracy)
    assert result.score > 0.9 > 0.7 > result.history[0].score
    assert accuracy(result.model) == result.score
    assert result.model is not model
    assert isinstance(result.model, GraphModule) == isinstance(model, GraphModule)
    assert same(weights(model), before) and model.training == mode
    assert not result.model.training
    assert all(parameter.grad is None for parameter in result.model.parameters())


def test_a_graph_trains_as_its_module_does() -> None:
    module = network()
    trained = tune(module, shuffled(), epochs=2).model
    twin = tune(graph(module), shuffled(), epochs=2).model
    assert isinstance(twin, GraphModule)
    found = weights(twin)
    for name, tensor in weights(trained).items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(found[name], tensor)
    assert not torch.equal(found["1.running_mean"], torch.zeros(4))


def test_what_comes_out_can_be_compiled() -> None:
    result = tune(graph(), shuffled(), epochs=1)
    x, _ = images()
    torch.testing.assert_close(fxopt.compile(result.model)(x), result.model(x))


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    torch.manual_seed(5)
    first = tune(network(), shuffled(), seed=3).model
    torch.rand(7)
    again = tune(network(), shuffled(), seed=3).model
    other = tune(network(), shuffled(), seed=4).model
    assert same(weights(first), weights(again)) and not same(weights(first), weights(other))


def test_the_global_random_numbers_go_on_as_if_nothing_had_been() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    def seed() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)

    model = network()
    seed()
    expected = drawn()
    seed()
    tune(model, shuffled())
    assert drawn() == expected


def test_the_first_epoch_is_plain_sgd() -> None:
    """Against a loop written here: the same updates, in the same order."""
    data = [(x, y) for x, y in zip(*(part.split(16) for part in images()), strict=True)]
    model = network()
    model[8] = nn.Identity()  # dropout would draw random numbers
    found = tune(
        model, data, epochs=1, schedule="constant", warmup=0.0, lr=0.1, momentum=0.8,
        nesterov=False, weight_decay=0.01, clip_grad=0.5,
    )  # fmt: skip
    own = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(own.parameters(), 0.1, momentum=0.8, weight_decay=0.01)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(own(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(own.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert same(weights(found.model), weights(own))
    assert found.history[1].loss == pytest.approx(sum(losses) / 4)


def test_a_frozen_weight_stays() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    result = tune(model, shuffled(), epochs=1)
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert not torch.equal(result.model[3].weight, model[3].weight)


def test_a_model_of_frozen_weights_is_refused() -> None:
    with pytest.raises(fxopt.OptionError, match="No weight requires grad"):
        tune(network().requires_grad_(False), shuffled())


def test_a_model_that_computes_its_own_loss() -> None:
    class Output(dict[str, torch.Tensor]):
        loss = property(lambda self: self["loss"])

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> Output:
            logits = self.network(pixels)
            return Output(loss=F.cross_entropy(logits, labels), logits=logits)

    x, y = images()
    data = [{"pixels": x, "labels": y}]
    result = tune(Own(), data, loss=None, epochs=20, teacher=Own())
    assert result.history[-1].loss < result.history[1].loss * 0.8


@each_kind
def test_channels_last_changes_the_layout_while_training_and_nothing_else(make: Any) -> None:
    seen = set()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets)

    def evaluate(model: Any) -> float:
        parameter = dict(model.named_parameters())["0.weight"]
        seen.add(parameter.is_contiguous(memory_format=torch.channels_last))
        return 0.0

    model = make()
    usual = tune(model, shuffled(), loss=loss)
    other = tune(model, shuffled(), loss=loss, channels_last=True, evaluate=evaluate, epochs=3)
    assert seen == {True}
    assert all(parameter.is_contiguous() for parameter in other.model.parameters())
    assert other.history[1].loss == pytest.approx(usual.history[1].loss, rel=1e-5)


@each_kind
def test_bf16_trains_in_bf16_and_keeps_the_weights_in_float32(make: Any) -> None:
    seen = set()

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.add(outputs.dtype)
        return F.cross_entropy(outputs.float(), targets)

    result = tune(make(), shuffled(), loss=loss, precision="bf16")
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


def test_a_moving_average_is_what_is_returned() -> None:
    data = [(x, y) for x, y in zip(*(part.split(16) for part in images()), strict=True)]
    model = network()
    model[8] = nn.Identity()
    trail: list[torch.Tensor] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets)

    for steps in range(1, 5):
        trail.append(tune(model, data, loss=loss, steps=steps, schedule="constant", warmup=0.0)
                     .model[9].weight.detach())  # fmt: skip
    average = trail[0]
    for count, weight in enumerate(trail[1:], start=1):
        decay = min(0.9, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * weight
    found = tune(model, data, loss=loss, steps=4, schedule="constant", warmup=0.0, ema=0.9)
    torch.testing.assert_close(found.model[9].weight.detach(), average)
    assert not torch.equal(found.model[9].weight, trail[-1])


# -- what can go wrong -----------------------------------------------------------------------------


@each_kind
def test_a_lone_sample_at_the_end_is_skipped(make: Any) -> None:
    result = tune(make(), shuffled(16, count=49), epochs=2)
    assert [row.steps for row in result.history] == [0, 3, 6]
    assert all(bool(tensor.isfinite().all()) for tensor in weights(result.model).values())


def test_a_lone_sample_counts_where_no_batch_norm_needs_others() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert tune(model, shuffled(16, count=49), epochs=1).history[-1].steps == 4


def test_a_running_variance_of_nothing_is_found() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    captured = fxopt.capture(model, torch.randn(1, 3))
    with pytest.raises(NotFiniteError, match=r"'1.running_var' holds nan.*batch 1 of epoch 1"):
        tune(captured, [(torch.randn(1, 3), torch.tensor([1]))])


def test_a_loss_of_nan_says_where_and_what_to_try() -> None:
    x, y = images(16)
    data = [(x, y), (x, y), (x * float("nan"), y)]
    with pytest.raises(NotFiniteError, match=r"nan.*batch 3 of epoch 1.*lower lr.*clip_grad"):
        tune(network(), data)


def test_a_mask_of_infinities_is_no_fault() -> None:
    model = network()
    model.register_buffer("mask", torch.tensor([float("-inf")]))
    assert tune(model, shuffled(), epochs=1).stopped == "budget"


def test_a_batch_of_another_form_is_named() -> None:
    with pytest.raises(ObjectiveError, match=r"got a Tensor.*batch 2 of epoch 1"):
        tune(network(), [images(16), images(16)[0]])


def test_data_that_gives_its_batches_once_is_used_up() -> None:
    batches = iter([images(16)] * 3)
    with pytest.raises(ObjectiveError, match="only once"):
        tune(network(), batches, epochs=2)
    assert tune(network(), iter([images(16)] * 3), epochs=1).history[-1].steps == 3


def test_endless_data_will_do_for_a_number_of_steps() -> None:
    def endless() -> Any:
        while True:
            yield images(16)

    assert tune(network(), endless(), steps=5).history[-1].steps == 5


def test_what_cannot_be_trained_is_said_first() -> None:
    with pytest.raises(fxopt.OptionError, match="Train its graph"):
        tune(fxopt.compile(network(), images()[0]), shuffled())
    with pytest.raises(fxopt.CaptureError, match="class Linear itself"):
        tune(nn.Linear, shuffled())  # type: ignore[arg-type]


def test_a_model_that_cannot_be_copied_is_said_so() -> None:
    class Single(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there can be only one")

    with pytest.raises(fxopt.OptionError, match="there can be only one"):
        tune(Single(2, 2), shuffled())


def test_the_table_has_a_row_per_epoch_and_marks_the_best() -> None:
    result = tune(network(), shuffled(), epochs=2, evaluate=accuracy)
    lines = str(result).splitlines()
    assert len(lines) == 4 and "score" in lines[0]
    assert [line.endswith("best") for line in lines[1:]] == [
        row is result.best for row in result.history
    ]


def test_without_a_terminal_it_writes_one_line_per_epoch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tune(network(), shuffled(), epochs=2, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 3
    assert "epoch 2" in shown.err
    tune(network(), shuffled(), epochs=1, progress=False)
    assert capsys.readouterr().err == ""
