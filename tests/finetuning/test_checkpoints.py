from __future__ import annotations

import _thread
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import fxopt
from tests.finetuning.subjects import (
    Killed,
    accuracy,
    graph,
    images,
    killed_at,
    network,
    same,
    shuffled,
    tune,
    weights,
)


@pytest.fixture(autouse=True)
def _listens_to_ctrl_c() -> Iterator[None]:
    """Background jobs of a shell ignore it, and so would the tests in them."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


class Noisy:
    """Batches whose order and content follow from torch's random numbers, drawn as they come."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        x, y = images()
        for _ in range(4):
            chosen = torch.randint(len(x), (16,))
            yield x[chosen] + torch.randn(16, 3, 8, 8), y[chosen]


def with_generator() -> DataLoader[Any]:
    return shuffled(generator=torch.Generator().manual_seed(11))


def half_each(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {
        "ema": 0.9, "schedule": half_each, "schedule_every": "step", "clip_grad": 1.0,
        "evaluate": accuracy, "precision": "bf16",
    },
    "teacher": {"optimizer": "adamw", "lr": 1e-3, "teacher": network(), "channels_last": True},
}  # fmt: skip


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("data", [shuffled, with_generator, Noisy], ids=lambda d: d.__name__)
@pytest.mark.parametrize("make", [network, graph], ids=["module", "graph"])
def test_a_killed_run_goes_on_bit_for_bit(
    make: Any, data: Callable[[], Any], extra: str, tmp_path: Path
) -> None:
    options = EXTRAS[extra]
    whole = tune(make(), data(), **options)
    path = tmp_path / "run.pt"
    keep: dict[str, Any] = {"checkpoint": path, "checkpoint_minutes": 0.0, **options}
    for call in (3, 2, 5):  # killed in the first epoch, again at once, and in the second
        with pytest.raises(Killed):
            tune(make(), data(), loss=killed_at(call, F.cross_entropy), **keep)
    parts = tune(make(), data(), **keep)
    assert [row.steps for row in parts.history] == [0, 4, 8, 12]
    assert same(weights(parts.model), weights(whole.model))
    for one, other in zip(parts.history, whole.history, strict=True):
        assert (one.loss, one.score, one.lr) == (other.loss, other.score, other.lr)


def test_between_checkpoints_a_run_goes_back_to_the_last(tmp_path: Path) -> None:
    whole = tune(network(), shuffled())
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):  # 5 minutes are not over: the last one stands after the epoch
        tune(network(), shuffled(), loss=killed_at(7, F.cross_entropy), checkpoint=path)
    parts = tune(network(), shuffled(), checkpoint=path)
    assert same(weights(parts.model), weights(whole.model))


def test_killed_while_evaluating(tmp_path: Path) -> None:
    whole = tune(network(), shuffled(), evaluate=accuracy)
    path = tmp_path / "run.pt"
    for call in (1, 2):
        with pytest.raises(Killed):
            tune(network(), shuffled(), evaluate=killed_at(call, accuracy), checkpoint=path)
    parts = tune(network(), shuffled(), evaluate=accuracy, checkpoint=path)
    assert same(weights(parts.model), weights(whole.model))
    assert [row.score for row in parts.history] == [row.score for row in whole.history]


def nearness(model: Any) -> float:
    """How little was learnt: best before the first step."""
    return -(dict(model.named_parameters())["0.weight"] - network()[0].weight).norm().item()


def test_the_best_weights_outlive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        tune(network(), shuffled(), evaluate=nearness, checkpoint=path,
             loss=killed_at(6, F.cross_entropy))  # fmt: skip
    found = tune(network(), shuffled(), evaluate=nearness, checkpoint=path)
    assert found.best.epoch == 0 and same(weights(found.model), weights(network()))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = tune(network(), shuffled(), evaluate=accuracy, checkpoint=path)
    again = tune(
        network(), shuffled(), loss=killed_at(1, F.cross_entropy), evaluate=accuracy,
        checkpoint=path,
    )  # fmt: skip
    assert same(weights(first.model), weights(again.model))
    assert again.history == first.history and again.best == first.best


