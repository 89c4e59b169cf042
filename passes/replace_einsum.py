"""Replace einsum by the matrix product, product or sum that it is.

Before                                       After
    s = einsum("bihd,bjhd->bhij", q, k)          q' = permute(q, [0, 2, 1, 3])
                                                 k' = permute(k, [0, 2, 3, 1])
                                                 s = matmul(q', k')

    y = einsum("...c,dc->...d", x, w)            y = matmul(x, permute(w, [1, 0]))
    z = einsum("bc,b->bc", x, y)                 z = x · unsqueeze(y, 1)
    m = einsum("bchw->bwh", x)                   m = permute(sum(x, [1]), [0, 2, 1])

Each letter of two operands is one of
    b  in both and in the result: a batch,           k  in both, not in the result: summed,
    m  in the first and the result: its rows,        n  in the second and the result: its columns,
and one in a single operand alone is summed first. Then the result is (b m k) × (b k n) = (b m n),
or, the operands changed about, (b n k) × (b k m) = (b n m). Several letters of one kind are joined
by a reshape. Without k the result is a product that broadcasts. More operands are multiplied
pairwise in the order of the path, or from the left: that is what einsum does itself.

Left alone: a letter that stands twice in one operand (a diagonal); a summed letter along which one
operand broadcasts; a product that would need more than three reshapes and permutes, which einsum
does inside; shapes with several symbolic sizes that would have to be joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rules import Value, apply_rules, rule
from fxopt.shapes import is_one, same_shape

aten = torch.ops.aten
_MOST_MOVES = 3

Letters = list[str]  # names of dimensions; those of an ellipsis are "…1", "…2" from the right


class _Unsuitable(Exception):
    """An einsum that this pass leaves alone; the message says why."""


@rule(lambda equation, tensors, path: aten.einsum(equation, tensors, path=path))
def replace_einsum(equation: str, tensors: list[Value], path: Any) -> Any:
    """einsum = sums of letters in one operand, then one product per pair of operands"""
    try:
        letters, result = _parse(equation, [tensor.ndim for tensor in tensors])
        operands = [_operand(*pair) for pair in zip(tensors, letters, strict=True)]
        for pair in _pairs(len(operands), path):
            a, b = (operands[i] for i in pair)
            operands = [one for i, one in enumerate(operands) if i not in pair]
            needed = {letter for one in operands for letter in one.letters} | {*result}
            operands.append(_contract(a, b, needed, [] if operands else result))
        return _arrange(_sum(operands[0], {*result}), result).make()
    except _Unsuitable as reason:
        return str(reason)


def _parse(equation: str, ranks: Sequence[int]) -> tuple[list[Letters], Letters]:
    """Return the letters of each operand's dimensions, and of the result's."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = []
    for term, rank in zip(left.split(","), ranks, strict=True):
        before, dots, after = term.partition("...")
        count = rank - len(before) - len(after) if dots else 0
        operands.append([*before, *(f"…{i}" for i in range(count, 0, -1)), *after])
    if any(len({*letters}) < len(letters) for letters in operands):
        raise _Unsuitable("a letter stands twice in one operand: that is a diagonal")
    every = [letter for letters in operands for letter in letters]
    dotted = sorted({letter for letter in every if len(letter) > 1}, key=_from_right)
    if not arrow:  # the letters that stand once, in alphabetical order
        return operands, [*dotted, *sorted(x for x in {*every} - {*dotted} if every.count(x) == 1)]
    before, dots, after = right.partition("...")
    return operands, [*before, *(dotted if dots else ()), *after]


def _operand(tensor: Value, letters: Letters) -> _Operand:
    return _Operand(lambda: tensor, letters, dict(zip(letters, tensor.shape, strict=True)))


def _from_right(letter: str) -> int:
    return -int(letter[1:])


def _pairs(count: int, path: Sequence[int] | None) -> list[tuple[int, int]]:
    """Return which two of the operands left are multiplied next; the product comes last."""
    if path is None:
        return [(0, 1)] * (count - 1)
    return list(zip(path[::2], path[1::2], strict=True))


# -- one pair --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Operand:
    """A tensor to be made, the letters of its dimensions, their sizes, and how many moves it takes.

    Nothing is built before it is known which of two ways to multiply is the shorter one.
    """

    make: Callable[[], Value]
    letters: Letters
    sizes: Mapping[str, Any]
    moves: int = 0

    def moved(self, move: Callable[[Value], Value], letters: Letters) -> _Operand:
        """The operand after a reshape or permute."""
        return _Operand(lambda: move(self.make()), letters, self.sizes, self.moves + 1)


