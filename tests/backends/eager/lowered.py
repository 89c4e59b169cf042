"""Checks that a lowering computes what the graph computes, by each way there is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt import dialect
from fxopt.backends.eager.onednn import library
from fxopt.backends.eager.program import Program, program_of
from fxopt.contract import Pass
from fxopt.graph_module import GraphModule
from fxopt.text import target_text
from fxopt.timings import Timings

_found = library()
LIBRARY = [] if _found is None else [f"oneDNN {_found.version}"]  # the way by oneDNN's own library


class Always(Timings):
    """Knows the answer to every question: one way."""

    def __init__(self, way: str) -> None:
        super().__init__(threads=1, file=None)
        self.way = way

    def known(self, question: str) -> str | None:
        self.asked += 1
        return self.way

    def fastest(self, question: str, ways: Any) -> str:
        raise AssertionError(f"'{self.way}' is none of {', '.join(ways)}")


def graph_of(model: nn.Module, inputs: Any, **options: Any) -> GraphModule:
    """Return the graph of a model in evaluation mode with noise in everything that it holds."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return fxopt.capture(model.eval(), inputs, **options)


def operators(graph: GraphModule) -> Counter[str]:
    """Return how often each operator stands in a graph."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return Counter(target_text(node.target).split(".")[0] for node in calls)


def check_lowering(
    graph: GraphModule, one: Pass, *others: tuple[Any, ...], bound: float = 1e-5
) -> tuple[GraphModule, Program]:
    """Run a pass on a copy of a graph; its program must compute the same, on `others`, too."""
    lowered = graph.copy()
    result = one.run(lowered)
    dialect.check(lowered, changed={*result.created, *result.changed})
    program = program_of(lowered)
    for inputs in (graph.info.example_inputs, *others):
        kept = [value.clone() for value in inputs]
        with torch.no_grad():
            expected = graph.run(*inputs)
            for _ in range(2):  # the second run must not see what the first left
                found = program.function(*inputs)
                for ours, theirs in zip(found, expected, strict=True):
                    assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
                    scale = theirs.abs().max().clamp(min=1e-6) if theirs.numel() else 1
                    error = (ours - theirs).abs().max() / scale if theirs.numel() else 0
                    assert error <= bound
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    return lowered, program
