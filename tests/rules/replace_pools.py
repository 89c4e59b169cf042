"""Where the rules of replace-pools fire, and where they hold back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.testing import Example

IMAGE = (2, 3, 6, 6)
SHARED = "is used elsewhere too"
NO_REASON = "does not apply"
REDUCTIONS = {"mean.dim": torch.mean, "sum.dim_IntList": torch.sum, "amax": torch.amax,
              "amin": torch.amin}  # fmt: skip
OPTIONS = {  # of equal numbers, both orders share the gradient in ways of their own
    f"merge_reductions[{name}]": {"inexact_at": {"kink"}} for name in ("amax", "amin")
}


def reduced_twice(name: str) -> Example:
    reduce = REDUCTIONS[name]
    return Example(lambda x: reduce(reduce(x, (3,)), (1,)), (2, 3, 4, 5))


def reduced_flat(name: str) -> Example:
    reduce = REDUCTIONS[name]
    return Example(lambda x: reduce(x.flatten(2), (2,)), (2, 3, 4, 5))


EXAMPLES: dict[str, list[Example]] = {
    "replace_flat_pool": [
        Example(lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), IMAGE),
        Example(lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1), IMAGE, reason=NO_REASON),
        Example(
            lambda x: (lambda y: (y.flatten(1), y * x))(F.adaptive_avg_pool2d(x, 1)), IMAGE,
            reason=SHARED,
        ),
    ],
    "replace_kept_mean": [
        Example(lambda x: x.mean((2, 3), keepdim=True), IMAGE),
        Example(lambda x: x.mean((1, 2), keepdim=True), IMAGE, reason="[2, 3] is wanted"),
    ],
    "replace_whole_window": [
        Example(lambda x: F.avg_pool2d(x, 6), IMAGE),
        Example(lambda x: F.avg_pool2d(x, 3), IMAGE, reason=NO_REASON),
        Example(
            lambda x: F.avg_pool2d(x, 2), torch.arange(8).reshape(2, 1, 2, 2),
            reason="it is not floating point",
        ),
    ],
    "replace_even_windows": [
        Example(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), IMAGE),
        Example(lambda x: F.adaptive_avg_pool2d(x, (4, 4)), IMAGE, reason="to [4, 4] overlap"),
    ],
    **{f"merge_reductions[{name}]": [reduced_twice(name)] for name in REDUCTIONS},
    **{f"merge_flat_reduction[{name}]": [reduced_flat(name)] for name in REDUCTIONS},
}  # fmt: skip
EXAMPLES["merge_reductions[mean.dim]"].append(
    Example(lambda x: (lambda y: (y, y.mean(1)))(x.mean(3)), (2, 3, 4, 5), reason=SHARED)
)
EXAMPLES["merge_flat_reduction[mean.dim]"].append(
    Example(lambda x: (lambda y: (y, y.mean(2)))(x.flatten(2)), (2, 3, 4, 5), reason=SHARED)
)
