"""move-permutes: what moves past a linear layer, and what stays because nothing would be saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.normalize import node_name
from fxopt.passes.move_permutes import MovePermutes
from fxopt.testing import check_pass

aten = torch.ops.aten


class Calls(nn.Module):
    """A model made of two linear layers and a function of them and the inputs."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 12, bias=False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 5, 8)


def heads(y: torch.Tensor) -> torch.Tensor:
    """From (sequence, batch, features) to (batch, head, sequence, features of a head)."""
    return y.unflatten(-1, (2, -1)).permute(1, 2, 0, 3)


def order(model: nn.Module, x: torch.Tensor, **options: Any) -> list[str]:
    """The names of the calls after the pass, in order."""
    graph, _ = check_pass(MovePermutes(), model, x, **options)
    return [node_name(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def test_a_permute_in_front_of_a_layer_goes_behind_it() -> None:
    model = Calls(lambda m, x: heads(m.a(x.transpose(0, 1))))
    assert order(model, tokens(), rewrites=1) == ["linear", "permute", "unflatten", "permute"]


def test_a_permute_goes_through_what_splits_the_features() -> None:
    model = Calls(lambda m, x: [heads(p) for p in m.b(x.transpose(0, 1)).chunk(3, -1)])
    assert order(model, tokens(), rewrites=1)[:3] == ["linear", "permute", "split_with_sizes"]


def test_a_permute_behind_a_layer_goes_in_front_of_it() -> None:
    model = Calls(lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1).exp())
    assert order(model, tokens(), rewrites=1) in (
        ["permute", "permute", "linear", "exp"], ["linear", "permute", "permute", "exp"]
    )


def test_a_reshape_between_a_layer_and_a_permute_goes_along() -> None:
    def joined(m: Any, h: torch.Tensor) -> torch.Tensor:
        y = m.a(h.permute(2, 0, 1, 3).reshape(10, 8))
        return m.b(y.reshape(5, 2, 8).transpose(0, 1).relu())

    found = order(Calls(joined), torch.randn(2, 2, 5, 4), rewrites=2)
    assert found == ["permute", "reshape", "reshape", "permute", "linear", "relu", "linear"]


@pytest.mark.parametrize("sizes", [{0: "batch"}, {1: "length"}, {0: "batch", 1: "length"}])
def test_symbolic_sizes(sizes: dict[int, str]) -> None:
    model = Calls(lambda m, x: heads(m.a(x.transpose(0, 1))))
    check_pass(MovePermutes(), model, tokens(), rewrites=1, dynamic_shapes=sizes)


def test_several_symbolic_sizes_hold_a_reshape_back() -> None:
    def joined(m: Any, h: torch.Tensor) -> torch.Tensor:
        batch, _, length, _ = h.shape
        y = m.a(h.permute(2, 0, 1, 3).reshape(batch * length, 8))
        return m.b(y.reshape(length, batch, 8).transpose(0, 1).relu())

    check_pass(
        MovePermutes(), Calls(joined), torch.randn(2, 2, 5, 4), rewrites=0,
        misses=["several symbolic sizes"], dynamic_shapes={0: "batch", 2: "length"},
    )  # fmt: skip


def test_half_precision() -> None:
    model = Calls(lambda m, x: heads(m.a(x.transpose(0, 1)))).half()
    check_pass(MovePermutes(), model, tokens().half(), rewrites=1, double=False, tolerance=1e-2,
               gradients=False)  # fmt: skip


def test_the_attention_of_pytorch_with_the_batch_first() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    graph, _ = check_pass(MovePermutes(), model, tokens())
    layers = graph.find(aten.linear.default)
    assert [node.args[0].target for node in layers[:2]] == ["src", aten.permute.default]


LEFT_ALONE: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "features are moved": (lambda m, x: heads(m.a(torch.cat([x, x[:, :3]], 1).mT)), []),
    "nothing follows": (lambda m, x: m.a(x.transpose(0, 1)).relu(), ["no permute follows"]),
    "only a reshape follows": (
        lambda m, x: m.a(x.transpose(0, 1)).reshape(10, 8), ["no permute follows"]
    ),
    "one reader of two is no permute": (
        lambda m, x: (heads(y := m.a(x.transpose(0, 1))), y.exp()), ["no permute follows"]
    ),
    "another reads the permute": (
        lambda m, x: (heads(m.a(y := x.transpose(0, 1))), y.relu()), ["used elsewhere"]
    ),
    "nothing comes before": (lambda m, x: m.a(x.exp()).transpose(0, 1), []),
    "what comes before has another reader": (
        lambda m, x: (m.a(y := x.exp().transpose(0, 1).reshape(10, 8)).reshape(5, 2, 8)
                      .transpose(0, 1), y), []
    ),
    "the features are cut behind the layer": (
        lambda m, x: m.b(x.exp().transpose(0, 1).reshape(10, 8)).reshape(5, 2, 3, 4)
        .transpose(0, 1), []
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_where_nothing_would_be_saved_all_stays(name: str) -> None:
    call, misses = LEFT_ALONE[name]
    check_pass(MovePermutes(), Calls(call), tokens(), rewrites=0, misses=misses)


def test_a_permute_of_the_features_behind_a_layer_stays() -> None:
    model = Calls(lambda m, h: m.a(h.permute(2, 0, 1, 3).reshape(8, 8, 8)).permute(2, 0, 1).exp())
    check_pass(MovePermutes(), model, torch.randn(8, 2, 8, 4), rewrites=0)


def test_a_permute_in_front_of_a_roll_stays_with_it() -> None:
    def windows(m: Any, h: torch.Tensor) -> torch.Tensor:
        y = m.a(h.transpose(1, 2).reshape(4, 4, 8)).reshape(2, 2, 2, 2, 8)
        return y.permute(0, 2, 1, 3, 4).reshape(4, 4, 8).roll((1, 1), (0, 1)).exp()

    check_pass(MovePermutes(), Calls(windows), torch.randn(4, 2, 4, 4), rewrites=0,
               misses=["a roll follows"])  # fmt: skip


def test_a_layer_that_is_read_twice_stays() -> None:
    def call(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = m.a(x.permute(1, 0, 2))
        return y.permute(1, 0, 2), y.exp()

    check_pass(MovePermutes(), Calls(call), tokens(), rewrites=0, misses=["used elsewhere"])


def test_the_same_layer_twice() -> None:
    model = Calls(lambda m, x: heads(m.a(m.a(x).exp().transpose(0, 1))))
    graph, _ = check_pass(MovePermutes(), model, tokens(), rewrites=1)
    assert len(graph.find(aten.linear.default)) == 2
