"""Lower batch norms that no convolution took up to the fastest kernel there is for their shape.

Before                                   After, where it is faster
    y = batch_norm(x, γ, β, μ, σ²)           z = fxopt.convolution(x, s, t, groups=channels, "relu")
    z = relu(y)                                with s = γ / √(σ² + ε), t = β − s · μ

A 1×1 convolution of each channel with itself is a scale and a shift, and does what follows in the
same pass over memory, channels last.

Left alone: batch norms in training mode, or without constant statistics; what is no image with a
batch; dtypes that oneDNN does not convolve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.affine import is_constant
from fxopt.backends.eager.cpu.choice import itself, library_way, replace_by_fastest
from fxopt.backends.eager.cpu.epilogues import Epilogue, activation_of, onednn_obstacle
from fxopt.backends.eager.onednn import library, operators
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, rank_of, shape_of
from fxopt.timings import Timings

aten = torch.ops.aten


@dataclass(frozen=True)
class LowerBatchNorms:
    """Scale, shift and activate in the fastest way."""

    timings: Timings | None = field(default=None, compare=False)

    name: ClassVar[str] = "lower-batch-norms"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Lower each batch norm of images."""
        rewriter = Rewriter(graph)
        if library() is None:
            return rewriter.result()
        for node in graph.find(aten.batch_norm.default):
            why = _obstacle(graph, node)
            if why is not None:
                rewriter.miss(node, why)
                continue
            epilogue = activation_of(node)
            last = epilogue.last_of(node)
            ways = library_way(node, partial(_by_library, rewriter, node, epilogue))
            ways["as it is"] = partial(itself, last)
            replace_by_fastest(rewriter, last, epilogue.inputs(_x(node)), ways, self.timings)
        return rewriter.result()


def _x(node: fx.Node) -> fx.Node:
    args: Any = node.args
    return args[0]


def _obstacle(graph: GraphModule, node: fx.Node) -> str | None:
    """Why a batch norm is left as it is, in words."""
    constants, is_training = node.args[1:5], node.args[5]
    if is_training or constants[2] is None or constants[3] is None:
        return "it takes the statistics of the batch"
    if not all(one is None or is_constant(graph, one) for one in constants):
        return "its scale, shift or statistics are not constant"
    if rank_of(node) != 4:
        return "its input is no image with a batch"
    if dtype_of(node) is not torch.float32:
        return f"its constants would be rounded to {dtype_of(node)}"
    return onednn_obstacle(node)


def _by_library(rewriter: Rewriter, node: fx.Node, epilogue: Epilogue) -> fx.Node:
    args: Any = node.args
    gamma, beta, mean, variance = args[1:5]
    place: dict[str, Any] = {
        "before": epilogue.last_of(node), "origin": (node, *epilogue.nodes),
    }  # fmt: skip
    factor = partial(_scale, gamma is not None, args[7])
    weights = [one for one in (variance, gamma) if one is not None]
    scale = rewriter.constant(
        lambda *values: factor(*values)[:, None, None, None], weights, name="scale", **place
    )
    sources = [mean, *([] if beta is None else [beta]), *weights]
    shift = rewriter.constant(
        partial(_shift, beta is not None, factor), sources, name="shift", **place
    )
    channels = int(shape_of(scale)[0])
    return rewriter.insert(
        operators.convolution, args[0], scale, shift, [1, 1], [0, 0], [1, 1], channels,
        *epilogue.unary.spelled, like=place["before"], **place,
    )  # fmt: skip


def _scale(has_gamma: bool, eps: float, *values: torch.Tensor) -> torch.Tensor:
    """Return γ / √(σ² + ε), computed in double precision from σ² and γ."""
    variance, *gamma = values
    inverse = (variance.double() + eps).rsqrt()
    return (inverse * gamma[0].double() if has_gamma else inverse).to(variance.dtype)


def _shift(
    has_beta: bool, factor: Callable[..., torch.Tensor], mean: torch.Tensor, *values: torch.Tensor
) -> torch.Tensor:
    """Return β − s · μ from μ, β and what `factor` computes s from."""
    moved = -mean.double() * factor(*values[has_beta:]).double()
    return (moved + values[0].double() if has_beta else moved).to(mean.dtype)
