"""Control-flow operators: the sub-graphs that a call runs, and how often."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator

from fxopt.cost.call import Call, Size, tensors_in
from fxopt.graph_module import GraphModule


def bodies(call: Call) -> list[GraphModule]:
    """Return the sub-graphs among a call's arguments; those that are erased by now are not."""
    if not isinstance(call.target, HigherOrderOperator):
        return []
    return [body for body in map(_body, call.inputs) if body is not None]


def _body(node: fx.Node) -> GraphModule | None:
    owner: Any = node.graph.owning_module
    if node.op != "get_attr" or not owner.has_constant(str(node.target)):
        return None
    value = owner.constant(str(node.target))
    return value if isinstance(value, GraphModule) else None


def trips(call: Call) -> Size:
    """Return how often the bodies run: as often as there are slices in a `map` or `scan`.

    A `while_loop` counts one trip, since only its data says how many there are.
    """
    if call.name not in ("map", "map_impl", "scan", "associative_scan"):
        return 1
    sequences: Any = call.node.args[2 if call.name == "scan" else 1]
    for node in sequences if isinstance(sequences, (list, tuple)) else [sequences]:
        for tensor in tensors_in(node.meta.get("val")):
            return call.sizes(tensor)[0]
    return 1
