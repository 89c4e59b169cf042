"""replace-einsum: which products einsum is, and that no letter is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from fxopt import dialect
from fxopt.capture import capture
from fxopt.passes.replace_einsum import ReplaceEinsum
from fxopt.testing import check_pass, op_counts, relative_error

SIZES = dict(zip("abcdijkABC", (2, 3, 4, 5, 6, 3, 4, 2, 3, 2), strict=True))


class Einsum(torch.nn.Module):
    """An einsum of what sines made."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, *tensors: torch.Tensor) -> Any:
        return torch.einsum(self.equation, *(tensor.sin() for tensor in tensors)) * 1.5


def operands(equation: str, **sizes: int) -> tuple[torch.Tensor, ...]:
    """Draw operands; dots stand for one more dimension per dot but two."""
    known = {**SIZES, **sizes}
    terms = equation.replace(" ", "").split("->")[0].replace("...", ".").split(",")
    return tuple(
        torch.randn([2 if letter == "." else known[letter] for letter in term]) for term in terms
    )


# An equation, and how many calls of each kind it becomes.
EQUATIONS = [
    ("abic,abjc->abij", {"matmul": 1, "permute": 1}),
    ("aibc,ajbc->abij", {"matmul": 1, "permute": 2}),
    ("abij,ajbc->aibc", {"matmul": 1, "permute": 2}),
    ("abij,abjc->abic", {"matmul": 1}),
    ("A B i C , A B j C -> A B i j", {"matmul": 1, "permute": 1}),
    ("abc,dc->abd", {"matmul": 1, "permute": 1}),
    ("abc,cd->abd", {"matmul": 1}),
    ("...c,cd->...d", {"matmul": 1}),
    ("...ij,...jk", {"matmul": 1}),
    ("...ij,jk->...ik", {"matmul": 1}),
    ("ij,jk", {"matmul": 1}),
    ("ij,jk->ki", {"matmul": 1, "permute": 2}),
    ("ij,j->i", {"matmul": 1}),
    ("i,ij->j", {"matmul": 1}),
    ("i,i->", {"matmul": 1}),
    ("ij,ij->", {"matmul": 1, "reshape": 2}),
    ("ai,ai->a", {"matmul": 1, "unsqueeze": 2, "squeeze": 1}),
    ("aij,aj->ai", {"matmul": 1, "unsqueeze": 1, "squeeze": 1}),
    ("i,j->ij", {"mul": 1, "unsqueeze": 1}),
    ("abc,b->abc", {"mul": 1, "unsqueeze": 1}),
    ("abc,abc->abc", {"mul": 1}),
    ("ab,c->abc", {"mul": 1, "unsqueeze": 1}),
    ("abcd->abdc", {"permute": 1}),
    ("abcd->ad", {"sum": 1}),
    ("abc->ca", {"sum": 1, "permute": 1}),
    ("ba", {"permute": 1}),
    ("aic,abc->ab", {"sum": 1, "matmul": 1, "unsqueeze": 1, "squeeze": 1, "permute": 1}),
    ("ab,bc,cd->ad", {"matmul": 2, "permute": 0}),
    ("ab,bc,c->a", {"matmul": 2}),
]


@pytest.mark.parametrize(("equation", "calls"), EQUATIONS)
def test_equations(equation: str, calls: dict[str, int]) -> None:
    graph, _ = check_pass(ReplaceEinsum(), Einsum(equation), operands(equation), rewrites=1)
    found = op_counts(graph)
    found["mul"] -= 1
    found = {op: n for op, n in found.items() if op not in ("sin", "einsum") and n}
    allowed = {op: n for op, n in calls.items() if n}
    if "unsqueeze" in calls or equation == "ij,jk->ki" or equation.count(",") == 2:
        assert found.get("matmul", 0) == calls.get("matmul", 0) and sum(found.values()) <= 6
    else:
        assert found == allowed, found


