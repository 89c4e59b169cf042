"""Where fake-quants go: which values and weights are rounded, who reads them, who shares a scale.

    layers ── read ──▶ the value that their input was moved from   ── is rounded
    other calls with integer kernels, where all that they read can be had rounded: they join in
    what a kernel of integers writes, and somebody reads rounded   ── all read it rounded
    what is computed in floats anyway                              ── others go on reading floats

The first two are demand, found by walking up from each reader through what only moves numbers; the
last two decide who reads the result. Nothing is computed here: calibration needs to know where to
look, first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx
import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.constants import Constants
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.policy import JOINS, LAYERS, MOVES, Policy
from fxopt.shapes import is_tensor, rank_of

aten = torch.ops.aten
Obstacle = Callable[[fx.Node], str | None]  # why a call is to stay float


@dataclass
class Value:
    """An activation that is rounded, and those who read it rounded; `group` shares one scale.

    `askers` are the calls that compute on its integers, behind whatever moves them, else the one
    that writes them. A `centered` one has to have the zero point 0.
    """

    node: fx.Node
    readers: list[fx.Node]
    askers: list[fx.Node]
    group: int
    centered: bool


@dataclass
class Placement:
    """What is rounded, in the order of the graph, and what stays float, with the reason."""

    values: list[Value]
    weights: dict[fx.Node, list[fx.Node]]  # constants, and the layers that read them
    floats: list[tuple[fx.Node, str]]


def place(
    graph: GraphModule, policy: Policy, obstacle: Obstacle, weights_only: Callable[[fx.Node], bool]
) -> Placement:
    """Decide what is rounded. `obstacle` says of a call why it is to stay float, or None.

    A layer of which `weights_only` is true reads floats.
    """
    walk = _Walk(graph, policy, obstacle, weights_only)
    walk.demand_of_layers()
    walk.other_readers()
    return walk.placement()


def called(node: fx.Node) -> str:
    """Return the name of the operator that a node calls, such as "aten::conv2d"."""
    return node.target._schema.name if isinstance(node.target, OpOverload) else ""


def channel_axis(layer: fx.Node) -> int:
    """Return the dimension of a layer's weight that counts its outputs (of a group)."""
    return 1 if called(layer).startswith("aten::conv_transpose") else 0


@dataclass
class _Walk:
    graph: GraphModule
    policy: Policy
    obstacle: Obstacle
    weights_only: Callable[[fx.Node], bool]
    integer: dict[fx.Node, None] = field(default_factory=dict)  # calls with kernels of integers
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)  # what these write, and which
    wanted: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)  # and who asked for it
    carriers: set[fx.Node] = field(default_factory=set)  # moves on the way to integer calls
    absorbed: set[fx.Node] = field(default_factory=set)  # calls that a kernel before them takes in
    weights: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    floats: list[tuple[fx.Node, str]] = field(default_factory=list)
    centered: set[fx.Node] = field(default_factory=set)
    scales: Any = field(default_factory=networkx.utils.UnionFind)

    def demand_of_layers(self) -> None:
        """Ask for the inputs of layers and products, and for the outputs that are integers only."""
        constants = Constants(self.graph)
        for node in self.graph.graph.nodes:
            name = called(node)
            if name not in self.policy.layers and name not in self.policy.products:
                if name in LAYERS:
                    words = f"{self.policy.name} has no kernel of integers for it"
                    self.floats.append((node, words))
                continue
            is_layer = name in self.policy.layers
            reason = self.obstacle(node) or _misfit(node, constants, is_layer)
            if reason is not None:
                self.floats.append((node, reason))
                continue
            if is_layer:
                self.weights.setdefault(node.all_input_nodes[1], []).append(node)
            if self.weights_only(node):
                continue
            self._compute_in_integers(node, node.all_input_nodes[: 1 if is_layer else 2])

    def other_readers(self) -> None:
        """Let other calls with kernels of integers join in, where they can read nothing else."""
        for node in self.graph.graph.nodes:
            if called(node) not in self.policy.reads or node in self.absorbed or _pads(node):
                continue
            operands = [x for x in node.all_input_nodes if _is_float(x)]
            roots = [root for x in operands for root in self._roots(x)]
            numbers = [x for x in node.args[:2] if isinstance(x, (int, float))]
            if called(node) in ("aten::add", "aten::mul") and numbers:
                continue  # there is a kernel for two tensors only
            if not operands or any(root.op == "get_attr" for root in roots):
                continue
            if all(map(self._is_to_be_had, roots)) and self.obstacle(node) is None:
                self._compute_in_integers(node, operands)

    def placement(self) -> Placement:
        """Say what is rounded, and who reads it so."""
        order = {node: at for at, node in enumerate(self.graph.graph.nodes)}
        groups: dict[Any, int] = {}
        values = []
        for root in sorted(self.wanted, key=order.__getitem__):
            group = groups.setdefault(self.scales[root], len(groups))
            askers = self.wanted[root] or [self.written[root]]
            is_centered = root in self.centered
            values.append(Value(root, list(self._readers(root)), askers, group, is_centered))
        return Placement(values, self.weights, self.floats)

    # -- what follows from what ---------------------------------------------------------------

    def _compute_in_integers(self, node: fx.Node, operands: Iterable[fx.Node]) -> None:
        """Note that a call computes on integers: ask for what it reads, and find what it writes."""
        self.integer[node] = None
        for operand in operands:
            roots = list(self._roots(operand, note=True))
            for root in roots:
                self.wanted.setdefault(root, []).append(node)
            if called(node) in self.policy.centered:
                self.centered.update(roots)
            if len(roots) > 1:
                self.scales.union(*roots)
        end = self._end(node)
        self.written[end] = node
        if called(node) in self.policy.rounds:
            self.wanted.setdefault(end, [])

    def _is_to_be_had(self, root: fx.Node) -> bool:
        """Whether a value is rounded, or can be without a loss to others.

        What a linear layer or a product writes stays float: in transformers that is added to what
        runs through the whole network, whose few large channels leave the others no steps.
        """
        if root in self.wanted:
            return True
        writer = self.written.get(root)
        is_product = writer is not None and called(writer) in self.policy.products
        return writer is not None and not is_product and called(writer) != "aten::linear"

    def _end(self, node: fx.Node) -> fx.Node:
        """Return what a call's kernel writes: behind it, what only it feeds and it takes in."""
        while len(node.users) == 1:
            (user,) = node.users
            if called(user) not in self.policy.absorbs or not _is_float(user):
                break
            if user in self.written or user in self.absorbed:
                break  # a sum of two layers goes into the first
            self.absorbed.add(user)
            node = user
        return node

    def _roots(self, value: fx.Node, *, note: bool = False) -> Iterator[fx.Node]:
        """Yield what computes the numbers of a value, before they were moved."""
        pending, seen = [value], set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            sources = moved(node)
            if sources is None:
                yield node
                continue
            pending.extend(reversed(sources))
            if note:
                self.carriers.add(node)

    def _readers(self, root: fx.Node) -> Iterator[fx.Node]:
        """Yield who reads a rounded value rounded."""
        if root in self.written:
            # what a kernel writes as integers nobody gets as floats for nothing, but the caller
            only_integers = called(self.written[root]) in self.policy.rounds
            yield from (u for u in root.users if only_integers or u.op != "output")
        else:
            yield from (u for u in root.users if u in self.integer or u in self.carriers)


