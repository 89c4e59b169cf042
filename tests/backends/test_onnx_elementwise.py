"""Emitters of functions that work element by element, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.onnx_check import check, flags, integers, normal, positive

UNARY = [
    "relu",
    "sigmoid",
    "tanh",
    "exp",
    "erf",
    "sin",
    "cos",
    "tan",
    "sinh",
    "cosh",
    "asinh",
    "atan",
    "square",
    "exp2",
    "expm1",
    "erfc",
    "sinc",
    "abs",
    "neg",
    "sign",
    "floor",
    "ceil",
    "round",
    "trunc",
    "frac",
    "isnan",
    "isinf",
    "isfinite",
    "logical_not",
    "deg2rad",
    "rad2deg",
    "signbit",
    "nan_to_num",
]
OF_POSITIVE = [
    "sqrt",
    "rsqrt",
    "log",
    "log1p",
    "log2",
    "log10",
    "reciprocal",
    "asin",
    "acos",
    "atanh",
    "logit",
]
ACTIVATIONS = [
    "gelu",
    "silu",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "celu",
    "softplus",
    "logsigmoid",
    "tanhshrink",
    "softshrink",
    "hardshrink",
    "softsign",
    "mish",
    "rrelu",
]
BINARY = [
    "add",
    "sub",
    "mul",
    "div",
    "maximum",
    "minimum",
    "atan2",
    "fmod",
    "remainder",
    "logaddexp",
    "hypot",
    "copysign",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
]


@pytest.mark.parametrize("name", UNARY)
def test_function_of_one_tensor(name: str) -> None:
    check(getattr(torch, name), (normal(2, 3, 4) * 2,))


@pytest.mark.parametrize("name", OF_POSITIVE)
def test_function_of_positive_numbers(name: str) -> None:
    check(getattr(torch, name), (positive(2, 3, 4),))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    check(getattr(F, name), (normal(3, 7) * 3,))


@pytest.mark.parametrize("name", BINARY)
def test_function_of_two_tensors_broadcasts(name: str) -> None:
    check(getattr(torch, name), (normal(2, 3, 4), normal(3, 1)))


Case = tuple[Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, Callable[[], Case]] = {
    "acosh": lambda: (torch.acosh, (positive(3) + 1,)),
    "log1p near zero": lambda: (torch.log1p, (normal(50) * 1e-5,)),
    "log1p of large": lambda: (torch.log1p, (positive(50) * 1e6,)),
    "expm1 near zero": lambda: (torch.expm1, (normal(50) * 1e-5,)),
    "expm1 of large": lambda: (torch.expm1, (normal(50) * 50,)),
    "not numbers": lambda: (
        lambda x: (x.isnan(), x.isinf(), x.isfinite(), x.nan_to_num(), x.nan_to_num(1, 2, 3)),
        (torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]),),
    ),
    "round to decimals": lambda: (lambda x: torch.round(x, decimals=2), (normal(5, 5),)),
    "gelu tanh": lambda: (lambda x: F.gelu(x, approximate="tanh"), (normal(3, 7),)),
    "softplus threshold": lambda: (lambda x: F.softplus(x, 2.0, 3.0), (normal(20) * 3,)),
    "celu alpha": lambda: (lambda x: F.celu(x, 2.0), (normal(20),)),
    "elu alpha": lambda: (lambda x: F.elu(x, 0.5), (normal(20),)),
    "threshold": lambda: (lambda x: F.threshold(x, 0.1, 20.0), (normal(20),)),
    "glu": lambda: (lambda x: F.glu(x, 1), (normal(2, 6, 3),)),
    "softmax": lambda: (
        lambda x: (F.softmax(x, 0), F.softmax(x, -1), F.log_softmax(x, 1), F.softmin(x, 1)),
        (normal(2, 3, 4),),
    ),
    "softmax of another dtype": lambda: (
        lambda x: F.softmax(x, -1, dtype=torch.float32),
        (normal(2, 5, dtype=torch.float16),),
    ),
    "softmax of a number": lambda: (lambda x: F.softmax(x, 0), (torch.tensor(3.0),)),
    "alpha": lambda: (
        lambda a, b: (
            torch.add(a, b, alpha=2),
            torch.sub(a, b, alpha=3),
            torch.rsub(a, 3, alpha=2),
        ),
        (normal(2, 3), normal(2, 3)),
    ),
    "powers": lambda: (
        lambda x: (x**2, x**3, x**0.5, x**-1, x**-0.5, x**2.5, 2**x, x**1, x**0, x**x),
        (positive(20),),
    ),
    "powers of integers": lambda: (lambda x: (x**3, x**x), (integers(10),)),
    "xlogy": lambda: (torch.xlogy, (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0]))),
    "lerp": lambda: (lambda a, b: torch.lerp(a, b, 0.3), (normal(3), normal(3))),
    "addcmul": lambda: (
        lambda a, b, c: (torch.addcmul(a, b, c, value=0.5), torch.addcdiv(a, b, c + 9, value=2)),
        (normal(3), normal(3), normal(3)),
    ),
    "clamp": lambda: (
        lambda x, y: (
            x.clamp(-0.5, 0.5),
            x.clamp(min=0),
            x.clamp(max=0.1),
            x.clamp(min=y),
            x.clamp(max=y),
        ),
        (normal(4, 4), normal(4)),
    ),
    "clamp of integers": lambda: (lambda x: x.clamp(1, 3), (integers(4, 4),)),
    "isclose": lambda: (torch.isclose, (normal(3), normal(3))),
    # -- promotion ------------------------------------------------------------------------------
    "integer and float": lambda: (
        lambda a, b: (a + b, a * 2.5, a / b),
        (integers(3, 4), normal(3, 4)),
    ),
    "integers divided": lambda: (lambda a: (a / (a + 1), a / 2), (integers(3, 4),)),
    "flags in sums": lambda: (lambda a, b: (a + b, a * b, b + a), (flags(3, 4), integers(3, 4))),
    "flags and flags": lambda: (lambda a, b: (a + b, a * b, a < b, a == b), (flags(6), flags(6))),
    "half and float": lambda: (lambda a, b: a + b, (normal(3, dtype=torch.half), normal(3))),
    "int32 and int64": lambda: (lambda a, b: a + b, (integers(3, dtype=torch.int32), integers(3))),
    "small integers wrap": lambda: (
        lambda a, b: (a + b, a + 200, a * a),
        (integers(9, high=255, dtype=torch.uint8), integers(9, low=-99, high=99, dtype=torch.int8)),
    ),
    "a number of higher rank": lambda: (
        lambda a, b: a * b,
        (normal(3, dtype=torch.half), torch.tensor(2.5)),
    ),
    "compared with numbers": lambda: (
        lambda x: (x > 1, x >= 1.5, x == 2, x != 2, x < 3.5, x <= 2),
        (integers(6),),
    ),
    "large integers compared": lambda: (
        lambda x: (x == 2**40, x > 2**40, x != x + 1),
        (torch.tensor([2**40, 2**40 + 1, 2**40 - 1]),),
    ),
    "casts": lambda: (
        lambda x: (x.int(), x.half(), x.double(), x.bool(), x.to(torch.uint8), x.long().float()),
        (positive(5) * 5,),
    ),
    # -- division of integers --------------------------------------------------------------------
    "division": lambda: (
        lambda a, b: tuple(torch.div(a, b, rounding_mode=m) for m in ("floor", "trunc", None)),
        (normal(20), normal(20) + 0.1),
    ),
    "division of integers": lambda: (
        lambda a, b: (
            *(torch.div(a, b, rounding_mode=m) for m in ("floor", "trunc", None)),
            a // b,
            a // 3,
            a % b,
            torch.fmod(a, b),
            a % -3,
        ),
        (integers(20, low=-9, high=9), torch.tensor([3, -2] * 10)),
    ),
    "remainder by a number": lambda: (
        lambda x: (x % 1.3, torch.fmod(x, 1.3), x % -1.3),
        (normal(20) * 5,),
    ),
    # -- choice and logic -------------------------------------------------------------------------
    "where": lambda: (
        lambda a, b: (
            torch.where(a > 0, a, b),
            torch.where(a > 0, a, 0.0),
            torch.where(a > 0, 1.0, 0.0),
        ),
        (normal(3, 4), normal(4)),
    ),
    "where of flags": lambda: (lambda a, b: torch.where(a > 0, a > 1, b), (normal(3, 4), flags(4))),
    "masked_fill": lambda: (
        lambda a, m: (
            a.masked_fill(m, -1e9),
            a.masked_fill(m, torch.tensor(2.0)),
            m.masked_fill(m, False),
        ),
        (normal(3, 4), flags(4)),
    ),
    "logic": lambda: (
        lambda a, b: (a & b, a | b, a ^ b, ~a, torch.logical_and(a, b), torch.logical_xor(a, b)),
        (flags(9), flags(9)),
    ),
    "bits": lambda: (
        lambda a, b: (a & b, a | b, a ^ b, ~a, a & 3, a << 2, a >> 1),
        (integers(9, low=-9, high=20), integers(9, high=9)),
    ),
    "logic of floats": lambda: (torch.logical_or, (normal(3), normal(3))),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    function, inputs = CASES[name]()
    check(function, inputs)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_prelu(shape: tuple[int, ...], channels: int) -> None:
    check(nn.PReLU(channels), (normal(*shape),))
