"""Where the rules of fuse-norms fire, and where they hold back."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxopt.testing import Example

ROWS, IMAGE = (3, 5, 8), (2, 6, 4, 5)


def layer_norm(x: Any, *, unbiased: bool = False, dims: Any = -1) -> Any:
    centred = x - x.mean(dims, keepdim=True)
    return centred / torch.sqrt(x.var(dims, unbiased=unbiased, keepdim=True) + 1e-5)


def rms_norm(x: Any, dim: int = -1) -> Any:
    return x * torch.rsqrt(x.square().mean(dim, keepdim=True) + 1e-5)


# What is rounded to half precision differs by as much, and its gradient is all rounding.
OPTIONS = {"remove_casts_around_norm": {"tolerance": 1e-4, "gradients": False}}

EXAMPLES: dict[str, list[Example]] = {
    "fuse_layer_norm": [
        Example(
            lambda x: (lambda d: d / torch.sqrt(d.square().mean(-1, True) + 1e-5))(
                x - x.mean(-1, True)
            ),
            ROWS,
        ),
        Example(layer_norm, ROWS),
        Example(lambda x: layer_norm(x, dims=1), (2, 64, 3, 4)),
        Example(
            lambda x: layer_norm(x, unbiased=True), ROWS,
            reason="its variance divides by n − 1, and that of a norm by n",
        ),
        Example(
            lambda x: layer_norm(x, dims=1), IMAGE,
            reason="it goes over few channels, and two permutes cost more than they save",
        ),
        Example(
            lambda x: layer_norm(x, dims=0), ROWS,
            reason="it goes over dimensions [0], and a norm goes over the last",
        ),
    ],
    "keep_norm_of_other_eps": [
        Example(
            lambda x: (x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-5), ROWS,
            reason="it does not add ε to its variance",
        ),
    ],
    "keep_norm_of_difference": [
        Example(
            lambda x: (x - x.mean(-1, True)) * torch.rsqrt(
                x.square().mean(-1, True) - x.mean(-1, True).square() + 1e-5
            ),
            ROWS, reason="E[x²] − E[x]² loses the digits that a norm keeps",
        ),
    ],
    "fuse_rms_norm": [
        Example(rms_norm, ROWS),
        Example(
            lambda x: rms_norm(x, 1), IMAGE,
            reason="over the channels of an image, rms_norm is slower than its pieces",
        ),
    ],
    "fuse_group_norm": [
        Example(lambda x: F.layer_norm(x.reshape(2, 3, -1), (40,)).reshape(2, 6, 4, 5), IMAGE),
        Example(
            lambda x: F.layer_norm(x.reshape(2, 4, -1), (30,)).reshape(2, 6, 4, 5), IMAGE,
            reason="does not apply",
        ),
    ],
    "replace_layer_norm_by_group_norm": [
        Example(lambda x, w: F.layer_norm(x, (6, 4, 5)) * w, IMAGE, weights={"w": (6, 1, 1)}),
        Example(
            lambda x, w: F.layer_norm(x, (6, 4, 5)) * w, IMAGE, weights={"w": (4, 1)},
            reason="does not apply",
        ),
    ],
    "fuse_weight": [
        Example(lambda x, w: F.layer_norm(x, (8,)) * w, ROWS, weights={"w": (8,)}),
        Example(lambda x, w: F.rms_norm(x, (8,), eps=1e-5) * w, ROWS, weights={"w": (8,)}),
        Example(
            lambda x, w: F.layer_norm(x, (8,)) * w, ROWS, weights={"w": (5, 1)},
            reason="does not apply",
        ),
        Example(
            lambda x, w: (lambda y: (y.sin(), y * w))(F.layer_norm(x, (8,))), ROWS,
            weights={"w": (8,)}, reason="is used elsewhere too",
        ),
    ],
    "fuse_bias": [
        Example(
            lambda x, w, b: F.layer_norm(x, (8,), w) + b, ROWS, weights={"w": (8,), "b": (8,)}
        ),
        Example(
            lambda x, w, b: F.layer_norm(x, (8,), w) + b, ROWS, weights={"w": (8,), "b": (5, 1)},
            reason="does not apply",
        ),
    ],
    "remove_casts_around_norm": [
        Example(
            lambda x: F.layer_norm(
                x.to(torch.bfloat16).float(), (8,)
            ).to(torch.bfloat16).to(x.dtype), ROWS,
        ),
        Example(
            lambda x: F.layer_norm(x.to(torch.bfloat16).float(), (8,)), ROWS, reason="wanted"
        ),
    ],
}  # fmt: skip
