"""What the code behind a graph may count on about its outputs, and how they are made so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.dynamo.inputs import example_of
from fxopt.errors import CaptureError


@dataclass(frozen=True)
class Output:
    """What the code behind a graph may count on about one output."""

    is_contiguous: bool = False
    whole: int | None = None  # the position of the input that it is
    part: str | None = None  # the name of the input that it is another view of

    def restored(self, value: Any, given: Sequence[Any]) -> Any:
        """Return the output as PyTorch would give it."""
        if self.whole is not None:
            return given[self.whole]
        if self.is_contiguous and isinstance(value, torch.Tensor):
            return value.contiguous()
        return value

    def check(self, written: set[str]) -> None:
        """Raise CaptureError where the output would not see what is written to its memory."""
        if self.part in written:
            raise CaptureError(
                f"An output is a view of '{self.part}', which the graph writes to. Return a copy "
                "(.clone()), or give options={'fallback': True} to let PyTorch run such a graph."
            )


def outputs_of(graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[Output]:
    """Return what may be counted on, one for each output."""
    outputs: Any = graph.graph.output_node().args[0]
    return [_output(_fake_value(output), nodes) for output in outputs]


def _output(value: Any, nodes: Sequence[fx.Node]) -> Output:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return Output()
    for index, node in enumerate(nodes):
        given = _fake_value(node)
        if isinstance(given, torch.Tensor) and _memory(given) == _memory(value):
            if given is value or _layout(given) == _layout(value):
                return Output(whole=index)
            return Output(part=node.name)
    return Output(is_contiguous=_is_contiguous(value))


def _fake_value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def _memory(fake: torch.Tensor) -> Any:
    return fake.untyped_storage()._cdata if fake.layout is torch.strided else id(fake)


def _layout(fake: torch.Tensor) -> str:
    """Return how a fake tensor lies in its memory, without asking symbolic sizes anything."""
    return str((fake.dtype, fake.shape, fake.stride(), fake.storage_offset()))


def _is_contiguous(fake: torch.Tensor) -> bool:
    """Whether a fake tensor is contiguous for the example's sizes; no guard is made."""
    expected = 1
    sizes, strides = map(example_of, fake.shape), map(example_of, fake.stride())
    for size, stride in reversed([*zip(sizes, strides, strict=True)]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
