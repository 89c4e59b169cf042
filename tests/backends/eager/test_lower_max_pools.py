"""Maximum pooling by both ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.backends.eager.cpu.lower_max_pools import LowerMaxPools
from tests.backends.eager.lowered import LIBRARY, Always, check_lowering, graph_of, operators

pytestmark = pytest.mark.skipif(not LIBRARY, reason="oneDNN's own library is not installed")
WAYS = [*LIBRARY, "as it is"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [(7, 9), (8, 8), (11, 6)], ids=str)
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d((2, 3), stride=(2, 3), padding=(0, 1), dilation=(2, 1), ceil_mode=True),
        nn.MaxPool2d(5, stride=1, padding=2),
        nn.MaxPool2d(3, stride=3, padding=1, ceil_mode=True),
    ],
    ids=str,
)
def test_geometries(way: str, pool: nn.MaxPool2d, size: tuple[int, int]) -> None:
    graph = graph_of(pool, torch.randn(2, 5, *size))
    lowered, _ = check_lowering(graph, LowerMaxPools(Always(way)), bound=0.0)
    assert operators(lowered)["fxopt::max_pool"] == (way in LIBRARY)


@pytest.mark.parametrize("way", WAYS)
def test_dynamic_sizes(way: str) -> None:
    axes = {0: "batch", 2: "height"}
    graph = graph_of(
        nn.MaxPool2d(3, 2, 1), torch.randn(2, 5, 9, 11), dynamic_shapes={"input": axes}
    )
    others = [(torch.randn(3, 5, 30, 11),), (torch.randn(1, 5, 8, 11),)]
    check_lowering(graph, LowerMaxPools(Always(way)), *others, bound=0.0)


def test_what_is_left_alone() -> None:
    one = LowerMaxPools(Always(LIBRARY[0]))
    pool = nn.MaxPool2d(2)
    result = one.run(graph_of(pool, torch.randn(1, 3, 8, 8).double()).copy())
    assert not result.modified and "no kernels for torch.float64" in result.misses[0].reason
    result = one.run(graph_of(pool, torch.randn(3, 8, 8)).copy())
    assert not result.modified and "without a batch" in result.misses[0].reason


def test_without_the_library(without_library: None) -> None:
    graph = graph_of(nn.MaxPool2d(2), torch.randn(1, 3, 8, 8)).copy()
    assert not LowerMaxPools(None).run(graph).modified
