"""Multiply-accumulates, against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxopt
from fxopt.cost import macs
from fxopt.vision import import_torchvision


def total(model: nn.Module, x: object) -> int:
    graph = fxopt.capture(model, x)
    return sum(map(macs, graph.graph.nodes))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        nn.Conv2d(4, 6, (1, 4), padding="same"),
    ],
    ids=["grouped", "transposed", "same"],
)
def test_convolutions(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 9, 9)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert total(layer, x) == counter.get_total_flops() // 2


def test_attention_and_products() -> None:
    class Products(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            y = F.scaled_dot_product_attention(q, k, k)
            return y @ k.mT + torch.einsum("bhij,bhkj->bhik", q, k)

    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    assert total(Products(), (q, k)) == 2 * 3 * 5 * 7 * (16 + 8 + 8)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_whole_networks(name: str) -> None:
    model = import_torchvision().models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert total(model, x) == counter.get_total_flops() // 2
