"""repeat-roundings: where ONNX Runtime needs it, nowhere else, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.backends.onnx import Onnx
from fxopt.backends.onnx.repeat_roundings import RepeatRoundings
from fxopt.testing import check_pass
from tests.backends.onnx_check import expected, lowered
from tests.backends.quantized import Round, Rounded, agrees, float_layers, kernels

Change = Callable[[Any, torch.Tensor], torch.Tensor]


class Moved(nn.Module):
    """A rounded value that is moved in some way, and then read by a layer."""

    def __init__(self, change: Change, channels: int = 8) -> None:
        super().__init__()
        self.change = change
        self.round, self.other = Round(0.02, 10), Round(0.03, 10)
        self.conv, self.last = Rounded(nn.Conv2d(channels, 8, 3)), Round(0.02, 120)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.conv(self.change(self, x)))


def halves(m: Moved, x: torch.Tensor) -> torch.Tensor:
    left, right = m.round(x).chunk(2, 1)
    return torch.cat([right, left], 1)


MOVES: dict[str, tuple[Change, int, int]] = {
    "cat": (lambda m, x: torch.cat([m.round(x), m.round(x.sin())], 1), 16, 1),
    "cat of a part": (lambda m, x: torch.cat([m.round(x), m.round(x)[:, :4]], 1), 12, 1),
    "halves": (halves, 8, 3),
    "pixel shuffle": (lambda m, x: F.pixel_shuffle(m.round(x), 2), 2, 1),
    "upsampling": (lambda m, x: F.interpolate(m.round(x), scale_factor=2), 8, 1),
    "pad": (lambda m, x: F.pad(m.round(x), (1, 2, 0, 1)), 8, 1),
    "slice": (lambda m, x: m.round(x)[:, 2:6], 4, 0),
    "max pool": (lambda m, x: F.max_pool2d(m.round(x), 2), 8, 0),
    "transposition": (lambda m, x: m.round(x).transpose(2, 3), 8, 0),
}


@pytest.mark.parametrize("opset", [20, 22])
@pytest.mark.parametrize("name", MOVES)
def test_a_layer_behind_a_move_computes_with_integers(
    name: str, opset: int, tmp_path: Path
) -> None:
    change, channels, _ = MOVES[name]
    x = torch.randn(2, 8, 12, 12)
    model = Moved(change, channels).eval()
    executable = lowered(model, (x,), opset=opset)
    agrees(executable.run(x), tuple(expected(model, (x,))), step=0.02)
    counts = kernels(executable, tmp_path)
    assert counts["QLinearConv"] == 1 and not float_layers(counts), counts


@pytest.mark.parametrize("name", MOVES)
def test_rounds_once_behind_each_move(name: str) -> None:
    change, channels, more = MOVES[name]
    check_pass(
        RepeatRoundings(), Moved(change, channels), torch.randn(2, 8, 12, 12), rewrites=more,
        misses=[], add_noise=False, gradients=False,
    )  # fmt: skip


LEFT_ALONE: dict[str, tuple[Change, int]] = {
    "other scales": (lambda m, x: torch.cat([m.round(x), m.other(x)], 1), 16),
    "one is not rounded": (lambda m, x: torch.cat([m.round(x), x], 1), 16),
    "a pad that is no rounded number": (lambda m, x: F.pad(m.round(x), (1, 1), value=0.333), 8),
    "no move": (lambda m, x: m.round(x).sin(), 8),
    "rounded anew": (lambda m, x: m.other(F.pad(m.round(x), (1, 1))), 8),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_leaves_alone(name: str) -> None:
    check_pass(
        RepeatRoundings(), Moved(*LEFT_ALONE[name]), torch.randn(2, 8, 12, 12), rewrites=0,
        add_noise=False,
    )  # fmt: skip


def test_leaves_alone_what_is_returned_only_and_wide_ranges() -> None:
    class Returned(nn.Module):
        def __init__(self, *ends: int) -> None:
            super().__init__()
            self.round = Round(0.02, 10, *ends)

        def forward(self, x: torch.Tensor) -> Any:
            y = F.pad(self.round(x), (1, 1))
            return (y, y.sin()) if self.round.range[1] < 256 else y @ y.T

    for ends in ((0, 255), (0, 1023)):
        check_pass(RepeatRoundings(), Returned(*ends), torch.randn(3, 4), rewrites=0)


def test_is_for_the_cpu_of_onnx_runtime() -> None:
    assert RepeatRoundings() in Onnx().legalize
    assert RepeatRoundings() not in Onnx(providers=("CUDAExecutionProvider",)).legalize
