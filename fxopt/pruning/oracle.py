"""The proof of a pruning: the original, with exactly those channels zeroed where they are read.

Zeroed *at the input of every contraction that reads them*: zero where they are computed would be
another function, since a bias, a sigmoid or a batch norm behind makes something of zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.follower import arguments
from fxopt.graph_module import GraphModule
from fxopt.pruning.mending import Mask
from fxopt.rewrite import Rewriter
from fxopt.shapes import rank_of

aten = torch.ops.aten


def zeroed(channels: Channels, gone: Mask) -> GraphModule:
    """Return a copy of the graph that was analysed in which channels that are gone are read as 0.

    `gone` says it of each identity by its root.
    """
    graph = channels.graph.copy()
    rewriter = Rewriter(graph)
    nodes = {node.name: node for node in graph.graph.nodes}
    for reader, position, dim in channels.follower.read:
        original = _operand(reader, position)
        ids = channels.along(original)[dim]
        if ids is None:
            continue
        lost = gone[channels.partition.roots(ids)]
        if lost.any():
            _zero(rewriter, nodes[reader.name], position, nodes[original.name], dim, lost)
    rewriter.result()
    return graph


def _operand(reader: fx.Node, position: int) -> Any:
    """Return the tensor that a contraction reads at a position; an einsum holds a list of them."""
    if isinstance(arguments(reader)[0], str):
        return arguments(reader)[1][position]
    return arguments(reader)[position]


def _zero(
    rewriter: Rewriter, reader: fx.Node, position: int, operand: fx.Node, dim: int, lost: Mask
) -> None:
    """Let `reader` read zero at these indices of one dimension of one operand."""
    shape = [len(lost) if d == dim else 1 for d in range(rank_of(operand))]
    values = torch.from_numpy(np.ascontiguousarray(lost)).reshape(shape)
    mask = rewriter.constant(lambda: values, [], name=f"{reader.name}_gone", before=reader)
    current = _operand(reader, position)  # perhaps zeroed along another dimension before
    zero = rewriter.insert(
        aten.masked_fill.Scalar, current, mask, 0, before=reader, like=current, origin=reader
    )
    args: tuple[Any, ...]
    if isinstance(arguments(reader)[0], str):
        operands: Any = list(arguments(reader)[1])
        operands[position] = zero
        args = (arguments(reader)[0], operands, *arguments(reader)[2:])
    else:
        args = (*arguments(reader)[:position], zero, *arguments(reader)[position + 1 :])
    rewriter.update(reader, args)
