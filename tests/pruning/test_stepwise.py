"""`fxopt.prune`: at once, in steps, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import OptionError
from fxopt.pruning.stepwise import pruning_record


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    one, two, three = nn.Linear(6, 64), nn.Linear(64, 32), nn.Linear(32, 3)
    return nn.Sequential(one, nn.ReLU(), two, nn.ReLU(), three)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def widths(graph: fxopt.GraphModule) -> list[int]:
    return [one.after for one in pruning_record(graph).widths]


@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        ("linear", [1 - 1 / 6, 1 - 2 / 6, 0.5]),
        ("cubic", [1 - 19 / 54, 1 - 26 / 54, 0.5]),
        (lambda part: part**2, [1 - 1 / 18, 1 - 4 / 18, 0.5]),
    ],
)
def test_steps_reach_the_ratio(model: Any, x: torch.Tensor, schedule: Any, after: Any) -> None:
    seen: list[list[int]] = []
    graph = fxopt.prune(
        model, x, ratio=0.5, steps=3, schedule=schedule,
        between=lambda graph: seen.append(widths(graph)),
    )  # fmt: skip
    for found, share in zip(seen, after, strict=True):
        assert abs(found[0] - 64 * share) <= 1
        assert abs(found[1] - 32 * share) <= 1
    assert widths(graph) == seen[-1]
    assert graph(x).shape == (2, 3)


def test_training_between_decides_what_goes_next(model: Any, x: torch.Tensor) -> None:
    """Weights that training makes small go in the next step."""

    def shrink(graph: fxopt.GraphModule) -> None:
        with torch.no_grad():
            for name, weight in graph.named_parameters():
                if name.startswith("0.weight"):
                    weight[10:] = 0

    graph = fxopt.prune(
        model, x, ratio=0.5, steps=2, between=shrink, importance="l1(roles=('output',))"
    )
    weight = next(v for k, v in graph.named_parameters() if k.startswith("0.weight"))
    assert (weight[:10] != 0).any(1).all()
    assert (weight[10:] == 0).all()


def test_a_trained_graph_may_be_returned(model: Any, x: torch.Tensor) -> None:
    data = [(x, torch.tensor([0, 1]))]

    def train(graph: fxopt.GraphModule) -> Any:
        return fxopt.finetune(
            graph, data, loss=nn.functional.cross_entropy, steps=2, progress=False
        ).model

    graph = fxopt.prune(model, x, steps=2, between=train)
    assert widths(graph) == [32, 16]
    with pytest.raises(OptionError, match="returned a Linear"):
        fxopt.prune(model, x, steps=2, between=lambda graph: nn.Linear(1, 1))


def test_refuses(model: Any, x: torch.Tensor) -> None:
    with pytest.raises(OptionError, match="steps must be"):
        fxopt.prune(model, x, steps=0)
    with pytest.raises(OptionError, match="schedule must be one of"):
        fxopt.prune(model, x, schedule="cosine")
    with pytest.raises(OptionError, match="raito"):
        fxopt.prune(model, x, raito=0.5)
    with pytest.raises(OptionError, match="was not pruned"):
        pruning_record(fxopt.capture(model, x))


def test_the_record_reads_well(model: Any, x: torch.Tensor) -> None:
    record = pruning_record(fxopt.prune(model, x))
    assert record.table() == "0      64 →     32\n2      32 →     16"
    assert str(record).splitlines() == [
        "channels 96 → 48 (−50%), MACs 5,056 → 1,504 (−70%), parameters 2,627 → 803 (−69%)",
        f"the original with those channels zeroed where they are read computes the same: error "
        f"{record.error:.2g} (bound 1e-05)",
        "frozen: what '4' computes: the model returns them",
    ]
