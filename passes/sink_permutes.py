"""Sink permutes through calls that do not mind the order of dimensions, until they cancel.

Before                                       After
    p = permute(x, [0, 2, 3, 1])                 y = softmax(relu(x) + permute(b, …), 1)
    y = softmax(relu(p) + b, 3)                  z = mean(x, [2, 3])
    y = permute(y, [0, 3, 1, 2])
    z = mean(p, [1, 2])

Elementwise arithmetic, softmax, cat, split, slices, pads and reductions that keep their dimensions
compute the same in any order of dimensions, if their own dimensions are renamed. Calls of this kind
that hang together are a region. In a region all of whose values are permuted by p⁻¹, permutes by p
at its entries go, and so do permutes by p⁻¹ at its exits; other values get a permute where they
enter or leave it. A region is flipped where two permutes go for each that comes; constants are
permuted at compile time. Connected regions are tried as a whole, then each part with one exit.

A reduction of a permuted tensor reduces the tensor itself.

Left alone: regions where more than one permute would come for two that go; normalizations, linear
layers and convolutions, which have their own order; a softmax along rows that would go across short
ones; operands of fewer dimensions that are no constants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_tensor, rank_of, shape_of

aten = torch.ops.aten
_PERMUTE, _SPLIT = aten.permute.default, aten.split_with_sizes.default
Order = tuple[int, ...]  # of the dimensions of a permute

_UNARY = {
    aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.gelu.default,
    aten.silu.default, aten.mish.default, aten.elu.default, aten.selu.default, aten.celu.default,
    aten.leaky_relu.default, aten.hardtanh.default, aten.hardswish.default,
    aten.hardsigmoid.default, aten.softplus.default, aten.log_sigmoid.default, aten.exp.default,
    aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default,
    aten.square.default, aten.neg.default, aten.abs.default, aten.sign.default, aten.erf.default,
    aten.sin.default, aten.cos.default, aten.floor.default, aten.ceil.default, aten.round.default,
    aten.clamp.default, aten.to.dtype, aten.logical_not.default, aten.bitwise_not.default,
    aten.rsub.Scalar, aten.pow.Tensor_Scalar,
}  # fmt: skip
_BINARY = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Tensor,
    aten.maximum.default, aten.minimum.default, aten.where.self, aten.addcmul.default,
    aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor,
    aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar,
    aten.logical_and.default, aten.logical_or.default, aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor, aten.masked_fill.Scalar,
}  # fmt: skip
# Calls along a dimension, or several, and which argument says which.
_ALONG = {
    aten.softmax.int: 1, aten.log_softmax.int: 1, aten.cat.default: 1, _SPLIT: 2,
    aten.slice.Tensor: 1, aten.cumsum.default: 1, aten.glu.default: 1, aten.flip.default: 1,
    aten.roll.default: 2,
}  # fmt: skip
_ROWWISE = (aten.softmax.int, aten.log_softmax.int, aten.cumsum.default)
_SHORTEST_ROW = 16  # elements that are computed side by side
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)


@dataclass(frozen=True)
class SinkPermutes:
    """Let permutes meet behind calls that do not mind the order of dimensions, and cancel."""

    name: ClassVar[str] = "sink-permutes"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Flip regions until none is worth it; each flip leaves fewer permutes than there were."""
        rewriter = Rewriter(graph)
        before = -1
        while rewriter.rewrites > before and not rewriter.out_of_fuel:
            before = rewriter.rewrites
            for node in graph.graph.nodes:
                _reduce_before(rewriter, node)
            ranks = {node: _free_rank(node) for node in graph.graph.nodes}
            free = {node: rank for node, rank in ranks.items() if rank is not None}
            for region in (*_components(free), *_closures(free)):
                _flip(rewriter, region)
        return rewriter.result()


def _reduce_before(rewriter: Rewriter, node: fx.Node) -> None:
    """mean(permute(x, p), dims) = mean(x, p[dims]) where the other dimensions keep their order"""
    if node.target in _REDUCTIONS and (permute := node.all_input_nodes[0]).target is _PERMUTE:
        dims = _reduced(node, _order_of(permute))
        if dims is not None:
            rewriter.update(node, (permute.args[0], dims, False))


def _reduced(node: fx.Node, order: Order) -> list[int] | None:
    """Return over what of z a call reduces permute(z, p); None where the rest is out of order."""
    if node.target not in _REDUCTIONS or node.args[2] is not False or not node.args[1]:
        return None
    dims: Any = node.args[1]
    kept = [d for i, d in enumerate(order) if i not in dims]
    return sorted(order[d] for d in dims) if kept == sorted(kept) else None


