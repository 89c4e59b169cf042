"""What the analysis of channels says about small networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.channels import Channels, Role, channels_network
from fxopt.channels.reshapes import blocks
from fxopt.errors import OptionError


def channels(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> Channels:
    return Channels(fxopt.capture(model.eval(), inputs), **options)


def found(model: nn.Module, *inputs: torch.Tensor, **options: Any) -> dict[str, int]:
    return {one.name: one.channels for one in channels(model, *inputs, **options).families}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        x = x + self.b(F.relu(self.bn(self.a(x))))
        return self.head(x.mean((2, 3)))


def test_a_residual_sum_makes_one_family() -> None:
    got = channels(Residual(), torch.randn(1, 3, 8, 8))
    stem, a = got.families
    assert (stem.layers, stem.channels) == (("stem", "b"), 8)
    assert (a.layers, a.channels) == (("a",), 6)
    roles = {(m.constant, m.dim): m.role for m in (*stem.members, *a.members)}
    assert roles == {
        ("stem.weight", 0): Role.OUTPUT, ("stem.bias", 0): Role.SHIFT,
        ("a.weight", 1): Role.INPUT, ("b.weight", 0): Role.OUTPUT, ("b.bias", 0): Role.SHIFT,
        ("head.weight", 1): Role.INPUT, ("a.weight", 0): Role.OUTPUT, ("a.bias", 0): Role.SHIFT,
        ("bn.weight", 0): Role.SCALE, ("bn.bias", 0): Role.SHIFT,
        ("bn.running_mean", 0): Role.STATISTIC, ("bn.running_var", 0): Role.STATISTIC,
        ("b.weight", 1): Role.INPUT,
    }  # fmt: skip
    (frozen,) = got.frozen()
    assert (frozen.layer, frozen.count, frozen.reason.text) == ("head", 4, "the model returns them")


class Attention(nn.Module):
    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(16, 3 * heads * width)
        self.out = nn.Linear(heads * width, 16)

    def forward(self, x: torch.Tensor) -> Any:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


def test_heads_are_found_without_being_told() -> None:
    got = channels(Attention(4, 8), torch.randn(2, 5, 16))
    (heads,) = got.families
    assert (heads.kind, heads.channels) == ("heads", 4)
    assert heads.members[0].positions.shape == (4, 3 * 8)
    assert heads.members[0].positions[1].tolist() == [
        *range(8, 16), *range(40, 48), *range(72, 80)
    ]  # fmt: skip


def test_the_width_of_heads_by_policy_and_where_there_is_one_head() -> None:
    assert found(Attention(4, 8), torch.randn(2, 5, 16), heads="width") == {"qkv": 8}
    assert found(Attention(1, 8), torch.randn(2, 5, 16)) == {"qkv": 8}
    with pytest.raises(OptionError, match="heads must be one of"):
        found(Attention(4, 8), torch.randn(2, 5, 16), heads="both")


def test_frozen_channels_name_the_reason() -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(self.a(x).softmax(-1))

    got = channels(Softmax(), torch.randn(3, 4))
    assert not got.families
    assert {one.layer: one.reason.text.split()[1] for one in got.frozen()} == {
        "a": "softmax", "b": "model"
    }  # fmt: skip


def test_blocks_of_a_reshape() -> None:
    def of(*shapes: list[int]) -> list[tuple[list[int], list[int]]]:
        return list(blocks(*shapes))

    assert of([2, 12, 7], [2, 3, 4, 7]) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert of([2, 3, 4], [6, 4]) == [([0, 1], [0]), ([2], [1])]
    assert of([6, 4], [4, 6]) == [([0, 1], [0, 1])]
    assert of([1, 5], [5]) == [([0], []), ([1], [0])]
    assert of([5], [5, 1, 1]) == [([0], [0]), ([], [1]), ([], [2])]


def test_the_network_of_channels() -> None:
    network = channels_network(channels(Residual(), torch.randn(1, 3, 8, 8)))
    stem, a = ("family", "stem"), ("family", "a")
    assert set(network.predecessors(stem)) == {("layer", "stem"), ("layer", "b")}
    assert set(network.successors(stem)) == {("layer", "a"), ("layer", "head")}
    assert set(network.successors(a)) == {("layer", "b")}
    assert network.nodes["layer", "head"]["frozen"] == 4
    assert network.nodes["layer", "stem"]["frozen"] == 0
