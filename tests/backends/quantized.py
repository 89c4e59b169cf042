"""What the tests of fake-quantized graphs share: models made of roundings, and how to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.backends.onnx.executable import OnnxExecutable
from fxopt.quantization.operator import fake_quantize

FLOAT_LAYERS = {
    "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul",
}  # fmt: skip


class Round(nn.Module):
    """The fake quantization of an activation."""

    def __init__(
        self, scale: float = 0.02, zero_point: int = 120, qmin: int = 0, qmax: int = 255
    ) -> None:
        super().__init__()
        self.range = qmin, qmax
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, self.scale, self.zero_point, *self.range)


class Rounded(nn.Module):
    """A layer whose weight is fake-quantized: per channel along `axis`, in one scale for None."""

    def __init__(
        self, layer: nn.Module, *, axis: int | None = 0, limit: int = 127, group: int = 0
    ) -> None:
        super().__init__()
        self.layer = layer
        self.limit = limit
        weight: Any = layer.weight
        self.view = [*weight.shape[:-1], -1, group] if group else list(weight.shape)
        with torch.no_grad():  # scales of neighbours that are not alike
            spread = [size if at == axis else 1 for at, size in enumerate(weight.shape)]
            weight.mul_(torch.rand(spread) * 1.5 + 0.5)
            parts = weight.view(self.view)
            kept = range(parts.dim() - 1) if group else [] if axis is None else [axis]
            rest = [at for at in range(parts.dim()) if at not in kept]
            scale = parts.abs().amax(rest, keepdim=True) / limit
        scale = scale.reshape(()) if axis is None else scale
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.layer.weight
        rounded = fake_quantize(
            weight.view(self.view), self.scale, self.zero_point, -self.limit, self.limit
        ).view(weight.shape)
        return torch.func.functional_call(self.layer, {"weight": rounded}, (x,))


class Residual(nn.Module):
    """A small residual network, all of whose kernels may compute with integers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            Round(), Rounded(nn.Conv2d(3, width, 3, padding=1)), nn.ReLU(), Round(0.02, 0)
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.first = nn.Sequential(
            Rounded(nn.Conv2d(width, width, 3, padding=1)), nn.ReLU(), Round(0.02, 0)
        )
        self.second = nn.Sequential(Rounded(nn.Conv2d(width, width, 3, padding=1)), Round())
        self.sum, self.mean = Round(0.02, 0), Round(0.01, 0)
        self.head = Rounded(nn.Linear(width, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.stem(x))
        x = self.sum(torch.relu(self.second(self.first(x)) + x))
        return self.head(self.mean(nn.functional.adaptive_avg_pool2d(x, 1)).flatten(1))


def agrees(
    actual: Any, expected: Any, *, step: float = 0.0, rare: float = 0.02, steps: int = 1,
    bound: float = 1e-5,
) -> None:  # fmt: skip
    """Compare results that may lie a step apart where a value falls on the edge of one.

    `step` is that of the last rounding, `rare` the part of the elements that may lie up to `steps`
    of them apart; the others differ by `bound` of the largest.
    """
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for found, wanted in pairs:
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        gap = (found.double() - wanted.double()).abs()
        slack = bound * max(float(wanted.abs().max()), 1e-30)
        assert float(gap.max()) <= steps * step + slack, (float(gap.max()), step, slack)
        assert float((gap > slack).double().mean()) <= rare, float((gap > slack).double().mean())


def kernels(executable: OnnxExecutable, folder: Path) -> dict[str, int]:
    """Return how many nodes of each type ONNX Runtime made of a model."""
    import onnx
    import onnxruntime

    path = folder / "optimized.onnx"
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = str(path)
    settings.log_severity_level = 4
    onnxruntime.InferenceSession(
        executable.model_proto().SerializeToString(), settings, ["CPUExecutionProvider"]
    )
    return dict(Counter(node.op_type for node in onnx.load(path).graph.node))


def float_layers(counts: dict[str, int]) -> dict[str, int]:
    """Return those kernels that multiply floats."""
    return {name: count for name, count in counts.items() if name in FLOAT_LAYERS}


def openvino_layers(compiled: Any) -> dict[str, Sequence[str]]:
    """Return the precision in which each layer of a compiled OpenVINO model multiplies."""
    layers: dict[str, list[str]] = {}
    for layer in compiled.get_runtime_model().get_ops():
        about = layer.get_rt_info()
        kind = str(about["layerType"].value)
        if kind in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            kernel = str(about["primitiveType"].value)
            layers.setdefault(kind, []).append(kernel.rpartition("_")[2].lower())
    return {kind: sorted(found) for kind, found in layers.items()}
