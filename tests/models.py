"""Tiny models, each named for what is special in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Function(nn.Module):
    """A function of tensors as a module; its first input is called x."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any, *others: Any) -> Any:
        return self.function(x, *others)


class ConvBnRelu(nn.Sequential):
    """The block that convolutional networks are made of, in evaluation mode."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__(
            nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.eval()


class Residual(nn.Module):
    """An activation with two users: the branch, and the sum behind it."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = ConvBnRelu(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return F.relu(self.norm(self.conv(y)) + y)


class SharedLayer(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(F.relu(self.layer(x)))


class Tokens(nn.Module):
    """Integer inputs, a mask with a default, and a nested output."""

    def __init__(self, words: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 6)
        self.head = nn.Linear(6, words)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        hidden = self.embedding(ids)
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        return {"logits": self.head(hidden), "hidden": hidden}


class Counter(nn.Module):
    """State: a buffer that each call changes."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x + self.calls


class Branches(nn.Module):
    """Python control flow that depends on a value: cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else x
