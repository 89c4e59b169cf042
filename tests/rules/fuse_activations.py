"""Where the rules of fuse-activations fire, and where they hold back."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fxopt.testing import Example

SHARED = "is used elsewhere too"
ROOT, KAPPA = math.sqrt(2), math.sqrt(2 / math.pi)


def shares(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A gate that another value needs as well."""
    gate = torch.sigmoid(x)
    return x * gate, gate


# PyTorch's kernels of these two hold 1 / 6 in float32, for doubles as well.
OPTIONS = {  # at a corner torch gives each operator a gradient of its own
    "fuse_hardsigmoid": {"tolerance": 1e-7, "inexact_at": {"kink"}},
    "fuse_hardswish": {"tolerance": 1e-7, "inexact_at": {"kink"}},
}

EXAMPLES: dict[str, list[Example]] = {
    "fuse_gelu": [
        Example(lambda x: 0.5 * x * (1 + torch.erf(x / ROOT)), (3, 4)),
        Example(lambda x: x * (torch.erf(x * math.sqrt(0.5)) + 1) / 2, (3, 4)),
        Example(
            lambda x: 0.5 * x * (1 + torch.erf(x / 1.4142)), (3, 4),
            reason="to the precision of torch.float64",
        ),
    ],
    "fuse_gelu_tanh": [
        Example(
            lambda x: 0.5 * x * (1 + torch.tanh(KAPPA * (x + 0.044715 * x**3))), (3, 4)
        ),
        Example(
            lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.044715 * x**3))), (3, 4),
            reason="to the precision of torch.float64",
        ),
    ],
    "keep_x_times_ndtr": [
        Example(
            lambda x: x * torch.special.ndtr(x), (3, 4), reason="it keeps digits that gelu loses"
        ),
    ],
    "fuse_sigmoid": [
        Example(lambda x: 1 / (1 + torch.exp(-x)), (3, 4)),
        Example(lambda x: (lambda y: (y.sin(), 1 / (1 + y)))(torch.exp(-x)), (3, 4), reason=SHARED),
    ],
    "fuse_silu": [
        Example(lambda x: x * torch.sigmoid(x), (3, 4)),
        Example(lambda x: x / (1 + torch.exp(-x)), (3, 4)),
        Example(shares, (3, 4), reason=SHARED),
        Example(lambda x, y: x * torch.sigmoid(y), (3, 4), (3, 4), reason="two different values"),
    ],
    "fuse_glu": [
        Example(lambda x: (lambda a, b: a * torch.sigmoid(b))(*x.chunk(2, 1)), (3, 4)),
        Example(lambda x: x[:, :2] * torch.sigmoid(x[:, 2:]), (3, 4)),
        Example(
            lambda x: (lambda a, b: a * torch.sigmoid(b))(*x.split([1, 3], 1)), (3, 4),
            reason="does not apply",
        ),
    ],
    "fuse_hardsigmoid": [
        Example(lambda x: F.relu6(x + 3) / 6, (3, 4)),
        Example(lambda x: torch.clamp(x / 6 + 0.5, 0, 1), (3, 4)),
        Example(lambda x: F.relu6(x + 3) / 5, (3, 4), reason="wanted, found 5"),
    ],
    "fuse_hardswish": [
        Example(lambda x: x * F.relu6(x + 3) / 6, (3, 4)),
        Example(lambda x: x * F.hardsigmoid(x), (3, 4)),
        Example(lambda x, y: y * F.hardsigmoid(x), (3, 4), (3, 4), reason="two different values"),
    ],
    "fuse_leaky_relu": [
        Example(lambda x: torch.where(x > 0, x, 0.1 * x), (3, 4)),
        Example(lambda x: torch.where(x <= 0, x * 0.1, x), (3, 4)),
        Example(
            lambda x: torch.where(x > 0, x, 2 * x), torch.arange(4) - 2,
            reason="leaky_relu does not take torch.int64",
        ),
    ],
    "keep_leaky_relu_of_other_gradient": [
        Example(
            lambda x: torch.maximum(x, 0.1 * x), (3, 4), reason="at x = 0 its gradient is not a"
        ),
        Example(
            lambda x: torch.where(x >= 0, x, 0.1 * x), (3, 4),
            reason="at x = 0 its gradient is not a",
        ),
    ],
    "fuse_prelu": [
        Example(
            lambda x, w: torch.where(x > 0, x, w * x), (2, 3, 4, 5), weights={"w": (3, 1, 1)}
        ),
        Example(
            lambda x, w: torch.where(x > 0, x, w * x), (2, 3, 4, 5), weights={"w": (5,)},
            reason="the slope does not vary along dimension 1 alone",
        ),
    ],
    "fuse_elu": [
        Example(lambda x: torch.where(x > 0, x, 0.5 * torch.expm1(x)), (3, 4)),
        Example(lambda x: torch.where(x >= 0, x, torch.expm1(x)), (3, 4)),
        Example(
            lambda x, a: torch.where(x > 0, x, a * torch.expm1(x)), (3, 4), (3, 4),
            reason="does not apply",
        ),
    ],
    "keep_elu_without_expm1": [
        Example(
            lambda x: torch.where(x > 0, x, torch.exp(x) - 1), (3, 4),
            reason="has lost what elu keeps near zero",
        ),
    ],
    "fuse_clamp": [
        Example(lambda x: torch.where(x < -1, -1, x), (3, 4)),
        Example(lambda x: x.masked_fill(x > 1, 1), (3, 4)),
        Example(lambda x: torch.where(x < -1, -2, x), (3, 4), reason="two different values"),
    ],
    "keep_relu_of_other_nan": [
        Example(
            lambda x: x * (x > 0), (3, 4), reason="it is not what relu is for nan or −∞"
        ),
    ],
    "fuse_softmax": [
        Example(
            lambda x: (lambda e: e / e.sum(-1, keepdim=True))((x - x.amax(-1, True)).exp()), (3, 4)
        ),
        Example(
            lambda x: (lambda e: (e / e.sum(-1, keepdim=True), e))((x - x.amax(-1, True)).exp()),
            (3, 4), reason=SHARED,
        ),
    ],
    "keep_softmax_that_overflows": [
        Example(
            lambda x: (lambda e: e / e.sum(-1, keepdim=True))(x.exp()), (3, 4),
            reason="exp(x) overflows where softmax does not",
        ),
    ],
    "remove_shift_of_softmax": [
        Example(lambda x: torch.softmax(x - x.amax(-1, True), -1), (3, 4)),
        Example(lambda x: torch.softmax(x - x.amax(0, True), -1), (3, 4), reason="two different"),
    ],
    "keep_log_of_underflow": [
        Example(
            lambda x: torch.softmax(x, -1).log(), (3, 4),
            reason="it is −∞ where what is inside underflows",
        ),
    ],
    "keep_softplus_that_overflows": [
        Example(
            lambda x: torch.log(1 + torch.exp(x)), (3, 4),
            reason="exp(x) overflows where softplus does not",
        ),
    ],
}  # fmt: skip
