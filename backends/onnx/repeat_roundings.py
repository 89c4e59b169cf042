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
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.naming import operators
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.placement import called, moved
from fxopt.quantization.policy import JOINS, MOVES, POLICIES
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_tensor

_TAKEN_ALONG = operators("""
    alias clone contiguous view reshape flatten unflatten permute transpose t squeeze unsqueeze
    slice narrow select max_pool1d max_pool2d max_pool3d flip
""")
_POLICY = POLICIES["onnx"]
_READERS = _POLICY.layers | _POLICY.products | _POLICY.reads


@dataclass(frozen=True)
class RepeatRoundings:
    """Repeat a fake quantization behind a move of its result, for ONNX Runtime's sake."""

    name: ClassVar[str] = "repeat-roundings"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Round behind each move that the runtime does not take along."""
        rewriter = Rewriter(graph)
        nodes = list(graph.graph.nodes)
        read, roundings = _read(nodes), _roundings(graph, nodes)
        for node, rounding in roundings.items():
            users = [u for u in node.users if u.op != "output" and u.target is not fake_quantize]
            if node is rounding or called(node) in _TAKEN_ALONG or node not in read or not users:
                continue
            if not is_tensor(node):
                continue
            again = rewriter.insert(
                fake_quantize, node, *rounding.args[1:], before=node.next, like=node, origin=node
            )
            if not rewriter.replace(node, again, users=users):
                break
        return rewriter.result()


def _roundings(graph: GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return, for what holds values rounded in one scale of 8 bits, the call that rounded them."""
    found: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.target is fake_quantize:
            if _is_narrow(node):
                found[node] = node
            continue
        first, *others = [found.get(source) for source in moved(node) or ()] or [None]
        if first is not None and all(_same(graph, first, other) for other in others):
            found[node] = first
    return found


def _is_narrow(rounding: fx.Node) -> bool:
    """Whether a call has one scale, and up to 8 bits."""
    _, scale, _, qmin, qmax = _arguments(rounding)
    return qmax - qmin < 256 and scale.meta["val"].numel() == 1


def _same(graph: GraphModule, a: fx.Node, b: fx.Node | None) -> bool:
    """Whether two calls round alike."""
    return b is not None and a.args[3:] == b.args[3:] and all(
        x is y or _is_equal(graph, x, y)
        for x, y in zip(_arguments(a)[1:3], _arguments(b)[1:3], strict=True)
    )  # fmt: skip


def _is_equal(graph: GraphModule, x: fx.Node, y: fx.Node) -> bool:
    if any(n.op != "get_attr" or str(n.target) in graph.info.mutated for n in (x, y)):
        return False
    return torch.equal(graph.value(x).reshape(()), graph.value(y).reshape(()))


def _read(nodes: list[fx.Node]) -> set[fx.Node]:
    """Return what calls with kernels for integers read, wherever it was moved."""
    found: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(called(user) in _READERS or _moves(user) and user in found for user in node.users):
            found.add(node)
    return found


def _moves(node: fx.Node) -> bool:
    return node.target is operator.getitem or called(node) in MOVES | JOINS


def _arguments(node: fx.Node) -> Any:
    return node.args
