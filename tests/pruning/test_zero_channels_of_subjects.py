"""Every subject, with random rows, columns and scales of zeros: what is known, and what goes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx

import fxopt
from fxopt.difference import relative_error
from fxopt.graph_module import GraphModule
from fxopt.passes import RemoveZeroChannels
from fxopt.pruning.constancy.layers import LAYERS
from fxopt.pruning.constant_channels import Constancy, Known
from fxopt.testing import random_inputs_like
from tests.pruning.subject import Subject
from tests.pruning.subjects import SUBJECTS, captured

aten = torch.ops.aten
DEAD = 0.35


def with_zeros(graph: GraphModule, seed: int) -> GraphModule:
    """Return a copy with zeros in rows, columns or both of each layer, and in scales of norms."""
    graph = copy.deepcopy(graph)
    generator = torch.Generator().manual_seed(seed)

    def dead(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator) < DEAD

    def zero(node: Any, where: torch.Tensor, dim: int = 0) -> None:
        if isinstance(node, fx.Node) and node.op == "get_attr":
            value = graph.value(node).data
            if value.shape[dim] == len(where):
                value.movedim(dim, 0)[where] = 0

    for node in graph.find(*LAYERS):
        rows, columns = (dead(node.args[1].meta["val"].shape[dim]) for dim in (0, 1))
        kind = torch.rand(3, generator=generator) < 0.6
        if kind[0]:
            zero(node.args[1], rows)
        if kind[1]:
            zero(node.args[1], columns, 1)
        if kind[2]:
            zero(node.args[2], rows)
    for node in graph.find(aten.batch_norm.default, aten.group_norm.default):
        scale, shift = node.args[2:4] if node.target is aten.group_norm.default else node.args[1:3]
        where = dead(node.meta["val"].shape[1])
        zero(scale, where)
        if torch.rand(1, generator=generator) < 0.6:
            zero(shift, where)
    return graph


def run(graph: GraphModule, inputs: list[Any]) -> dict[fx.Node, Any]:
    """Return the value of each node."""
    values: dict[fx.Node, Any] = dict(zip(graph.placeholders, inputs, strict=True))
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                values[node] = graph.value(node)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return values


def expect_known(found: Known | None, value: torch.Tensor, node: fx.Node) -> None:
    """All that is said to be known of a tensor is so."""
    if found is None:
        return
    assert found.values.dim() == value.dim() and found.values.dtype == value.dtype, node
    known, values = found.known.expand(value.shape), found.values.expand(value.shape)
    assert torch.allclose(value[known], values[known], rtol=1e-9, atol=1e-9), node


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_what_is_known_is_so_and_what_goes_is_not_missed(subject: Subject) -> None:
    graph = with_zeros(captured(subject.name), seed=len(subject.name))
    inputs = random_inputs_like(list(graph.info.example_inputs))
    seen = Constancy(graph.graph.nodes, {
        name: value for name, value in graph.constants().items() if name not in graph.info.mutated
    })  # fmt: skip
    for node, value in run(graph, inputs).items():
        if isinstance(value, torch.Tensor):
            expect_known(seen.of(node), value, node)
        for found, part in zip(seen.parts(node), value if seen.parts(node) else (), strict=True):
            expect_known(found, part, node)

    smaller = graph.copy()
    result = RemoveZeroChannels().run(smaller)
    fxopt.dialect.check(smaller)
    with torch.no_grad():
        expected, got = graph.copy().run(*inputs), smaller.copy().run(*inputs)
    bound = 1e-10 if all(t.dtype is torch.float64 for t in expected) else 1e-2
    assert relative_error(list(got), list(expected)) <= bound
    assert {name for name in result.created if name not in {n.name for n in smaller.graph.nodes}} \
        == set()
    assert not RemoveZeroChannels().run(smaller).modified
