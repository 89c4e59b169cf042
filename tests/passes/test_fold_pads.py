"""fold-pads: which pads and crops a layer takes over, which not, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.capture import capture
from fxopt.passes.fold_pads import FoldPads
from fxopt.testing import check_pass


class Calls(nn.Module):
    """A function of a convolution and the input."""

    def __init__(self, call: Callable[..., Any], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.call = call
        self.conv = conv or nn.Identity()

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.conv, x)


def padded(*pad: int, value: float = 0.0) -> Callable[..., Any]:
    return lambda conv, x: conv(F.pad(x, pad, value=value))


def conv(kernel: Any = 3, stride: Any = 2, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(2, 3, kernel, stride, **options)


LOW = -math.inf
IMAGE = (1, 2, 8, 8)

FOLDED: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "left and top": (Calls(padded(1, 0, 1, 0), conv()), IMAGE),
    "more on the left": (Calls(padded(2, 1, 2, 1), conv(5)), IMAGE),
    "right and bottom, never read": (Calls(padded(0, 1, 0, 1), conv(2)), IMAGE),
    "both sides": (Calls(padded(1, 1, 2, 2), conv(3, 1)), IMAGE),
    "one axis": (Calls(padded(1, 0), conv((1, 3))), IMAGE),
    "an axis more, by nothing": (Calls(padded(1, 0, 1, 0, 0, 0), conv()), IMAGE),
    "beside padding of its own": (Calls(padded(1, 0, 1, 0), conv(5, padding=1)), IMAGE),
    "dilated": (Calls(padded(2, 1, 2, 1), conv(3, dilation=2)), IMAGE),
    "not batched": (Calls(padded(1, 0, 1, 0), conv()), IMAGE[1:]),
    "1d": (Calls(padded(1, 0), nn.Conv1d(2, 3, 3, 2)), (1, 2, 8)),
    "3d": (Calls(padded(*(1, 0) * 3), nn.Conv3d(1, 2, 3, 2)), (1, 1, 4, 6, 8)),
    "maximum, left": (Calls(padded(1, 0, 1, 0, value=LOW), nn.MaxPool2d(3, 2)), IMAGE),
    "maximum, right": (Calls(padded(0, 1, 0, 1, value=LOW), nn.MaxPool2d(3, 2)), IMAGE),
    "maximum, both": (Calls(padded(1, 1, 1, 1, value=LOW), nn.MaxPool2d(3, 2)), IMAGE),
    "maximum, rounded up": (
        Calls(padded(1, 0, 1, 0, value=LOW), nn.MaxPool2d(3, 2, ceil_mode=True)), (1, 2, 7, 8)
    ),
    "maximum, dilated": (
        Calls(padded(1, 0, 1, 1, value=LOW), nn.MaxPool2d(3, 2, dilation=3)), IMAGE
    ),
    "maximum, 1d": (Calls(padded(0, 1, value=LOW), nn.MaxPool1d(3, 2)), (1, 2, 8)),
    "average": (Calls(padded(1, 1, 1, 1), nn.AvgPool2d(3, 1)), IMAGE),
    "average, left": (Calls(padded(1, 0, 1, 0), nn.AvgPool2d(3, 2)), IMAGE),
    "average, padded by itself": (Calls(padded(1, 1, 1, 1), nn.AvgPool2d(4, 2, 1)), IMAGE),
    "average that would not count": (
        Calls(padded(1, 1, 1, 1), nn.AvgPool2d(3, 1, count_include_pad=False)), IMAGE
    ),
    "average with a divisor": (
        Calls(padded(1, 1), nn.AvgPool2d(3, 1, divisor_override=2)), IMAGE
    ),
    "average, 1d": (Calls(padded(1, 1), nn.AvgPool1d(3, 1)), (1, 2, 8)),
    "average, 3d": (Calls(padded(1, 1), nn.AvgPool3d(3, 1)), (1, 1, 4, 6, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDED)
def test_folds_a_pad(case: str) -> None:
    model, shape = FOLDED[case]
    check_pass(FoldPads(), model, torch.randn(shape), after={"pad": 0}, rewrites=1, misses=[])


CROPPED: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "less padding": (Calls(lambda c, x: c(x)[:, :, 1:-1, 1:-1], conv(3, 1, padding=2)), IMAGE, 2),
    "all of the padding": (Calls(lambda c, x: c(x)[..., 1:7], conv(3, 1, padding=1)), IMAGE, 1),
    "strided": (
        Calls(lambda c, x: c(x)[..., 1:-1], conv(3, (1, 2), padding=(0, 4))), (1, 2, 7, 7), 1
    ),
    "1d": (Calls(lambda c, x: c(x)[..., 2:-2], nn.Conv1d(2, 3, 5, padding=4)), (1, 2, 8), 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CROPPED)
def test_folds_a_crop(case: str) -> None:
    model, shape, rewrites = CROPPED[case]
    check_pass(
        FoldPads(), model, torch.randn(shape), after={"slice": 0}, rewrites=rewrites, misses=[]
    )


def test_a_pooling_of_the_last_column_reads_as_expected() -> None:
    model, shape = FOLDED["maximum, right"]
    check_pass(FoldPads(), model, torch.randn(shape), text="""
