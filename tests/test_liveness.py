"""Which activations are alive: by hand, and beside the storages that really are."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.cost import live_bytes, peak
from fxopt.graph_module import GraphModule
from fxopt.vision import import_torchvision

x = torch.randn(16)  # 64 bytes


def live(function: Any, *inputs: Any) -> dict[str, int]:
    """In units of x."""

    class Model(nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    graph = fxopt.capture(Model(), inputs)
    sizes = live_bytes(graph.graph.nodes)
    return {n.name: s // 64 for n, s in zip(graph.graph.nodes, sizes, strict=True)}


def test_a_chain_holds_the_input_and_two_values() -> None:
    found = live(lambda x: x.sin().cos().tan(), x)
    assert [found[name] for name in ("sin", "cos", "tan", "output")] == [2, 3, 3, 2]


def test_a_value_stays_until_its_last_use() -> None:
    found = live(lambda x: (y := x.sin()).cos().tan() + y, x)
    assert [found[name] for name in ("sin", "cos", "tan", "add")] == [2, 3, 4, 4]


def test_outputs_stay_to_the_end() -> None:
    found = live(lambda x: (x.sin(), x.cos().tan()), x)
    assert [found[name] for name in ("sin", "cos", "tan", "output")] == [2, 3, 4, 3]


def test_a_result_that_nobody_uses_lives_while_it_is_made() -> None:
    found = live(lambda x: x.reshape(4, 4).topk(4).values.sin().cos(), x)
    assert [found[name] for name in ("topk", "sin", "cos")] == [4, 3, 3]  # indices are int64


def test_a_view_keeps_what_it_is_a_view_of() -> None:
    found = live(lambda x: x.sin().reshape(4, 4)[:1].permute(1, 0).cos().tan().sin(), x)
    assert found["permute"] == 2
    assert found["cos"] == 2  # a quarter more
    assert found["tan"] == 1  # the base is gone
    copied = live(lambda x: x.sin().reshape(4, 4).mT.reshape(16).cos(), x)
    assert [copied[name] for name in ("permute", "reshape_1", "cos")] == [2, 3, 3]


def test_the_parts_of_a_split_are_one_storage() -> None:
    found = live(lambda x: [part.cos() for part in x.sin().split(8)], x)
    assert [found[name] for name in ("cos", "cos_1", "output")] == [2, 3, 2]  # halves: 2.5, 3, 2


def test_constants_are_no_activations() -> None:
    graph = fxopt.capture(nn.Linear(16, 16).eval(), x)
    assert peak(live_bytes(graph.graph.nodes)) == 128


def test_a_body_is_alive_while_its_operator_runs() -> None:
    def inside(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x.sin().cos() + x.tan(), lambda x: x.sin(), (x,))

    found = live(inside, x)
    assert found["cond"] == 4  # x; sin, cos; cos, tan, sum: three at most
    assert found["output"] == 2


def test_records_of_a_story_may_come_without_constants() -> None:
    graph = fxopt.capture(nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), x)
    story = fxopt.optimize(graph, passes=[]).story
    records = [r for r in story.captured.records if r.op != "get_attr"]
    assert live_bytes(records) == [64, 128, 192, 128]


class Tracker(TorchDispatchMode):
    """Adds up the storages that operators return, for as long as each is alive."""

    def __init__(self, graph: GraphModule, inputs: Any) -> None:
        super().__init__()
        self.constants = {t.untyped_storage()._cdata for t in graph.constants().values()}
        self.alive: dict[int, int] = {}
        self.peak = 0
        self.note(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(result)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    def note(self, values: Any) -> None:
        for tensor in pytree.tree_leaves(values):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in {*self.constants, *self.alive}:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_the_peak_is_what_is_alive_when_the_graph_runs(name: str) -> None:
    model = import_torchvision().models.get_model(name, weights=None).eval()
    graph = fxopt.capture(model, torch.randn(1, 3, 32, 32))
    inputs = [tensor.clone() for tensor in graph.info.example_inputs]
    tracker = Tracker(graph, inputs)
    with torch.no_grad(), tracker:
        graph.run(*inputs)
    assert peak(live_bytes(graph.graph.nodes)) == tracker.peak


def test_the_peak_of_expressions_leaves_out_what_another_exceeds() -> None:
    import sympy

    n, m = sympy.symbols("n m", integer=True, nonnegative=True)
    assert peak([3, 7, 5]) == 7
    assert peak([]) == 0
    assert peak([2 * n, 3 * n + 4, n + 4]) == 3 * n + 4
    assert peak([5 * n, 2 * n + 3]) == 5 * n
    largest = peak([4 * n, n + m, 2 * n])
    assert largest.subs({n: 1, m: 9}) == 10
    assert largest.subs({n: 5, m: 9}) == 20
