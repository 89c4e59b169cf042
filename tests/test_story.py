"""Snapshots: what the graph was, whatever happens to it later."""

from __future__ import annotations

import torch
from torch import nn

import fxopt
from fxopt.story import Recorder
from tests.models import Residual


class Branches(nn.Module):
    """A branch whose body holds something to fold."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: (x + 0).sin(), lambda x: x * 2, (x,))


def test_a_snapshot_does_not_change_with_the_graph() -> None:
    graph = fxopt.capture(Residual(), torch.randn(1, 3, 8, 8))
    snapshot = Recorder().snapshot(graph)
    text = fxopt.optimize(graph).story.captured.text
    assert snapshot.text == text and "batch_norm" in text


def test_nodes_that_a_pass_left_alone_are_the_same_record() -> None:
    steps = fxopt.optimize(Residual(), torch.randn(1, 3, 8, 8)).story.steps
    fused = next(step for step in steps if step.name == "fuse-conv-bn")
    before, after = ({r.name: r for r in s.records} for s in (fused.before, fused.after))
    assert before["relu"] is not after["relu"], "its argument is another node now"
    assert before["x"] is after["x"]
    idle = next(step for step in steps if not step.rewrites)
    assert all(a is b for a, b in zip(idle.before.records, idle.after.records, strict=True))


def test_changes_in_a_sub_graph_are_seen() -> None:
    story = fxopt.optimize(Branches(), torch.randn(4)).story
    (body, _) = story.captured.subgraphs
    assert [r.name for r in story.captured.subgraphs[body].records if "add" in r.name] == ["add"]
    assert not any("add" in r.name for r in story.final.subgraphs[body].records)
    changed = next(step for step in story.steps if step.rewrites)
    assert "-%add: f32[4] = add" in changed.diff()
    captured, final = story.captured.counts.nodes, story.final.counts.nodes
    assert captured == final + 1, "the calls in bodies are counted"


def test_a_graph_knows_the_classes_of_its_modules() -> None:
    graph = fxopt.capture(Residual(), torch.randn(1, 3, 8, 8))
    assert graph.info.modules["stem"] == "tests.models.ConvBnRelu"
    assert graph.info.modules["stem.0"] == "torch.nn.modules.conv.Conv2d"
    assert graph.info.modules[""] == "tests.models.Residual"
