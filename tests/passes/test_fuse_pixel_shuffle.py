"""fuse-pixel-shuffle: the two shuffles, and orders of dimensions that are neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.passes.fuse_pixel_shuffle import FusePixelShuffle
from fxopt.testing import check_pass

X = torch.randn(2, 8, 4, 6, generator=torch.Generator().manual_seed(0))


class Shuffle(torch.nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, shuffle: Callable[[Any], Any]) -> None:
        super().__init__()
        self.shuffle = shuffle

    def forward(self, x: torch.Tensor) -> Any:
        return self.shuffle(x)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 2, 2, 2, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(-1, 2, 8, 12)


def unshuffled(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 8, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(-1, 32, 2, 3)


@pytest.mark.parametrize(
    ("shuffle", "name"), [(shuffled, "pixel_shuffle"), (unshuffled, "pixel_unshuffle")]
)
def test_shuffles_get_their_names(shuffle: Callable[[Any], Any], name: str) -> None:
    after = {name: 1, "reshape": 0, "permute": 0}
    check_pass(FusePixelShuffle(), Shuffle(shuffle), X, rewrites=1, after=after, tolerance=0)
    names = {"x": {0: "n"}}
    check_pass(FusePixelShuffle(), Shuffle(shuffle), X, after=after, dynamic_shapes=names)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_any_dtype(dtype: torch.dtype) -> None:
    model = Shuffle(lambda x: shuffled((x * 9).to(dtype)))
    check_pass(
        FusePixelShuffle(), model, X, rewrites=1, double=False, gradients=False, tolerance=0
    )


@pytest.mark.parametrize(
    ("shuffle", "reason"),
    [
        (lambda x: x.view(2, 2, 2, 2, 4, 6).permute(0, 3, 4, 1, 5, 2).reshape(2, 2, 8, 12), None),
        (lambda x: x.view(2, 2, 2, 2, 4, 6).permute(0, 1, 4, 3, 5, 2).reshape(2, 2, 8, 12), None),
        (lambda x: x.view(2, 2, 4, 1, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 16, 6),
         "no squares"),
        (lambda x: x.view(4, 2, 2, 2, 4, 3).permute(0, 1, 4, 2, 5, 3).reshape(4, 2, 8, 6),
         "cuts more than channels"),
        (lambda x: x.view(2, 2, 2, 2, 4, 6).permute(0, 1, 4, 2, 5, 3).reshape(2, 2, 12, 8),
         "does not join blocks with pixels"),
        (lambda x: x.view(2, 8, 4, 1, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 16, 4, 3),
         "no squares"),
        (lambda x: x.view(4, 4, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(4, 16, 2, 3),
         "cuts more than pixels"),
        (lambda x: x.view(2, 8, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 16, 4, 3),
         "does not join blocks with channels"),
    ],
)  # fmt: skip
def test_other_orders_stay(shuffle: Callable[[Any], Any], reason: str | None) -> None:
    wanted = [] if reason is None else [reason]
    check_pass(FusePixelShuffle(), Shuffle(shuffle), X, rewrites=0, misses=wanted)


def test_shared_values_stay() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = x.view(2, 2, 2, 2, 4, 6).permute(0, 1, 4, 2, 5, 3)
            return y.reshape(2, 2, 8, 12), y.sum(0)

    check_pass(FusePixelShuffle(), Both(), X, rewrites=0, misses=["is used elsewhere too"])
