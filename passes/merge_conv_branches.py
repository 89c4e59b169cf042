"""Merge convolutions of the same input that are summed: the branches of networks to re-parametrize.

Before                                   After
    a = batch_norm(conv2d(x, w, b, padding=1))     y = conv2d(x, w', b', padding=1)
    c = batch_norm(conv2d(x, v))
    y = a + c + batch_norm(x)

A sum of convolutions is the convolution with the summed kernels; a smaller kernel is one with zeros
around it, x itself is a kernel of one tap, and a batch norm or a factor scales what is below it:
    w' = s_a · w + s_c · pad(v) + s_x · 1,   b' = s_a · b + t_a + t_c + t_x
All of it is computed in float64 and stored in w's dtype (`fxopt.kernels` has the algebra).

Handled: sums and differences of any number of terms, in any order, beside other terms; 1d, 2d and
3d convolutions, grouped, strided and dilated, and linear layers; kernels of other sizes, not
centred ones and sparse (dilated) ones too, whose taps are among those of the largest; batch norms
in inference and constant factors per channel over a layer, over x or over a whole sum; branches
of two layers in a row that are one map (a low-rank adapter beside the layer it adapts).

Left alone: a kernel with taps that the largest has not, so that no multiplication is added and no
zero weight meets an infinity; other strides or groups; x beside a layer that has another number of
channels, or a stride; layers with another user; weights that are not constant; batch norms that
use batch statistics; terms that are broadcast.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.kernels import (
    LAYERS,
    SUMS,
    Kernel,
    Scaling,
    Summand,
    chained,
    fits,
    identity,
    insert,
    insert_sum,
    is_summand,
    kernel_of,
    scaled,
    scaling_of,
    summands,
    summed,
)
from fxopt.rewrite import Rewriter


@dataclass(frozen=True)
class MergeConvBranches:
    """Merge summed convolutions of one input, the input itself and its batch norms into one."""

    name: ClassVar[str] = "merge-conv-branches"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Merge the branches of each sum; inner sums come first, and are branches of outer ones."""
        rewriter = Rewriter(graph)
        for node in graph.find(*SUMS):
            if not node._erased and not is_summand(node):
                _merge(rewriter, node)
        return rewriter.result()


_REACH = 32  # how many scalings in a row are followed


# -- branches ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """A term of a sum as a map of `source`: a layer, or without a kernel the source itself."""

    factor: float
    node: fx.Node
    source: fx.Node
    kernel: Kernel | None
    scalings: tuple[Scaling, ...]  # of the source, where there is no layer; the first one first

    def inside(self, host: Kernel) -> Kernel | None:
        """Return this branch as a kernel that fits into `host`, or None."""
        kernel = self.kernel or _scaled(identity(self.source, host), self.scalings)
        return kernel if kernel is not None and fits(kernel, host) else None


def _branch(graph: GraphModule, factor: float, node: fx.Node) -> _Branch:
    """Read a term of a sum down to a layer, or to a value that others read too."""
    source, scalings = _unscaled(graph, node)
    times = Scaling(source, (), (), partial(torch.tensor, factor, dtype=torch.float64))
    scalings = (*scalings, times) if factor != 1 else scalings
    kernel = _layer(graph, source)
    if kernel is None:
        return _Branch(factor, node, source, None, scalings)
    kernel = _scaled(kernel, scalings)
    return _Branch(factor, node, kernel.x if kernel else node, kernel, ())


def _layer(graph: GraphModule, node: fx.Node) -> Kernel | None:
    """Read a layer that nobody else uses, with what stands before it where the two are one map."""
    outer = kernel_of(graph, node) if len(node.users) == 1 else None
    if not isinstance(outer, Kernel):
        return None
    source, scalings = _unscaled(graph, outer.x)
    inner = kernel_of(graph, source) if len(source.users) == 1 else None
    if not isinstance(inner, Kernel):
        inner = identity(source, outer)
    inner = _scaled(inner, scalings)
    both = chained(outer, inner) if inner is not None and inner.x is not outer.x else None
    return both if isinstance(both, Kernel) else outer


def _unscaled(graph: GraphModule, node: fx.Node) -> tuple[fx.Node, tuple[Scaling, ...]]:
    """Return what a node scales and shifts, and how: past calls that nobody else uses."""
    scalings: list[Scaling] = []
    while len(node.users) == 1 and len(scalings) < _REACH:
        scaling = scaling_of(graph, node)
        if not isinstance(scaling, Scaling):
            break
        scalings.append(scaling)
        node = scaling.x
    return node, tuple(reversed(scalings))


