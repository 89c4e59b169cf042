"""Which node is wrong: by bisection over a graph that is cut off behind a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.backend import Backend
from fxopt.bisection.attempt import Verdict, attempt
from fxopt.bisection.judge import Judge
from fxopt.contract import Pass
from fxopt.graph_module import GraphModule
from fxopt.oracle import Oracle
from fxopt.shapes import is_tensor
from fxopt.signature import Signature, Structure
from fxopt.verify import runner

aten = torch.ops.aten


def wrong_on_backend(graph: GraphModule, backend: Backend, oracle: Oracle) -> fx.Node | None:
    """Return a call that a backend computes otherwise than PyTorch does, from equal inputs.

    None where no cut shows the error: the backend is then wrong only about what none of them
    holds, such as state.
    """
    return _first(graph, lambda part: not _judge(part, oracle, backend)(part).right)


def wrong_after_pass(
    graph: GraphModule, one: Pass, oracle: Oracle, verdict: Verdict
) -> fx.Node | None:
    """Return the call from which on a pass goes wrong in the way that `verdict` says."""

    def is_wrong(part: GraphModule) -> bool:
        done = attempt(one, part)
        if done.failure is not None:
            return done.failure.raised == verdict.raised
        return not verdict.raised and not _judge(part, oracle)(done.graph).right

    return _first(graph, is_wrong)


def _judge(part: GraphModule, oracle: Oracle, backend: Backend | None = None) -> Judge:
    return Judge(replace(oracle, reference=runner(part), original=part, accept=None), backend)


def _first(graph: GraphModule, is_wrong: Callable[[GraphModule], bool]) -> fx.Node | None:
    """Return a call behind which the graph, cut off, is wrong, and before which it is right."""
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and not _is_write(n)]

    def is_wrong_behind(count: int) -> bool:
        values = _live_behind(calls[:count])
        return bool(values) and is_wrong(cut_off(graph, values))

    low, high = 0, len(calls)
    if not is_wrong_behind(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_wrong_behind(middle) else (middle, high)
    return calls[low]


def cut_off(graph: GraphModule, values: Sequence[fx.Node]) -> GraphModule:
    """Return a copy of the graph that ends where `values` are known, and returns them as a tuple.

    What they do not need is gone, and state is not written back.
    """
    part = graph.copy()
    twins = dict(zip(graph.graph.nodes, part.graph.nodes, strict=True))
    part.output_node.args = (tuple(twins[value] for value in values),)
    for node in reversed(part.graph.nodes):
        if node.op in ("call_function", "get_attr") and not node.users:
            part.graph.erase_node(node)
    part.info.mutated = frozenset()
    part.info.story = None
    signature = part.info.signature
    assert signature is not None
    places = tuple(range(len(values)))
    part.info.signature = Signature(
        signature.parameters, signature.names, signature.spec, signature.leaves,
        Structure(pytree.tree_structure(places), places), signature.ranges, signature.guards,
    )  # fmt: skip
    part.recompile()
    return part


def _live_behind(calls: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the tensors that these calls make and others read."""
    inside = set(calls)
    return [
        node for node in calls
        if is_tensor(node) and any(user not in inside for user in node.users)
    ]


def _is_write(node: fx.Node) -> bool:
    return node.target is aten.copy_.default
