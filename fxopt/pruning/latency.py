"""How much time a pruned graph takes, of what the whole one takes: measured, by turns."""

from __future__ import annotations

import torch

from fxopt.channels.analysis import Channels
from fxopt.channels.partition import Mask
from fxopt.comparison.race import Call, race
from fxopt.compile import compile
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule
from fxopt.pruning.removal import remove

_ROUNDS = 7


class Stopwatch:
    """The latency of a graph without some channels, as a share of the whole graph's.

    Both are compiled for the same backend and called on the example inputs by turns; the share is
    the quotient of their medians.
    """

    def __init__(self, channels: Channels, backend: str) -> None:
        self._channels = channels
        self._backend = backend
        self._whole = self._call(channels.graph)

    def __call__(self, gone: Mask) -> float:
        """Return the share; `gone` says of each identity, by its root, whether it has gone."""
        if not gone.any():
            return 1.0
        pruned = self._call(remove(self._channels, gone)[0])
        outcome = race({"whole": self._whole, "pruned": pruned}, rounds=_ROUNDS)
        for reason in outcome.failures.values():
            raise LoweringError(f"The latency could not be measured: {reason}")
        latencies = outcome.latencies
        return latencies["pruned"].median / latencies["whole"].median

    def _call(self, graph: GraphModule) -> Call:
        compiled = compile(graph, backend=self._backend, verify="off")
        inputs = graph.info.example_inputs

        def call() -> object:
            with torch.inference_mode():
                return compiled.executable.run(*inputs)

        return call
