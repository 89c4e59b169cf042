"""Compute once, now, what depends on constants only.

Before                                   After
    v = v_weight; g = g_weight               w = constant
    w = v · (g / ‖v‖)                        y = linear(x, w)
    y = linear(x, w)

A call is constant when it is pure and each of its arguments is a literal, an unchanging constant,
or a constant call; so is whatever follows from static shapes alone (masks, position indices). Only
the values that the rest of the graph needs are stored. Each remembers how it was computed, so that
new weights can be put through it; it is a parameter if one of its sources requires grad.

Left alone: randomness and other effects; state that the graph writes; a result much larger than
what it came from (`growth` times the bytes of its sources, where that exceeds `free_bytes`): then
the largest part of it that is small enough is stored; a result that is not a dense tensor; a
fake-quantized weight and what is computed from it, for backends store its integers, and training
needs the gradient that goes straight through the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.constants import fold
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_static_shape


@dataclass(frozen=True)
class FoldConstants:
    """Replace calls that depend on constants only by their values.

    `growth`: how many times the bytes of its sources a stored result may take. `free_bytes`: below
    this size a result is always stored.
    """

    growth: float = 4.0
    free_bytes: int = 4 * 2**20
    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Find the constant calls, choose which values to store, compute and store them."""
        rewriter = Rewriter(graph)
        sources = _constant_calls(graph)
        for node in self._needed(rewriter, graph, sources):
            if rewriter.out_of_fuel:
                break
            fold(rewriter, node)
        return rewriter.result()

    def _needed(
        self, rewriter: Rewriter, graph: GraphModule, sources: dict[fx.Node, int]
    ) -> list[fx.Node]:
        """Return, in graph order, the constant calls whose values the rest of the graph uses."""
        rejected: set[fx.Node] = set()
        chosen = []
        for node in reversed(list(sources)):
            if all(user in sources and user not in rejected for user in node.users):
                continue  # only constant calls use it, or nobody does
            reason = self._why_not(node, sources[node])
            if reason is None:
                chosen.append(node)
            else:
                rejected.add(node)
                if is_static_shape(node):
                    rewriter.miss(node, reason)
        return chosen[::-1]

    def _why_not(self, node: fx.Node, source_bytes: int) -> str | None:
        if not is_static_shape(node):
            return "it is not one tensor of known shape"
        value = node.meta["val"]
        if value.layout is not torch.strided or value.is_quantized:
            return "it is not a dense tensor"
        size = _bytes(value)
        if size > self.free_bytes and size > self.growth * source_bytes:
            return f"its {size:,} bytes are too many for a constant made of {source_bytes:,} bytes"
        return None


def _constant_calls(graph: GraphModule) -> dict[fx.Node, int]:
    """Return the calls that depend on constants only, with the bytes of the constants beneath.

    A constant that is used along several ways counts once for each, up to all constants together.
    """
    everything = sum(map(_bytes, graph.constants().values()))
    found: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or not is_pure(node) or node.target is fake_quantize:
            continue
        total = 0
        for used in node.all_input_nodes:
            if used in found:
                total += found[used]
            elif _is_constant(graph, used):
                total += _bytes(used.meta["val"])
            else:
                break
        else:
            found[node] = min(total, everything)
    return found


def _is_constant(graph: GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and "val" in node.meta and node.target not in graph.info.mutated


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
