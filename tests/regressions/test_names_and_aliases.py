"""Found by readers and by hostile use: names, aliases, sub-graphs, state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fxopt
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter

aten = torch.ops.aten
NAMES = [n for n in dir(GraphModule) if not n.startswith("_") and n not in dir(nn.Module)]


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_may_be_called_like_anything_of_ours(name: str) -> None:
    model = nn.ModuleDict({"other": nn.Linear(3, 3)})
    model.add_module(name, nn.Linear(3, 3))

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules.update(model._modules)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self._modules[name](x))

    named, x = Named(), torch.randn(2, 3)
    compiled = fxopt.compile(named, x)
    torch.testing.assert_close(compiled(x), named(x))
    doubled = {key: value * 2 for key, value in named.state_dict().items()}
    compiled.update(doubled)
    named.load_state_dict(doubled)
    torch.testing.assert_close(compiled(x), named(x))
    graph = fxopt.capture(named, x)
    graph.load_state_dict(named.state_dict())
    torch.testing.assert_close(graph(x), named(x))


def test_constants_fold_inside_control_flow() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(
                x.sum() > 0, lambda x: x + torch.arange(4) * 2.0, lambda x: x - 1, (x,)
            )

    for x in (torch.ones(4), -torch.ones(4)):
        compiled = fxopt.compile(Branches(), torch.ones(4))
        assert torch.equal(compiled(x), Branches()(x))
    folds = next(s for s in compiled.story.steps if s.name == "fold-constants")
    assert folds.rewrites == 1 and folds.created


def test_an_explicit_copy_stays_a_copy() -> None:
    class Copies(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32, copy=True)

    compiled, x = fxopt.compile(Copies(), torch.randn(3)), torch.zeros(3)
    compiled(x).add_(1)
    assert torch.equal(x, torch.zeros(3))


def test_one_tensor_given_twice_is_two_arguments() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * 2 + y

    x = torch.ones(3)
    graph = fxopt.capture(Two(), (x, x))
    assert torch.equal(graph(torch.ones(3), torch.zeros(3)), torch.full((3,), 2.0))


def test_a_buffer_keeps_what_an_input_was_before_it_was_written() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.empty(3)
            y.copy_(x)
            self.seen.copy_(x)
            x.add_(1)
            return y

    compiled, x = fxopt.compile(Remembers(), torch.zeros(3)), torch.zeros(3)
    assert torch.equal(compiled(x), torch.zeros(3))
    assert torch.equal(x, torch.ones(3))
    assert torch.equal(compiled.executable.graph.constant("seen"), torch.zeros(3))


def test_state_starts_anew_for_each_verification_input_and_benchmark() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    x = torch.ones(2)
    compiled = fxopt.compile(Counts(), x, verify_inputs=[x, x * 2, x * 3])
    compiled.benchmark(rounds=3)
    assert compiled(x)[0].item() == 1
    with pytest.raises(fxopt.OptionError, match="at least one round"):
        compiled.benchmark(rounds=0)


def test_a_rewrite_may_wrap_what_it_replaces_more_than_once() -> None:
    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu().sigmoid()

    graph = fxopt.capture(One(), torch.randn(3))
    rewriter = Rewriter(graph)
    relu = graph.find(aten.relu.default)[0]
    inner = rewriter.insert(aten.neg.default, relu, before=relu.next)
    outer = rewriter.insert(aten.neg.default, inner, before=inner.next)
    rewriter.replace(relu, outer)
    rewriter.result()
    fxopt.dialect.check(graph)
    x = torch.randn(3)
    assert torch.equal(graph(x), One()(x))


def test_without_inputs_other_shapes_compile_again() -> None:
    model = nn.Linear(5, 3)
    compiled = fxopt.compile(model)
    assert compiled.graph is not None
    for rows in (1, 7):
        x = torch.randn(rows, 5)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_model_under_torch_compile_is_compiled_itself() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    model = Counts()
    compiled = fxopt.compile(torch.compile(model), torch.ones(2))
    assert model.calls.item() == 0 and compiled(torch.ones(2))[0].item() == 1


def test_a_cache_in_a_dict_is_left_as_it_was() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache: dict[str, torch.Tensor] = {}
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if "w" not in self.cache:
                self.cache["w"] = self.weight * 2
            return x * self.cache["w"]

    model = Caches()
    fxopt.compile(model, torch.ones(3))
    assert model.cache == {}
    assert type(model(torch.ones(3)).detach()) is torch.Tensor
