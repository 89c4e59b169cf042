"""Which programs may be replayed from a CUDA graph; judged without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.eager.cuda.obstacles import device_of, recording_obstacle
from fxopt.graph_module import GraphModule
from tests.backends.eager.pretended_cuda import pretend_cuda
from tests.models import Counter

X = torch.randn(4, 6)
ROWS = torch.tensor([2, 0])


class Calls(nn.Module):
    """A function as a model, with a weight, a number and a table that may stay on the CPU."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("number", torch.tensor(2.0))
        self.register_buffer("table", torch.randn(4, 6))
        self.function = forward

    def forward(self, *args: torch.Tensor) -> Any:
        return self.function(self, *args)


def captured(
    forward: Callable[..., Any], *inputs: Any, but: Collection[str] = (), **options: Any
) -> GraphModule:
    graph = fxopt.capture(Calls(forward).eval(), inputs or (X,), **options)
    return pretend_cuda(graph, but=but)


def mask_of(x: torch.Tensor) -> torch.Tensor:
    return x > 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (x @ m.weight).relu(),
        lambda m, x: x * m.number,
        lambda m, x: F.dropout(x, 0.5, m.training) + 1,
        lambda m, x: x[ROWS] * 2,
        lambda m, x: torch.where(mask_of(x), x, 0.0).sin(),
        lambda m, x: x.masked_fill(mask_of(x), 0.0),
        lambda m, x: x / x.norm(dim=-1, keepdim=True),
        lambda m, x: x + torch.linalg.inv(m.weight)[:4],  # follows from a constant
        lambda m, x: (x.topk(2)[0], x.sort()[1]),
        lambda m, x: F.scaled_dot_product_attention(x[None], x[None], x[None]) + 1,
        lambda m, x: torch.index_put(x, (ROWS,), x[:2]),
    ],
)
def test_what_is_possible(forward: Callable[..., Any]) -> None:
    graph = captured(forward)
    assert recording_obstacle(graph) is None
    assert device_of(graph) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: x + torch.rand_like(x), "it is random"),
        (lambda m, x: F.dropout(x, 0.5, True), "it is in training mode"),
        (lambda m, x: torch.linalg.inv(x @ x.t()), "whether it succeeded"),
        (lambda m, x: torch.inverse(x @ x.t()), "whether it succeeded"),
        (lambda m, x: torch.index_put(x, (mask_of(x),), x.sum()), "a mask says"),
        (lambda m, x: F.one_hot(x.long().clamp(0, 2), 3), "CPU would have to wait"),
        (lambda m, x: x.as_strided((2,), (1,)) + 1, "by strides"),
        (lambda m, x: (x + 1, x), "may share its memory with an input"),
        (lambda m, x: x.t(), "may share its memory with an input"),
        (lambda m, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), "sub-graphs"),
        (lambda m, x: x[mask_of(x)], "depends on what is computed"),
        (lambda m, x: x * x.sum().item(), "(depends on what|wait for what)"),
    ],
)
def test_what_is_not(forward: Callable[..., Any], why: str) -> None:
    found = recording_obstacle(captured(forward))
    assert found is not None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(found)


def test_state_is_an_obstacle() -> None:
    graph = pretend_cuda(fxopt.capture(Counter(), torch.zeros(2)))
    assert "writes to its argument" in str(recording_obstacle(graph))


def test_work_on_the_cpu_is_an_obstacle() -> None:
    def forward(model: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sin().cos().tan()

    assert recording_obstacle(captured(forward, but=["cos"])) == "cos: it computes on cpu"
    name = captured(forward).placeholders[0].name
    found = recording_obstacle(captured(forward, but=[name]))
    assert found == f"the input '{name}' is on cpu"
    everything = [n.name for n in captured(forward).graph.nodes if n.op != "placeholder"]
    assert "computes on cpu" in str(recording_obstacle(captured(forward, but=everything)))


def test_constants_on_the_cpu() -> None:
    number = captured(lambda m, x: x * m.number, but=["number"])
    assert recording_obstacle(number) is None  # kernels are given its value
    table = captured(lambda m, x: torch.cat([x, m.table]), but=["table"])
    assert recording_obstacle(table) == "cat: it reads table, which is on cpu"
    filled = captured(lambda m, x: torch.index_put(x, (ROWS,), m.number), but=["number"])
    assert "it reads number, which is on cpu" in str(recording_obstacle(filled))


def test_a_graph_on_the_cpu_alone() -> None:
    graph = fxopt.capture(Calls(lambda m, x: x + 1), X)
    assert "is on cpu" in str(recording_obstacle(graph))
    graph = fxopt.capture(Calls(lambda m: m.weight.clone()), ())
    assert recording_obstacle(graph) == "nothing is computed on cuda"


def test_two_devices() -> None:
    graph = captured(lambda m, x, y: (x.sin(), y.cos()), X, X)
    y = graph.placeholders[1].name
    pretend_cuda(
        graph, "cuda:1", but=[n.name for n in graph.graph.nodes if n.name not in (y, "cos")]
    )
    assert recording_obstacle(graph) == "it computes on cuda:0 and cuda:1"


def test_dynamic_shapes_are_possible() -> None:
    graph = captured(
        lambda m, x: x.reshape(x.shape[0] * 2, 3).softmax(0) * x.shape[0], X,
        dynamic_shapes={"args": ({0: torch.export.Dim.DYNAMIC},)},
    )  # fmt: skip
    assert recording_obstacle(graph) is None
