"""Move numbers while they are bytes.

Before                                   After
    y = dequantize(q, s, z, …)               p = max_pool(q, …)
    p = max_pool2d(y, …)                     y = dequantize(p, s, z, …)

    a = dequantize(p, s, z, …)               q = cat([p, r], 1)
    b = dequantize(r, s, z, …)               y = dequantize(q, s, z, …)
    y = cat([a, b], 1)

    y = dequantize(q, s, z, …)               q
    r = quantize(y, s, z, …)

Left alone: moves behind which nobody reads bytes; what is joined from bytes that stand for
different numbers; padding with another number than 0; numbers that are rounded again, but not as
before.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.backends.eager.cpu.grids import (
    LAYERS,
    Bytes,
    bytes_behind,
    is_fake_quantized,
    same_grid,
)
from fxopt.backends.eager.onednn import operators
from fxopt.backends.eager.onednn.grids import bytes_for
from fxopt.backends.eager.onednn.quantized_operators import dequantize, quantize
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import rank_of

aten = torch.ops.aten
_MOVES = {
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.dims, aten.slice.Tensor, aten.select.int,
    aten.expand.default, aten.repeat.default, aten.clone.default, aten.flip.default,
    aten.roll.default, aten.index_select.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.channel_shuffle.default, aten.upsample_nearest2d.vec,
    aten.pad.default,
}  # fmt: skip
_JOINS = {aten.cat.default, aten.stack.default}
_SPLITS = {aten.split_with_sizes.default, aten.unbind.int}


@dataclass(frozen=True)
class SinkDequantizations:
    """Make floats of bytes as late as possible."""

    name: ClassVar[str] = "sink-dequantizations"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Move each dequantization behind the moves that lead to readers of bytes."""
        rewriter = Rewriter(graph)
        if graph.find(dequantize):
            sinking, wanted = _Sinking(rewriter), _wanted(graph)
            for node in list(graph.graph.nodes):
                if node.target is quantize:
                    _drop_return(rewriter, node)
                elif node in wanted and node.target not in _SPLITS:
                    sinking.sink(node)
        return rewriter.result()


def _wanted(graph: GraphModule) -> set[fx.Node]:
    """Return the moves behind which somebody reads bytes."""
    found: set[fx.Node] = set()
    for node in reversed(graph.graph.nodes):
        if _is_move(node) and any(u in found or _reads_bytes(u) for u in node.users):
            found.add(node)
    return found


def _is_move(node: fx.Node) -> bool:
    args: Any = node.args
    if node.target is operator.getitem:
        return args[0].target in _SPLITS
    if node.target is aten.pad.default:
        return args[2] != "constant" or not args[3]
    return node.target in _MOVES | _JOINS | _SPLITS or _is_pool(node)


def _is_pool(node: fx.Node) -> bool:
    return node.target is aten.max_pool2d.default and rank_of(node) == 4


def _reads_bytes(user: fx.Node) -> bool:
    is_layer = user.target in LAYERS and is_fake_quantized(user.args[1])
    return is_layer or user.target is quantize


def _drop_return(rewriter: Rewriter, node: fx.Node) -> None:
    """Leave out a way back to floats, and from there to the same bytes."""
    value, *given = node.args
    grid, found = tuple(given), bytes_behind(value)
    if found is not None and _is_within(found.grid, grid):
        if same_grid(rewriter.graph, found.grid, grid):
            rewriter.replace(node, found.node)


def _is_within(a: Any, b: Any) -> bool:
    """Whether the bounds of a grid lie within those of another."""
    return bool(b[2] <= a[2] and a[3] <= b[3])


@dataclass(frozen=True)
class _Sinking:
    """Moves bytes in the place of the floats that stand for them."""

    rewriter: Rewriter
    splits: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def sink(self, node: fx.Node) -> None:
        """Put the way back to floats behind a move."""
        args: Any = node.args
        moved = args[0].args[0] if node.target is operator.getitem else args[0]
        values = moved if isinstance(moved, (list, tuple)) else [moved]
        parts = list(map(bytes_behind, values))
        found = [one for one in parts if one is not None]
        if not found:
            return
        grid = found[0].grid
        if len(found) < len(parts) or not all(self._alike(grid, one.grid) for one in found):
            self.rewriter.miss(node, "it joins bytes that stand for different numbers, or floats")
            return
        if node.target is aten.upsample_nearest2d.vec and bytes_for(*grid[2:]) is torch.int8:
            self.rewriter.miss(node, "PyTorch enlarges no images of signed bytes")
            return
        new = self._moved(node, found, grid)
        back = self.rewriter.insert(dequantize, new, *grid, before=node, like=node)
        self.rewriter.replace(node, back)

    def _moved(self, node: fx.Node, found: list[Bytes], grid: tuple[Any, ...]) -> fx.Node:
        """Insert the move of bytes."""
        args: Any = node.args
        first = found[0].node
        if node.target in _JOINS:
            return self._insert(node, node.target, [one.node for one in found], *args[1:])
        if node.target is operator.getitem:
            split = args[0]
            if split not in self.splits:
                self.splits[split] = self._insert(split, split.target, first, *split.args[1:])
            return self._insert(node, operator.getitem, self.splits[split], args[1])
        if _is_pool(node):
            window, stride, *geometry = args[1:]
            dtype = bytes_for(*grid[2:])
            return self._insert(
                node, operators.max_pool, first, dtype, window, stride or window, *geometry
            )
        if node.target is aten.pad.default and args[2] == "constant":
            zero = float(self.rewriter.graph.value(grid[1]))
            return self._insert(node, node.target, first, *args[1:3], zero)
        kwargs: dict[str, Any] = dict(node.kwargs)
        return self._insert(node, node.target, first, *args[1:], **kwargs)

    def _insert(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.rewriter.insert(target, *args, before=node, **kwargs)

    def _alike(self, a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
        return a[2:] == b[2:] and same_grid(self.rewriter.graph, a, b)
