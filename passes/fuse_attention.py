"""Fuse attention that is written by hand into one scaled dot-product attention.

Before                                        After
    s = matmul(q, permute(k)) * a + bias          y = scaled_dot_product_attention(
    s = masked_fill(s, m, lowest)                     q, k, v, masked_fill(bias, m, lowest),
    y = matmul(dropout(softmax(s)), v)                scale=a)

Both are softmax(a · q·kᵀ + mask) · v. What counts is which axes each product sums over, so matmul,
bmm, baddbmm and einsum are all read as einsum, and q, k, v may stand on either side, in any layout,
of rank 2 to any. The scale may stand on q, on k, on both, or behind the product; a scale per head
or row goes to q. Masks are added, or filled in; several become one, where they are constants at
compile time. Batch and heads may be merged and split again around a mask. A softmax does not change
where one number per row is taken away before it.

Then all attentions, also those that were one call before: a constant mask that hides nothing goes,
a constant triangle becomes `is_causal`, and keys and values whose heads are repeated become
`enable_gqa`.

A float mask is added, so a row that a mask hides with the lowest number stays uniform (its scores,
filled over before, then get a gradient). For a row of scores that is −inf throughout, PyTorch's
kernels give 0, and softmax nan; its fused CPU kernel also gives 0 where all scores of a row are
nan. This pass counts on finite q and k, whose product does not overflow, and checks the masks. The
weights are rounded to half precision later than before.

Left alone: a mask with −inf that may hide a whole row; scores that are filled with a number of
ordinary size, which is another function than adding it; weights or scores that are used elsewhere,
or that a call mixes, bounds or bends in between (talking heads, clamp, tanh); a softmax over what
is not the product of two tensors; masks larger than the scores; training-mode dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.attention.fusion import fuse
from fxopt.attention.mask_sizes import HIDDEN, MaskSizes
from fxopt.attention.obstacle import HeldBack
from fxopt.attention.scores import feeds_product
from fxopt.constants import Constants
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import rank_of, same_shape, shape_of

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class FuseAttention:
    """Replace two products with a softmax between them by one scaled dot-product attention.

    Constant masks are added up at compile time unless the sum has more than `largest_mask` bytes.
    """

    largest_mask: int = 2**24

    name: ClassVar[str] = "fuse-attention"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Fuse around each softmax, then simplify the masks and heads of all attentions."""
        rewriter, sizes = Rewriter(graph), MaskSizes(Constants(graph))
        alike: dict[Any, fx.Node] = {}
        for softmax in graph.find(aten.softmax.int):
            if not feeds_product(softmax):
                continue
            try:
                fuse(rewriter, sizes, alike, softmax, self.largest_mask)
            except HeldBack as reason:
                rewriter.discard()
                rewriter.miss(softmax, str(reason))
        constants = Constants(graph)
        for attention in graph.find(_ATTENTION):
            _simplify_mask(rewriter, constants, attention)
            _group_heads(rewriter, attention)
        return rewriter.result()


# -- attention as it stands ------------------------------------------------------------------------


def _simplify_mask(rewriter: Rewriter, constants: Constants, attention: fx.Node) -> None:
    """Take away a constant mask that hides nothing, or only what comes after each query."""
    args: Any = attention.args
    mask, causal = args[3], args[5]
    if causal or not constants.fixes(mask):
        return
    value = constants.value(mask)
    shown = value if value.dtype is torch.bool else value == 0
    hidden = ~shown if value.dtype is torch.bool else value < HIDDEN
    if bool(shown.all()):
        rewriter.update(attention, (*args[:3], None, args[4], False))
    elif _is_triangle(attention, shown) and bool((shown | hidden).all()):
        rewriter.update(attention, (*args[:3], None, args[4], True))


def _is_triangle(attention: fx.Node, shown: torch.Tensor) -> bool:
    """Whether each query sees itself and the keys before it, counted from the first."""
    query, key = attention.args[:2]
    rows, columns = shape_of(query)[-2], shape_of(key)[-2]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        return False
    if tuple(shown.shape[-2:]) != (rows, columns):
        return False
    return bool((shown == torch.ones_like(shown[..., :, :]).tril()).all())


def _group_heads(rewriter: Rewriter, attention: fx.Node) -> None:
    """attention(q, repeat(k), repeat(v)) = attention(q, k, v, enable_gqa=True)"""
    query, *sides = attention.args[:3]
    if attention.kwargs["enable_gqa"] or any(rank_of(x) != 4 for x in (query, *sides)):
        return
    heads = shape_of(query)[1]
    key, value = map(_before_repeats, sides)
    few, same = shape_of(key)[1], shape_of(value)[1]
    if not (isinstance(heads, int) and isinstance(few, int)) or few != same or few >= heads:
        return
    if few > 1 and (key is sides[0] or value is sides[1]):
        return  # not all of them are repeated, or the shapes of this attention are wrong
    new = rewriter.insert(
        _ATTENTION, query, key, value, *attention.args[3:],
        scale=attention.kwargs["scale"], enable_gqa=True, before=attention, like=attention,
    )  # fmt: skip
    rewriter.replace(attention, new)


def _before_repeats(node: Any) -> fx.Node:
    """Return (B, h, N, D) where `node` repeats each of its heads some times in a row."""
    found = node
    if node.target is aten.repeat_interleave.self_int and node.args[2] == 1:
        found = node.args[0]
    elif node.target is aten.reshape.default and node.args[0].target is aten.expand.default:
        spread = node.args[0].args[0]
        if spread.target is aten.unsqueeze.default and spread.args[1] == 2:
            found = spread.args[0]
    if rank_of(found) != 4:
        return node
    old, new = shape_of(found), shape_of(node)
    kept = same_shape((old[0], *old[2:]), (new[0], *new[2:]))
    return found if kept and isinstance(old[1], int) else node