def test_time_that_was_spent_stays_spent(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        tune(
            network(), shuffled(), epochs=3, checkpoint=path, checkpoint_minutes=0.0,
            loss=killed_at(6, F.cross_entropy),
        )  # fmt: skip
    state = torch.load(path, weights_only=True)["state"]
    assert state["at"]["seconds"] > 0 and state["at"]["steps"] == 5
    minutes = tune(network(), shuffled(), epochs=3, checkpoint=path).history[-1].minutes
    assert minutes * 60 > state["at"]["seconds"]


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lr": 0.04}, r"lr was 0.05 and is 0.04"),
        ({"epochs": 4}, r"epochs was 3 and is 4"),
        ({"data": shuffled(8)}, r"batches was 4 and is 8; batch size was 16 and is 8"),
        ({"model": fxopt.capture(network(), images()[0])}, "another model"),
        ({"teacher": network()}, "teacher was None"),
        ({"loss": F.mse_loss}, "loss was '[^']*cross_entropy' and is '[^']*mse_loss'"),
        ({"evaluate": accuracy}, "evaluate was None and is '[^']*accuracy'"),
    ],
)
def test_another_run_is_refused_and_the_file_kept(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.pt"
    tune(network(), shuffled(), epochs=3, checkpoint=path)
    before = path.read_bytes()
    given = {"model": network(), "data": shuffled(), "epochs": 3, "checkpoint": path, **change}
    with pytest.raises(fxopt.OptionError, match=says):
        tune(given.pop("model"), given.pop("data"), **given)
    assert path.read_bytes() == before


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    tune(network(), shuffled(), checkpoint=path)
    other = network()
    with torch.no_grad():
        other[9].bias[0] += 1e-3
    with pytest.raises(fxopt.OptionError, match="other weights"):
        tune(other, shuffled(), checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"my thesis", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_never_overwritten(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "thesis.pt"
    path.write_bytes(content)
    with pytest.raises(fxopt.ArtefactError, match="thesis.pt"):
        tune(network(), shuffled(), checkpoint=path)
    assert path.read_bytes() == content
    torch.save({"weights": 1}, path)
    with pytest.raises(fxopt.ArtefactError, match=r"not a checkpoint of fxopt.finetune"):
        tune(network(), shuffled(), checkpoint=path)


def test_a_path_that_cannot_be_written_shows_before_anything_takes_long(tmp_path: Path) -> None:
    evaluate = killed_at(1, accuracy)
    with pytest.raises(fxopt.ArtefactError, match="Cannot write"):
        tune(network(), shuffled(), evaluate=evaluate, checkpoint=tmp_path / "missing" / "run.pt")


def test_nan_keeps_the_checkpoint_from_before(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    x, y = images(16)
    data = [(x, y), (x * float("nan"), y)]
    with pytest.raises(fxopt.FxoptError, match="checkpoint from before was kept"):
        tune(network(), data, checkpoint=path, checkpoint_minutes=0.0)
    state = torch.load(path, weights_only=True)["state"]
    assert state["at"]["steps"] == 1
    assert all(bool(t.isfinite().all()) for t in state["step"]["student"].values())


def interrupting(at: int, send: Callable[[], None]) -> Callable[..., torch.Tensor]:
    """A loss that is interrupted at its nth call, in the middle of a step."""
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            send()
        return F.cross_entropy(outputs, targets)

    loss.__module__, loss.__qualname__ = F.cross_entropy.__module__, F.cross_entropy.__qualname__
    return loss


@pytest.mark.parametrize("call", [2, 4, 12], ids=["inside", "last-of-epoch", "very-last"])
def test_ctrl_c_keeps_everything_that_was_done(call: int, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    whole = tune(network(), shuffled())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=f"after step {call}; the same call goes on"):
        tune(network(), shuffled(), checkpoint=path, loss=interrupting(
            call, lambda: os.kill(os.getpid(), signal.SIGINT)))  # fmt: skip
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(path, weights_only=True)["state"]["at"]["steps"] == call
    parts = tune(network(), shuffled(), checkpoint=path)
    assert same(weights(parts.model), weights(whole.model))


@pytest.mark.parametrize("call", [2, 4], ids=["in-between", "at-the-end"])
def test_ctrl_c_while_evaluating_stops_behind_it(call: int, tmp_path: Path) -> None:
    calls = 0

    def evaluate(model: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return accuracy(model)

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        tune(network(), shuffled(), checkpoint=path, evaluate=evaluate)
    state = torch.load(path, weights_only=True)["state"]
    assert state["at"]["steps"] == 4 * (call - 1) and len(state["history"]) == call


def test_a_second_ctrl_c_acts_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        for _ in range(2):
            _thread.interrupt_main()
        for _ in range(100):  # a signal is handled between two instructions
            continue
        raise AssertionError("it went on")

    with pytest.raises(KeyboardInterrupt):
        tune(network(), shuffled(), checkpoint=tmp_path / "run.pt", loss=interrupting(2, twice))
