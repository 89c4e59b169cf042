"""Lower maximum pooling to the fastest kernel there is for its shape.

Before                                   After, where it is faster
    y = max_pool2d(x, [3, 3], …)             y = fxopt.max_pool(x, …)

oneDNN's own library pools images that lie channels last several times as fast as PyTorch does.

Left alone: other dtypes than floating-point ones; images without a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.backends.eager.cpu.choice import itself, library_way, replace_by_fastest
from fxopt.backends.eager.cpu.epilogues import onednn_obstacle
from fxopt.backends.eager.onednn import library, operators
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, rank_of
from fxopt.timings import Timings

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerMaxPools:
    """Take the largest value of each window in the fastest way."""

    timings: Timings | None = field(default=None, compare=False)

    name: ClassVar[str] = "lower-max-pools"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Lower each maximum pooling of images."""
        rewriter = Rewriter(graph)
        if library() is None:
            return rewriter.result()
        for node in graph.find(aten.max_pool2d.default):
            why = _obstacle(node)
            if why is not None:
                rewriter.miss(node, why)
            else:
                ways = library_way(node, partial(_by_library, rewriter, node))
                ways["as it is"] = partial(itself, node)
                replace_by_fastest(rewriter, node, node.all_input_nodes, ways, self.timings)
        return rewriter.result()


def _obstacle(node: fx.Node) -> str | None:
    """Why a pooling is left as it is, in words."""
    if rank_of(node) != 4:
        return "its input is one image, without a batch"
    return onednn_obstacle(node)


def _by_library(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    args: Any = node.args
    x, window, stride, *geometry = args
    return rewriter.insert(
        operators.max_pool, x, dtype_of(node), window, stride or window, *geometry,
        before=node, like=node,
    )  # fmt: skip
