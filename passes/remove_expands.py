"""Remove expansions where the operator broadcasts by itself.

Before                                   After
    m = expand(mask, [b, h, n, n])           y = scores + neg(mask)
    y = scores + neg(m)
    z = x · repeat(s, [1, 1, h, w])          z = x · s

A size of 1 stands for any size in elementwise arithmetic, in the batch of a matrix product and in
the mask of an attention; so it need not be written out where another operand has the size. This
holds for expand, for repeat, tile and repeat_interleave of dimensions of size 1, and through
elementwise calls of one tensor: f(expand(x)) = expand(f(x)), for which f is computed on x alone.

Left alone: an expansion that alone gives the result its shape, or (from no dimensions) its dtype;
repetitions of more than one element; rows and columns of matrix products; what goes into other
operators, such as cat; symbolic sizes that are not provably the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, infer, is_one, is_tensor, rank_of, same_shape, shape_of

aten = torch.ops.aten

# Elementwise operators that broadcast all their tensors.
_BROADCAST = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.div.Tensor_mode,
    aten.pow.Tensor_Tensor, aten.remainder.Tensor, aten.fmod.Tensor, aten.floor_divide.default,
    aten.maximum.default, aten.minimum.default, aten.fmax.default, aten.fmin.default,
    aten.atan2.default, aten.hypot.default, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.lerp.Tensor, aten.lerp.Scalar,
    aten.addcmul.default, aten.addcdiv.default, aten.clamp.Tensor,
    aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor,
    aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor,
}  # fmt: skip
# Others, and which of their tensors may be smaller.
_MATMUL, _ATTENTION = aten.matmul.default, aten.scaled_dot_product_attention.default
_PLACES = {aten.masked_fill.Scalar: (1,), _MATMUL: (0, 1), _ATTENTION: (3,)}

_ELEMENTWISE = {
    aten.to.dtype, aten.neg.default, aten.abs.default, aten.exp.default, aten.log.default,
    aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.square.default,
    aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.silu.default,
    aten.gelu.default, aten.hardsigmoid.default, aten.hardtanh.default, aten.clamp.default,
    aten.softplus.default, aten.erf.default, aten.sin.default, aten.cos.default,
    aten.logical_not.default, aten.bitwise_not.default, aten.rsub.Scalar, aten.pow.Tensor_Scalar,
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.eq.Scalar,
    aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar,
}  # fmt: skip


@dataclass(frozen=True)
class RemoveExpands:
    """Leave broadcasting to the operators that do it by themselves."""

    name: ClassVar[str] = "remove-expands"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Look at each operand of each operator that broadcasts."""
        rewriter = Rewriter(graph)
        for node in list(graph.graph.nodes):
            tensors = sum(map(is_tensor, node.args))
            if tensors > 1 and (node.target in _BROADCAST or node.target in _PLACES):
                for place in _PLACES.get(node.target, range(len(node.args))):
                    _remove_expand(rewriter, node, place)
        return rewriter.result()


def _remove_expand(rewriter: Rewriter, node: fx.Node, place: int) -> None:
    """f(x, g(expand(y))) = f(x, g(y))"""
    found = _expanded(node.args[place])
    if found is None:
        return
    source, between = found
    if node.target is _MATMUL and not _keeps_matrices(node.args[place], source):
        return
    if node.target is _ATTENTION and rank_of(source) != rank_of(node.args[place]):
        return
    new = source
    for call in between:
        kwargs: Any = call.kwargs
        new = rewriter.insert(call.target, new, *call.args[1:], before=node, origin=call, **kwargs)
    args = (*node.args[:place], new, *node.args[place + 1 :])
    value = infer(node.target, args, node.kwargs, rewriter.graph.info.fake_mode)
    if value.dtype == dtype_of(node) and same_shape(value.shape, shape_of(node)):
        rewriter.update(node, args)
    else:
        rewriter.discard()
        rewriter.miss(node, f"{node.args[place]} gives it its shape or dtype")


def _expanded(value: Any) -> tuple[fx.Node, list[fx.Node]] | None:
    """Return what is expanded on the way to a value, and the elementwise calls after that."""
    between: list[fx.Node] = []
    while _is_elementwise(value):
        between.insert(0, value)
        value = value.args[0]
    if not is_tensor(value) or not _expands(value):
        return None
    return value.args[0], between


def _is_elementwise(value: Any) -> bool:
    """Whether a value is computed from one tensor, element by element, for one user."""
    if not is_tensor(value) or value.target not in _ELEMENTWISE or len(value.users) > 1:
        return False
    return list(value.args[:1]) == value.all_input_nodes and is_pure(value)


def _expands(node: fx.Node) -> bool:
    """Whether a call does nothing but widen dimensions of size 1, or add some in front."""
    if node.target in (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default):
        return True
    if node.target in (aten.repeat.default, aten.tile.default):
        sizes, counts = shape_of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
        kept = [1] * (len(sizes) - len(counts)) + counts[len(counts) - len(sizes) :]
        return all(is_one(n) or is_one(size) for n, size in zip(kept, sizes, strict=True))
    if node.target is aten.repeat_interleave.self_int and isinstance(node.args[2], int):
        return is_one(shape_of(node.args[0])[node.args[2]])
    return False


def _keeps_matrices(expanded: Any, source: fx.Node) -> bool:
    """Whether the last two dimensions were there before, of the same sizes."""
    return rank_of(source) > 1 and same_shape(shape_of(source)[-2:], shape_of(expanded)[-2:])
