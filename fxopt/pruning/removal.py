"""Remove channels from a graph: cut the constants, mend the calls, prove the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.contract import Miss, PassResult
from fxopt.cost import macs
from fxopt.errors import VerifyError
from fxopt.graph_module import GraphModule
from fxopt.pruning.mending import Mask, Mender
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
    reference = zeroed(channels, gone)
    verdict = compare(
        name, runner(pruned), runner(reference), reference, [graph.info.example_inputs], None
    )
    approximate = _approximate(channels, gone)
    if not verdict.passed and not approximate:
        raise VerifyError(
            f"The pruned graph is not the original with {int(sum(m.sum() for m in removals))} "
            f"channels zeroed where they are read: max |Δ| / max |reference| is {verdict.error:.3g}"
            f", and the bound is {verdict.bound:.3g}. This is a bug of '{name}', unless the model "
            "is random. The graph is as it was."
        )
    record = _record(channels, removals, pruned, verdict, approximate)
    graph.become(pruned)
    return replace(result, misses=misses, details=record)


def _approximate(channels: Channels, gone: Mask) -> tuple[str, ...]:
    """Return where a mean or a norm reduces channels that are gone."""
    return tuple(
        f"{reason.text} ({reason.node})"
        for reason, ids in channels.reductions
        if gone[channels.partition.roots(ids)].any()
    )


def _record(
    channels: Channels,
    removals: Sequence[Mask],
    pruned: GraphModule,
    verdict: Verification,
    approximate: tuple[str, ...],
) -> PruningRecord:
    widths = tuple(
        Width(family.name, family.layers, family.channels, family.channels - int(mask.sum()))
        for family, mask in zip(channels.families, removals, strict=True)
    )
    graphs = (channels.graph, pruned)
    before, after = (sum(map(macs, _calls(graph))) for graph in graphs)
    sizes = [sum(p.numel() for p in set(_parameters(graph))) for graph in graphs]
    return PruningRecord(
        widths, tuple(channels.frozen()), (before, after), (sizes[0], sizes[1]),
        verdict.error, verdict.bound, approximate,
    )  # fmt: skip


def _calls(graph: GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function"]


def _parameters(graph: GraphModule) -> list[torch.nn.Parameter]:
    return [p for p in graph.constants().values() if isinstance(p, torch.nn.Parameter)]
