"""What the page is given: checked against the story that it tells."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.page.data import page_data
from fxopt.story import Snapshot
from tests.models import Residual
from tests.test_story import Branches

X = torch.randn(1, 3, 8, 8)


def names(data: dict[str, Any], step: int) -> list[str]:
    """The names in the graph after a step."""
    while data["steps"][step]["records"] is None:
        step -= 1
    return [data["records"][i]["name"] for i in data["steps"][step]["records"]]


def drawn(snapshot: Snapshot) -> list[str]:
    return [record.name for record in snapshot.records if record.op != "get_attr"]


@pytest.fixture(scope="module")
def graph() -> fxopt.GraphModule:
    return fxopt.optimize(Residual(), X)


@pytest.fixture(scope="module")
def data(graph: fxopt.GraphModule) -> dict[str, Any]:
    return page_data(graph)


def test_each_step_holds_the_graph_after_it(graph: Any, data: dict[str, Any]) -> None:
    story = graph.story
    assert [s["name"] for s in data["steps"]] == ["capture", *(s.name for s in story.steps)]
    assert names(data, 0) == drawn(story.captured)
    for number, step in enumerate(story.steps, start=1):
        assert names(data, number) == drawn(step.after)
        assert (data["steps"][number]["records"] is None) == (step.before.text == step.after.text)


def test_records_are_shared_by_steps(data: dict[str, Any]) -> None:
    texts = [(r["name"], r["text"]) for r in data["records"]]
    assert len(set(texts)) == len(texts)
    used = {i for step in data["steps"] for i in step["records"] or ()}
    assert used == set(range(len(texts)))


def test_a_node_says_all_that_is_known_of_it(data: dict[str, Any]) -> None:
    records = {r["name"]: r for r in data["records"]}
    fused = next(r for r in records.values() if r["pass"] == "fuse-conv-bn" and r["replaces"])
    assert fused["label"] == "conv2d" and fused["family"] == "convolution"
    assert fused["shape"] == "1×8×8×8" and fused["dtype"] == "f32"
    assert any("batch_norm" in name for name in fused["replaces"])
    arguments = dict(fused["arguments"])
    assert arguments["input"].startswith("%") and arguments["padding"] == "[1, 1]"
    assert "f32[8," in arguments["weight"] and arguments["weight"].split()[0]
    assert fused["macs"] == 8 * 8 * 8 * 27 and fused["params"] == 8 * 27 + 8
    assert fused["read"] == 4 * (3 * 8 * 8 + 8 * 27 + 8) and fused["written"] == 4 * 8 * 8 * 8
    conv = records["conv2d"]
    assert conv["path"] == "stem.0" and conv["module"] == "torch.nn.modules.conv.Conv2d"
    assert "conv.py" in conv["source"] or "models.py" in conv["source"]
    assert data["modules"]["stem"] == "tests.models.ConvBnRelu"


def test_a_node_that_a_rule_made_names_the_rule() -> None:
    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Hardtanh(0.0, 6.0)).eval()
    data = page_data(fxopt.optimize(model, X))
    made = [r for r in data["records"] if r["rule"]]
    assert made and all(r["pass"] == "simplify" for r in made)
    used = {rule["name"] for step in data["steps"] for rule in step["rules"] if rule["rewritten"]}
    assert {r["rule"] for r in made} <= used


def test_inputs_lead_to_nodes_of_the_same_graph(data: dict[str, Any]) -> None:
    for number, step in enumerate(data["steps"]):
        known = set(names(data, number))
        for index in step["records"] or ():
            assert set(data["records"][index]["inputs"]) <= known


def test_bodies_of_control_flow_are_drawn_inside_their_call() -> None:
    data = page_data(fxopt.optimize(Branches(), torch.randn(4)))
    inside = [r for r in data["records"] if "/" in r["name"]]
    assert {r["label"] for r in inside} >= {"sin", "mul.Tensor"}
    bodies = {r["path"].split(".")[0] for r in inside}
    assert len(bodies) == 2, "the two branches"
    call = next(r for r in data["records"] if r["family"] == "control")
    assert call["inputs"]


def test_facts_say_how_it_was_verified() -> None:
    compiled = fxopt.compile(Residual(), X, backend="onnx")
    facts = dict(page_data(compiled.graph, compiled)["facts"])
    assert "bound" in facts["verified: optimized graph"] and "verified: onnx backend" in facts
    facts = dict(page_data(fxopt.optimize(Residual(), X, verify="off"))["facts"])
    assert facts["verified"] == "no"


def test_a_graph_without_a_story_has_one_step() -> None:
    data = page_data(fxopt.capture(Residual(), X))
    assert [step["name"] for step in data["steps"]] == ["capture"]
    assert data["memory"]["before"] == data["memory"]["after"] and data["roofline"] is None
    assert max(size for _, size in data["memory"]["before"]) >= 4 * 3 * 64


def test_symbolic_sizes_and_a_profile_become_json() -> None:
    graph = fxopt.optimize(Residual(), torch.randn(2, 3, 8, 8), dynamic_shapes={0: "batch"})
    data = page_data(graph, profile=fxopt.profile(graph, rounds=2))
    json.dumps(data, allow_nan=False)
    assert all(r["ms"] > 0 for r in data["records"] if r["label"] == "conv2d" and r["replaces"])
    assert data["roofline"]["flops_per_second"] > 1e6 and data["roofline"]["points"]