def _scaled(kernel: Kernel, scalings: tuple[Scaling, ...]) -> Kernel | None:
    for scaling in scalings:
        found = scaled(kernel, scaling)
        if found is None:
            return None
        kernel = found
    return kernel


# -- merging -------------------------------------------------------------------------------------


def _merge(rewriter: Rewriter, root: fx.Node) -> None:
    """Replace a sum by that of fewer terms."""
    branches = [_branch(rewriter.graph, *term) for term in summands(root)]
    by_source: dict[fx.Node, list[_Branch]] = defaultdict(list)
    for branch in branches:
        by_source[branch.source].append(branch)
    groups = [group for alike in by_source.values() for group in _groups(alike)]
    taken = {id(branch) for group in groups for branch in group}
    left = [branch for branch in branches if id(branch) not in taken]
    _report(rewriter, left, by_source)
    if not groups:
        return
    new: list[Summand] = [(1, _insert(rewriter, group, root)) for group in groups]
    new += [(branch.factor, branch.node) for branch in left]
    rewriter.replace(root, insert_sum(rewriter, new, root))


def _groups(branches: list[_Branch]) -> list[list[_Branch]]:
    """Return the branches that merge, in groups; the first of each is the layer that holds them."""
    layers = [branch for branch in branches if branch.kernel is not None]
    if not layers or len(branches) == 1:
        return []
    groups: list[list[_Branch]] = []
    for branch in sorted(layers, key=_size) + [b for b in branches if b.kernel is None]:
        room = (group for group in groups if branch.inside(_host(group)) is not None)
        group = next(room, None)
        if group is not None:
            group.append(branch)
        elif branch.kernel is not None and math.prod(branch.kernel.shape) <= branch.kernel.work:
            groups.append([branch])
    return [group for group in groups if len(group) > 1]


def _size(branch: _Branch) -> tuple[int, bool]:
    """Sort large kernels to the front, and behind others those that two layers have together."""
    size = math.prod(_host([branch]).shape)
    return -size, size != _host([branch]).work


def _host(group: list[_Branch]) -> Kernel:
    kernel = group[0].kernel
    assert kernel is not None
    return kernel


def _insert(rewriter: Rewriter, group: list[_Branch], root: fx.Node) -> fx.Node:
    """Insert the layer that computes a group of branches."""
    host = _host(group)
    guests = [branch.inside(host) for branch in group[1:]]
    kernel = summed(host, tuple(guest for guest in guests if guest is not None))
    origin = (*(branch.node for branch in group), root)
    return insert(rewriter, kernel, word="merged", before=root, origin=origin, like=root)


def _report(
    rewriter: Rewriter, left: list[_Branch], by_source: dict[fx.Node, list[_Branch]]
) -> None:
    """Say of each branch that stays beside a layer of the same input why it does."""
    largest: dict[fx.Node, _Branch] = {}
    for source, branches in by_source.items():
        layers = (branch for branch in branches if branch.kernel is not None)
        found = min(layers, key=_size, default=None)
        if found is not None:
            largest[source] = found
    for branch in left:
        beside = largest.get(branch.source)
        if beside is not None and beside is not branch:
            rewriter.miss(branch.node, _why_apart(branch, beside))
        elif branch.kernel is None and branch.source.all_input_nodes:
            obstacle = _obstacle(rewriter.graph, branch.source)
            if obstacle is not None and branch.source.all_input_nodes[0] in largest:
                rewriter.miss(branch.node, obstacle)


def _why_apart(branch: _Branch, beside: _Branch) -> str:
    host = _host([beside])
    if branch.kernel is None and not _scaled(identity(branch.source, host), branch.scalings):
        return f"it is scaled along other axes than the channels of {beside.node.name}"
    return f"it has taps that {beside.node.name} has not, or another stride or groups"


def _obstacle(graph: GraphModule, node: fx.Node) -> str | None:
    """Why a layer or a scaling was taken for a value of its own; None for any other call."""
    read = kernel_of if node.target in LAYERS else scaling_of
    found = read(graph, node)
    if isinstance(found, str) or found is None:
        return found
    return f"{node.name} is used elsewhere too"
