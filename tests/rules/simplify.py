"""Where the rules of simplify fire, and where they hold back."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fxopt.testing import Example

NO_REASON = "does not apply"
SHARED = "is used elsewhere too"

EXAMPLES: dict[str, list[Example]] = {
    "merge_reshapes": [
        Example(lambda x: x.reshape(6, 4).reshape(2, 12), (2, 3, 4)),
        Example(lambda x: x.unsqueeze(1).reshape(2, 3, 4).sin(), (2, 3, 4)),
        Example(lambda x: x.flatten(1).unsqueeze(-1), (2, 3, 4)),
        Example(lambda x: x.sin().reshape(2, 12), (2, 3, 4), reason=NO_REASON),
        Example(lambda x: (lambda y: (y.sin(), y.reshape(2, 12)))(x.reshape(6, 4)), (2, 3, 4),
                reason=SHARED),
    ],
    "drop_kept_dims": [
        Example(lambda x: x.mean((2, 3), keepdim=True).flatten(1), (2, 3, 4, 5)),
        Example(lambda x: x.mean((2, 3)).flatten(1), (2, 3, 4, 5), reason=NO_REASON),
        Example(
            lambda x: (lambda y: (y * x, y.flatten(1)))(x.mean((2, 3), keepdim=True)),
            (2, 3, 4, 5), reason=SHARED,
        ),
    ],
    "merge_expands": [
        Example(lambda x: x.expand(2, 3, 4).expand(5, 2, 3, 4), (3, 4)),
        Example(
            lambda x: (lambda y: (y.sin(), y.expand(5, 2, 3, 4)))(x.expand(2, 3, 4)), (3, 4),
            reason=SHARED,
        ),
    ],
    "merge_slices": [
        Example(lambda x: x[:, 2:9][:, 1:5], (3, 10)),
        Example(lambda x: x[:, 2:9][:, ::2], (3, 10), reason="1 wanted, found 2"),
    ],
    "merge_select_of_slice": [
        Example(lambda x: x[:, 2:9][:, 1], (3, 10)),
        Example(lambda x: x[:, 2:9][1], (3, 10), reason="two different values"),
    ],
    "merge_cats": [
        Example(lambda x, y: torch.cat([torch.cat([x, y], 1), x], 1), (3, 4), (3, 2)),
        Example(lambda x, y: torch.cat([torch.cat([x, y], 1), x], 0), (3, 2), (3, 0),
                reason=NO_REASON),
        Example(
            lambda x, y: (lambda z: (z.sin(), torch.cat([z, x], 1)))(torch.cat([x, y], 1)),
            (3, 4), (3, 2), reason=SHARED,
        ),
    ],
    "merge_casts": [
        Example(
            lambda x: x.to(torch.int32).to(torch.int64), torch.arange(4, dtype=torch.int16)
        ),
        Example(lambda x: x.long().int() + 1, torch.arange(4, dtype=torch.int32)),
        Example(
            lambda x: x.to(torch.int8).to(torch.int64), torch.arange(4, dtype=torch.int16),
            reason="torch.int8 does not hold every value of torch.int16",
        ),
        Example(
            lambda x: x.to(torch.float32).to(torch.int8), torch.arange(4, dtype=torch.int16),
            reason="what is out of the range of torch.int8 may become another integer",
        ),
    ],
    "merge_bounds": [
        Example(lambda x: x.relu().clamp(max=6), (3, 4)),
        Example(lambda x: x.clamp(-1, 1).clamp(0, 2), (3, 4)),
        Example(lambda x: x.relu().relu(), (3, 4)),
        Example(lambda x: x.clamp(0, 1).clamp(2, 3), (3, 4), reason="the bounds cross"),
        Example(
            lambda x: (lambda y: (y.sin(), y.clamp(0, 2)))(x.clamp(-1, 3)), (3, 4), reason=SHARED
        ),
        Example(
            lambda x: x.clamp(-1, 1).clamp(0, 2), torch.arange(4, dtype=torch.uint8),
            reason="a large one to unsigned integers",
        ),
        Example(
            lambda x: F.hardtanh(x.clamp(0, 3), -1, 2), (3, 4),
            reason="no single call has this gradient at the bounds",
        ),
    ],
    "remove_relu_of_positive": [
        Example(lambda x: x.sigmoid().relu(), (3, 4)),
        Example(lambda x: x.exp().abs(), (3, 4)),
        Example(lambda x: x.tanh().relu(), (3, 4), reason=NO_REASON),
    ],
    "remove_double_negation": [
        Example(lambda x: x.neg().neg().sin(), (3, 4)),
        Example(lambda x: x.neg().abs().neg(), (3, 4), reason="neg wanted, found abs"),
    ],
    "merge_abs_of_neg": [
        Example(lambda x: x.neg().abs(), (3, 4)),
        Example(
            lambda x: x.neg().abs(), torch.arange(4, dtype=torch.uint8), reason="−x wraps around"
        ),
        Example(lambda x: (lambda y: (y.sin(), y.abs()))(x.neg()), (3, 4), reason=SHARED),
    ],
    "merge_roundings": [
        Example(lambda x: x.floor().round() + x, (3, 4)),
        Example(lambda x: x.sin().round() + x, (3, 4), reason=NO_REASON),
    ],
    "merge_neg_into_sum": [
        Example(lambda x, y: x + y.neg(), (3, 4), (3, 4)),
        Example(lambda x, y: x - y.neg(), (3, 4), (3, 4)),
        Example(
            lambda x, y: x + y.neg(), torch.arange(4), torch.arange(4, dtype=torch.uint8),
            reason="−y wraps around",
        ),
        Example(
            lambda x, y: (lambda z: (z.sin(), x + z))(y.neg()), (3, 4), (3, 4), reason=SHARED
        ),
    ],
    "merge_scalar_sums": [
        Example(lambda x: x + 2.0 + 0.5, (3, 4)),
        Example(lambda x: x - 2.0 - 0.5, (3, 4)),
        Example(
            lambda x: x + 2.0**23 - 2.0**23, (3, 4),
            reason="adding a number and taking one away is how one rounds",
        ),
        Example(
            lambda x: x + 100 + 100, torch.arange(4, dtype=torch.int8), reason="out of the range"
        ),
    ],
    "merge_scalar_products": [
        Example(lambda x: x * 0.5 * 3.0, (3, 4)),
        Example(lambda x: x / 4.0 * 3.0, (3, 4)),
        Example(
            lambda x: x * 1e200 * 1e200, (3, 4), reason="is out of the normal range"
        ),
        Example(lambda x: (lambda y: (y.sin(), y * 3.0))(x * 0.5), (3, 4), reason=SHARED),
    ],
    "fuse_rsqrt": [
        Example(lambda x: 1 / x.exp().sqrt(), (3, 4)),
        Example(lambda x: x.exp().sqrt().reciprocal(), (3, 4)),
        Example(lambda x: (lambda y: (y.sin(), 1 / y))(x.exp().sqrt()), (3, 4), reason=SHARED),
    ],
    "merge_pads": [
        Example(lambda x: F.pad(F.pad(x, (1, 2)), (3, 0, 1, 1)), (3, 4)),
        Example(
            lambda x: F.pad(F.pad(x, (1, 2)), (-1, 0)), (3, 4), reason="a pad is negative, and cuts"
        ),
        Example(
            lambda x: (lambda y: (y.sin(), F.pad(y, (1, 1))))(F.pad(x, (1, 2))), (3, 4),
            reason=SHARED,
        ),
    ],
}  # fmt: skip
