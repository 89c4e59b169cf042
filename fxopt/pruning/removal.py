"""Remove channels from a graph: cut the constants, mend the calls, prove the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
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
from fxopt.reconstruction import Reconstruction, reconstruct
from fxopt.rewrite import Rewriter
from fxopt.story import Verification
from fxopt.verify import compare, runner

aten = torch.ops.aten
_DROPOUTS = (
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)  # fmt: skip


def remove(
    channels: Channels, gone: Mask, name: str = "prune-channels"
) -> tuple[GraphModule, PassResult]:
    """Return a copy of the analysed graph without the channels that are gone (by their roots)."""
    graph = channels.graph.copy()
    rewriter = Rewriter(graph)
    rewriter.resize(Mender(channels, gone, rewriter, name))
    return graph, rewriter.result()


def remove_proven(
    graph: GraphModule, channels: Channels, removals: Sequence[Mask], gone: Mask, name: str,
    batches: Sequence[Any] = (),
) -> PassResult:  # fmt: skip
    """Make `graph` the analysed one without some channels, once that is proven; say what was done.

    `removals` says for each family which of its channels go, `gone` for each identity. Raises
    VerifyError, and leaves the graph as it was, where the result is not the original with those
    channels zeroed wherever a contraction reads them. With `batches`, what is proven is then fit to
    what the original's layers return on these (see `fxopt.reconstruction`).
    """
    misses = tuple(Miss(one.node, one.reason.text) for one in channels.frozen())
    if not gone.any():
        sizes = _sizes(channels.graph, channels.graph)
        frozen, widths = tuple(channels.frozen()), _widths(channels, removals)
        return PassResult(misses=misses, details=PruningRecord(widths, frozen, *sizes, 0.0, 0.0))
    pruned, result = remove(channels, gone, name)
    if not result.modified:
        return PassResult()  # bisection has stopped the pass
    approximate = channels.reductions(gone)
    verdict = _judged(pruned, zeroed(channels, gone, reduce_kept=True), name)
    if not verdict.passed:
        raise VerifyError(
            f"The pruned graph is not the original with {int(sum(m.sum() for m in removals))} "
            f"channels zeroed where they are read: max |Δ| / max |reference| is {verdict.error:.3g}"
            f", and the bound is {verdict.bound:.3g} ({verdict.what}). This is a bug of '{name}', "
            "unless the model is random. The graph is as it was."
        )
    error = verdict.error
    if approximate:
        error = _judged(pruned, zeroed(channels, gone), name).error
    where = tuple(f"{text} ({node.name})" for node, text in approximate)
    widths = _widths(channels, removals)
    record = PruningRecord(
        widths, tuple(channels.frozen()), *_sizes(channels.graph, pruned), error, verdict.bound,
        where, _reconstructed(pruned, channels, gone, batches) if batches else None,
    )  # fmt: skip
    graph.become(pruned)
    return replace(result, misses=misses, details=record)


def _reconstructed(
    pruned: GraphModule, channels: Channels, gone: Mask, batches: Sequence[Any]
) -> Reconstruction:
    """Fit the layers of the pruned graph, in place, to those of the one that was analysed."""
    originals = {node.name: node for node in channels.graph.graph.nodes}

    def stays(name: str, value: torch.Tensor) -> torch.Tensor:
        for dim, ids in enumerate(channels.along(originals[name])):
            if ids is not None and (lost := gone[channels.partition.roots(ids)]).any():
                kept = torch.from_numpy(np.flatnonzero(~lost)).to(value.device)
                value = value.index_select(dim, kept)
        return value

    pruned.own_storage()  # what was not cut is still the storage of the model
    return reconstruct(pruned, channels.graph, stays, batches)


def _judged(pruned: GraphModule, reference: GraphModule, name: str) -> Verification:
    """Compare on the example inputs, and on others: an image of zeros proves little."""
    original = _certain(reference)
    run, expected = runner(_certain(pruned)), runner(original)
    inputs = reference.info.example_inputs
    verdict = compare(name, run, expected, original, [inputs], None)
    if not verdict.passed:
        return verdict
    try:
        other = compare(name, run, expected, original, [_noisy(inputs)], None)
    except (RuntimeError, IndexError, ValueError):
        return verdict  # the reference fails: not every model takes every number, such as a mask
    return max(verdict, other, key=lambda one: one.error / one.bound)


def _noisy(flat: Sequence[Any]) -> tuple[Any, ...]:
    """Return inputs with noise of their own spread (or of 1, where they are all alike)."""
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return value
        spread = float(value.double().std()) if value.numel() > 1 else 0.0
        drawn = torch.randn(value.shape, generator=generator).to(value)
        return value + drawn * (spread if 0.0 < spread < math.inf else 1.0)

    return tuple(map(noise, flat))


def _certain(graph: GraphModule) -> GraphModule:
    """Return a graph without dropout: on another width it would draw other numbers."""
    if not any(node.args[2] is True for node in graph.find(*_DROPOUTS)):
        return graph
    twin = graph.copy()
    for node in twin.find(*_DROPOUTS):
        node.args = (*node.args[:2], False)
    twin.recompile()
    return twin


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
