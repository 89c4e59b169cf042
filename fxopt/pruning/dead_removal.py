"""Do without the channels that may go: cut them, give biases what they added, remember why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.channels.follower import arguments
from fxopt.contract import PassResult
from fxopt.graph_module import GraphModule, Recipe
from fxopt.pruning.constancy.layers import added_by, in_groups
from fxopt.pruning.constant_channels import Constancy
from fxopt.pruning.dead_channels import DeadChannels
from fxopt.pruning.mending import Kept, Mender
from fxopt.pruning.readings import judge
from fxopt.pruning.record import Width
from fxopt.replay import remember_reads
from fxopt.rewrite import Rewriter
from fxopt.shapes import shape_of


@dataclass(frozen=True)
class RemovedChannels:
    """What was removed; print it. `absorbing` are the layers whose bias took constants in."""

    widths: tuple[Width, ...]
    absorbing: tuple[str, ...]

    @classmethod
    def of(cls, dead: DeadChannels) -> RemovedChannels:
        """Return the families of channels that some are gone from."""
        lost = [
            (family, int(dead.gone[dead.channels.ids_of(family)].sum()))
            for family in dead.channels.families
        ]
        widths = tuple(
            Width(family.name, family.layers, family.channels, family.channels - count)
            for family, count in lost
            if count
        )
        layers = (reading.node for reading, _ in dead.folds)
        return cls(widths, tuple(str(node.meta.get("path") or node.name) for node in layers))

    def plus(self, later: RemovedChannels) -> RemovedChannels:
        """Return what this removal and a later one did together."""
        widths = {width.name: width for width in self.widths}
        for width in later.widths:
            before = widths.pop(width.name, width).before
            widths[width.name] = replace(width, before=before)
        absorbing = dict.fromkeys((*self.absorbing, *later.absorbing))
        return RemovedChannels(tuple(widths.values()), tuple(absorbing))

    @property
    def count(self) -> int:
        """How many channels have gone."""
        return sum(width.before - width.after for width in self.widths)

    def __str__(self) -> str:
        name = max((len(width.name) for width in self.widths), default=0)
        words = "1 channel" if self.count == 1 else f"{self.count} channels"
        lines = [f"{words} had no effect, or a constant one"]
        lines += [
            f"{width.name:{name}}  {width.before:>6} → {width.after:>6}" for width in self.widths
        ]
        if self.absorbing:
            lines.append(f"biases that took constants in: {len(self.absorbing)}")
        return "\n".join(lines)


def without(dead: DeadChannels, name: str) -> tuple[GraphModule, PassResult]:
    """Return a copy of the analysed graph without the channels that may go: one rewrite.

    What it was decided on is remembered, so that new weights with other constants are refused.
    """
    channels = dead.channels
    graph = channels.graph.copy()
    rewriter = Rewriter(graph)
    mender = Mender(channels, dead.gone, rewriter, name)
    nodes = {node.name: node for node in graph.graph.nodes}
    biases: dict[fx.Node, fx.Node] = {}  # by the layer, or by the bias if the layer has it alone
    for reading, values in dead.folds:
        layer = nodes[reading.node.name]
        leaving = mender.stays(reading.leaving)
        kept = None if leaving is None else tuple(np.flatnonzero(leaving).tolist())
        weight, bias = arguments(layer)[1:3]
        alone = bias is not None and len(bias.users) == 1
        key = bias if alone else layer
        biases[key] = rewriter.constant(
            Absorbed(reading.node, torch.from_numpy(values), kept),
            [weight] if bias is None else [weight, bias],
            name=_name_of_bias(weight, bias),
            before=key,
            origin=layer,
        )

    def mend(node: fx.Node) -> fx.Node | tuple[Any, ...] | None:
        if node.op == "get_attr" and node in biases:
            return biases[node]
        found = mender(node)
        if node not in biases:
            return found
        args = found if isinstance(found, tuple) else node.args
        return (*args[:2], biases[node], *args[3:])

    shared = [arguments(layer)[2] for layer in biases if layer.op == "call_function"]
    if rewriter.resize(mend):
        for bias in dict.fromkeys(shared):  # of several layers, all of which have others now
            if bias is not None and not bias._erased and not bias.users:
                rewriter.erase(bias)
        _remember(graph, dead, name)
    return graph, rewriter.result()


class Absorbed:
    """Computes a layer's bias when it no longer reads channels of these constant values."""

    def __init__(
        self, layer: fx.Node, values: torch.Tensor, kept: tuple[int, ...] | None
    ) -> None:
        self._groups = _shape_in_groups(layer)
        self.values = values
        self.kept = kept

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return b + Σ w · c of the outputs that stay."""
        apart = weight.reshape(self._groups)
        total = added_by(apart, self.values.to(weight.device))
        if bias is not None:
            total = total + bias.double()
        total = total.to((weight if bias is None else bias).dtype)
        return total if self.kept is None else Kept(((0, self.kept),))(total)


def _shape_in_groups(layer: fx.Node) -> tuple[int, ...]:
    empty = torch.empty(shape_of(arguments(layer)[1]), device="meta")
    return tuple(in_groups(layer, empty).shape)


def _name_of_bias(weight: fx.Node, bias: fx.Node | None) -> str:
    if bias is not None:
        return f"{bias.target}_absorbed"
    path, dot, _ = str(weight.target).rpartition(".")
    return f"{path}{dot}bias"


class StillDead:
    """Computes, from new weights, the constants by which channels that have gone could go.

    NaN stands for one that could not go; it holds the calls of a graph, and none of its tensors.
    """

    def __init__(self, dead: DeadChannels) -> None:
        twins = _skeleton(dead.channels.graph.graph.nodes)
        self.names = dead.names
        self.gone = dead.gone
        self.nodes = list(twins.values())
        self.readings = [
            replace(
                one, node=twins[one.node], operands=tuple((twins[x], d) for x, d in one.operands)
            )
            for one in dead.readings
            if dead.gone[one.entering].any()
        ]

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Return one number for each channel that is gone, at each contraction that read it."""
        seen = Constancy(self.nodes, dict(zip(self.names, tensors, strict=True)))
        found = []
        for reading in self.readings:
            lost = self.gone[reading.entering]
            verdict = judge(reading, seen, self.gone)
            added = np.where(verdict.fold, verdict.values, 0.0) + 0.0  # 0 is also −0
            found.append(np.where(verdict.fine, added, np.nan)[lost])
        return torch.tensor(np.concatenate([np.zeros(0), *found]).tolist(), dtype=torch.float64)


def _skeleton(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copy nodes into a graph that belongs to no module, and so keeps no weights."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        twins[node] = graph.node_copy(node, twins.__getitem__)
    return twins


def _remember(graph: GraphModule, dead: DeadChannels, name: str) -> None:
    """Let new weights be refused in which those channels could not go, or are other constants."""
    still = StillDead(dead)
    taken = {recipe.name for recipe in graph.info.recipes}
    record, count = "constants_of_channels", 2
    while record in taken or graph.has_constant(record):
        record, count = f"constants_of_channels_{count}", count + 1
    values = still(*(dead.channels.graph.constant(one).detach() for one in dead.names))
    graph.info.recipes.append(Recipe(record, tuple(dead.names), still))
    remember_reads(graph, name, {record: (values, 0)})
