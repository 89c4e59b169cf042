"""Sizes that are baked into calls, after channels have gone: what each call must be told now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.contractions import CONVOLUTIONS, groups_position
from fxopt.channels.follower import Along, arguments
from fxopt.channels.indexing import index_source, known_indices
from fxopt.channels.partition import Ids, Mask
from fxopt.normalize import INT_MAX
from fxopt.replay import remember_reads
from fxopt.rewrite import Rewriter

aten = torch.ops.aten


class Mender:
    """Tells each node of a graph its new arguments, when the channels that are `gone` have gone.

    `gone` says it of each identity by its root. The nodes are asked in order: see
    `Rewriter.resize`. The graph is a copy of the one that was analysed, with the same node names.
    `asked_by` is the name of the pass, for what it read of weights (see `replay.remember_reads`).
    """

    def __init__(
        self, channels: Channels, gone: Mask, rewriter: Rewriter, asked_by: str
    ) -> None:
        self.asked_by = asked_by
        self.channels = channels
        self.rewriter = rewriter
        self._gone = gone
        self._originals = {node.name: node for node in channels.graph.graph.nodes}
        self._constants: dict[str, fx.Node] = {}

    def __call__(self, node: fx.Node) -> fx.Node | tuple[Any, ...] | None:
        """Return what `node` must become; None where it is right as it is."""
        if node.op == "get_attr":
            return self._constant(node)
        mend = _MENDS.get(node.target)
        return None if mend is None else mend(self, node)

    def stays(self, ids: Ids | None) -> Mask | None:
        """Return which indices of a dimension stay; None where all do."""
        if ids is None:
            return None
        stays = ~self._gone[self.channels.partition.roots(ids)]
        return None if stays.all() else stays

    def along(self, node: Any) -> Along:
        """Return what stood along the dimensions of a tensor before."""
        return self.channels.along(self._originals[node.name])

    def parts(self, node: fx.Node) -> list[Along]:
        """Return what stood along the dimensions of each of several tensors before."""
        found = self.channels.follower.along[self._originals[node.name]]
        assert isinstance(found, list)
        return found

    def entering(self, node: fx.Node, dim: int) -> Mask | None:
        """Return which indices of its first operand's dimension stay."""
        return self.stays(self.before(node)[dim])

    def before(self, node: fx.Node) -> Along:
        """Return what stood along the dimensions of the first operand of `node` before."""
        return self.channels.along(arguments(self._originals[node.name])[0])

    def sizes(self, node: fx.Node, sizes: Any, dims: range) -> list[Any]:
        """Return sizes that a call names, for these dimensions of its result, as they are now."""
        found = list(sizes)
        along = self.along(node)
        for place, dim in enumerate(dims):
            stays = self.stays(along[dim])
            if stays is not None and isinstance(found[place], int) and found[place] != -1:
                found[place] = int(stays.sum())
        return found

    def index(self, node: fx.Node, places: Ids, dim: int) -> fx.Node:
        """Return a call that picks these places of the first operand of `node`."""
        values = torch.from_numpy(np.ascontiguousarray(places))
        index = self.rewriter.constant(
            lambda: values, [], name=f"{node.name}_places", before=node, origin=node
        )
        return self.rewriter.insert(
            aten.index_select.default, arguments(node)[0], dim, index, before=node, origin=node
        )

    def _constant(self, node: fx.Node) -> fx.Node | None:
        name = str(node.target)
        if name not in self.channels.follower.constants:
            return None
        stays = [self.stays(ids) for ids in self.channels.constant(name)]
        if all(one is None for one in stays):
            return None
        if name not in self._constants:
            kept = [(d, np.flatnonzero(one)) for d, one in enumerate(stays) if one is not None]
            part = Kept(tuple((dim, tuple(places.tolist())) for dim, places in kept))
            self._constants[name] = self.rewriter.constant(
                part, [node], name=_name(name), before=node, origin=node, is_part=True
            )
        return self._constants[name]


