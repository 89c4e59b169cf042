"""Constants of a graph: which are known for good, and which training or new weights may change."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.shapes import is_tensor


class Constants:
    """What is known of the constants that a graph has now."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph

    def holds(self, node: Any) -> bool:
        """Whether a node is a constant tensor that the graph itself does not change."""
        known = isinstance(node, fx.Node) and node.op == "get_attr" and is_tensor(node)
        return known and node.target not in self.graph.info.mutated

    def fixes(self, node: Any) -> bool:
        """Whether a node is a constant that neither training nor new weights change."""
        return self.holds(node) and self.graph.fixed_tensor(str(node.target)) is not None

    def value(self, node: fx.Node) -> torch.Tensor:
        """Return the value of a constant."""
        return self.graph.value(node).detach()

    def number(self, x: Any) -> float | None:
        """Return a plain number, or the only element of a constant that nothing changes."""
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            return float(x)
        if not self.fixes(x) or x.meta["val"].dtype.is_complex or self.value(x).numel() != 1:
            return None
        return float(self.value(x))
