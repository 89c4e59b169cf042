"""Round again behind what moves rounded values to layers that compute with integers.

Before                                   After
    c = cat([Q(a), Q(b)], 1)                 c = Q(cat([Q(a), Q(b)], 1))
    y = conv2d(c, Q(w), b)                   y = conv2d(c, Q(w), b)

    Q(x) = fake_quantize(x, s, z, qmin, qmax),   Q(Q(x)) = Q(x)

ONNX Runtime's CPU computes a layer with integers where a DequantizeLinear stands right in front of
it, and moves integers where a QuantizeLinear stands behind the move as well. Both are there then.

Left alone: reshapes, transpositions, slices and max pools, which the runtime takes along by itself;
joined values with different scales; a pad with another number than 0, which is no rounded one;
values that no such layer reads; ranges of more than 8 bits.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.placement import called
from fxopt.quantization.policy import JOINS, MOVES
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_tensor


def _operators(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


_TAKEN_ALONG = _operators("""
    alias clone contiguous view reshape flatten unflatten permute transpose t squeeze unsqueeze
    slice narrow select max_pool1d max_pool2d max_pool3d flip
""")
_READERS = _operators("""
    conv1d conv2d conv3d convolution linear matmul bmm mm add mul sigmoid leaky_relu avg_pool2d
    adaptive_avg_pool2d
""")


@dataclass(frozen=True)
class RepeatRoundings:
    """Repeat a fake quantization behind a move of its result, for ONNX Runtime's sake."""

    name: ClassVar[str] = "repeat-roundings"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Round behind each move that the runtime does not take along."""
        rewriter = Rewriter(graph)
        for node in list(graph.graph.nodes):
            rounding = None if called(node) in _TAKEN_ALONG else _rounding(graph, node)
            users = [u for u in node.users if u.op != "output" and u.target is not fake_quantize]
            if rounding is None or node is rounding or not users:
                continue
            if not is_tensor(node) or not _is_read(node):
                continue
            if rewriter.out_of_fuel:
                break
            again = rewriter.insert(
                fake_quantize, node, *rounding.args[1:], before=node.next, like=node, origin=node
            )
            rewriter.replace(node, again, users=users)
        return rewriter.result()


def _rounding(graph: GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the fake quantization whose values, in one scale of 8 bits, a node holds."""
    if node.target is fake_quantize:
        _, scale, _, qmin, qmax = node.args
        is_narrow = qmax - qmin < 256  # type: ignore[operator]
        return node if is_narrow and scale.meta["val"].numel() == 1 else None  # type: ignore[union-attr]
    found = [_rounding(graph, source) for source in _sources(node)]
    first = found[0] if found else None
    if first is None or any(one is None or not _same(graph, first, one) for one in found[1:]):
        return None
    return first


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return what a node moves the numbers of; nothing where it computes other ones."""
    args: Any = node.args
    if node.target is operator.getitem:
        return _sources(args[0]) if called(args[0]) in MOVES else []
    if called(node) in JOINS:
        return list(args[0])
    if called(node) == "aten::constant_pad_nd" and args[2] != 0:
        return []
    if called(node) == "aten::pad" and args[2] == "constant" and args[3] not in (None, 0):
        return []
    return [args[0]] if called(node) in MOVES and is_tensor(args[0]) else []


def _same(graph: GraphModule, a: fx.Node, b: fx.Node) -> bool:
    """Whether two calls round alike."""
    return a.args[3:] == b.args[3:] and all(
        x is y or _is_equal(graph, x, y) for x, y in zip(a.args[1:3], b.args[1:3], strict=True)
    )


def _is_equal(graph: GraphModule, x: Any, y: Any) -> bool:
    if any(n.op != "get_attr" or str(n.target) in graph.info.mutated for n in (x, y)):
        return False
    return torch.equal(graph.value(x).reshape(()), graph.value(y).reshape(()))


def _is_read(node: fx.Node) -> bool:
    """Whether a call with kernels for integers reads a value, wherever it was moved."""
    return any(called(user) in _READERS for user in _readers(node))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user.target is operator.getitem or called(user) in MOVES | JOINS:
            pending.extend(user.users)
        else:
            yield user