%x: f64[1,2,8,8] = input
%max_pool2d_1: f64[1,2,4,4] = max_pool2d(%x, [3, 3], [2, 2], [0, 0], [1, 1], True)
return (%max_pool2d_1)
""")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0])
@pytest.mark.parametrize("case", ["maximum, right", "maximum, left", "average, left"])
def test_special_values_stay(case: str, value: float) -> None:
    model, shape = FOLDED[case]
    x = torch.randn(shape)
    x[..., ::3, 1::2] = value
    graph = capture(model, x)
    assert FoldPads().run(graph).rewrites == 1
    torch.testing.assert_close(graph(x), model(x), equal_nan=True)


KEPT: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "right and bottom": (Calls(padded(0, 1, 0, 1), conv()), IMAGE, "not [4, 4]"),
    "left, and one output more": (Calls(padded(1, 0, 1, 0), conv(3, 1)), IMAGE, "not [7, 7]"),
    "larger than the input": (Calls(padded(0, 9), conv((1, 9), 1)), IMAGE, "outputs, not [8, 9]"),
    "channels": (Calls(padded(0, 0, 0, 0, 1, 0), nn.Conv2d(3, 3, 3)), IMAGE, "pads channels"),
    "a cut": (Calls(padded(-1, 1), conv()), IMAGE, "negative"),
    "a cut before a maximum": (
        Calls(padded(-1, 1, value=LOW), nn.MaxPool2d(2)), IMAGE, "negative"
    ),
    "a cut before an average": (Calls(padded(-1, 1), nn.AvgPool2d(2)), IMAGE, "negative"),
    "other numbers": (Calls(padded(1, 0, 1, 0, value=1.0), conv()), IMAGE, ""),
    "zeros before a maximum": (
        Calls(padded(1, 0, 1, 0), nn.MaxPool2d(3, 2)), IMAGE, "may be the maximum"
    ),
    "a maximum of nothing": (
        Calls(padded(2, 2, value=LOW), nn.MaxPool2d(3, 1)), IMAGE, "more than half"
    ),
    "a maximum too far to the right": (
        Calls(padded(0, 3, value=LOW), nn.MaxPool2d(2, 1)), IMAGE, "outputs, not [7, 10]"
    ),
    "an average of nothing": (Calls(padded(2, 2), nn.AvgPool2d(3, 1)), IMAGE, "more than half"),
    "an average of the right": (Calls(padded(0, 1), nn.AvgPool2d(3, 2)), IMAGE, "not [3, 4]"),
    "an average that does not count": (
        Calls(padded(1, 1), nn.AvgPool2d(4, 1, 1, count_include_pad=False)), IMAGE, "not count"
    ),
    "an average rounded up": (
        Calls(padded(1, 0, 1, 0), nn.AvgPool2d(3, 2, ceil_mode=True)), IMAGE, ""
    ),
    "a crop of the right": (
        Calls(lambda c, x: c(x)[..., :-1], conv(3, 1, padding=1)), IMAGE, "not [8, 7]"
    ),
    "a crop beyond the padding": (
        Calls(lambda c, x: c(x)[..., 2:-2], conv(3, 1, padding=1)), IMAGE, "more than the padding"
    ),
    "a crop that is not all": (
        Calls(lambda c, x: ((y := c(x))[..., 1:-1], y.relu()), conv(3, 1, padding=1)), IMAGE,
        "used elsewhere",
    ),
    "a crop of channels": (
        Calls(lambda c, x: c(x)[:, 1:], conv(3, 1, padding=1)), IMAGE, ""
    ),
    "every second position": (
        Calls(lambda c, x: c(x)[..., 1:-1:2], conv(3, 1, padding=1)), IMAGE, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_stays(case: str) -> None:
    model, shape, reason = KEPT[case]
    misses = [reason] if reason else []
    finite = "maximum" not in case  # a maximum of −∞ alone
    check_pass(
        FoldPads(), model, torch.randn(shape), rewrites=0, misses=misses, gradients=finite
    )


def test_a_size_that_is_not_known_prevents_it() -> None:
    model, shape = FOLDED["left and top"]
    check_pass(
        FoldPads(), model, torch.randn(shape), dynamic_shapes={2: "height"}, rewrites=0,
        misses=["the size is not known"],
    )
    check_pass(FoldPads(), model, torch.randn(shape), dynamic_shapes={0: "batch"}, rewrites=1)


def test_a_pad_that_others_read_stays_for_them() -> None:
    def call(conv: Any, x: torch.Tensor) -> Any:
        y = F.pad(x, (1, 0, 1, 0))
        return conv(y), y.relu()

    check_pass(FoldPads(), Calls(call, conv()), torch.randn(IMAGE), after={"pad": 1}, rewrites=1)


def test_one_pad_goes_into_every_convolution_behind_it() -> None:
    def call(conv: Any, x: torch.Tensor) -> Any:
        y = F.pad(x, (1, 1, 1, 1))
        return conv(y), F.conv2d(y, conv.weight, padding=1, dilation=2)

    graph, _ = check_pass(FoldPads(), Calls(call, conv()), torch.randn(IMAGE), after={"pad": 0})
    layers = graph.find(torch.ops.aten.conv2d.default)
    assert [node.args[4] for node in layers] == [[1, 1], [2, 2]]
