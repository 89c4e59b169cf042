"""Where the rules of fold-pads fire, and where they hold back."""

from __future__ import annotations

import math

import torch.nn.functional as F

from fxopt.testing import Example

IMAGE, WEIGHT = (2, 3, 6, 6), {"w": (4, 3, 3, 3)}
NEGATIVE = "a pad is negative, and cuts"

EXAMPLES: dict[str, list[Example]] = {
    "fold_pad_into_conv": [
        Example(lambda x, w: F.conv2d(F.pad(x, (1, 0, 1, 0)), w, stride=2), IMAGE, weights=WEIGHT),
        Example(lambda x, w: F.conv2d(F.pad(x, (1, 1, 2, 2)), w), IMAGE, weights=WEIGHT),
        Example(
            lambda x, w: F.conv2d(F.pad(x, (0, 1, 0, 1)), w), IMAGE, weights=WEIGHT,
            reason="with the left padding on both sides it has",
        ),
        Example(
            lambda x, w: F.conv2d(F.pad(x, (-1, -1)), w), IMAGE, weights=WEIGHT, reason=NEGATIVE
        ),
        Example(
            lambda x, w: F.conv2d(F.pad(x, (0, 0, 0, 0, 1, 1)), w), (2, 1, 6, 6), weights=WEIGHT,
            reason="it pads channels, or the batch",
        ),
    ],
    "fold_pad_into_max_pool": [
        Example(lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-math.inf), 3, 2), IMAGE),
        Example(lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-math.inf), 3, 2), IMAGE),
        Example(
            lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2), IMAGE,
            reason="it pads with a number that may be the maximum",
        ),
        Example(
            lambda x: F.max_pool2d(F.pad(x, (2, 2, 2, 2), value=-math.inf), 3, 2), IMAGE,
            reason="it pads more than half of the kernel",
        ),
    ],
    "fold_pad_into_avg_pool": [
        Example(lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2), IMAGE),
        Example(
            lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 4, 2, 1, count_include_pad=False), IMAGE,
            reason="the average does not count its own padding",
        ),
        Example(
            lambda x: F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 3, 2), IMAGE,
            reason="it pads more than half of the kernel",
        ),
    ],
    "fold_crop_into_conv": [
        Example(
            lambda x, w: F.conv2d(x, w, padding=2)[:, :, 1:-1], IMAGE, weights=WEIGHT
        ),
        Example(
            lambda x, w: F.conv2d(x, w, padding=1)[:, :, 2:], IMAGE, weights=WEIGHT,
            reason="it crops more than the padding",
        ),
        Example(
            lambda x, w: (lambda y: (y.sin(), y[:, :, 1:-1]))(F.conv2d(x, w, padding=2)), IMAGE,
            weights=WEIGHT, reason="is used elsewhere too",
        ),
    ],
}  # fmt: skip
