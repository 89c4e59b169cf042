"""Symbolic sizes as text: written for a file, and read by a small parser of our own.

The grammar is what sympy prints for torch's expressions:

    sum     = product (("+" | "-") product)*
    product = factor (("*" | "/" | "//" | "%") factor)*
    factor  = ("-" | "+") factor | atom ["**" factor]
    atom    = number | symbol | function "(" sum ("," sum)* ")" | "(" sum ")"

Functions come from one list, symbols from the caller. A text comes from a file that anybody may
have written, so its length, depth, numbers and exponents are limited, and nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import sympy
from sympy.printing.str import StrPrinter
from torch.utils._sympy import functions

from fxopt.errors import ArtefactError

MAX_CHARACTERS = 20_000
MAX_TOKENS = 1_000
MAX_DEPTH = 60
MAX_INTEGER = 2**63
MAX_EXPONENT = 64

# Name in the text: the function, its number of arguments (None: one or more).
_FUNCTIONS: dict[str, tuple[Any, int | None]] = {
    "FloorDiv": (functions.FloorDiv, 2),
    "CleanDiv": (functions.FloorDiv, 2),  # the same value; it prints as a floor division, too
    "CeilDiv": (functions.CeilDiv, 2),
    "Mod": (functions.Mod, 2),
    "PythonMod": (functions.PythonMod, 2),
    "ModularIndexing": (functions.ModularIndexing, 3),
    "IntTrueDiv": (functions.IntTrueDiv, 2),
    "FloatTrueDiv": (functions.FloatTrueDiv, 2),
    "PowByNatural": (functions.PowByNatural, 2),
    "FloatPow": (functions.FloatPow, 2),
    "LShift": (functions.LShift, 2),
    "RShift": (functions.RShift, 2),
    "ToFloat": (functions.ToFloat, 1),
    "TruncToInt": (functions.TruncToInt, 1),
    "TruncToFloat": (functions.TruncToFloat, 1),
    "FloorToInt": (functions.FloorToInt, 1),
    "CeilToInt": (functions.CeilToInt, 1),
    "RoundToInt": (functions.RoundToInt, 1),
    "RoundDecimal": (functions.RoundDecimal, 2),
    "Max": (functions.Max, None),
    "Min": (functions.Min, None),
}
_POWERS = {"PowByNatural", "FloatPow", "LShift", "RShift"}

_TOKEN = re.compile(
    r"\s*(?:(?P<float>\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+)|(?P<int>\d+)"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<mark>\*\*|//|[-+*/%(),]))",
    re.ASCII,
)


class _Token(NamedTuple):
    kind: str
    text: str


class _Printer(StrPrinter):  # type: ignore[misc]
    """Sympy's own text, with floats in full."""

    def _print_Float(self, expr: sympy.Float) -> str:
        return repr(float(expr))


def write(expression: sympy.Expr | int) -> str:
    """Return an expression as text that `parse` reads; raise ArtefactError for any other."""
    plain = sympy.sympify(expression).replace(functions.Identity, lambda inner: inner)
    text = str(_Printer().doprint(plain))
    symbols = {str(symbol): symbol for symbol in plain.free_symbols}
    read = parse(text, symbols)  # sympy may multiply out what it reads
    if _Printer().doprint(read) != text and sympy.expand(read - plain) != 0:
        raise ArtefactError(
            f"The symbolic size {text} cannot be saved. Compile again with that dimension fixed."
        )
    return text


def parse(text: str, symbols: Mapping[str, sympy.Symbol]) -> sympy.Expr:
    """Return the expression that a text stands for; raise ArtefactError for all else.

    `symbols` are the only names it may use, apart from the known functions.
    """
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        raise _refused(text, "it is not a short text")
    try:
        parser = _Parser(text, symbols)
        result = parser.sum(0)
        if parser.token is not None:
            raise _refused(text, f"'{parser.token.text}' was not expected")
    except ArtefactError:
        raise
    except Exception as error:  # sympy says in many ways that it does not like an expression
        raise _refused(text, str(error) or type(error).__name__) from error
    return result


def _refused(text: Any, reason: str) -> ArtefactError:
    shown = str(text)[:80]
    return ArtefactError(
        f"'{shown}' is not a symbolic size: {reason}. The file is damaged or not fxopt's; get it "
        "again, or save the model again."
    )


def _tokens(text: str) -> list[_Token]:
    found = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise _refused(text, f"'{text[position : position + 10]}' cannot be read")
        found.append(_Token(str(match.lastgroup), str(match.group(str(match.lastgroup)))))
        position = match.end()
        if len(found) > MAX_TOKENS:
            raise _refused(text, f"it has more than {MAX_TOKENS} parts")
    return found


