"""Which channels may go from a graph, since nothing depends on them.

A channel may go when, at every contraction that reads it, one of these holds:

    nobody listens      its weights are 0, but for outputs that go as well
    it is 0             whatever the inputs are
    it is a constant c  at every place, and the bias can take what it adds: Σ w · c over the kernel

What has gone may leave others without a listener, so that the search goes on until nothing changes:
each layer is judged again only when outputs of it have gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.partition import Ids
from fxopt.contract import Miss
from fxopt.pruning.constancy.layers import LAYERS, sees_all_taps
from fxopt.pruning.constant_channels import Constancy
from fxopt.pruning.mending import Mask
from fxopt.pruning.readings import (
    Judgement,
    Numbers,
    Reading,
    has_constant_bias,
    judge,
    readings_of,
)


class DeadChannels:
    """The channels of an analysed graph that may go: `gone`, by their roots."""

    def __init__(self, channels: Channels) -> None:
        self.channels = channels
        graph = channels.graph
        self.names = sorted({
            str(node.target) for node in graph.graph.find_nodes(op="get_attr")
            if isinstance(node.meta.get("val"), torch.Tensor)
        } - graph.info.mutated)  # fmt: skip
        self.seen = Constancy(graph.graph.nodes, {one: graph.constant(one) for one in self.names})
        self.readings = readings_of(channels)
        self._affected = _Index(self.readings)
        self.candidates = np.zeros(len(channels.partition), np.bool_)
        for family in channels.families:
            self.candidates[channels.ids_of(family)] = True
        self.gone = self._search()
        self.held = self._last_ones()
        if self.held:
            self.candidates[list(self.held)] = False
            self.gone = self._search()

    @property
    def folds(self) -> list[tuple[Reading, Numbers]]:
        """The layers whose bias is given what channels added to it, and the constants they read."""
        found = []
        for reading, verdict in self._final():
            lost = self.gone[reading.entering]
            if (lost & verdict.fold).any():
                found.append((reading, np.where(lost, verdict.values, 0.0)))
        return found

    def _final(self) -> Iterator[tuple[Reading, Judgement]]:
        return zip(self.readings, self._verdicts, strict=True)

    def _search(self) -> Mask:
        """Find channels until what has gone leaves no other without a listener."""
        gone = np.zeros(len(self.candidates), np.bool_)
        objections = np.zeros(len(gone), np.int64)
        self._verdicts = [judge(reading, self.seen, gone) for reading in self.readings]
        for reading, verdict in self._final():
            np.add.at(objections, reading.entering[~verdict.fine], 1)
        new = np.flatnonzero(self.candidates & (objections == 0))
        while len(new):
            gone[new] = True
            freed = []
            for place in self._affected.by(new):
                reading = self.readings[place]
                now = judge(reading, self.seen, gone)
                freed.append(reading.entering[now.fine & ~self._verdicts[place].fine])
                np.subtract.at(objections, freed[-1], 1)
                self._verdicts[place] = now
            touched = np.unique(np.concatenate([np.zeros(0, np.int64), *freed]))
            new = touched[
                self.candidates[touched] & ~gone[touched] & (objections[touched] == 0)
            ]
        return gone

    def _last_ones(self) -> dict[int, fx.Node]:
        """Return a channel for each dimension that would be left empty, and where that is."""
        held: dict[int, fx.Node] = {}
        gone = self.gone.copy()
        if not gone.any():
            return held
        for node, along in self.channels.values():
            for ids in along:
                if ids is None:
                    continue
                roots = self.channels.partition.roots(ids)
                if gone[roots].all():
                    gone[roots[0]] = False
                    held[int(roots[0])] = node
        return held

    # -- why others stay --------------------------------------------------------------------------

    def misses(self) -> Iterator[Miss]:
        """Yield why channels stay that are zero, or another constant; each channel once."""
        told = self.gone.copy()
        for reading, verdict in self._final():
            blocked = ~verdict.fine | _goes_on(reading) & ~verdict.heard
            stuck = blocked & self._constants_read(reading) & self.candidates[reading.entering]
            stuck &= ~self.gone[reading.entering]
            if stuck.any() and not _can_absorb(reading.node):
                told[reading.entering[stuck]] = True
                yield Miss(
                    reading.node.name,
                    f"of the channels that it reads, {_are(int(stuck.sum()))} constant, but not 0, "
                    f"and {_why_not_folded(reading.node)}",
                )
        for root, node in self.held.items():
            told[root] = True
            yield Miss(node.name, "all its channels could go, and one has to stay")
        yield from self._others(told)

    def _constants_read(self, reading: Reading) -> Mask:
        """Return which channels a contraction reads as a constant other than 0."""
        found = np.zeros(len(reading.entering), np.bool_)
        for operand, dim in reading.operands:
            known = self.seen.of(operand)
            if known is not None and not self.channels.follower.is_weight(operand):
                one = known.along(dim)
                found |= (one.known & (one.values != 0)).expand(len(found)).cpu().numpy()
        return found

    def _others(self, told: Mask) -> Iterator[Miss]:
        """Yield where values hold constant channels that may not go, or not alone."""
        partition = self.channels.partition
        counts: dict[int, int] = {}
        for node, along in self.channels.values():
            known = self.seen.of(node)
            if known is None or self.channels.follower.is_weight(node):
                continue
            for dim, ids in enumerate(along):
                if ids is None or known.values.shape[dim] != len(ids):
                    continue
                roots = partition.roots(ids[known.along(dim).known.cpu().numpy()])
                new = np.unique(roots[~told[roots]])
                told[new] = True
                reasons = partition.reason_indices(new)
                for index in reasons[reasons >= 0].tolist():
                    counts[index] = counts.get(index, 0) + 1
                if alone := int((reasons < 0).sum()):
                    words = "constant, but not wherever they are read"
                    yield Miss(node.name, f"of its channels, {_are(alone)} {words}")
        texts = list(partition.reasons)
        for index, count in counts.items():
            reason = texts[index]
            words = "1 channel stays" if count == 1 else f"{count} channels stay"
            yield Miss(reason.node, f"{words}, though constant: {reason.text}")


def _goes_on(reading: Reading) -> Mask:
    """Return which channels a layer passes on, such as a depthwise one."""
    if reading.leaving is None:
        return np.zeros(len(reading.entering), np.bool_)
    return np.isin(reading.entering, reading.leaving)


def _can_absorb(node: fx.Node) -> bool:
    """Whether a layer's bias may take in what constants add."""
    return node.target in LAYERS and sees_all_taps(node) and has_constant_bias(node)