def moved(node: fx.Node) -> list[fx.Node] | None:
    """Return what a node moves the numbers of, or None where it computes new ones."""
    name = called(node)
    if name.startswith("aten::max_pool") and _pads_beyond(node.all_input_nodes[0]):
        return None  # what was padded with is gone, and shall not widen the range
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return moved(source) if called(source) in MOVES else None
    if name in JOINS:
        parts: Any = node.args[0]
        return list(parts)
    if name not in MOVES or not _is_float(node.all_input_nodes[0]):
        return None
    return None if _pads_beyond(node) else [node.all_input_nodes[0]]


def _pads_beyond(node: fx.Node) -> bool:
    """Whether a call pads with what lies in no range: 0 does, and the tensor's own numbers do."""
    if called(node) not in ("aten::constant_pad_nd", "aten::pad"):
        return False
    is_constant = called(node) == "aten::constant_pad_nd" or node.args[2] == "constant"
    return is_constant and node.args[-1] not in (None, 0)


def _pads(pool: fx.Node) -> bool:
    """Whether an average pool counts zeros around the edge, or less than its window there.

    OpenVINO takes a zero of integers for the number 0, whatever the zero point.
    """
    if not called(pool).startswith("aten::avg_pool"):
        return False
    padding, ceils, divisor = pool.args[3], pool.args[4], pool.args[6:]
    sizes = padding if isinstance(padding, (list, tuple)) else [padding]
    return any(sizes) or bool(ceils) or any(one is not None for one in divisor)


def _is_float(node: fx.Node) -> bool:
    return is_tensor(node) and bool(node.meta["val"].dtype.is_floating_point)


def _misfit(node: fx.Node, constants: Constants, is_layer: bool) -> str | None:
    """Return why a call has no kernel of integers."""
    if not _is_float(node):
        return "it does not compute floats"
    if is_layer:
        weight: Any = node.args[1]
        if called(node) == "aten::linear" and rank_of(node.args[0]) < 2:
            return "its input is a vector"
        if weight.target is fake_quantize:
            return "its weight is quantized already"
        if not constants.holds(weight):
            return "its weight is not a constant"
        return "its weight has less than two dimensions" if rank_of(weight) < 2 else None
    operands: Any = node.args[:2]
    if any(x.op == "get_attr" for x in operands):
        return "one factor is a constant, and no layer's weight"
    return "one factor is a vector" if any(rank_of(x) < 2 for x in operands) else None
