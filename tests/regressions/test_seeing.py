"""Figures, names and errors of what shows a model, that once were wrong."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.contract import Effect, Precondition
from fxopt.testing import relative_error

X = torch.ones(1, 3)
A = torch.ones(4, 4)


class Named(nn.Module):
    """A layer under a name that is no Python."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._modules[self.name](x)  # type: ignore[misc]


class Only(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", ['a"x', "a\\x", "lambda", "a b"])
def test_a_module_may_have_any_name(name: str) -> None:
    model = Named(name)
    assert relative_error(fxopt.optimize(model, X)(X), model(X)) < 1e-6


def test_a_graph_that_fails_before_any_pass_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *flat: Any) -> Any:
        raise SyntaxError("unterminated string literal")

    monkeypatch.setattr(fxopt.GraphModule, "run", fail)
    with pytest.raises(fxopt.VerifyError, match=r"before any pass.*unterminated string literal"):
        fxopt.optimize(nn.Sequential(nn.ReLU(), nn.ReLU()), X)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: torch.broadcast_tensors(a, a[:1])[1],
        lambda a: torch.meshgrid(a[0], a[1], indexing="ij")[0],
        torch.atleast_3d,
    ],
    ids=["broadcast_tensors", "meshgrid", "atleast_3d"],
)
def test_a_view_moves_and_takes_nothing(view: Any) -> None:
    found = fxopt.profile(Only(view), A, measure=False)
    assert (found.bytes_moved, found.peak_activation_bytes, found.notes) == (0, 64, ())


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda a: a // 2, 2 * 16),
        (lambda a: torch.div(a, 2, rounding_mode="floor"), 2 * 16),
        (lambda a: F.mse_loss(a, a, reduction="none"), 2 * 16),
        (lambda a: torch.msort(torch.cat([a, a])), 32 * 3),
        (lambda a: torch.fft.rfft(a, n=64).abs(), 4 * 5 * 64 * 6 // 2 + 4 * 33),
    ],
    ids=["floor_divide", "div", "mse_loss", "msort", "rfft"],
)
def test_operations_that_were_miscounted(function: Any, flops: int) -> None:
    assert fxopt.profile(Only(function), A, measure=False).flops == flops


def test_names_of_candidates_are_no_markup() -> None:
    names = ["[/b]", "a [bold]x[/bold]"]
    found = fxopt.compare(dict.fromkeys(names, nn.Linear(3, 3)), X, rounds=1, memory=False)
    assert all(name in str(found) for name in names)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (torch.randn(2, 5), r"Item 1 of data= does not fit the model: .*2x5"),
        ((torch.randn(2, 3), "cat"), r"is no class index: 'cat'"),
    ],
)
def test_data_that_does_not_fit_is_named(item: Any, words: str) -> None:
    data = [torch.randn(2, 3), item] if isinstance(item, torch.Tensor) else [item]
    model = nn.Linear(3, 3)
    with pytest.raises(fxopt.OptionError, match=words):
        fxopt.compare({"a": model, "b": model}, X, data=data, rounds=1, memory=False)


def test_equality_of_nothing_but_nan_proves_nothing() -> None:
    graph = fxopt.optimize(Only(lambda x: F.relu(F.relu(x * float("nan")))), X)
    assert "prove nothing" in str(graph.report)
    assert "prove nothing" not in str(fxopt.optimize(Only(torch.relu), X).report)


def test_what_is_no_graph_has_no_network() -> None:
    with pytest.raises(fxopt.OptionError, match=r"not a Linear.*fxopt\.capture"):
        fxopt.to_networkx(nn.Linear(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"oracle": lambda graph: torch.ones(3)}, "must return True or False"),
        ({"oracle": lambda graph: 1.0, "threshold": "a"}, "threshold must be a number"),
    ],
)
def test_an_oracle_that_cannot_be_understood(options: dict[str, Any], words: str) -> None:
    with pytest.raises(fxopt.OptionError, match=words):
        fxopt.bisect(nn.Linear(3, 3), X, **options)


def test_the_default_list_has_a_name_in_python_too() -> None:
    graph = fxopt.optimize(nn.Linear(3, 3), X, passes=["fuse-conv-bn", "default"])
    names = [one.name for one in fxopt.default_passes()]
    assert [step.name for step in graph.story.steps] == ["fuse-conv-bn", *names]


@dataclass(frozen=True)
class Silent:
    name: ClassVar[str] = "silent"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: fxopt.GraphModule) -> Any:
        return None


def test_a_pass_that_returns_nothing_is_told_what_to_return() -> None:
    with pytest.raises(fxopt.FxoptError, match=r"run\(\) returned None.*PassResult"):
        fxopt.optimize(nn.Linear(3, 3), X, passes=[Silent()])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("bisect", "tests.models:ConvBnRelu", "--input", "1x3x8x8"), 0),
        (("bisect", "tests.models:ConvBnRelu", "--input", "1x4x8x8"), 2),
        (("bisect", "tests.models:ConvBnRelu", "--script", "no/such/b.py"), 2),
        (("view", "tests.models:ConvBnRelu", "--input", "1x3x8x8", "-o", "v.txt"), 2),
    ],
)
def test_exit_codes(
    arguments: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert CliRunner().invoke(main, list(arguments)).exit_code == code
    assert not list(tmp_path.iterdir())
