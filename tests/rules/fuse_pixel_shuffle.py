"""Where the rules of fuse-pixel-shuffle fire, and where they hold back."""

from __future__ import annotations

from typing import Any

from fxopt.testing import Example

PACKED, PLAIN = (2, 12, 4, 5), (2, 3, 8, 10)


def shuffle(x: Any, r: int = 2, s: int = 2) -> Any:
    n, c, h, w = x.shape
    y = x.reshape(n, c // (r * s), r, s, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // (r * s), h * r, w * s)


def unshuffle(x: Any, r: int = 2, s: int = 2) -> Any:
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // r, r, w // s, s).permute(0, 1, 3, 5, 2, 4)
    return y.reshape(n, c * r * s, h // r, w // s)


EXAMPLES: dict[str, list[Example]] = {
    "fuse_pixel_shuffle": [
        Example(shuffle, PACKED),
        Example(shuffle, (0, *PACKED[1:]), reason="leaves an empty image as it is"),
        Example(lambda x: shuffle(x, 3, 2), PACKED, reason="its blocks are no squares"),
        Example(
            lambda x: x.reshape(1, 6, 2, 2, 4, 5).permute(0, 1, 4, 2, 5, 3).reshape(1, 6, 8, 10),
            PACKED, reason="it cuts more than channels",
        ),
    ],
    "fuse_pixel_unshuffle": [
        Example(unshuffle, PLAIN),
        Example(unshuffle, (0, *PLAIN[1:]), reason="leaves an empty image as it is"),
        Example(lambda x: unshuffle(x, 4, 2), PLAIN, reason="its blocks are no squares"),
        Example(
            lambda x: (
                x.reshape(2, 3, 4, 2, 5, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 5, 4)
            ),
            PLAIN, reason="it does not join blocks with channels",
        ),
    ],
}  # fmt: skip
