"""The graph as a networkx graph."""

from __future__ import annotations

import networkx
import torch
from torch import nn

import fxopt
from tests.models import Residual


def test_nodes_edges_and_attributes() -> None:
    passes = ["remove-no-ops", "fuse-conv-bn"]
    graph = fxopt.optimize(Residual(), torch.randn(2, 3, 8, 8), passes=passes)
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


def test_a_node_says_where_it_comes_from_and_what_it_costs() -> None:
    network = fxopt.to_networkx(fxopt.capture(Residual(), torch.zeros(2, 3, 8, 8)))
    conv = network.nodes["conv2d"]
    assert conv["op"] == "call_function" and conv["family"] == "convolution"
    assert conv["path"] == "stem.0" and conv["module"] == "torch.nn.modules.conv.Conv2d"
    assert conv["source"].endswith("y = self.stem(x)")
    assert conv["text"].startswith("%conv2d: f32[2,8,8,8] = conv2d(")
    assert conv["type"] == "f32[2,8,8,8]" and conv["arguments"] == {"padding": "1"}
    assert conv["macs"] == 2 * 8 * 8 * 8 * 3 * 9 and conv["flops"] == 2 * conv["macs"]
    assert conv["params"] == 8 * 3 * 9 and conv["parameters"] == {"stem.0.weight": 216}
    assert conv["read"] == 4 * (2 * 3 * 64 + 216) and conv["written"] == 4 * 2 * 8 * 64
    assert conv["rule"] is None and conv["replaces"] == ()
    assert network.graph["modules"]["stem"] == "tests.models.ConvBnRelu"
    assert network.nodes["output"]["type"] == ""


def test_what_a_pass_made_says_what_it_stands_for() -> None:
    graph = fxopt.optimize(Residual(), torch.zeros(2, 3, 8, 8), passes=["fuse-conv-bn"])
    fused = fxopt.to_networkx(graph).nodes["conv2d_2"]
    assert fused["replaces"] == ("conv2d", "batch_norm")


def test_an_edge_says_which_argument_it_is() -> None:
    class Uses(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([x * x, y[0]])

    network = fxopt.to_networkx(
        fxopt.capture(Uses(), (torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)))
    )
    squares = [(d["argument"], d["name"]) for d in network["x"]["mul"].values()]
    assert squares == [(0, "self"), (1, "other")], "one edge per use"
    joined = [d["name"] for _, _, d in network.in_edges("cat", data=True)]
    assert joined == ["tensors[0]", "tensors[1]"]
    (edge,) = network["y"]["select"].values()
    assert edge["shape"] == (2, 3) and edge["dtype"] == "i64" and edge["type"] == "i64[2,3]"
    (result,) = network["cat"]["output"].values()
    assert result["name"] == "results[0]"


def test_arguments_are_those_that_a_reader_cannot_guess() -> None:
    class Various(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.nn.functional.avg_pool2d(x, 3, (2, 1), count_include_pad=False)
            return torch.permute(y, (0, 2, 3, 1))[:, 1:].mul(0.1767766952966369)

    network = fxopt.to_networkx(fxopt.capture(Various(), torch.zeros(1, 3, 9, 9)))
    shown = {data["target"]: data["arguments"] for _, data in network.nodes(data=True)}
    assert shown["avg_pool2d"] == {
        "kernel_size": "3", "stride": "2×1", "count_include_pad": "False",
    }  # fmt: skip
    assert shown["permute"] == {"dims": "0, 2, 3, 1"}
    assert shown["slice.Tensor"] == {"dim": "1", "start": "1"}, "to the end goes without saying"
    assert shown["mul.Tensor"] == {"other": "0.176777"}


def test_a_symbolic_size_is_text_and_costs_what_the_example_does() -> None:
    graph = fxopt.capture(nn.Linear(4, 2), torch.zeros(3, 4), dynamic_shapes={0: "batch"})
    linear = fxopt.to_networkx(graph).nodes["linear"]
    assert isinstance(linear["shape"][0], str) and linear["shape"][1] == 2
    assert linear["macs"] == 3 * 4 * 2


def test_a_snapshot_is_a_graph_too() -> None:
    graph = fxopt.optimize(Residual(), torch.zeros(2, 3, 8, 8))
    network = fxopt.to_networkx(graph.story.captured)
    assert "batch_norm" in network and network.number_of_nodes() == len(
        graph.story.captured.records
    )


def test_the_bodies_of_control_flow_are_in_it() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    network = fxopt.to_networkx(fxopt.capture(Choice(), torch.zeros(3)))
    sine = next(data for name, data in network.nodes(data=True) if name.endswith("/sin"))
    assert sine["path"].startswith("inner.") and "true_graph" in sine["path"]
    assert networkx.is_directed_acyclic_graph(network)
