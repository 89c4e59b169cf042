"""Where the rules of move-permutes fire, and where they hold back."""

from __future__ import annotations

import torch.nn.functional as F

from fxopt.testing import Example

ROWS, WEIGHT = (2, 3, 4), {"w": (5, 4)}
NO_REASON, SHARED = "does not apply", "is used elsewhere too"

EXAMPLES: dict[str, list[Example]] = {
    "move_permute_behind_linear": [
        Example(
            lambda x, w: F.linear(x.permute(1, 0, 2), w).permute(0, 2, 1), ROWS, weights=WEIGHT
        ),
        Example(
            lambda x, w: F.linear(x.permute(1, 0, 2), w).sin(), ROWS, weights=WEIGHT,
            reason="no permute follows that it could be merged with",
        ),
        Example(
            lambda x, w: F.linear(x.permute(0, 2, 1), w).permute(1, 0, 2), (2, 4, 3),
            weights=WEIGHT, reason=NO_REASON,
        ),
        Example(
            lambda x, w: (lambda y: (y.sin(), F.linear(y, w).permute(0, 2, 1)))(
                x.permute(1, 0, 2)
            ),
            ROWS, weights=WEIGHT, reason=SHARED,
        ),
    ],
    "move_permute_before_linear": [
        Example(
            lambda x, w: F.linear(x.permute(0, 2, 1), w).permute(1, 0, 2), (2, 4, 3),
            weights=WEIGHT,
        ),
        Example(
            lambda x, w: F.linear(x.sin(), w).permute(1, 0, 2), ROWS, weights=WEIGHT,
            reason=NO_REASON,
        ),
        Example(
            lambda x, w: (lambda y: (y.sin(), y.permute(1, 0, 2)))(
                F.linear(x.permute(0, 2, 1), w)
            ),
            (2, 4, 3), weights=WEIGHT, reason=SHARED,
        ),
    ],
    "move_reshape_before_linear": [
        Example(
            lambda x, w: F.linear(x.permute(0, 2, 1).flatten(0, 1), w).reshape(2, 3, 5)
            .permute(1, 0, 2), (2, 4, 3), weights=WEIGHT,
        ),
        Example(
            lambda x, w: F.linear(x.sin().flatten(0, 1), w).reshape(2, 3, 5).permute(1, 0, 2),
            ROWS, weights=WEIGHT, reason=NO_REASON,
        ),
    ],
}  # fmt: skip
