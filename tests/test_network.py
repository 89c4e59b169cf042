"""The graph as a networkx graph."""

from __future__ import annotations

import networkx
import torch

import fxopt
from tests.models import Residual


def test_nodes_edges_and_attributes() -> None:
    graph = fxopt.optimize(Residual(), torch.randn(2, 3, 8, 8))
    network = fxopt.to_networkx(graph)
    assert networkx.is_directed_acyclic_graph(network)
    assert list(network) == [node.name for node in graph.graph.nodes]
    conv = network.nodes["conv2d_2"] if "conv2d_2" in network else network.nodes["conv2d"]
    assert conv["target"] == "conv2d" and conv["shape"] == (2, 8, 8, 8) and conv["dtype"] == "f32"
    assert conv["macs"] > 0 and "F.conv2d" not in conv["path"]
    assert sum(data["macs"] for _, data in network.nodes(data=True)) == (
        graph.story.final.counts.macs
    )
    relu = next(n for n, data in network.nodes(data=True) if data["target"] == "relu")
    assert network.in_degree(relu) == 1 and network.out_degree(relu) == 2
