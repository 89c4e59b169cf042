"""One spelling per operation: whatever the user writes, the same node comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fxopt
from fxopt.normalize import INT_MAX, ShapeNeeded, canonical, complete
from fxopt.testing import relative_error
from fxopt.text import graph_text
from tests.test_capture import Model

aten = torch.ops.aten
X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
W = torch.linspace(-1, 1, 18).reshape(2, 3, 3)


def text_of(function: Callable[..., Any]) -> str:
    """Return the graph of a function, whose numbers agree with it."""
    graph = fxopt.capture(Model(lambda self, x: function(x), w=W), X)
    fxopt.dialect.check(graph)
    assert relative_error(graph(X), function(X)) < 1e-6
    return graph_text(graph)


SYNONYMS: dict[str, list[Callable[[torch.Tensor], Any]]] = {
    "permute": [
        lambda x: x.permute(0, 2, 1),
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(-1, -2),
        lambda x: x.mT,
        lambda x: x.swapaxes(1, 2),
        lambda x: x.swapdims(-2, 2),
        lambda x: x.movedim(1, 2),
        lambda x: torch.moveaxis(x, (0, 2), (0, 1)),
        lambda x: torch.permute(x, (0, -1, -2)),
    ],
    "reshape": [lambda x: x.reshape(6, 4), lambda x: x.view(6, 4), lambda x: x.view((6, 4))],
    "cat": [
        lambda x: torch.cat([x, x], dim=-1),
        lambda x: torch.concat((x, x), 2),
        lambda x: torch.concatenate([x, x], axis=2),
    ],
    "slice": [
        lambda x: x[:, :, 1:],
        lambda x: x[..., -3:],
        lambda x: x[:, :, 1:4],
        lambda x: x.narrow(2, 1, 3),
        lambda x: x.narrow(-1, 1, 3),
    ],
    "select": [lambda x: x[:, -1], lambda x: x[:, 2], lambda x: x.select(-2, -1)],
    "split": [
        lambda x: x.split(2, -1)[0],
        lambda x: x.chunk(2, dim=2)[0],
        lambda x: torch.split(x, [2, 2], 2)[0],
    ],
    "squeeze": [
        lambda x: x[:, :1].squeeze(1),
        lambda x: x[:, :1].squeeze(-2),
        lambda x: x[:, :1].squeeze(),
        lambda x: x[:, :1].squeeze((1, 2)),
    ],
    "arithmetic with numbers": [
        lambda x: x * 2 - 1,
        lambda x: torch.sub(torch.multiply(x, 2), 1),
        lambda x: torch.subtract(torch.mul(x, 2), 1),
    ],
    "division": [lambda x: x / 2, lambda x: torch.true_divide(x, 2), lambda x: torch.divide(x, 2)],
    "comparison": [lambda x: x > 0, lambda x: torch.gt(x, 0), lambda x: torch.greater(x, 0)],
    "clamp": [lambda x: x.clamp(min=0), lambda x: x.clamp_min(0), lambda x: torch.clip(x, 0)],
    "relu6": [lambda x: F.relu6(x), lambda x: F.hardtanh(x, 0.0, 6.0)],
    "sigmoid": [lambda x: torch.sigmoid(x), lambda x: torch.special.expit(x)],
    "cast": [
        lambda x: x.double(),
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.type(torch.float64),
        lambda x: x.to(dtype=torch.float64, copy=False),
    ],
    "pad": [lambda x: F.pad(x, (1, 1)), lambda x: F.pad(x, [1, 1], mode="constant", value=0)],
    "full": [
        lambda x: x + torch.zeros(2, 3, 4),
        lambda x: x + torch.zeros_like(x),
        lambda x: x + x.new_zeros(2, 3, 4),
        lambda x: x + torch.full((2, 3, 4), 0.0),
        lambda x: x + torch.full_like(x, 0),
    ],
    "arange": [
        lambda x: x + torch.arange(4),
        lambda x: x + torch.arange(0, 4),
        lambda x: x + torch.arange(0, 4, 1, dtype=torch.int64),
    ],
    "conv": [
        lambda x: F.conv1d(x, W, padding=1),
        lambda x: F.conv1d(x, W, None, 1, (1,), 1, 1),
        lambda x: F.conv1d(x, W, padding="same"),
    ],
    "pool": [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, (2, 2), stride=(2, 2), padding=0),
    ],
    "attention": [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.5),
    ],
}


@pytest.mark.parametrize("name", SYNONYMS)
def test_synonyms_become_one_graph(name: str) -> None:
    first, *others = map(text_of, SYNONYMS[name])
    for other in others:
        assert _without_names(other) == _without_names(first)


def _without_names(text: str) -> str:
    """Number the nodes, since a name remembers which operator was written."""
    names: dict[str, str] = {}
    out = []
    for line in text.replace(", 0.0, dtype", ", 0, dtype").splitlines():
        words = line.replace("%", " %").split(" ")
        for word in words:
            if word.startswith("%"):
                name = word.strip("%:,()[]")
                names.setdefault(name, f"n{len(names)}")
        out.append(" ".join(names.get(word.strip("%:,()[]"), word) for word in words))
    return "\n".join(out)


def test_different_meanings_stay_different() -> None:
    for one, other in [
        (lambda x: x.permute(0, 2, 1), lambda x: x.permute(2, 1, 0)),
        (lambda x: x[:, :, 1:], lambda x: x[:, :, 1:3]),
        (lambda x: F.pad(x, (1, 1)), lambda x: F.pad(x, (1, 1), value=1)),
        (lambda x: x.clamp(min=0), lambda x: x.clamp(max=0)),
        (lambda x: x.sub(1, alpha=2), lambda x: x.sub(1)),
        (lambda x: torch.full((2,), 1), lambda x: torch.full((2,), 1.0)),
    ]:
        assert _without_names(text_of(one)) != _without_names(text_of(other))


def test_calls_that_return_their_argument_vanish() -> None:
    for function in (
        lambda x: x.squeeze(0),
        lambda x: x[0, 0, 0].transpose(0, -1),
        lambda x: x[0, 0].t(),
        lambda x: x.squeeze(),
    ):
        assert not {"squeeze", "permute"} & set(text_of(function).replace("(", " ").split())


def test_every_argument_is_written_out() -> None:
    call = complete(aten.add.Tensor, ("x", "y"), {})
    assert call.args == ("x", "y") and call.kwargs == {"alpha": 1}
    assert complete(aten.softmax.int, ("x",), {"dim": 1}).args == ("x", 1, None)
    with pytest.raises(TypeError, match="needs an argument 'other'"):
        complete(aten.add.Tensor, ("x",), {})


def test_without_shapes_the_spelling_waits_or_says_that_it_needs_them() -> None:
    def unknown(argument: Any) -> Any:
        return None

    with pytest.raises(ShapeNeeded):
        canonical(aten.transpose.int, ("x", 0, 1), {}, unknown)
    with pytest.raises(ShapeNeeded):
        canonical(aten.sum.dim_IntList, ("x", [-1]), {}, unknown)
    assert canonical(aten.slice.Tensor, ("x", 1, 2), {}, unknown).args == ("x", 1, 2, INT_MAX, 1)


def test_canonical_is_a_fixpoint() -> None:
    def forward(self: Any, x: Any) -> Any:
        y = F.pad(x.transpose(1, 2), (1, 1)).chunk(2, -1)[0].clamp_min(0)
        return F.avg_pool2d(y.double(), 2), y.squeeze(), torch.ones_like(y), y.movedim(0, -1)

    graph = fxopt.capture(Model(forward), X, dynamic_shapes={0: "n"})
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            again = canonical(node.target, node.args, node.kwargs, fxopt.shapes.describe)
            assert again == (node.target, node.args, node.kwargs)
