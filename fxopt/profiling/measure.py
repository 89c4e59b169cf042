"""Milliseconds per node: PyTorch runs the graph node by node, again and again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.devices import waiter
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule

WARMUP = 3  # rounds that are not counted


@dataclass(frozen=True)
class Timing:
    """How long one node took, in milliseconds."""

    median: float
    spread: float  # between the first and the third quartile

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Sum up the rounds of one node."""
        if len(milliseconds) < 2:
            return cls(milliseconds[0], 0.0)
        low, middle, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(middle, high - low)


def measure(graph: GraphModule, flat: Sequence[Any], *, rounds: int = 10) -> dict[str, Timing]:
    """Return how long each call of the graph takes on flat inputs, by the node's name.

    All nodes run in order, `rounds` times after a warm-up, so that each finds the caches as the
    node before it leaves them; values are freed as soon as no later node needs them. A GPU is
    waited for before and after each node. The graph, its state, the inputs and the random
    generators are left as they were. Raises OptionError for `rounds` below 1.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise OptionError(f"rounds must be an int, at least 1, not {rounds!r}.")
    runner = _Runner(graph.copy(), flat)
    times: dict[str, list[float]] = {}
    wait = waiter(runner.tensors())
    devices = list({v.device.index for v in runner.tensors() if v.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for turn in range(-WARMUP, rounds):
            taken = runner.run(wait)
            if turn >= 0:
                for name, milliseconds in taken.items():
                    times.setdefault(name, []).append(milliseconds)
    return {name: Timing.of(rows) for name, rows in times.items()}


class _Runner:
    """Runs one graph node by node, each time from the same state and inputs."""

    def __init__(self, graph: GraphModule, flat: Sequence[Any]) -> None:
        self._graph = graph
        self._inputs = flat
        self._state = {
            name: (graph.constant(name), graph.constant(name).detach().clone())
            for name in graph.info.mutated
        }
        self._writes_inputs = any(_is_write(node) for node in graph.graph.nodes)
        self._dead = _dead_after(graph)

    def tensors(self) -> list[torch.Tensor]:
        """Return the inputs and constants."""
        inputs = [value for value in self._inputs if isinstance(value, torch.Tensor)]
        return [*inputs, *self._graph.constants().values()]

    def run(self, wait: Callable[[], None]) -> dict[str, float]:
        """Run all nodes once; return the milliseconds of each call."""
        for tensor, before in self._state.values():
            tensor.copy_(before)
        inputs = iter(self._inputs)
        values: dict[fx.Node, Any] = {}
        taken: dict[str, float] = {}
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                value = next(inputs)
                values[node] = _copied(value) if self._writes_inputs else value
            elif node.op == "get_attr":
                values[node] = self._graph.value(node)
            elif node.op == "call_function":
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(dict(node.kwargs), values.__getitem__)
                wait()
                started = time.perf_counter_ns()
                values[node] = node.target(*args, **kwargs)
                wait()
                taken[node.name] = (time.perf_counter_ns() - started) / 1e6
                del args, kwargs
            for dead in self._dead.get(node, ()):
                del values[dead]
        return taken


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_write(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.is_mutable


def _dead_after(graph: GraphModule) -> Mapping[fx.Node, list[fx.Node]]:
    """Return which values no node needs any more, by the node after which that is so."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        last[node] = node
        for used in node.all_input_nodes:
            last[used] = node
    dead: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if node.op != "output":
            dead.setdefault(node, []).append(value)
    return dead
