"""Weights that the graph computes from others, such as standardized ones, and that hold channels.

A standardized weight is (w − mean w) / std w over what it reads, so no column can go from it. But
from its *value* any can: what holds channels there becomes the constant that it is.
"""

from __future__ import annotations

from torch import fx

from fxopt.channels.analysis import Channels
from fxopt.constants import cone, fold
from fxopt.contract import PassResult
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_static_shape


def fold_holding(channels: Channels) -> PassResult:
    """Fold the computed weights of the analysed graph in which channels are frozen, in place."""
    graph = channels.graph
    follower = channels.follower
    holding = {reason.node for reason in channels.partition.reasons}
    rewriter = Rewriter(graph)
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not follower.is_weight(node):
            continue
        leaves = any(not follower.is_weight(user) for user in node.users)
        if leaves and is_static_shape(node) and _holds(node, holding):
            fold(rewriter, node)
    return rewriter.result()


def _holds(node: fx.Node, holding: set[str]) -> bool:
    """Whether channels are frozen somewhere in the computation of a weight."""
    return any(used.name in holding for used in cone(node))


def analysed(graph: GraphModule, *, heads: str, reduced: bool) -> tuple[Channels, PassResult]:
    """Analyse the channels of a copy of a graph, in which computed weights hold none."""
    working = graph.copy()
    channels = Channels(working, heads=heads, reduced=reduced)
    folded = fold_holding(channels)
    if folded.modified:
        channels = Channels(working, heads=heads, reduced=reduced)
    return channels, folded
