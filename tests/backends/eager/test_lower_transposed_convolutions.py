"""Transposed convolutions by both ways."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.backends.eager.cpu import choice
from fxopt.backends.eager.cpu.lower_transposed_convolutions import LowerTransposedConvolutions
from tests.backends.eager.lowered import Always, check_lowering, graph_of, operators


@pytest.fixture(autouse=True)
def _nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_SMALL", 0)


@pytest.mark.parametrize("way", ["oneDNN", "as it is"])
@pytest.mark.parametrize(
    "conv",
    [
        nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1),
        nn.ConvTranspose2d(8, 16, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.ConvTranspose2d(8, 12, (2, 3), stride=(2, 1), dilation=(1, 2), groups=4),
        nn.ConvTranspose2d(8, 8, 3, groups=8),
    ],
    ids=str,
)
def test_geometries(way: str, conv: nn.ConvTranspose2d) -> None:
    graph = graph_of(nn.Sequential(conv, nn.ReLU()), torch.randn(2, 8, 9, 11))
    lowered, _ = check_lowering(graph, LowerTransposedConvolutions(Always(way)))
    assert operators(lowered)["relu"] == (way == "as it is")


@pytest.mark.parametrize("way", ["oneDNN", "as it is"])
def test_dynamic_sizes(way: str) -> None:
    model = nn.ConvTranspose2d(8, 16, 4, stride=2)
    axes = {0: "batch", 3: "width"}
    graph = graph_of(model, torch.randn(2, 8, 9, 11), dynamic_shapes={"input": axes})
    check_lowering(
        graph, LowerTransposedConvolutions(Always(way)), (torch.randn(3, 8, 9, 20),)
    )


def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = LowerTransposedConvolutions(Always("oneDNN"))
    double = nn.ConvTranspose2d(8, 16, 4).double()
    graph = graph_of(double, torch.randn(2, 8, 9, 11, dtype=torch.float64))
    result = one.run(graph.copy())
    assert not result.modified and "no kernels for torch.float64" in result.misses[0].reason
    monkeypatch.undo()
    assert not one.run(graph_of(nn.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3))).modified