class Kept:
    """Computes what stays of a constant: these indices of these dimensions."""

    def __init__(self, kept: tuple[tuple[int, tuple[int, ...]], ...]) -> None:
        self.kept = kept

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of the tensor that stays."""
        for dim, places in self.kept:
            index = torch.tensor(places, dtype=torch.int64, device=tensor.device)
            tensor = tensor.index_select(dim, index)
        return tensor


def _name(name: str) -> str:
    """Return the hint for a constant's name: that of the original, however often it was cut."""
    stem, _, tail = name.rpartition("_pruned")
    return f"{stem if stem and not tail.strip('_0123456789') else name}_pruned"


# -- the calls ---------------------------------------------------------------------------------

Mend = Callable[[Mender, fx.Node], "fx.Node | tuple[Any, ...] | None"]
_MENDS: dict[Any, Mend] = {}


def mends(*targets: Any) -> Callable[[Mend], Mend]:
    """Register what to tell these operators when channels have gone."""

    def register(mend: Mend) -> Mend:
        for target in targets:
            _MENDS[target] = mend
        return mend

    return register


def with_argument(node: fx.Node, position: int, value: Any) -> tuple[Any, ...] | None:
    """Return the arguments of a node with another one; None where it is the same."""
    if arguments(node)[position] == value:
        return None
    return (*arguments(node)[:position], value, *arguments(node)[position + 1 :])


