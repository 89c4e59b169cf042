"""Batch norms that stand alone, by both ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.backends.eager.cpu.lower_batch_norms import LowerBatchNorms
from tests.backends.eager.lowered import LIBRARY, Always, check_lowering, graph_of, operators

pytestmark = pytest.mark.skipif(not LIBRARY, reason="oneDNN's own library is not installed")
WAYS = [*LIBRARY, "as it is"]


class Norm(nn.Module):
    """A batch norm, and what follows it."""

    def __init__(
        self, norm: nn.Module, then: Callable[[torch.Tensor], torch.Tensor] = F.relu
    ) -> None:
        super().__init__()
        self.norm, self.then = norm, then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(self.norm(x))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("then", [F.relu, F.silu, torch.neg])
def test_norms(way: str, affine: bool, then: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Norm(nn.BatchNorm2d(5, eps=0.3, affine=affine), then)
    graph = graph_of(model, torch.randn(2, 5, 9, 7))
    lowered, _ = check_lowering(graph, LowerBatchNorms(Always(way)))
    assert operators(lowered)["fxopt::convolution"] == (way in LIBRARY)
    assert operators(lowered)["relu"] == (way == "as it is" and then is F.relu)


def test_a_norm_that_two_read_keeps_its_activation() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return F.relu(y) + y

    graph = graph_of(Twice(), torch.randn(2, 4, 9, 7))
    lowered, _ = check_lowering(graph, LowerBatchNorms(Always(LIBRARY[0])))
    assert operators(lowered)["relu"] == 1


def test_dynamic_sizes() -> None:
    axes = {0: "batch", 3: "width"}
    graph = graph_of(
        Norm(nn.BatchNorm2d(4)), torch.randn(2, 4, 9, 7), dynamic_shapes={"x": axes}
    )
    others = [(torch.randn(5, 4, 9, 3),), (torch.randn(1, 4, 9, 1),)]
    check_lowering(graph, LowerBatchNorms(Always(LIBRARY[0])), *others)


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.BatchNorm1d(4), torch.randn(3, 4), "no image with a batch"),
        (nn.BatchNorm2d(4, track_running_stats=False), torch.randn(3, 4, 2, 2), "of the batch"),
        (nn.BatchNorm2d(4).double(), torch.randn(3, 4, 2, 2).double(), "rounded to torch.float64"),
    ],
)
def test_what_is_left_alone(model: nn.Module, x: torch.Tensor, reason: str) -> None:
    result = LowerBatchNorms(Always(LIBRARY[0])).run(graph_of(model, x).copy())
    assert not result.modified and reason in result.misses[0].reason