@pytest.mark.parametrize(
    ("equation", "reason"),
    [
        ("aab->ab", "stands twice in one operand"),
        ("ii", "stands twice in one operand"),
        ("aii,aij->aj", "stands twice"),
        ("abij,acij->aibcj", "reshapes and permutes beside the product"),
    ],
)
def test_what_stays(equation: str, reason: str) -> None:
    check_pass(
        ReplaceEinsum(), Einsum(equation), operands(equation, i=3), rewrites=0, misses=[reason]
    )


def test_broadcasting() -> None:
    a, b = torch.randn(1, 4, 5), torch.randn(3, 5, 2)
    check_pass(ReplaceEinsum(), Einsum("aij,ajk->aik"), (a, b), rewrites=1, after={"matmul": 1})
    check_pass(ReplaceEinsum(), Einsum("...ij,...jk->...ik"), (a, b), rewrites=1)
    check_pass(
        ReplaceEinsum(), Einsum("aij,ajk->ik"), (a, b),
        rewrites=0, misses=["may broadcast along the summed dimension 'a'"],
    )  # fmt: skip


def test_scores_are_what_an_attention_looks_for() -> None:
    graph, _ = check_pass(
        ReplaceEinsum(), Einsum("abic,abjc->abij"), operands("abic,abjc->abij"), rewrites=1
    )
    (product,) = graph.find(torch.ops.aten.matmul.default)
    assert product.args[0].name == "sin"
    assert product.args[1].target is torch.ops.aten.permute.default
    assert product.args[1].args[1] == [0, 1, 3, 2]


def test_symbolic_sizes() -> None:
    model, inputs = Einsum("abic,abjc->abij"), operands("abic,abjc->abij")
    names = {"tensors": ({0: "n", 2: "t"}, {0: "n", 2: "s"})}
    graph, _ = check_pass(ReplaceEinsum(), model, inputs, rewrites=1, dynamic_shapes=names)
    a, b = torch.randn(5, 3, 7, 4).double(), torch.randn(5, 3, 2, 4).double()
    assert relative_error(graph(a, b), model(a, b)) < 1e-12
    flat = Einsum("abic,dic->abd")
    inputs = operands("abic,dic->abd")
    names = {"tensors": ({0: "n"}, None)}
    check_pass(ReplaceEinsum(), flat, inputs, rewrites=1, dynamic_shapes=names)
    check_pass(
        ReplaceEinsum(), flat, inputs, rewrites=0, misses=["several symbolic sizes"],
        dynamic_shapes={"tensors": ({0: "n", 1: "b"}, None)},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    class Converted(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
            a, b = (a * 9).to(dtype), (b * 9).to(dtype)
            return torch.einsum("aic,abc->aib", a, b), torch.einsum("aic->ac", a)

    inputs = operands("aic,abc->aib")
    check_pass(ReplaceEinsum(), Converted(), inputs, double=False, gradients=False, tolerance=1e-2)


def test_an_output_does_not_become_the_input() -> None:
    class Same(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.einsum("ab->ab", x)

    x = torch.randn(2, 3)
    graph = capture(Same(), x)
    ReplaceEinsum().run(graph)
    graph(x)  # einsum itself returns a view of its operand
    assert op_counts(graph).get("einsum", 0) in (0, 1)


@pytest.mark.parametrize("seed", range(8))
def test_equations_drawn_by_chance(seed: int) -> None:
    rng = random.Random(seed)
    terms = ["".join(rng.sample("abcdi", rng.randint(1, 4))) for _ in range(rng.choice((2, 2, 3)))]
    used = sorted(set("".join(terms)))
    equation = ",".join(terms) + "->" + "".join(rng.sample(used, rng.randint(0, len(used))))
    inputs = operands(equation)
    graph = capture(Einsum(equation), inputs)
    ReplaceEinsum().run(graph)
    dialect.check(graph)
    assert relative_error(graph(*inputs), Einsum(equation)(*inputs)) < 1e-5, equation
