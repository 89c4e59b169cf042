"""What a graph would cost without some channels: counted from sizes, without building it.

MACs come from the cost formulas that profiles use, asked about calls with the sizes that stay; a
constant's elements are the product of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.follower import Along
from fxopt.channels.partition import Ids, Mask
from fxopt.cost import macs
from fxopt.cost.call import Call
from fxopt.cost.formula import Size
from fxopt.cost.node import work_of
from fxopt.shapes import is_tensor

KINDS = ("channels", "macs", "params", "bytes", "latency")


class Budget:
    """The cost of a graph, of one kind, as a function of which channels have gone."""

    def __init__(self, channels: Channels, kind: str) -> None:
        self._channels = channels
        self._kind = kind
        self._calls = [
            node for node in channels.graph.graph.nodes if node.op == "call_function" and macs(node)
        ]

    def __call__(self, gone: Mask) -> float:
        """Return the cost; `gone` says of each identity, by its root, whether it has gone."""
        left = _Left(self._channels, gone)
        if self._kind == "macs":
            return float(sum(work_of(_CallWithout(node, left)).macs for node in self._calls))
        return float(sum(
            math.prod(map(left.size, tensor.shape, along)) * self._each(tensor)
            for name, along in self._channels.follower.constants.items()
            for tensor in (self._channels.graph.constant(name),)
        ))  # fmt: skip

    def _each(self, tensor: torch.Tensor) -> int:
        """Return what one element of a constant counts."""
        if self._kind == "bytes":
            return tensor.element_size()
        return int(isinstance(tensor, torch.nn.Parameter))


class _Left:
    """How many indices of each dimension stay."""

    def __init__(self, channels: Channels, gone: Mask) -> None:
        self._channels = channels
        self._gone = gone
        self._known: dict[int, int] = {}

    def along(self, node: fx.Node) -> Any:
        return self._channels.follower.along[node]

    def size(self, size: Size, ids: Ids | None) -> Size:
        if ids is None:
            return size
        if id(ids) not in self._known:
            lost = self._gone[self._channels.partition.roots(ids)]
            self._known[id(ids)] = len(ids) - int(lost.sum())
        return self._known[id(ids)]


class _CallWithout(Call):
    """A call as it will be when channels have gone."""

    def __init__(self, node: fx.Node, left: _Left) -> None:
        super().__init__(node)
        self._left = left

    def sizes(self, tensor: Any) -> tuple[Size, ...]:
        shape = super().sizes(tensor)
        if not isinstance(tensor, fx.Node):
            return shape
        return tuple(map(self._left.size, shape, self._left.along(tensor)))

    @property
    def out_shape(self) -> tuple[Size, ...]:
        found = self._left.along(self.node)
        along: Along = found[0] if isinstance(found, list) else found
        return tuple(map(self._left.size, super().out_shape, along))

    @property
    def first(self) -> tuple[Size, ...]:
        return next((self.sizes(node) for node in self.inputs if is_tensor(node)), ())