def _channels(count: int) -> str:
    return "1 channel" if count == 1 else f"{count} channels"


def _are(count: int) -> str:
    return "1 is" if count == 1 else f"{count} are"


def _why_not_folded(node: fx.Node) -> str:
    if node.target not in LAYERS:
        return "it has no bias to take what they add"
    if not sees_all_taps(node):
        return "at its borders it sees fewer of them than elsewhere, so no bias says the same"
    return "its weight or bias is not a constant to change"


class _Index:
    """Which layers compute a channel."""

    def __init__(self, readings: Sequence[Reading]) -> None:
        made = [(place, one.leaving) for place, one in enumerate(readings)]
        layers = [(place, ids) for place, ids in made if ids is not None]
        empty = np.zeros(0, np.int64)
        roots = np.concatenate([empty, *(ids for _, ids in layers)])
        owners = np.concatenate([empty, *(np.full(len(ids), place) for place, ids in layers)])
        order = np.argsort(roots, kind="stable")
        self._roots, self._owners = roots[order], owners[order]

    def by(self, roots: Ids) -> list[int]:
        """Return the layers that compute any of these."""
        start = np.searchsorted(self._roots, roots)
        stop = np.searchsorted(self._roots, roots, "right")
        places: set[int] = set()
        for first, last in zip(start.tolist(), stop.tolist(), strict=True):
            places.update(self._owners[first:last].tolist())
        return sorted(places)
