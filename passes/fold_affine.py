"""Fold multiplications and additions of per-channel constants into the weights beside them.

Before                                   After
    y = linear(x, w, b)                      z = linear(x, w · s, b · s + t)
    z = y * s + t

    y = (x − m) / d                          z = conv2d(x, w / d, b − Σ w · m / d)
    z = conv2d(y, w, b)

A factor is a Python number, a constant of one element, or a constant that varies along the layer's
channels and along nothing else; the channels are followed through reshape, permute, flatten, split
(a factor on the queries of a joint q, k, v layer scales just their rows), dropout in evaluation and
averages over positions. Every mul, div, add, sub, rsub and neg is folded by itself, the nearest to
the layer first, so that chains fold completely; `fxopt.affine` has the algebra. A batch norm behind
which a constant stands takes it into its own weights.

Left alone: factors that are computed from inputs; factors that vary along positions; a layer whose
output has another user; a result of another dtype than the input; in front of a layer, shifts where
it pads with zeros or is transposed (scales still fold), and any other user.

`norms=True` also folds the weights of layer norm and RMS norm into the linear layers behind them,
as rotations and shared norms want it. By default they stay: the graph gets no smaller, every linear
layer gets a new weight, and PyTorch's layer norm on CPU is slower without weights than with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from fxopt.affine import Affine, Coefficients, fold_all, is_constant, wide
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldAffine:
    """Fold per-channel constants into the weights before or behind them."""

    norms: bool = False  # also the weights of layer norms in front of linear layers

    name: ClassVar[str] = "fold-affine"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fold what stands behind a layer, then what stands in front of one."""
        rewriter = Rewriter(graph)
        targets = (*_READERS, *(_NORMS if self.norms else ()))
        fold_all(rewriter, targets, lambda node: _affine(graph, node))
        return rewriter.result()


def _affine(graph: GraphModule, node: fx.Node) -> Affine | None:
    """Read a call as a scale and a shift by constants, or return None."""
    dtype = dtype_of(node)
    if not (dtype.is_floating_point or dtype.is_complex):
        return None
    if node.target in _NORMS:
        return _NORMS[node.target](graph, node)
    return _READERS[node.target](graph, node)


class _Constant(NamedTuple):
    """A constant operand: its shape, the node that holds it (if any), and its value."""

    shape: tuple[int, ...]
    sources: tuple[fx.Node, ...]
    value: Coefficients


def _constant(graph: GraphModule, operand: Any) -> _Constant | None:
    if is_constant(graph, operand):
        return _Constant(shape_of(operand), (operand,), wide)
    if isinstance(operand, (int, float)) and math.isfinite(operand):
        return _Constant((), (), lambda: torch.tensor(operand, dtype=torch.float64))
    return None


def _operands(graph: GraphModule, node: fx.Node) -> tuple[fx.Node, _Constant, bool] | None:
    """Return the computed operand, the constant one, and whether the constant comes first."""
    for first, position in ((False, 1), (True, 0)):
        x, constant = node.args[1 - position], _constant(graph, node.args[position])
        if constant is not None and isinstance(x, fx.Node) and is_tensor(x):
            return x, constant, first
    return None


# -- one reader per operator ----------------------------------------------------------------------


def _read_mul(graph: GraphModule, node: fx.Node) -> Affine | None:
    """x · c"""
    found = _operands(graph, node)
    if found is None:
        return None
    x, constant, _ = found
    return Affine(node, x, constant.shape, constant.sources, scale=constant.value)


def _read_div(graph: GraphModule, node: fx.Node) -> Affine | None:
    """x / c"""
    found = _operands(graph, node)
    if found is None or found[2] or node.args[1] == 0:
        return None
    x, constant, _ = found
    return Affine(
        node, x, constant.shape, constant.sources, lambda *values: 1 / constant.value(*values)
    )


def _read_neg(graph: GraphModule, node: fx.Node) -> Affine | None:
    """x · −1"""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return Affine(node, x, scale=lambda: torch.tensor(-1.0))


def _read_sum(graph: GraphModule, node: fx.Node) -> Affine | None:
    """a · p + b · q, one of a and b constant; add: 1, α; sub: 1, −α; rsub: −α, 1"""
    found = _operands(graph, node)
    alpha = node.kwargs["alpha"] if "alpha" in node.kwargs else node.args[2]
    if found is None or not isinstance(alpha, (int, float)):
        return None
    x, constant, constant_is_first = found
    p: float = 1
    q: float = alpha if node.target is aten.add.Tensor else -alpha
    if node.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        p, q = q, p
    of_x, of_constant = (q, p) if constant_is_first else (p, q)
    return Affine(
        node,
        x,
        constant.shape,
        constant.sources,
        None if of_x == 1 else lambda *values: torch.tensor(of_x),
        lambda *values: constant.value(*values) * of_constant,
    )


_READERS: dict[Any, Callable[[GraphModule, fx.Node], Affine | None]] = {
    aten.mul.Tensor: _read_mul,
    aten.div.Tensor: _read_div,
    aten.add.Tensor: _read_sum,
    aten.sub.Tensor: _read_sum,
    aten.rsub.Tensor: _read_sum,
    aten.rsub.Scalar: _read_sum,
    aten.neg.default: _read_neg,
}


def _read_layer_norm(graph: GraphModule, node: fx.Node) -> Affine | None:
    """normalized(x) · γ + β"""
    args: Any = node.args
    x, shape, gamma, beta, *rest = args
    weights = tuple(weight for weight in (gamma, beta) if weight is not None)
    if not weights or not all(is_constant(graph, weight) for weight in weights):
        return None
    return Affine(
        node,
        x,
        tuple(shape),
        weights,
        None if gamma is None else lambda *values: wide(values[0]),
        None if beta is None else lambda *values: wide(values[-1]),
        bare=(x, shape, None, None, *rest),
    )


def _read_rms_norm(graph: GraphModule, node: fx.Node) -> Affine | None:
    """normalized(x) · γ"""
    args: Any = node.args
    x, shape, gamma, epsilon = args
    if not is_constant(graph, gamma):
        return None
    return Affine(node, x, tuple(shape), (gamma,), wide, bare=(x, shape, None, epsilon))


_NORMS = {aten.layer_norm.default: _read_layer_norm, aten.rms_norm.default: _read_rms_norm}
