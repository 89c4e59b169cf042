"""The choice of layouts: never worse than leaving everything alone, often the best, and linear."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import fx

from fxopt.backends.onnx.layouts import CONVERSION, LEFT, WRITTEN, Comes, Layouts, Step
from tests.work import lines_run

SAVED = WRITTEN + 2 * LEFT


def a_graph(size: int, seed: int) -> tuple[list[Step], dict[fx.Node, Comes]]:
    """A graph of calls of one to two arguments, about half of them steps."""
    draw = random.Random(seed)
    graph = fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    steps, comes = [], {values[1]: Comes.MOVED}
    for _ in range(size):
        read = tuple(dict.fromkeys(draw.choices(values[-4:], k=draw.choice((1, 1, 2)))))
        node = graph.call_function(torch.relu, read)
        values.append(node)
        kind = draw.random()
        if kind < 0.6:
            steps.append(Step(node, read, (node,), draw.choice((0, 0, SAVED))))
        elif kind < 0.7:
            steps.append(Step(node, read[:1], (node,), view=True))
            node.args = read[:1]
        elif kind < 0.75:
            comes[node] = Comes.EITHER
    graph.output(values[-1])
    return steps, comes


def layouts_of(size: int, seed: int) -> Layouts:
    steps, comes = a_graph(size, seed)
    return Layouts(steps, comes, reads_any=lambda user: comes.get(user) is Comes.EITHER)


def cost(layouts: Layouts) -> int:
    """What everything costs as it is now, added up afresh."""
    values = {v: None for step in layouts.steps.values() for v in (*step.inputs, *step.outputs)}
    total = -sum(step.saved for step in layouts.steps.values() if layouts.moved[step.node])
    for value in values:
        needs = (layouts.is_needed_kept(value), layouts.is_needed_moved(value))
        comes = layouts.comes(value)
        if comes is Comes.EITHER:
            total += CONVERSION * max(1, sum(needs))
        else:
            total += CONVERSION * needs[comes is Comes.KEPT]
    return total


def cost_of(size: int, seed: int, moved: tuple[bool, ...]) -> int:
    layouts = layouts_of(size, seed)
    for step, wanted in zip(layouts.steps.values(), moved, strict=True):
        layouts._put(step, wanted)
    return cost(layouts)


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_is_never_worse_than_no_move_and_mostly_the_best(seed: int) -> None:
    layouts = layouts_of(9, seed)
    groups = layouts.choose()
    moved = {step.node for group in groups for step in group}
    assert moved == {node for node, is_moved in layouts.moved.items() if is_moved}
    every = itertools.product((False, True), repeat=len(layouts.steps))
    costs = {choice: cost_of(9, seed, choice) for choice in every}
    found, stay = cost(layouts), costs[(False,) * len(layouts.steps)]
    assert found < stay if moved else found == stay
    assert found <= min(costs.values()) + CONVERSION


def test_most_choices_are_the_best_ones() -> None:
    best = 0
    for seed in range(40):
        layouts = layouts_of(7, seed)
        layouts.choose()
        every = itertools.product((False, True), repeat=len(layouts.steps))
        best += cost(layouts) == min(cost_of(7, seed, choice) for choice in every)
    assert best >= 36


def test_an_overhead_holds_a_group_back() -> None:
    free, dear = layouts_of(12, 3), layouts_of(12, 3)
    assert free.choose()
    assert not dear.choose(lambda group: 10**9)
    assert not any(dear.moved.values())


def test_the_work_is_linear() -> None:
    """Also where one value has a thousand readers, and one call a thousand arguments."""

    def wide(size: int) -> tuple[list[Step], dict[fx.Node, Comes]]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        nodes = [graph.call_function(torch.relu, (x,)) for _ in range(size)]
        joined = graph.call_function(torch.cat, (nodes,))
        graph.output(joined)
        steps = [Step(node, (x,), (node,), LEFT) for node in nodes]
        return [*steps, Step(joined, tuple(nodes), (joined,))], {}

    for make in (wide, lambda size: a_graph(size, 1)):
        small, large = (
            lines_run(Layouts(*make(size), reads_any=lambda user: False).choose)
            for size in (200, 1_600)
        )
        assert large < 8 * 1.5 * small
