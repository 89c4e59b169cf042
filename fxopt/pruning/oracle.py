"""The proof of a pruning: the original, with exactly those channels zeroed where they are read.

Zeroed *at the input of every contraction that reads them*: zero where they are computed would be
another function, since a bias, a sigmoid or a batch norm behind makes something of zero.

A mean or a norm over channels that go is another function without them, and pruning there is asked
for. What remains to be proven is that it is the mean or norm of those that stay (`reduce_kept`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.follower import arguments, operand, with_operand
from fxopt.channels.partition import Ids, Mask
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter, fuel
from fxopt.shapes import rank_of, shape_of

aten = torch.ops.aten


def zeroed(channels: Channels, gone: Mask, *, reduce_kept: bool = False) -> GraphModule:
    """Return a copy of the graph that was analysed in which channels that are gone are read as 0.

    `gone` says it of each identity by its root. With `reduce_kept`, means and norms over such
    channels reduce those that stay.
    """
    graph = channels.graph.copy()
    with fuel(None):  # a reference is no rewrite that bisection counts
        rewriter = Rewriter(graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    for reader, position, dim in channels.follower.read:
        original = operand(reader, position)
        ids = channels.along(original)[dim]
        if ids is None:
            continue
        lost = gone[channels.partition.roots(ids)]
        if lost.any():
            _zero(rewriter, nodes[reader.name], position, nodes[original.name], dim, lost)
    if reduce_kept:
        for node, _ in dict(channels.reductions(gone)).items():
            _reduce_kept(rewriter, channels, gone, node, nodes)
    rewriter.result()
    return graph


def _reduce_kept(
    rewriter: Rewriter, channels: Channels, gone: Mask, original: fx.Node, nodes: dict[str, fx.Node]
) -> None:
    """Let a mean or a norm see only the channels that stay."""
    node = nodes[original.name]
    kept: dict[int, Ids] = {}
    for dim, ids in enumerate(channels.along(arguments(original)[0])):
        if ids is not None and (lost := gone[channels.partition.roots(ids)]).any():
            kept[dim] = np.flatnonzero(~lost)

    def picked(x: fx.Node, dims: dict[int, Ids]) -> fx.Node:
        for dim, places in dims.items():
            index = _index(rewriter, places, node)
            x = rewriter.insert(aten.index_select.default, x, dim, index, before=node)
        return x

    x, *rest = arguments(node)
    args = [picked(x, kept), *rest]
    if rank_of(original) == rank_of(arguments(original)[0]) and original.target in _NORMS:
        first = _NORMS[original.target](args, rank_of(x), kept)
        args[2:] = [
            picked(one, {d - first: p for d, p in kept.items() if 0 <= d - first < rank_of(one)})
            if isinstance(one, fx.Node) else one
            for one in args[2:]
        ]  # fmt: skip
    named: Any = node.kwargs
    result = rewriter.insert(node.target, *args, before=node, **named)
    if shape_of(result) != shape_of(node):
        back = {}
        for dim, places in kept.items():
            back[dim] = np.zeros(shape_of(node)[dim], np.int64)  # any value stands for the lost
            back[dim][places] = np.arange(len(places))
        result = picked(result, back)
    rewriter.replace(node, result)


def _layer_norm(args: list[Any], rank: int, kept: dict[int, Ids]) -> int:
    """Give a layer norm its new shape; return the dimension at which its weights begin."""
    first = rank - len(args[1])
    args[1] = [
        len(kept[first + place]) if first + place in kept else size
        for place, size in enumerate(args[1])
    ]
    return first


def _group_norm(args: list[Any], rank: int, kept: dict[int, Ids]) -> int:
    """Groups as many as before, each narrower."""
    return 1


_NORMS: dict[Any, Any] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
}


def _index(rewriter: Rewriter, places: Ids, before: fx.Node) -> fx.Node:
    values = torch.from_numpy(np.ascontiguousarray(places))
    return rewriter.constant(lambda: values, [], name=f"{before.name}_kept", before=before)


def _zero(
    rewriter: Rewriter, reader: fx.Node, position: int, read: fx.Node, dim: int, lost: Mask
) -> None:
    """Let `reader` read zero at these indices of one dimension of one operand."""
    shape = [len(lost) if d == dim else 1 for d in range(rank_of(read))]
    values = torch.from_numpy(np.ascontiguousarray(lost)).reshape(shape)
    mask = rewriter.constant(lambda: values, [], name=f"{reader.name}_gone", before=reader)
    current = operand(reader, position)  # perhaps zeroed along another dimension before
    zero = rewriter.insert(
        aten.masked_fill.Scalar, current, mask, 0, before=reader, like=current, origin=reader
    )
    rewriter.update(reader, with_operand(reader, position, zero))
