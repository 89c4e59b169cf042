"""Writes turned into values: whatever a model writes, the graph computes what eager mode does.

Every case compares outputs, written inputs and state with eager, in float64, over two calls.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.testing import relative_error

Step = Callable[[torch.Tensor], torch.Tensor]


class Writer(nn.Module):
    """Runs a function of an input, another input and a buffer that it may write to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("state", torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
        return self.function(a, b, self.state)


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    b = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    return a, b.permute(2, 1, 0) if seed % 2 else b  # every other one is not contiguous


def agrees_with_eager(model: nn.Module, seed: int) -> fxopt.GraphModule:
    before = copy.deepcopy(model.state_dict())
    graph = fxopt.capture(model, inputs(seed))
    fxopt.dialect.check(graph)
    eager = copy.deepcopy(model)
    for call in (0, 2):
        ours, theirs = inputs(seed + call), inputs(seed + call)
        with torch.no_grad():
            expected = copy.deepcopy(eager(*theirs))  # outputs may be views that are written later
            found = graph(*ours)
        assert relative_error(found, expected) < 1e-12, f"outputs of call {call}\n{graph}"
        assert relative_error(ours, theirs) < 1e-12, f"inputs after call {call}\n{graph}"
        state = graph.state if graph.has_constant("state") else before["state"]
        assert relative_error(state, eager.state) < 1e-12, f"state after call {call}\n{graph}"
    assert torch.equal(model.state, before["state"]), "the user's buffer changed"
    return graph


def on_input(write: Step) -> Callable[..., Any]:
    def function(a: Any, b: Any, state: Any) -> Any:
        written = write(a)
        return written, a * 2, b

    return function


WRITES: dict[str, Step] = {
    "relu_": lambda x: x.relu_(),
    "slice": lambda x: x[1:, ::2].add_(1),
    "select": lambda x: x[0].mul_(3),
    "split": lambda x: x.split([1, 3], dim=1)[1].zero_(),
    "chunk": lambda x: x.chunk(2, 1)[0].neg_(),
    "unbind": lambda x: x.unbind(1)[2].fill_(7),
    "tensor_split": lambda x: x.tensor_split(2, 1)[1].add_(1),
    "transposed": lambda x: x.t().cumsum_(0),
    "reshaped": lambda x: x.reshape(2, 6)[0].add_(1),
    "reshaped copy": lambda x: x.t().reshape(-1).add_(1),  # not a view: x must stay
    "diagonal": lambda x: x.diagonal(1).mul_(5),
    "view of view of view": lambda x: x[1:].t()[:3].reshape(3, 2)[0].fill_(9),
    "other dtype": lambda x: x.view(torch.int64).bitwise_and_(-2),
    "unfolded": lambda x: x.unfold(1, 2, 2).select(2, 0).zero_(),
    "part of an expanded": lambda x: x.expand(2, 3, 4)[0].add_(1),
    "real part": lambda x: torch.view_as_complex(x.view(3, 2, 2)).real.add_(1),
    "imaginary part": lambda x: torch.view_as_complex(x.view(3, 2, 2)).imag.mul_(2),
    "masked": lambda x: x.masked_fill_(x > 0, 0.5),
    "masked assignment": lambda x: _assign(x, x > 0, -1.0),
    "index assignment": lambda x: _assign(x, torch.tensor([0, 2]), 4.0),
    "slice assignment": lambda x: _assign(x, (slice(None), slice(1, 3)), x[:, :1]),
    "index_put_ accumulate": lambda x: x.index_put_(
        (torch.tensor([1, 1]),), torch.ones((), dtype=torch.float64), accumulate=True
    ),
    "scatter_": lambda x: x.scatter_(1, torch.tensor([[1], [0], [2]]), 3.0),
    "copy_ that casts": lambda x: x.copy_(torch.arange(4)),
    "copy_ that broadcasts": lambda x: x[:, 1:].copy_(torch.ones(3, 1)),
    "fill_ with a tensor": lambda x: x.fill_(torch.tensor(2.5)),
    "fill_diagonal_": lambda x: x.fill_diagonal_(3.0),
    "fill_diagonal_ that wraps": lambda x: x.t().fill_diagonal_(3.0, wrap=True),
    "out=": lambda x: torch.sin(x.clone(), out=x),
    "out= a view": lambda x: torch.add(x[:1], 1.0, out=x[1:2]),
    "dropout that is off": lambda x: F.dropout(x, 0.5, training=False).add_(1),
    "in-place dropout that is off": lambda x: F.dropout(x, 0.5, training=False, inplace=True),
    "contiguous, of a contiguous": lambda x: x.contiguous().add_(1),
    "contiguous, of another": lambda x: x.t().contiguous().add_(1),
    "to the same dtype": lambda x: x.to(torch.float64).add_(1),
    "to another dtype": lambda x: x.to(torch.float32).add_(1),
    "type_as the same": lambda x: x.type_as(torch.zeros(1, dtype=torch.float64)).add_(1),
    "detached": lambda x: x.detach().add_(1),
    "squeezed in place": lambda x: x.view(1, 3, 4).squeeze_(0).add_(1),
    "transposed in place": lambda x: x.view_as(x).t_().add_(torch.arange(3)),
    "a clone": lambda x: x.clone().add_(1),
}


def _assign(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    x[index] = value
    return x


@pytest.mark.parametrize("name", WRITES)
def test_a_write_to_an_input_is_the_same_as_in_eager(name: str) -> None:
    agrees_with_eager(Writer(on_input(WRITES[name])), seed=2)


@pytest.mark.parametrize("name", [n for n in WRITES if "transposed in" not in n])
def test_a_write_to_a_fresh_tensor_is_the_same_as_in_eager(name: str) -> None:
    def function(a: Any, b: Any, state: Any) -> Any:
        x = a * 2
        early = x[0]
        written = WRITES[name](x)
        return written, early, x + 1

    graph = agrees_with_eager(Writer(function), seed=4)
    assert not any(t._schema.is_mutable for t in _targets(graph)), "a write is left"


def _targets(graph: fxopt.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]


def test_state_goes_on_from_call_to_call_and_is_written_once() -> None:
    def function(a: Any, b: Any, state: Any) -> Any:
        state.add_(1)
        state[0] += a[0, :3]
        state.mul_(0.5)
        return a + state.sum()

    graph = agrees_with_eager(Writer(function), seed=0)
    assert len(graph.find(torch.ops.aten.copy_.default)) == 1
    assert graph.info.mutated == {"state"}


def test_reads_between_writes_see_each_its_own_time() -> None:
    def function(a: Any, b: Any, state: Any) -> Any:
        row = a[0]
        first = row.clone()
        a.add_(1)
        second = row * 1
        row.zero_()
        return first, second, a.sum(), a[:, 0]

    agrees_with_eager(Writer(function), seed=0)


def test_a_parameter_written_under_no_grad_is_state() -> None:
    class Ema(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return x - self.mean

    model, x = Ema(), torch.randn(3, 4)
    graph, eager = fxopt.capture(model, x), copy.deepcopy(model)
    for _ in range(2):
        assert relative_error(graph(x), eager(x)) < 1e-6
    assert relative_error(graph.mean, eager.mean) < 1e-6
    assert graph.mean.grad_fn is None and not model.mean.any()


def test_state_written_under_no_grad_holds_no_graph_of_earlier_calls() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("last", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            with torch.no_grad():
                self.last.mul_(0.5).add_(y.mean(0))
            return y - self.last

    graph = fxopt.capture(Memory(), torch.randn(3, 4))
    for _ in range(2):  # the second would run backward through the first
        graph(torch.randn(3, 4)).sum().backward()
    assert not graph.last.requires_grad and graph.last.any()


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (lambda a, b, s: a.t_(), "changes the shape of an input"),
        (lambda a, b, s: s.add_(1).unsqueeze_(0), "changes the shape of an input"),
        (lambda a, b, s: F.dropout(a * 2, 0.5, training=False).t_(), "of a tensor of another name"),
        (lambda a, b, s: (a * 2).as_strided((2,), (2,)).add_(1), "as_strided"),
        (lambda a, b, s: (a * 2).set_(b), "set_"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_its_source_line(
    function: Callable[..., Any], part: str
) -> None:
    with pytest.raises(fxopt.CaptureError, match=part):
        fxopt.capture(Writer(function), inputs(0))


# -- programs at random ---------------------------------------------------------------------------

VIEWS: list[Callable[[random.Random, torch.Tensor], Step | None]] = [
    lambda r, t: (lambda x: x[1:]) if t.dim() and t.shape[0] > 1 else None,
    lambda r, t: (lambda x: x[..., ::2]) if t.dim() else None,
    lambda r, t: (lambda x: x.select(-1, 0)) if t.dim() > 1 else None,
    lambda r, t: (lambda x: x.transpose(0, -1)) if t.dim() > 1 else None,
    lambda r, t: lambda x: x.reshape(-1),
    lambda r, t: (lambda x: x.unsqueeze(1)) if t.dim() in (1, 2) else None,
    lambda r, t: lambda x: x.squeeze(),
    lambda r, t: (lambda x: x.diagonal()) if t.dim() > 1 else None,
    lambda r, t: (lambda x: x.chunk(2, -1)[-1]) if t.dim() else None,
    lambda r, t: (lambda x: x.tensor_split(2)[0]) if t.dim() and t.shape[0] > 1 else None,
    lambda r, t: (lambda x: x.unbind(0)[-1]) if t.dim() > 1 else None,
    lambda r, t: (lambda x: x.unfold(-1, 2, 2)) if t.dim() and t.shape[-1] > 1 else None,
    lambda r, t: (lambda x: x.expand(2, *x.shape)) if t.dim() < 3 else None,
    lambda r, t: lambda x: x.contiguous(),
    lambda r, t: lambda x: x.double(),
    lambda r, t: lambda x: F.dropout(x, 0.5, False),
    lambda r, t: lambda x: torch.atleast_2d(x),
    lambda r, t: (lambda x: x.view_as(x).transpose_(0, -1)) if t.dim() else None,
]
READS: list[Step] = [lambda x: x * 2, lambda x: x.sum(), lambda x: x.sin(), lambda x: x.clone()]


def program(seed: int, length: int = 10) -> Writer:
    """Return a model that views, writes and reads its tensors in a random order."""
    choice = random.Random(seed)
    writes = [w for name, w in WRITES.items() if name in SAFE]
    steps: list[tuple[int, Step]] = []
    pool = [*inputs(seed), Writer(print).state.clone()]
    while len(steps) < length:
        at = choice.choice([choice.randrange(len(pool)), len(pool) - 1])
        step: Step | None
        kind = choice.random()
        if kind < 0.5:
            step = choice.choice(VIEWS)(choice, pool[at])
        else:
            step = choice.choice(writes if kind < 0.85 else READS)
        tensor = pool[at]
        overlaps = any(s == 0 < n - 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))
        if step is None or step in writes and (overlaps or not tensor.dim()):
            continue
        pool.append(step(pool[at]))
        steps.append((at, step))
    outputs = [*choice.sample(range(len(pool)), 2), len(pool) - 1]

    def function(a: Any, b: Any, state: Any) -> Any:
        values = [a, b, state]
        for at, step in steps:
            values.append(step(values[at]))
        return [values[at] for at in outputs]

    return Writer(function)


SAFE = {
    "relu_", "masked", "dropout that is off", "detached", "to the same dtype", "a clone",
    "contiguous, of a contiguous", "in-place dropout that is off", "out=",
}  # fmt: skip


@pytest.mark.parametrize("block", range(4))
def test_random_programs_of_views_writes_and_reads(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        agrees_with_eager(program(seed), seed)
