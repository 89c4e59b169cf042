"""Remove channels from a graph: cut the constants, mend the calls, prove the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.channels.partition import Mask
from fxopt.contract import Miss, PassResult
from fxopt.cost import macs
from fxopt.errors import VerifyError
from fxopt.graph_module import GraphModule
from fxopt.pruning.mending import Mender
from fxopt.pruning.oracle import zeroed
from fxopt.pruning.record import PruningRecord, Width
from fxopt.rewrite import Rewriter
from fxopt.story import Verification
from fxopt.verify import compare, runner


def remove(channels: Channels, gone: Mask) -> tuple[GraphModule, PassResult]:
    """Return a copy of the analysed graph without the channels that are gone (by their roots)."""
    graph = channels.graph.copy()
    rewriter = Rewriter(graph)
    rewriter.resize(Mender(channels, gone, rewriter))
    return graph, rewriter.result()


def removed(
    graph: GraphModule, channels: Channels, removals: Sequence[Mask], gone: Mask, name: str
) -> PassResult:
    """Make `graph` the analysed one without some channels, once that is proven; say what was done.

    `removals` says for each family which of its channels go, `gone` for each identity. Raises
    VerifyError, and leaves the graph as it was, where the result is not the original with those
    channels zeroed wherever a contraction reads them.
    """
    misses = tuple(Miss(one.node, one.reason.text) for one in channels.frozen())
    if not gone.any():
        return PassResult(misses=misses)
    pruned, result = remove(channels, gone)
    if not result.modified:
        return PassResult()  # bisection has stopped the pass
    approximate = channels.reductions(gone)
    verdict = _judged(pruned, zeroed(channels, gone, reduce_kept=True), name)
    if not verdict.passed:
        raise VerifyError(
            f"The pruned graph is not the original with {int(sum(m.sum() for m in removals))} "
            f"channels zeroed where they are read: max |Δ| / max |reference| is {verdict.error:.3g}"
            f", and the bound is {verdict.bound:.3g}. This is a bug of '{name}', unless the model "
            "is random. The graph is as it was."
        )
    error = verdict.error
    if approximate:
        error = _judged(pruned, zeroed(channels, gone), name).error
    where = tuple(f"{text} ({node.name})" for node, text in approximate)
    widths = _widths(channels, removals)
    record = PruningRecord(
        widths, tuple(channels.frozen()), *_sizes(channels.graph, pruned), error, verdict.bound,
        where,
    )  # fmt: skip
    graph.become(pruned)
    return replace(result, misses=misses, details=record)


def _judged(pruned: GraphModule, reference: GraphModule, name: str) -> Verification:
    inputs = [reference.info.example_inputs]
    return compare(name, runner(pruned), runner(reference), reference, inputs, None)


def _widths(channels: Channels, removals: Sequence[Mask]) -> tuple[Width, ...]:
    return tuple(
        Width(family.name, family.layers, family.channels, family.channels - int(mask.sum()))
        for family, mask in zip(channels.families, removals, strict=True)
    )


def _sizes(
    before: GraphModule, after: GraphModule
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the MACs, and the parameters, before and after."""
    calls = [sum(map(macs, _calls(graph))) for graph in (before, after)]
    elements = [sum(p.numel() for p in set(_parameters(graph))) for graph in (before, after)]
    return (calls[0], calls[1]), (elements[0], elements[1])


def _calls(graph: GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def _parameters(graph: GraphModule) -> list[torch.nn.Parameter]:
    return [p for p in graph.constants().values() if isinstance(p, torch.nn.Parameter)]