class _Parser:
    """Recursive descent over the tokens; one method per rule of the grammar."""

    def __init__(self, text: str, symbols: Mapping[str, sympy.Symbol]) -> None:
        self._text = text
        self._symbols = symbols
        self._tokens = iter(_tokens(text))
        self.token: _Token | None = None
        self._advance()

    def sum(self, depth: int) -> sympy.Expr:
        """Read a sum."""
        if depth > MAX_DEPTH:
            raise _refused(self._text, f"it is nested deeper than {MAX_DEPTH}")
        total = self._product(depth)
        while self._at("+", "-"):
            minus = self._take() == "-"
            term = self._product(depth)
            total = total - term if minus else total + term
        return self._checked(total)

    def _product(self, depth: int) -> sympy.Expr:
        total = self._factor(depth)
        while self._at("*", "/", "//", "%"):
            mark = self._take()
            factor = self._factor(depth)
            if mark != "*" and factor.is_zero:
                raise _refused(self._text, "it divides by zero")
            if mark == "*":
                total = total * factor
            elif mark == "/":
                total = total / factor
            else:
                total = (functions.FloorDiv if mark == "//" else functions.Mod)(total, factor)
        return self._checked(total)

    def _factor(self, depth: int) -> sympy.Expr:
        if depth > MAX_DEPTH:
            raise _refused(self._text, f"it is nested deeper than {MAX_DEPTH}")
        if self._at("-", "+"):
            minus = self._take() == "-"
            value = self._factor(depth + 1)
            return -value if minus else value
        base = self._atom(depth + 1)
        if self._at("**"):
            self._take()
            exponent = self._factor(depth + 1)
            self._check_exponent(exponent)
            return self._checked(base**exponent)
        return base

    def _atom(self, depth: int) -> sympy.Expr:
        token = self.token
        if token is None:
            raise _refused(self._text, "it ends too early")
        if token.kind == "int":
            if len(token.text) > 20:
                raise _refused(self._text, "a number is too large")
            return self._checked(sympy.Integer(self._take()))
        if token.kind == "float":
            return sympy.Float(float(self._take()))
        if token.kind == "name":
            name = self._take()
            if self._at("("):
                return self._call(name, depth)
            if name not in self._symbols:
                raise _refused(self._text, f"there is no symbol '{name}'")
            return self._symbols[name]
        self._expect("(")
        value = self.sum(depth + 1)
        self._expect(")")
        return value

    def _call(self, name: str, depth: int) -> sympy.Expr:
        if name not in _FUNCTIONS:
            raise _refused(self._text, f"there is no function '{name}'")
        function, count = _FUNCTIONS[name]
        self._expect("(")
        arguments = [self.sum(depth + 1)]
        while self._at(","):
            self._take()
            arguments.append(self.sum(depth + 1))
        self._expect(")")
        if count is not None and len(arguments) != count:
            raise _refused(self._text, f"{name} takes {count} arguments")
        if name in _POWERS:
            self._check_exponent(arguments[1], symbolic=True)
        return self._checked(function(*arguments))

    def _check_exponent(self, exponent: sympy.Expr, symbolic: bool = False) -> None:
        small = exponent.is_number and abs(exponent) <= MAX_EXPONENT
        if not (small or (symbolic and isinstance(exponent, sympy.Symbol))):
            raise _refused(self._text, "an exponent is too large")

    def _checked(self, value: sympy.Expr) -> sympy.Expr:
        if value.is_Integer and abs(value) > MAX_INTEGER:
            raise _refused(self._text, "a number is too large")
        if value.is_Pow and not (value.exp.is_number and abs(value.exp) <= MAX_EXPONENT):
            raise _refused(self._text, "an exponent is too large")
        if value.has(sympy.zoo, sympy.nan, sympy.oo, sympy.I):
            raise _refused(self._text, "it is not a finite number")
        return value

    def _at(self, *marks: str) -> bool:
        return self.token is not None and self.token.kind == "mark" and self.token.text in marks

    def _take(self) -> str:
        token = self.token
        assert token is not None
        self._advance()
        return token.text

    def _advance(self) -> None:
        self.token = next(self._tokens, None)

    def _expect(self, mark: str) -> None:
        if not self._at(mark):
            found = "the end" if self.token is None else f"'{self.token.text}'"
            raise _refused(self._text, f"'{mark}' was expected, not {found}")
        self._take()
