"""Per-channel scales and shifts, and how the weights before or behind them take them in.

An affine call `z = y · s + t`, whose coefficients vary along the channels of a layer (a
convolution or a linear layer) and along nothing else, is part of that layer's weights:

    behind the layer        (w ∗ x + b) · s + t  =  (w · s_out) ∗ x + (b · s + t)
    in front of the layer   w ∗ (x · s + t) + b  =  (w · s_in) ∗ x + (b + Σ w · t)

The shift in front needs every output to see the whole kernel: no zero padding, no transposed
convolution. Both hold through calls that only move elements, or average over what is not a channel
(reshape, permute, dropout in evaluation, mean); where the channels went is computed from shapes.
New weights are computed in float64 and stored in the old weights' dtype. No decision depends on the
value of a constant, so new weights can be put through the same computations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_tensor, rank_of, same_metadata, shape_of

aten = torch.ops.aten
Coefficients = Callable[..., torch.Tensor]  # from the values of the sources


@dataclass(frozen=True)
class Affine:
    """A call that computes `input · scale + shift`.

    `scale` and `shift` (None: 1 and 0) compute coefficients from the values of `sources`; both
    broadcast to `shape`, and that to the call's own shape. `obstacle` says why the call is not what
    it looks like. `bare` are the arguments of a call that must stay, without its coefficients.
    """

    node: fx.Node
    input: fx.Node
    shape: tuple[int, ...] = ()
    sources: tuple[fx.Node, ...] = ()
    scale: Coefficients | None = None
    shift: Coefficients | None = None
    obstacle: str | None = None
    bare: tuple[Any, ...] | None = None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in the precision that new weights are computed in."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def is_constant(graph: GraphModule, node: Any) -> bool:
    """Whether a node is a constant tensor that the graph itself does not change."""
    known = isinstance(node, fx.Node) and node.op == "get_attr" and is_tensor(node)
    return known and str(node.target) not in graph.info.mutated


def fold_all(
    rewriter: Rewriter, nodes: Iterable[fx.Node], read: Callable[[fx.Node], Affine | None]
) -> None:
    """Fold each node that `read` understands into the layer before it, else into those behind it.

    The nearest goes first: in graph order backwards, in reverse order forwards. So one visit per
    direction folds whole chains.
    """
    left: list[tuple[fx.Node, str | None]] = []
    for node in nodes:
        affine = read(node)
        if affine is not None and node.users:
            found = _into_producer(rewriter, affine)
            if found is not FOLDED:
                left.append((node, found))
    for node, reason in reversed(left):
        affine = read(node)
        assert affine is not None
        found = _into_consumers(rewriter, affine)
        if found is not FOLDED and (reason or found):
            rewriter.miss(node, "; ".join(filter(None, (reason, found))))


FOLDED = "folded"  # what the two directions below return; else the reason, or None: no layer there


# -- the layers ---------------------------------------------------------------------------------------

_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


@dataclass(frozen=True)
class _Layer:
    """A call (x, weight, bias, …) that scales and shifts channels by its weights."""

    node: fx.Node
    axis: int  # of the channels, counted from the end, in the input and in the output
    groups: int = 1
    transposed: bool = False
    padded: bool = False

    @property
    def weight(self) -> fx.Node:
        weight = self.node.args[1]
        assert isinstance(weight, fx.Node)
        return weight

    @property
    def bias(self) -> Any:
        return self.node.args[2]

    @property
    def outputs(self) -> int:
        """The number of output channels."""
        return int(shape_of(self.weight)[1] * self.groups if self.transposed else shape_of(self.weight)[0])

    def obstacle(self, graph: GraphModule) -> str | None:
        """Why this layer's weights cannot be replaced, or None."""
        if not is_constant(graph, self.weight):
            return f"the weight of {self.node.name} is not a constant"
        if self.bias is not None and not is_constant(graph, self.bias):
            return f"the bias of {self.node.name} is not a constant"
        if not (self.weight.meta["val"].is_floating_point() or self.weight.meta["val"].is_complex()):
            return f"the weight of {self.node.name} is of integers"
        return None


def _layer(node: Any) -> _Layer | None:
    """Read a convolution or a linear layer."""
    target = node.target
    if target is aten.linear.default and rank_of(node.args[1]) == 2:
        return _Layer(node, axis=-1)
    if target in _CONVOLUTIONS:
        padding = node.args[4]
        padded = isinstance(padding, str) or any(pad != 0 for pad in padding)
        return _Layer(node, -1 - _CONVOLUTIONS[target], node.args[6], padded=padded)
    if target in _TRANSPOSED:
        return _Layer(node, -1 - _TRANSPOSED[target], node.args[6], transposed=True)
    return None


def _producer(node: fx.Node) -> _Layer | None:
    """Read a layer, or a batch norm with weights: its output is scaled and shifted like a layer's."""
    if node.target is aten.batch_norm.default and isinstance(node.args[1], fx.Node):
        return _Layer(node, axis=1 - rank_of(node))
    return _layer(node)


# -- the algebra --------------------------------------------------------------------------------------


def _blocks(layer: _Layer, weight: torch.Tensor) -> torch.Tensor:
    """View a weight as (groups, outputs per group, inputs per group, kernel), widened."""
    columns = weight.shape[1] if weight.dim() > 1 else 1
    blocks = wide(weight).reshape(layer.groups, -1, columns, weight[0, 0].numel() if columns else 1)
    return blocks.transpose(1, 2) if layer.transposed else blocks


def _from_blocks(layer: _Layer, blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    blocks = blocks.transpose(1, 2) if layer.transposed else blocks
    return blocks.reshape(weight.shape).to(weight.dtype)