@mends(aten.reshape.default, aten.expand.default)
def _shape(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    sizes: Any = arguments(node)[1]
    return with_argument(node, 1, mender.sizes(node, sizes, range(len(sizes))))


@mends(aten.unflatten.int)
def _unflatten(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    _, dim, sizes = arguments(node)
    dims = range(dim, dim + len(sizes))
    return with_argument(node, 2, mender.sizes(node, sizes, dims))


@mends(aten.full.default)
def _full(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    sizes: Any = arguments(node)[0]
    return with_argument(node, 0, mender.sizes(node, sizes, range(len(sizes))))


@mends(aten.repeat.default)
def _repeat(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    """Only where a single one was repeated are there fewer repetitions."""
    times: Any = list(arguments(node)[1])
    before = mender.before(node)
    added = len(times) - len(before)
    for dim, ids in enumerate(mender.along(node)):
        stays = mender.stays(ids)
        if stays is not None and (dim < added or before[dim - added] is None):
            times[dim] = int(stays.sum())
    return with_argument(node, 1, times)


@mends(aten.repeat_interleave.self_int)
def _repeat_each(mender: Mender, node: fx.Node) -> fx.Node | None:
    x, _, dim = arguments(node)
    if not isinstance(dim, int) or (stays := mender.stays(mender.along(node)[dim])) is None:
        return None
    is_one = mender.before(node)[dim] is None  # a single one was repeated
    count = int(stays.sum()) if is_one else arguments(node)[1]
    # a new call, since the old one may name the size of its result
    return mender.rewriter.insert(node.target, x, count, dim, before=node, origin=node)


@mends(aten.split_with_sizes.default)
def _split(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    dim: Any = arguments(node)[2]
    stays = [mender.stays(along[dim]) for along in mender.parts(node)]
    old: Any = arguments(node)[1]
    sizes = [
        size if one is None else int(one.sum()) for size, one in zip(old, stays, strict=True)
    ]
    return with_argument(node, 1, sizes)


@mends(aten.slice.Tensor)
def _slice(mender: Mender, node: fx.Node) -> fx.Node | tuple[Any, ...] | None:
    x, dim, start, end, step = arguments(node)
    stays = mender.entering(node, dim)
    if stays is None:
        return None
    assert isinstance(start, int) and isinstance(end, int) and isinstance(step, int)
    if step == 1:
        first = int(stays[:start].sum())
        last = INT_MAX if end >= len(stays) else int(stays[:end].sum())
        return None if (first, last) == (start, end) else (x, dim, first, last, step)
    taken = np.zeros(len(stays), np.bool_)
    taken[start:end:step] = True
    places = np.flatnonzero(taken[stays])
    return mender.index(node, places, dim)


@mends(aten.slice_scatter.default)
def _slice_scatter(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    x, part, dim, start, end, step = arguments(node)
    stays = mender.entering(node, dim)
    if stays is None:
        return None
    last = INT_MAX if end >= len(stays) else int(stays[:end].sum())
    return x, part, dim, int(stays[:start].sum()), last, step


@mends(aten.select_scatter.default)
def _select_scatter(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    _, _, dim, index = arguments(node)
    stays = mender.entering(node, dim)
    return None if stays is None else with_argument(node, 3, int(stays[:index].sum()))


@mends(aten.select.int)
def _select(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    _, dim, index = arguments(node)
    stays = mender.entering(node, dim)
    if stays is None:
        return None
    assert isinstance(index, int)
    return with_argument(node, 2, int(stays[:index].sum()))


@mends(aten.roll.default)
def _roll(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    """What was rolled over the end is that much less."""
    x, shifts, dims = arguments(node)
    if all(mender.entering(node, dim) is None for dim in dims):
        return None
    totals: dict[int, int] = {}
    for shift, dim in zip(shifts, dims, strict=True):
        totals[dim] = totals.get(dim, 0) + shift
    for dim, total in totals.items():
        stays = mender.entering(node, dim)
        if stays is not None:
            totals[dim] = int(stays[len(stays) - total % len(stays) :].sum())
    return x, list(totals.values()), list(totals)


@mends(aten.pad.default)
def _pad(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    pads: Any = list(arguments(node)[1])
    after = mender.along(node)
    for pair in range(len(pads) // 2):
        dim = len(after) - 1 - pair
        made, given = mender.stays(after[dim]), mender.entering(node, dim)
        for side, slot in enumerate((2 * pair, 2 * pair + 1)):
            count = pads[slot]
            if count > 0 and made is not None:
                part = made[:count] if side == 0 else made[-count:]
                pads[slot] = int(part.sum())
            elif count < 0 and given is not None:
                part = given[:-count] if side == 0 else given[count:]
                pads[slot] = -int(part.sum())
    return with_argument(node, 1, pads)


@mends(aten.index_select.default)
def _index_select(mender: Mender, node: fx.Node) -> fx.Node | None:
    dim: Any = arguments(node)[1]
    return _repicked(mender, node, dim, arguments(node)[2])


@mends(aten.index.Tensor)
def _index(mender: Mender, node: fx.Node) -> fx.Node | None:
    indices: Any = arguments(node)[1]
    given = [dim for dim, index in enumerate(indices) if index is not None]
    return _repicked(mender, node, given[0], indices[given[0]]) if len(given) == 1 else None


def _repicked(mender: Mender, node: fx.Node, dim: int, index: Any) -> fx.Node | None:
    """Pick those that stay, at the places where they now stand."""
    stays = mender.entering(node, dim)
    if stays is None:
        return None
    places = known_indices(mender.rewriter.graph, index)
    assert places is not None, "channels that are picked by an unknown index cannot go"
    source = index_source(index)
    assert source is not None
    graph = mender.rewriter.graph
    name = str(source.target)
    remember_reads(graph, mender.asked_by, {name: (graph.constant(name), 0)})
    ranks = np.cumsum(stays) - 1
    return mender.index(node, ranks[places[stays[places]]], dim)


@mends(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    shape: Any = arguments(node)[1]
    rank = len(mender.along(node))
    return with_argument(node, 1, mender.sizes(node, shape, range(rank - len(shape), rank)))


@mends(aten.group_norm.default)
def _group_norm(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    return with_argument(node, 1, groups_left(mender, mender.along(node)[1], arguments(node)[1]))


@mends(aten.channel_shuffle.default, aten.native_channel_shuffle.default)
def _channel_shuffle(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    return with_argument(node, 1, groups_left(mender, mender.before(node)[1], arguments(node)[1]))


@mends(*CONVOLUTIONS)
def _convolution(mender: Mender, node: fx.Node) -> tuple[Any, ...] | None:
    position = groups_position(node)
    groups: Any = arguments(node)[position]
    if groups == 1:
        return None
    channel = len(mender.along(node)) - CONVOLUTIONS[node.target] - 1
    ids = mender.before(node)[channel]
    return with_argument(node, position, groups_left(mender, ids, groups))


def groups_left(mender: Mender, ids: Ids | None, groups: Any) -> Any:
    """Return how many groups still have a channel."""
    stays = mender.stays(ids)
    return groups if stays is None else int(stays.reshape(groups, -1).any(1).sum())
