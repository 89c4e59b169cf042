"""The graph for people's own analysis: as a networkx graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxopt.cost import macs
from fxopt.graph_module import GraphModule
from fxopt.text import dtype_text, target_text

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: GraphModule) -> networkx.MultiDiGraph:
    """Return the graph with one node per fx node, by name, and one edge per use of a value.

    Node attributes: `op`, `target` (as in the text form), `path` (of the module), `source` (the
    user's line), `shape` (a tuple; symbolic sizes as text), `dtype`, `macs`. Edges carry
    `argument`, the position among the inputs of the node that uses the value.
    """
    import networkx

    result = networkx.MultiDiGraph(name=graph.info.model_name)
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        attributes: dict[str, Any] = {
            "op": node.op,
            "target": target_text(node.target),
            "path": node.meta.get("path", ""),
            "source": node.meta.get("source") or "",
            "macs": macs(node),
        }
        if isinstance(value, torch.Tensor):
            attributes["shape"] = tuple(s if isinstance(s, int) else str(s) for s in value.shape)
            attributes["dtype"] = dtype_text(value.dtype)
        result.add_node(node.name, **attributes)
        for position, used in enumerate(node.all_input_nodes):
            result.add_edge(used.name, node.name, argument=position)
    return result
