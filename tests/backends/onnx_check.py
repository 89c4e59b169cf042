"""What the tests of the onnx backend share: run a model in PyTorch and in ONNX, and compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt import dialect
from fxopt.backends.onnx import Onnx
from fxopt.backends.onnx.executable import OnnxExecutable
from fxopt.capture import capture
from fxopt.pipeline import run_pass


class Function(nn.Module):
    """A function of any number of tensors as a module, which are its inputs alike."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def positive(*shape: int) -> torch.Tensor:
    """Numbers from 0.1 to 0.9."""
    return torch.rand(*shape) * 0.8 + 0.1


def integers(
    *shape: int, low: int = 0, high: int = 5, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    return torch.randint(low, high, shape).to(dtype)


def flags(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape).bool()


def noisy(model: nn.Module) -> nn.Module:
    """Put noise into every weight and statistic, so that nothing is almost the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.2)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max|Δ| / max|expected|; infinite where shape, dtype, integers or the places of NaN differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = (x.double().nan_to_num(0.0, 1e30, -1e30) for x in (actual, expected))
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9))


def lowered(
    model: Any, inputs: Sequence[Any], dynamic_shapes: Any = None, **options: Any
) -> OnnxExecutable:
    model = model if isinstance(model, nn.Module) else Function(model)
    if dynamic_shapes is not None and isinstance(model, Function):
        dynamic_shapes = (dynamic_shapes,)
    graph = capture(model, tuple(inputs), dynamic_shapes=dynamic_shapes)
    backend = Onnx(**{"threads": 1, **options})
    for one in backend.legalize:
        run_pass(one, graph)
    dialect.check(graph)
    return backend.lower(graph)


def expected(model: Any, inputs: Sequence[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, torch.Tensor)]


def check(
    model: Any,
    inputs: Sequence[Any],
    *others: Sequence[Any],
    dynamic_shapes: Any = None,
    tolerance: float = 1e-5,
    **options: Any,
) -> OnnxExecutable:
    """Lower, run on the inputs and on others, and compare with PyTorch each time."""
    executable = lowered(model, inputs, dynamic_shapes, **options)
    for given in (inputs, *others):
        wanted = expected(model, given)
        for index, (a, b) in enumerate(zip(executable.run(*given), wanted, strict=True)):
            found = difference(a, b)
            assert found <= tolerance, (
                f"output {index} differs by {found:.2e}: {a.dtype}{list(a.shape)} {a}\n"
                f"expected {b.dtype}{list(b.shape)} {b}\n{executable.op_counts()}"
            )
    return executable


def mlp() -> nn.Module:
    """A model with constants large enough to lie in a file of their own."""
    return noisy(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)))
