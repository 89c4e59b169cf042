"""What differs between two moments of a graph, and that as text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import fxopt
from fxopt.contract import Effect, Pass, PassResult
from fxopt.diff import diff_nodes, diff_text
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.story import Recorder, Snapshot
from fxopt.text import quantity_text
from tests.models import ConvBnRelu, Residual, SharedLayer

aten = torch.ops.aten
IMAGE = torch.zeros(2, 3, 8, 8)


@dataclass(frozen=True)
class SkipRelu(Pass):
    """Has the sum use what the activation before it uses."""

    name = "skip-relu"
    effect = Effect.LOSSY
    requires = ()

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        relu, add = graph.find(aten.relu.default)[0], graph.find(aten.add.Tensor)[0]
        rewriter.update(add, (add.args[0], relu.args[0]))
        return rewriter.result()


@dataclass(frozen=True)
class UseOneConstant(Pass):
    """Has the product use the constant that the sum uses."""

    name = "use-one-constant"
    effect = Effect.LOSSY
    requires = ()

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        mul, add = graph.find(aten.mul.Tensor)[0], graph.find(aten.add.Tensor)[0]
        rewriter.update(mul, (mul.args[0], add.args[1]))
        return rewriter.result()


def moments(model: nn.Module, inputs: torch.Tensor, *passes: object) -> tuple[Snapshot, Snapshot]:
    story = fxopt.optimize(model, inputs, passes=list(passes), verify="off").story
    return story.captured, story.final


def test_a_fusion_as_text() -> None:
    before, after = moments(ConvBnRelu(), IMAGE, "fuse-conv-bn")
    assert diff_text(before, after) == (
        "@@ top level @@\n"
        "-%conv2d: f32[2,8,8,8] = conv2d(%input_1, '0.weight', None, [1, 1], [1, 1], [1, 1], 1)\n"
        "-%batch_norm: f32[2,8,8,8] = batch_norm(%conv2d, '1.weight', '1.bias', "
        "'1.running_mean', '1.running_var', False, 0.1, 1e-05, False)  → %conv2d_1\n"
        "+%conv2d_1: f32[2,8,8,8] = conv2d(%input_1, '0.weight_folded', '0.bias_folded', "
        "[1, 1], [1, 1], [1, 1], 1)"
    )


def test_what_only_follows_did_not_change() -> None:
    before, after = moments(ConvBnRelu(), IMAGE, "fuse-conv-bn")
    found = diff_nodes(before.records, after.records)
    assert not found.changed and "relu" not in {*found.removed, *found.added}
    assert found.successors == {"batch_norm": ("%conv2d_1",)}
    assert bool(found) and not diff_nodes(after.records, after.records)


def test_a_user_of_something_else_that_was_there_changed() -> None:
    before, after = moments(Residual(), IMAGE, SkipRelu())
    found = diff_nodes(before.records, after.records)
    assert list(found.changed) == ["add"] and not found.removed
    text = diff_text(before, after).splitlines()
    assert [line[:5] for line in text] == ["@@ to", "-%add", "+%add"]


def test_a_module_heads_what_changed_in_it_once() -> None:
    before, after = moments(nn.Sequential(Residual()).eval(), IMAGE, "fuse-conv-bn")
    headings = [line for line in diff_text(before, after).splitlines() if line[0] == "@"]
    assert headings == ["@@ 0.stem @@", "@@ 0 @@"]


def test_a_removed_node_stands_where_it_was_and_leads_to_what_is_used_now() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4), nn.Dropout()).eval()
    before, after = moments(model, torch.zeros(1, 4), "remove-no-ops")
    assert diff_text(before, after).splitlines() == [
        "@@ 0 @@",
        "-%dropout: f32[1,4] = dropout(%input_1, 0.5, False)  → %input_1",
        "@@ 2 @@",
        "-%dropout_1: f32[1,4] = dropout(%linear, 0.5, False)  → %linear",
    ]


def test_a_constant_has_a_line_only_where_nothing_uses_it() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.sin()
            return x + 1

    before, after = moments(Idle(), torch.zeros(3), "remove-dead-nodes")
    assert diff_text(before, after).splitlines() == [
        "@@ top level @@", "-%sin: f32[3] = sin('weight')",
    ]  # fmt: skip
    records = [record for record in before.records if record.name != "sin"]
    idle = Snapshot(tuple(records), before.parameters)
    assert diff_text(idle, after) == "@@ top level @@\n-%weight: f32[3] = constant 'weight'"


def test_another_constant_is_a_change() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a", torch.ones(3))
            self.register_buffer("b", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.a) * self.b

    before, after = moments(Pair(), torch.zeros(3), UseOneConstant())
    lines = diff_text(before, after).splitlines()
    assert lines[1:] == [
        "-%mul: f32[3] = mul.Tensor(%add, 'b')",
        "+%mul: f32[3] = mul.Tensor(%add, 'a')",
    ]


def test_nodes_that_moved_are_the_same() -> None:
    graph = fxopt.capture(nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Dropout()).eval(), IMAGE)
    before = Recorder().snapshot(graph)
    moved = Snapshot((*before.records[2:4], *before.records[:2], *before.records[4:]), 0)
    assert diff_text(before, moved) == ""
    shorter = Snapshot((*before.records[2:4], before.records[0], *before.records[4:]), 0)
    assert diff_text(before, shorter).count("\n-%relu") == 1


def test_the_bodies_of_control_flow_are_compared() -> None:
    def branch(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x.sin(), training=False)

    class Choice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, branch, lambda x: x.cos(), (x,))

    before, after = moments(Choice(), torch.zeros(3), "remove-no-ops")
    assert diff_text(before, after).splitlines() == [
        "@@ true_graph_0 @@",
        "-%dropout: f32[3] = dropout(%sin, 0.5, False)  → %sin",
    ]


def test_nothing_differs() -> None:
    before, after = moments(SharedLayer(), torch.zeros(1, 4))
    assert diff_text(before, after) == ""


def test_counts_are_written_shortly() -> None:
    written = [quantity_text(n) for n in (0, 7, 999, 1000, 70_400, 999_499, 999_500, 25_557_032)]
    assert written == ["0", "7", "999", "1k", "70.4k", "999k", "1M", "25.6M"]
    assert quantity_text(4_089_184_256) == "4.09G" and quantity_text(1.8e12) == "1.8T"
