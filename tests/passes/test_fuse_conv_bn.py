"""fuse-conv-bn: what folds, what must not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.capture import capture
from fxopt.passes.fuse_conv_bn import FuseConvBn
from fxopt.rewrite import fuel
from fxopt.testing import check_pass, noisy, op_counts, relative_error

FOLDED = {"batch_norm": 0, "instance_norm": 0}


class Calls(nn.Module):
    """A model made of named layers and a function of them and the input."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def image(channels: int = 4, size: int = 6) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


# -- behind a layer -----------------------------------------------------------------------------------

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "conv2d, norm without weights": (
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 6, 6)
    ),
    "conv2d, large epsilon": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5), (2, 4, 6, 6)),
    "conv2d of two groups": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "depthwise conv2d": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 6, 6)),
    "conv2d of one channel": (nn.Conv2d(4, 1, 3), nn.BatchNorm2d(1), (2, 4, 6, 6)),
    "conv2d, same padding": (
        nn.Conv2d(4, 6, (4, 3), padding="same"), nn.BatchNorm2d(6), (2, 4, 6, 6)
    ),
    "conv2d, reflected": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 6, 6)
    ),
    "conv3d": (nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), (2, 2, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(6), (2, 4, 5, 5),
    ),
    "transposed 2d of two groups": (
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)
    ),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6), (1, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
    "synchronized": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 6, 6)),
    "instance norm": (
        nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        (2, 4, 6, 6),
    ),
    "instance norm without weights": (
        nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, track_running_stats=True), (2, 4, 6)
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_folds_into_the_layer_before(case: str) -> None:
    layer, norm, shape = LAYERS[case]
    model = nn.Sequential(layer, norm)
    check_pass(FuseConvBn(), model, torch.randn(shape), after=FOLDED, rewrites=1, misses=[])


def test_the_new_graph_reads_as_expected() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    check_pass(FuseConvBn(), model, torch.randn(1, 3, 2, 2), text="""
%input_1: f64[1,3,2,2] = input
%_0_weight_folded: f64[4,3,1,1] = constant '0.weight_folded'
%_0_bias_folded: f64[4] = constant '0.bias_folded'
%conv2d: f64[1,4,2,2] = conv2d(%input_1, %_0_weight_folded, %_0_bias_folded, [1, 1], [0, 0], [1, 1], 1)
%relu: f64[1,4,2,2] = relu(%conv2d)
return (%relu)
""")  # noqa: E501