def _contract(a: _Operand, b: _Operand, needed: set[str], result: Letters) -> _Operand:
    """Multiply two operands and sum over the letters that nothing needs any more.

    The product has its letters in the order of `result`, or in any order where that is empty.
    """
    a, b = _sum(a, needed | {*b.letters}), _sum(b, needed | {*a.letters})
    both = [letter for letter in a.letters if letter in b.letters]
    summed = [letter for letter in both if letter not in needed]
    for letter in both:
        sizes = a.sizes[letter], b.sizes[letter]
        one = any(map(is_one, sizes)) and letter not in summed
        if not one and not same_shape(sizes[:1], sizes[1:]):
            raise _Unsuitable(f"it may broadcast along the summed dimension '{letter}'")
    order = result or [*dict.fromkeys(a.letters + b.letters)]
    if not summed:
        best = _multiply(a, b, [letter for letter in order if letter in {*a.letters, *b.letters}])
    else:
        kinds = ({*both} - {*summed}, {*a.letters} - {*both}, {*b.letters} - {*both})
        batch, rows, columns = ([x for x in order if x in kind] for kind in kinds)
        best = _arrange(_matmul(a, b, batch, rows, columns, summed), result)
        if best.moves > a.moves + b.moves:
            swapped = _arrange(_matmul(b, a, batch, columns, rows, summed), result)
            best = min(best, swapped, key=lambda product: product.moves)
    if best.moves > _MOST_MOVES:
        raise _Unsuitable(f"it would take {best.moves} reshapes and permutes beside the product")
    return best


def _multiply(a: _Operand, b: _Operand, result: Letters) -> _Operand:
    """Multiply with broadcasting: each operand gets a size of 1 for each letter that it lacks."""
    x, y = _spread(a, result), _spread(b, result)
    return _product(lambda: x.make() * y.make(), result, x, y)


def _product(make: Callable[[], Value], letters: Letters, a: _Operand, b: _Operand) -> _Operand:
    sizes = {**a.sizes, **{x: n for x, n in b.sizes.items() if is_one(a.sizes.get(x, 1))}}
    return _Operand(make, letters, sizes, a.moves + b.moves)


def _matmul(
    a: _Operand, b: _Operand, batch: Letters, rows: Letters, columns: Letters, summed: Letters
) -> _Operand:
    """(batch rows summed) × (batch summed columns) = (batch rows columns)

    Without a batch, rows may be any number of dimensions (they broadcast), and columns none.
    """
    groups = [[letter] for letter in batch]
    left = [*groups, *([rows] if batch else [[row] for row in rows])]
    right = [columns] if batch or columns else []
    x = _join(_arrange(a, batch + rows + summed), [*left, summed])
    y = _join(_arrange(b, batch + summed + columns), [*groups, summed, *right])
    product = _product(lambda: x.make() @ y.make(), batch + rows + columns, x, y)
    return _part(product, [*left, *right])


# -- one operand -----------------------------------------------------------------------------------


def _sum(operand: _Operand, needed: set[str]) -> _Operand:
    """Sum over the letters that nothing needs."""
    dims = [dim for dim, letter in enumerate(operand.letters) if letter not in needed]
    if not dims:
        return operand
    letters = [letter for letter in operand.letters if letter in needed]
    return replace(operand, make=lambda: operand.make().sum(dims), letters=letters)


def _arrange(operand: _Operand, letters: Letters) -> _Operand:
    """Permute to another order of the letters; an empty one is any order."""
    if not letters or letters == operand.letters:
        return operand
    dims = [operand.letters.index(letter) for letter in letters]
    return operand.moved(lambda value: value.permute(dims), letters)


def _spread(operand: _Operand, letters: Letters) -> _Operand:
    """Permute to the order of these letters, with a size of 1 for each that is missing inside."""
    own = _arrange(operand, [letter for letter in letters if letter in operand.letters])
    first = min((letters.index(letter) for letter in own.letters), default=len(letters))
    missing = [place for place, x in enumerate(letters[first:]) if x not in own.letters]
    if not missing:
        return own

    def unsqueezed(value: Value) -> Value:
        for place in missing:
            value = value.unsqueeze(place)
        return value

    return replace(own.moved(unsqueezed, own.letters), moves=own.moves + len(missing))


def _join(operand: _Operand, groups: Sequence[Letters]) -> _Operand:
    """Join the dimensions of each group to one, which is of size 1 for a group without any."""
    if all(len(group) == 1 for group in groups):
        return operand
    if all(len(group) <= 1 for group in groups):
        return operand.moved(lambda value: value.unsqueeze(groups.index([])), operand.letters)
    shape = _spelled([math.prod(operand.sizes[x] for x in group) for group in groups])
    return operand.moved(lambda value: value.reshape(shape), operand.letters)


def _part(operand: _Operand, groups: Sequence[Letters]) -> _Operand:
    """Undo `_join`."""
    if all(len(group) == 1 for group in groups):
        return operand
    if all(len(group) <= 1 for group in groups):
        dims = [dim for dim, group in enumerate(groups) if not group]
        return operand.moved(lambda value: value.squeeze(dims), operand.letters)
    shape = _spelled([operand.sizes[letter] for letter in operand.letters])
    return operand.moved(lambda value: value.reshape(shape), operand.letters)


def _spelled(shape: Sequence[Any]) -> list[int]:
    """Return a shape with its symbolic size as −1; raise where there are several."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1 or -1 in sizes and 0 in sizes:
        raise _Unsuitable("its shape has several symbolic sizes")
    return sizes


@dataclass(frozen=True)
class ReplaceEinsum:
    """Write einsum as the sums, products and matrix products that it is."""

    name: ClassVar[str] = "replace-einsum"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Look at each einsum once."""
        return apply_rules(graph, (replace_einsum,))
