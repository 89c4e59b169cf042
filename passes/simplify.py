"""Simplify small chains of calls by exact algebra.

Before                                   After
    a = pad(x, [1, 1, 1, 1])                 c = hardtanh(conv2d(x, w, b, padding=1), 0, 6)
    b = relu(conv2d(a, w, b))                d = flatten(c, 1)
    c = clamp(b, max=6)
    d = reshape(flatten(c, 2), [n, -1])

Views of views, casts of casts, bounds of bounds and pads of pads become one call; zero padding
becomes a convolution's own; chains of scalars are computed once; x · σ(x) is silu, 1 / √x is rsqrt.
Each rule states its equation. Rules hold for nan, infinities and −0.0, and gradients are the same;
only relu(clamp(x, max=b)) passes its gradient at x = b, and hardtanh(x, 0, b) does not.

Scalar chains round once where they rounded twice. hardswish overflows a factor of 6 earlier than
x · hardsigmoid(x).

Left alone: a value inside the chain that others use, where the chain would then be computed twice
or nothing be saved; bounds that cross; casts through a narrower type; sums of scalars with
different signs, because (x + 2²³) − 2²³ is how one rounds; scalar products that leave the range of
the dtype; integer division; a single view (flatten stays flatten); shapes with several symbolic sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rules import Value, apply_rules, rule
from fxopt.shapes import is_tensor, same_metadata

aten = torch.ops.aten
INT_MAX = 9223372036854775807  # how ATen writes "to the end"


# -- views of views -----------------------------------------------------------------------------------

_RESHAPES = (
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dims,
    aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip


@rule(
    lambda y, size: y.reshape(size),
    lambda y, first, last: torch.flatten(y, first, last),
    lambda y, dim, sizes: aten.unflatten.int(y, dim, sizes),
    lambda y, dims: aten.squeeze.dims(y, dims),
    lambda y, dim: y.unsqueeze(dim),
)
def merge_reshapes(y: Value, match: Match) -> Any:
    """reshape(reshape(x)) = reshape(x), which is x where the shape returns"""
    if y.node.target not in _RESHAPES:
        return None
    x = y.source
    if same_metadata(x.node, match.root):
        return x
    if y.users > 1:
        return f"{y.node.name} is used elsewhere too"
    sizes = [size if isinstance(size, int) else -1 for size in match.root.meta["val"].shape]
    if sizes.count(-1) > 1 or -1 in sizes and 0 in sizes:
        return None
    return x.reshape(sizes)


@rule(
    lambda y, size: y.reshape(size),
    lambda y, first, last: torch.flatten(y, first, last),
    lambda y, dims: aten.squeeze.dims(y, dims),
)
def drop_kept_dims(y: Value, match: Match) -> Any:
    """reshape(mean(x, dims, keepdim=True)) = mean(x, dims)"""
    node = y.node
    if node.target not in _REDUCTIONS or node.args[2] is not True or not node.args[1]:
        return None
    rest = [size for axis, size in enumerate(y.shape) if axis not in node.args[1]]
    if not same_shape(rest, match.root.meta["val"].shape):
        return None
    if y.users > 1:
        return f"{node.name} is used elsewhere too"
    return y.source.call(node.target, *node.args[1:2], False, **node.kwargs)
