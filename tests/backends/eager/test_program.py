"""The flat program: its source, what it keeps, and what it may write over."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.eager.program import Program, program_of
from fxopt.text import target_text
from tests.models import Counter

aten = torch.ops.aten
ROOT = Path(__file__).parent.parent.parent.parent


def program_for(forward: Callable[..., Any], *inputs: torch.Tensor) -> Program:
    """Capture a function and return its program, having compared the two."""

    class Model(nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return forward(*args)

    graph = fxopt.capture(Model(), inputs)
    program = program_of(graph)
    kept = [value.clone() for value in inputs]
    with torch.no_grad():
        expected = graph.run(*inputs)
        for _ in range(2):
            found = program.function(*inputs)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    return program


def overwriting(program: Program) -> list[str]:
    """Return the operators in a program that write to their argument."""
    names = [target_text(op).split(".")[0] for op in program.operators.values()]
    return sorted(name for name in names if name.endswith("_"))


def name_of(program: Program, operator: str) -> str:
    """Return the name that an operator has in a program."""
    (name,) = [n for n, op in program.operators.items() if target_text(op) == operator]
    return name


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("forward", "inputs", "expected"),
    [
        (lambda x: torch.relu(x), [X], []),  # the caller's memory
        (lambda x: torch.relu(x.sin()), [X], ["relu_"]),
        (lambda x: (lambda y: torch.relu(y) + y)(x.sin()), [X], ["add_"]),
        (lambda x: (lambda y: (torch.relu(y), y))(x.sin()), [X], []),  # an output
        (lambda x: (lambda y: (torch.relu(y), y.t()))(x.sin()), [X], []),  # a view of it is one
        (lambda x: (lambda y: torch.relu(y).t() + y.t())(x.sin()), [X], ["add_"]),
        (lambda x: torch.relu(x.sin().t()), [X], ["relu_"]),
        (lambda x: torch.relu(x.sin()[1:]), [X], []),  # a part: the rest might be read
        (lambda x: torch.relu(x[0].sin().expand(4, 6)), [X], []),  # elements that stand for many
        (lambda x, y: x.sin() + y, [X, X[:1]], ["add_"]),
        (lambda x, y: y[:1].sin() + x, [X, X], []),  # a smaller one holds no result
        (lambda x, y: x + y.sin(), [X, X], ["add_"]),  # sums commute
        (lambda x, y: torch.sub(x, y.sin()), [X, X], []),  # differences do not
        (lambda x: (lambda y: y * y)(x.sin()), [X], []),  # reads what it would write
        (lambda x: x.cos() * 2, [X], ["mul_"]),
        (lambda x: torch.div(x.long(), 2), [X * 9], []),  # another dtype
        (lambda x: F.softmax(x.sin(), -1).relu(), [X], []),  # composite: may be its argument
    ],
)
def test_what_is_written_over(
    forward: Callable[..., Any], inputs: list[torch.Tensor], expected: list[str]
) -> None:
    assert overwriting(program_for(forward, *inputs)) == expected


def test_an_input_that_comes_back_is_the_caller_s_own() -> None:
    program = program_for(lambda x: (x, x.t()), X)
    a, b = program.function(X)
    assert a is X and b.data_ptr() == X.data_ptr()


class Outputs(nn.Module):
    """Constants as outputs, and views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.weight, self.weight, self.weight.t(), self.weight.sum()


def test_constants_among_outputs_are_copies() -> None:
    compiled = fxopt.compile(Outputs().eval(), X, passes=[])
    first = [value.clone() for value in compiled(X)]
    for value in compiled(X):
        value.zero_()
    assert all(torch.equal(a, b) for a, b in zip(compiled(X), first, strict=True))


@pytest.mark.parametrize("check", ["values_are_dropped", "inputs_are_dropped"])
def test_nothing_is_kept(check: str) -> None:
    """In a process of its own: where `torch.compile` was used, Python holds callers' arguments."""
    code = f"from tests.backends.eager import test_program; test_program.{check}()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def values_are_dropped() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watch(x: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(x))
        gc.collect()
        alive.append(sum(one() is not None for one in seen))
        return x.cos()

    program = program_for(lambda x: x.cos().cos().cos().cos(), X)
    names = {**program.names, name_of(program, "cos"): watch}
    Program(program.source, names, {}).function(X.clone())
    assert alive == [1, 1, 1, 1]


def inputs_are_dropped() -> None:
    program = program_for(lambda x: x.cos().sin(), X)
    x = X.clone()
    gone = weakref.ref(x)
    held = []

    def watch(value: torch.Tensor) -> torch.Tensor:
        held.append(gone())
        return value

    names = {**program.names, name_of(program, "sin"): watch}
    function = Program(program.source, names, {}).function
    arguments = [x]
    del x
    function(arguments.pop())
    assert held == [None]


def test_odd_numbers_and_names() -> None:
    def forward(x: torch.Tensor) -> Any:
        y = torch.full_like(x, float("inf")) + float("-inf")
        z = torch.clamp(x, max=float("inf"))
        return y.isnan(), z, torch.arange(3, dtype=torch.int32, device="cpu"), x.to(torch.float16)

    program_for(forward, X)


def test_a_name_of_the_user_s_that_looks_like_one_of_ours() -> None:
    class Model(nn.Module):
        def forward(self, relu_0_: torch.Tensor, sizes_1_: torch.Tensor) -> torch.Tensor:
            return torch.relu(relu_0_ - sizes_1_.permute(1, 0))

    x = torch.randn(3, 3)
    graph = fxopt.capture(Model(), (x, x))
    (found,) = program_of(graph).function(x, x)
    assert torch.equal(found, torch.relu(x - x.t()))


def test_state_is_written_and_never_computed_early() -> None:
    compiled = fxopt.compile(Counter(), torch.zeros(2))
    assert [compiled(torch.zeros(2))[0].item() for _ in range(3)] == [1, 2, 3]


def test_what_follows_from_constants_is_computed_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.t().contiguous()

    graph = fxopt.capture(Model(), X)
    program = program_of(graph)
    assert [target_text(op) for op in program.operators.values()] == ["matmul"]
    assert torch.equal(program.function(X)[0], graph.run(X)[0])


def test_a_deep_graph() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        for _ in range(400):
            x = torch.sin(x)
        return x

    program_for(forward, X)
