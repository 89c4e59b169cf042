"""Symbolic sizes: what torch makes is written and read back; anything else is refused, fast."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy import functions as F

from fxopt.errors import ArtefactError
from fxopt.expressions import parse, write
from tests.work import lines_run

n, m = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))
SYMBOLS = {"s0": n, "s1": m}

MADE_BY_TORCH = [
    sympy.Integer(7), n, -n, n + 1, 2 * n - m, n * m, n**2, (n + m) ** 3, n / 2, 1 / n,
    F.FloorDiv(n, 2) + 1, F.FloorDiv(F.FloorDiv(n - 1, 2) + m, 3) * 4, F.FloorDiv(n * m - 1, -2),
    F.Mod(n, 3), F.PythonMod(n - 5, 3), F.CeilDiv(n, 4), F.Max(n, 3, m), F.Min(2 * n, m),
    F.PowByNatural(n, m), F.IntTrueDiv(n, 3), F.TruncToInt(F.FloatTrueDiv(F.ToFloat(n), 0.3)),
    F.TruncToInt(1.3 * F.ToFloat(n)), F.RoundToInt((0.1 + 0.2) * F.ToFloat(n)),
    F.CeilToInt(F.ToFloat(n) * 1e-7), F.ModularIndexing(n, 2, m), 2 * F.Max(1, n - 3) ** 2,
]  # fmt: skip


@pytest.mark.parametrize("expression", MADE_BY_TORCH, ids=str)
def test_what_torch_makes_is_read_back(expression: sympy.Expr) -> None:
    assert parse(write(expression), SYMBOLS) == expression


def test_functions_that_print_as_others_keep_their_value() -> None:
    assert parse(write(F.CleanDiv(n * 6, m)), SYMBOLS) == F.FloorDiv(n * 6, m)
    assert parse(write(F.Identity(n) * 2 + 1), SYMBOLS) == 2 * n + 1


def test_what_sympy_multiplies_out_keeps_its_value() -> None:
    size = sympy.Mul(-1, n + 1, F.FloorDiv(n, 2), evaluate=False)
    assert sympy.expand(parse(write(size), SYMBOLS) - size) == 0


leaves = st.one_of(st.integers(-9, 99).map(sympy.Integer), st.sampled_from([n, m]))
sizes = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, st.integers(1, 9)).map(lambda pair: F.FloorDiv(*map(sympy.sympify, pair))),
        st.tuples(inner, inner).map(lambda pair: F.Max(*pair)),
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_any_size_has_the_same_value_after_a_round_trip(expression: sympy.Expr) -> None:
    values = {n: 12, m: 7}
    found = parse(write(expression), SYMBOLS)
    assert found.subs(values) == sympy.sympify(expression).subs(values)


REFUSED: list[Any] = [
    "__import__('os')", "os.system", "s0.__class__", "s0[0]", "eval(1)", "Function('f')(s0)",
    "lambda: 1", "s0 if 1 else 2", "s0 and 1", "s0 & 1", "s0 < 1", "s0 = 1", "'s0'", "s2", "S0",
    "", " ", "(", "s0)", "(s0", "s0 +", "* s0", "s0 s1", "Max()", "Max(s0,)", "FloorDiv(1)",
    "Mod(1, 2, 3)", "1.5.5", "0x10", "1_000", "٣", "²", "s0\x00", "I", "oo", "nan", "zoo", "pi",
    "s0 // 0", "s0 % 0", "s0 / 0", "FloorDiv(s0, 0)", "Mod(1, 0)", "0**-1", "(-1)**0.5", "1e999",
    "9**9**9", "s0**s1", "s0**65", "((s0**64)**64)**64", "LShift(1, 10**18)", "2**64 * 2**64",
    "PowByNatural(7, 10**15)", "9" * 5000, "(" * 5000, "-" * 3000 + "1", "1+" * 3000 + "1",
    "Max(" * 200 + "1" + ")" * 200, None, 7, ["s0"],
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: str(text)[:20])
def test_anything_else_is_refused_at_once(text: Any) -> None:
    def refused() -> None:
        with pytest.raises(ArtefactError, match="is not a symbolic size"):
            parse(text, SYMBOLS)

    assert lines_run(refused) < 100_000


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="s01 +-*/%(),.eMaxodFlrDiv_'[]{}:;=<>&|~^@!\n", max_size=40))
def test_random_text_is_a_size_or_refused(text: str) -> None:
    try:
        found = parse(text, SYMBOLS)
    except ArtefactError:
        return
    assert found.free_symbols <= {n, m}


def test_a_size_beyond_the_limits_is_refused_when_it_is_written() -> None:
    with pytest.raises(ArtefactError):
        write(sympy.Integer(2**80) * n)
    with pytest.raises(ArtefactError):
        write(sympy.sin(n))