# -- regions ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """Calls that do not mind the order of dimensions, in the order of the graph."""

    nodes: dict[fx.Node, None]
    rank: int

    @property
    def is_whole(self) -> bool:
        """Whether all of it is still there, and each split is with all of its parts."""
        if any(node._erased for node in self.nodes):
            return False
        parts: list[Any] = [node for node in self.nodes if node.target is getitem]
        splits = [node for node in self.nodes if node.target is _SPLIT]
        return all(part.args[0] in self.nodes for part in parts) and all(
            part in self.nodes for split in splits for part in split.users
        )

    def entries(self) -> dict[fx.Node, None]:
        """The tensors that come from outside."""
        found = (source for node in self.nodes for source in node.all_input_nodes)
        return {source: None for source in found if source not in self.nodes}

    def exits(self) -> Iterator[tuple[fx.Node, list[fx.Node], list[fx.Node]]]:
        """Yield each value used outside, the permutes that use it, and what else does."""
        for node in self.nodes:
            users = [user for user in node.users if user not in self.nodes]
            permutes = [u for u in users if u.target is _PERMUTE and not self.is_within(u)]
            others = [user for user in users if user.target is not _PERMUTE]
            if permutes or others:
                yield node, permutes, others

    def is_within(self, permute: fx.Node) -> bool:
        """Whether a permute at the border leads from the region back into it, and nowhere else."""
        return permute.args[0] in self.nodes and all(user in self.nodes for user in permute.users)

    def orders(self) -> list[Order]:
        """The orders p that flipping could take away, the most frequent first; few of them."""
        counts: Counter[Order] = Counter()
        for entry in self.entries():
            if entry.target is _PERMUTE:
                counts[_order_of(entry)] += 1
        for _, permutes, _ in self.exits():
            counts.update(_inverse(_order_of(permute)) for permute in permutes)
        return [order for order, _ in counts.most_common(3)]

    def saved(self, order: Order) -> int:
        """How many permutes go where x becomes x' = permute(x, p⁻¹); 0 where it is not worth it.

        It is where two go for each that comes, because one beside a convolution may cost more than
        one that is only a view; three for each tensor that would be there in two orders.
        """
        if any(_is_slower(node, order) for node in self.nodes):
            return 0
        gone = new = twice = 0
        for entry in self.entries():
            if entry.target is not _PERMUTE:
                twice += not _is_constant(entry) and rank_of(entry) > 0
                continue
            stays = _order_of(entry) != order or entry.args[0] in self.nodes
            dies = all(user in self.nodes for user in entry.users)
            gone, new = gone + (dies and not stays), new + (stays and not dies)
            twice += not stays and not dies
        for _, permutes, others in self.exits():
            new += any(_reduced(user, order) is None for user in others)
            gone += sum(_order_of(permute) == _inverse(order) for permute in permutes)
        return gone - new - twice if gone >= 2 * new + 3 * twice else 0


def _is_slower(node: fx.Node, order: Order) -> bool:
    """Whether a call goes along rows, and would go across short ones: slower than permuting."""
    if node.target not in _ROWWISE or node.args[1] != len(order) - 1:
        return False
    across = [size for d, size in zip(order, shape_of(node), strict=True) if d > order[-1]]
    known = all(isinstance(size, int) for size in across)
    return bool(across) and known and math.prod(across) < _SHORTEST_ROW


def _order_of(permute: fx.Node) -> Order:
    order: Any = permute.args[1]
    return tuple(order)


def _inverse(order: Order) -> Order:
    return tuple(order.index(d) for d in range(len(order)))


def _is_constant(node: fx.Node) -> bool:
    graph: Any = node.graph.owning_module
    return node.op == "get_attr" and node.target not in graph.info.mutated


def _free_rank(node: fx.Node) -> int | None:
    """Return the rank of the tensors of a call that does not mind their order; None for others."""
    if node.target is getitem:
        source: Any = node.args[0]
        return _free_rank(source) if source.target is _SPLIT else None
    known = node.target in _UNARY or node.target in _BINARY or node.target in _ALONG
    kept = node.target in _REDUCTIONS and bool(node.args[1]) and node.args[2] is True
    padded = node.target is aten.pad.default and node.args[2] == "constant"
    if not (known or kept or padded) or not is_pure(node):
        return None
    if node.target is aten.roll.default and not node.args[2]:
        return None
    value = node.meta["val"]
    rank = int((value[0] if isinstance(value, (list, tuple)) else value).dim())
    sources = node.all_input_nodes
    if rank < 2 or not all(map(is_tensor, sources)):
        return None
    same = all(rank_of(s) in (0, rank) or _is_constant(s) for s in sources)
    return rank if same else None


