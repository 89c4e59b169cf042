"""A small classifier with batch norm and dropout, and images that it can learn in a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxopt
from fxopt.graph_module import GraphModule


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4, 2),
    )  # fmt: skip


def graph(model: nn.Module | None = None) -> GraphModule:
    x = torch.randn(4, 3, 8, 8)
    return fxopt.capture(model or network(), x, dynamic_shapes={"input": {0: "batch"}})


def images(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are bright in the left or in the right half, and which."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    y = torch.arange(count) % 2
    x[y == 0, :, :, :4] += 1.0
    x[y == 1, 1, :, 4:] -= 1.0
    return x, y


def shuffled(batch_size: int = 16, count: int = 64, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*images(count)), batch_size, shuffle=True, **options)


def accuracy(model: Any) -> float:
    x, y = images()
    return (model(x).argmax(1) == y).double().mean().item()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies; a graph's own storage is left shared."""
    tensors = model.constants() if isinstance(model, GraphModule) else dict(model.state_dict())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def tune(model: nn.Module, data: Any, **options: Any) -> Any:
    given: dict[str, Any] = {"loss": F.cross_entropy, "lr": 0.05, "progress": False, **options}
    if not {"epochs", "steps", "minutes", "cpu_minutes"} & set(given):
        given["epochs"] = 3
    return fxopt.finetune(model, data, **given)


class Killed(BaseException):
    """What ends a process, as far as a test can do that."""


def killed_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that fails for good at its nth call."""
    calls = 0

    def dying(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise Killed
        return function(*args)

    dying.__module__, dying.__qualname__ = function.__module__, function.__qualname__
    return dying
