"""What fuse-activations and fuse-norms recognise needs no more ONNX nodes than what was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.backends.onnx import Onnx
from fxopt.capture import capture
from fxopt.passes import FuseActivations, FuseNorms
from tests.backends.onnx_check import check, normal

KAPPA = math.sqrt(2 / math.pi)


class Written(nn.Module):
    """A function of one tensor, with a weight and a bias."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.rand(shape) + 0.5)
        self.bias = nn.Parameter(torch.randn(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, self.bias)


def standard(x: torch.Tensor, dims: Any, eps: float = 1e-5) -> torch.Tensor:
    d = x - x.mean(dims, keepdim=True)
    return d / torch.sqrt(d.pow(2).mean(dims, keepdim=True) + eps)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def gated(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return a * b.sigmoid()


def softly(x: torch.Tensor) -> torch.Tensor:
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


TOKENS, IMAGE = (2, 5, 64), (2, 64, 4, 3)
FORMS: dict[str, tuple[Callable[..., Any], tuple[int, ...], tuple[int, ...]]] = {
    "gelu": (lambda x, w, b: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), TOKENS, ()),
    "gelu tanh": (
        lambda x, w, b: 0.5 * x * (1 + torch.tanh(KAPPA * (x + 0.044715 * x**3))), TOKENS, ()
    ),
    "gelu tanh of products": (
        lambda x, w, b: 0.5 * x * (1 + torch.tanh(x * KAPPA * (1 + 0.044715 * x * x))), TOKENS, ()
    ),
    "sigmoid": (lambda x, w, b: torch.reciprocal(1 + torch.exp(-x)), TOKENS, ()),
    "silu": (lambda x, w, b: x * x.sigmoid(), TOKENS, ()),
    "silu of exp": (lambda x, w, b: x / (1 + torch.exp(-x)), TOKENS, ()),
    "glu": (lambda x, w, b: gated(x), TOKENS, ()),
    "hardsigmoid": (lambda x, w, b: F.relu6(x + 3) / 6, TOKENS, ()),
    "hardswish": (lambda x, w, b: x * F.relu6(x + 3) / 6, TOKENS, ()),
    "leaky_relu": (lambda x, w, b: torch.where(x > 0, x, 0.1 * x), TOKENS, ()),
    "prelu": (lambda x, w, b: torch.where(x > 0, x, w * x), IMAGE, (64, 1, 1)),
    "elu": (lambda x, w, b: torch.where(x > 0, x, torch.expm1(x)), TOKENS, ()),
    "clamp": (lambda x, w, b: torch.where(x > 0.5, 0.5, x), TOKENS, ()),
    "softmax": (lambda x, w, b: softly(x), TOKENS, ()),
    "shifted softmax": (lambda x, w, b: F.softmax(x - x.amax(-1, True), -1), TOKENS, ()),
    "layer norm": (lambda x, w, b: standard(x, -1) * w + b, TOKENS, (64,)),
    "layer norm with a bias": (lambda x, w, b: standard(x, -1) + b, TOKENS, (64,)),
    "layer norm alone": (lambda x, w, b: standard(x, -1), TOKENS, ()),
    "layer norm over channels": (lambda x, w, b: standard(x, 1) * w + b, IMAGE, (64, 1, 1)),
    "rms norm": (lambda x, w, b: w * rms(x), TOKENS, (64,)),
    "rms norm alone": (lambda x, w, b: rms(x), TOKENS, ()),
    "instance norm": (lambda x, w, b: standard(x, (2, 3)) * w + b, IMAGE, (64, 1, 1)),
    "instance norm alone": (lambda x, w, b: standard(x, (2, 3)), IMAGE, ()),
    "norm of everything": (lambda x, w, b: standard(x, (1, 2, 3)) * w + b, IMAGE, (64, 1, 1)),
    "group norm": (
        lambda x, w, b: standard(x.view(2, 8, -1), -1).view(x.shape) * w + b, IMAGE, (64, 1, 1)
    ),
}  # fmt: skip


def sizes(model: nn.Module, x: torch.Tensor, path: Path, opset: int) -> list[tuple[int, int]]:
    """Return how many nodes the file and the optimised file have, before and after the passes."""
    graph = capture(model, (x,))
    found = []
    for passes in ((), (FuseActivations(), FuseNorms())):
        fired = [one.run(graph).rewrites for one in passes]
        assert not fired or any(fired)
        Onnx(threads=1, opset=opset).lower(graph.copy()).save(path, "{}")
        found.append((len(onnx.load(path).graph.node), optimised(path)))
    return found


def optimised(path: Path) -> int:
    """Return how many nodes are left after ONNX Runtime's extended optimisation."""
    options, target = onnxruntime.SessionOptions(), path.with_suffix(".optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.log_severity_level = str(target), 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return len(onnx.load(target).graph.node)


@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_recognised_is_no_larger(name: str, opset: int, tmp_path: Path) -> None:
    function, shape, weights = FORMS[name]
    x = normal(*shape)
    before, after = sizes(Written(function, *weights).eval(), x, tmp_path / "m.onnx", opset)
    assert after[0] <= before[0] and after[1] <= before[1], (before, after)


def test_norms_that_are_one_node() -> None:
    for model, shape in (
        (nn.GroupNorm(6, 6), (2, 6, 4, 3)), (nn.GroupNorm(6, 6, affine=False), (2, 6, 5)),
        (nn.LayerNorm(6, elementwise_affine=False), (2, 6)), (nn.PReLU(6), (2, 6, 4)),
    ):  # fmt: skip
        assert len(check(model, [normal(*shape)]).op_counts()) == 1


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rms_norm_of_large_values(dtype: torch.dtype, weight: bool, opset: int) -> None:
    model = nn.RMSNorm(6, 1e-5, weight).to(dtype)
    tolerance = 2 * torch.finfo(dtype).eps
    check(model, [normal(2, 3, 6, dtype=dtype) * 400], tolerance=tolerance, opset=opset)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm_in_float64(groups: int) -> None:
    model = nn.GroupNorm(groups, 6).double()
    check(model, [normal(2, 6, 4, 3, dtype=torch.float64)], tolerance=1e-12)


def test_a_slope_that_is_an_input() -> None:
    assert check(F.prelu, [normal(2, 3, 4), normal(3)]).op_counts() == {"Reshape": 1, "PRelu": 1}