def _components(free: dict[fx.Node, int]) -> Iterator[_Region]:
    """Yield the connected regions of free calls, given with their ranks."""
    seen: set[fx.Node] = set()
    for first, rank in free.items():
        found, pending = [], [] if first in seen else [first]
        seen.update(pending)
        while pending:
            node = pending.pop()
            found.append(node)
            around = (*node.all_input_nodes, *node.users)
            new = [other for other in around if free.get(other) == rank and other not in seen]
            seen.update(new)
            pending += dict.fromkeys(new)
        if found:
            yield _Region(dict.fromkeys(sorted(found)), rank)


def _closures(free: dict[fx.Node, int]) -> Iterator[_Region]:
    """Yield regions with one exit beside permutes: calls all of whose users lie in the region."""
    exits: dict[fx.Node, fx.Node] = {}
    regions: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(free):
        users = [user for user in node.users if user.target is not _PERMUTE]
        inside = all(free.get(user) == free[node] for user in users)
        into = {exits[user] for user in users} if inside else set()
        exits[node] = into.pop() if len(into) == 1 else node
        regions.setdefault(exits[node], []).append(node)
    for found in regions.values():
        yield _Region(dict.fromkeys(reversed(found)), free[found[0]])


# -- flipping --------------------------------------------------------------------------------------


def _flip(rewriter: Rewriter, region: _Region) -> None:
    """Permute all values of a region by p⁻¹ where that leaves fewer permutes."""
    if not region.is_whole or not any(region.exits()):
        return
    best = max(region.orders(), key=region.saved, default=None)
    if best is None or region.saved(best) < 1:
        return
    flipped: dict[fx.Node, fx.Node] = {}
    for node in region.nodes:
        for source in node.all_input_nodes:
            if source not in flipped:
                z: Any = source.args[0] if source.target is _PERMUTE else None
                inside = flipped[z] if z in region.nodes else None
                flipped[source] = _entry(rewriter, source, best, inside, before=node)
        args = fx.map_arg(_respelled(node, best), flipped.__getitem__)
        kwargs: Any = node.kwargs
        flipped[node] = rewriter.insert(node.target, *args, before=node, **kwargs)
    new: dict[fx.Node, fx.Node] = {}
    for node, permutes, others in region.exits():
        for permute in permutes:
            dims = [best[d] for d in _order_of(permute)]
            new[permute] = _permuted(rewriter, flipped[node], dims, before=permute)
        reduced = {user: kept for user in others if (kept := _reduced(user, best))}
        for user, kept in reduced.items():
            new[user] = rewriter.insert(user.target, flipped[node], kept, False, before=user)
        if len(reduced) < len(others):
            new[node] = _permuted(rewriter, flipped[node], list(best), before=node)
    rewriter.replace(new)


def _entry(
    rewriter: Rewriter, source: fx.Node, order: Order, inside: fx.Node | None, before: fx.Node
) -> fx.Node:
    """Return x' = permute(x, p⁻¹) of a value from outside; z where x is permute(z, p).

    `inside` is z' where x is a permute of a value z of the region itself.
    """
    rank, back = len(order), _inverse(order)
    if rank_of(source) == 0:
        return source
    if _is_constant(source):
        return rewriter.constant(
            lambda t: t.reshape(*[1] * (rank - t.dim()), *t.shape).permute(back).contiguous(),
            [source],
            name=f"{source.target}_permuted",
            before=before,
        )
    if source.target is not _PERMUTE:
        return _permuted(rewriter, source, list(back), before=before)
    dims = [_order_of(source)[d] for d in back]
    if inside is not None:
        return _permuted(rewriter, inside, [order[d] for d in dims], before=before)
    return _permuted(rewriter, source.args[0], dims, before=before)


def _permuted(rewriter: Rewriter, x: Any, dims: list[int], *, before: fx.Node) -> Any:
    if dims == sorted(dims):
        return x
    return rewriter.insert(_PERMUTE, x, dims, before=before)


def _respelled(node: fx.Node, order: Order) -> tuple[Any, ...]:
    """Return the arguments of a call with its dimensions renamed."""
    args: list[Any] = list(node.args)
    target: Any = node.target
    place = 1 if target in _REDUCTIONS else _ALONG.get(target)
    if node.target is aten.pad.default:  # two numbers per dimension, the last dimension first
        pads = [*args[1], *[0] * (2 * len(order) - len(args[1]))]
        by_dim = {order[-1 - i]: pads[2 * i : 2 * i + 2] for i in range(len(order))}
        pads = [n for d in reversed(range(len(order))) for n in by_dim[d]]
        while len(pads) > 2 and pads[-2:] == [0, 0]:
            del pads[-2:]
        args[1] = pads
    elif place is not None:
        dims = args[place]
        args[place] = order[dims] if isinstance(dims, int) else [order[d] for d in dims]
    return tuple(args)
