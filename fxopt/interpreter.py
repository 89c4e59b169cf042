"""Running a graph in evaluation, and one node at a time."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.graph_module import GraphModule


class Interpreter(fx.Interpreter):
    """Runs a graph node by node: `run` all of it on flat inputs, or `advance` by single nodes.

    Values are let go of once no node needs them any more.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._graph_module = graph

    def advance(self, node: fx.Node) -> Any:
        """Run the next node, whose inputs are known, and return its value.

        Inputs of the graph come from the iterator `args_iter`.
        """
        value = self.env[node] = self.run_node(node)
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]
        return value

    def run_node(self, n: fx.Node) -> Any:
        """Return the value of a node.

        A constant comes from where the graph keeps it: fx would look for attributes by the parts of
        its name, and find a method where a layer is called like one.
        """
        return self._graph_module.value(n) if n.op == "get_attr" else super().run_node(n)


def in_evaluation(graph: GraphModule) -> GraphModule:
    """Return a copy in evaluation mode; flags and state are its own, weights are shared."""
    return graph.copy().train(False)
