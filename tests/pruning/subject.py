"""What a subject is: a tiny model, its inputs, and what pruning half of its channels must do to it.

A claim names a layer by its module path, and means the dimension along which its outputs stand; or
a constant with a dimension, "table@1". What no claim names may shrink or not: only the numbers say
whether it was right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxopt.testing import noisy

IS_OUTPUT = "its rows are the model's output"
IS_INPUT = "its columns read the model's input"
MIXES = "the operator behind it mixes all channels, so that none can go without changing the rest"
BAKED = "the number of channels is baked into an operator, or checked by one"


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    `shrinks` are those that must lose rows at a ratio of one half, `keeps` those that must not,
    with the reason. `groups` maps a layer to the number of neighbouring rows that go or stay
    together.
    """

    name: str
    about: str
    make: Callable[[], nn.Module]
    inputs: tuple[torch.Tensor, ...]
    shrinks: tuple[str, ...]
    keeps: Mapping[str, str]
    groups: Mapping[str, int] = field(default_factory=dict)
    dynamic_shapes: Any = None

    def model(self) -> nn.Module:
        """Build the model in evaluation mode, with noise in every weight, scale and statistic."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return noisy(self.make().eval())

    def __str__(self) -> str:
        return self.name


def place_of(model: nn.Module, claim: str) -> tuple[str, int]:
    """Return the constant and the dimension that a claim is about."""
    path, _, dim = claim.partition("@")
    if dim:
        model.get_parameter(path)
        return path, int(dim)
    layer = model.get_submodule(path)
    assert isinstance(layer.weight, nn.Parameter), f"{claim} has no weight"
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return f"{path}.weight", int(transposed)


class Net(nn.Module):
    """Layers, weights and buffers by name, and a function of them and of up to three inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, z: torch.Tensor | None = None
    ) -> Any:
        given = [value for value in (y, z) if value is not None]
        return self.function(self, x, *given)


class Table:
    """Collects the subjects of one file: `@table(shape, shrinks="a b")` above a factory."""

    def __init__(self) -> None:
        self.subjects: list[Subject] = []

    def __call__(
        self,
        *inputs: tuple[int, ...] | torch.Tensor,
        shrinks: str = "",
        keeps: Mapping[str, str] | None = None,
        groups: Mapping[str, int] | None = None,
        dynamic_shapes: Any = None,
    ) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
        """Register the factory below: its name is the subject's, its docstring what is special."""

        def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
            generator = torch.Generator().manual_seed(len(self.subjects))
            drawn = tuple(
                one if isinstance(one, torch.Tensor) else torch.randn(one, generator=generator)
                for one in inputs
            )
            self.subjects.append(
                Subject(
                    make.__name__, make.__doc__ or "", make, drawn, tuple(shrinks.split()),
                    keeps or {}, groups or {}, dynamic_shapes,
                )
            )
            return make

        return register


def weights(*shape: int) -> nn.Parameter:
    """Return a weight of this shape, to be filled with noise."""
    return nn.Parameter(torch.zeros(shape))


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the image's size, unless told otherwise."""
    options.setdefault("padding", kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, **options)
