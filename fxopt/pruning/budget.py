"""What a graph would cost without some channels, from the shares of dimensions that stay.

A contraction's multiplications are proportional to its output and to what each output reads; a
constant's elements to each of its dimensions. So no graph has to be built to know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.contractions import CONVOLUTIONS, TRANSPOSED
from fxopt.channels.follower import Along, arguments, operand
from fxopt.channels.partition import Ids, Mask
from fxopt.channels.recurrent import GATES, steps_of
from fxopt.cost import macs
from fxopt.shapes import rank_of, shape_of

KINDS = ("channels", "macs", "params", "bytes", "latency")


class Budget:
    """The cost of a graph, of one kind, as a function of which channels have gone."""

    def __init__(self, channels: Channels, kind: str) -> None:
        terms = list(_macs(channels) if kind == "macs" else _elements(channels, kind == "bytes"))
        vectors: dict[int, Ids] = {id(ids): ids for _, along in terms for ids in along}
        places = {key: place for place, key in enumerate(vectors)}
        self._roots = [channels.partition.roots(ids) for ids in vectors.values()]
        self._terms = [(base, [places[id(ids)] for ids in along]) for base, along in terms]

    def __call__(self, gone: Mask) -> float:
        """Return the cost; `gone` says of each identity, by its root, whether it has gone."""
        shares = [1.0 - float(gone[roots].mean()) for roots in self._roots]
        return float(
            sum(base * np.prod([shares[place] for place in places]) for base, places in self._terms)
        )


def _elements(channels: Channels, in_bytes: bool) -> Iterator[tuple[float, list[Ids]]]:
    """Yield the elements (or bytes) of each constant, and the dimensions that may shrink."""
    for name, along in channels.follower.constants.items():
        tensor = channels.graph.constant(name)
        size = tensor.numel() * (tensor.element_size() if in_bytes else 1)
        if in_bytes or isinstance(tensor, torch.nn.Parameter):
            yield float(size), [ids for ids in along if ids is not None]


def _macs(channels: Channels) -> Iterator[tuple[float, list[Ids]]]:
    """Yield the multiplications of each call, and the dimensions they are proportional to."""
    read: dict[fx.Node, list[Ids]] = {}
    for node, position, dim in channels.follower.read:
        ids = channels.along(operand(node, position))[dim]
        if ids is not None:
            read.setdefault(node, []).append(ids)
    for node, along in channels.values():
        if node.op == "call_function" and (count := macs(node)):
            yield float(count), [*_present(along), *_inner(channels, node, read.get(node, []))]
    for node in channels.graph.find(*GATES):
        for weight in arguments(node)[2]:
            if rank_of(weight) == 2:
                size = steps_of(node) * math.prod(shape_of(weight))
                yield float(size), _present(channels.along(weight))


def _inner(channels: Channels, node: fx.Node, read: list[Ids]) -> list[Ids]:
    """Return the dimensions that each output sums over."""
    if node.target not in CONVOLUTIONS:
        return read[:1]  # both operands of a product are read along the same channels
    weight = channels.along(arguments(node)[1])
    if node.target in TRANSPOSED:
        return _present(weight[:1])
    return _present(weight[1:2])


def _present(along: Along) -> list[Ids]:
    return [ids for ids in along if ids is not None]
