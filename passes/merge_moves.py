"""Merge chains of reshapes and permutes into one of each, or into nothing.

Before                                   After
    a = reshape(x, [8, 8, 7, 7, c])          d = reshape(x, [8, 8, 7, 7, c])
    b = permute(a, [0, 2, 1, 3, 4])          e = permute(d, [2, 0, 3, 1, 4])
    c = reshape(b, [8, 7, 8, 7, c])
    d = permute(c, [1, 3, 0, 2, 4])
    e = reshape(d, [7, 8, 7, 8, c])

A chain of reshapes and permutes cuts the dimensions of x into atoms, and puts those into another
order. Where every reshape of a chain cuts or joins whole atoms, all that counts is the last order:
    x  →  reshape to blocks of atoms  →  permute  →  reshape to the result's shape,
and either reshape goes where the blocks are the dimensions that x, or the result, has anyway.
Flatten, unflatten, squeeze, unsqueeze, view_as, reshape_as, and a selection from a dimension of
size 1, are reshapes; one that is left over is written `reshape`.

Left alone: a chain whose reshapes cut across its atoms ([8, 7] as [7, 8] after a permute); values
inside a chain that others use, where nothing would be saved; shapes with several symbolic sizes,
which one −1 cannot spell; empty tensors; a single view (flatten stays flatten).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, takewhile
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rules import Value, apply_rules, rule
from fxopt.shapes import is_one, same_shape, shape_of

aten = torch.ops.aten

_RESHAPES = {
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dims,
    aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
}  # fmt: skip
_PERMUTE = aten.permute.default


# -- what a chain does -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """The atoms of a tensor, and how they are grouped to the dimensions of a result.

    `sizes` are the atoms in the order of the source, none of size 1; each dimension of the result
    is a group of them, the empty group where its size is 1.
    """

    sizes: tuple[Any, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def sequence(self) -> tuple[int, ...]:
        """All atoms in the order of the result."""
        return tuple(chain(*self.groups))


def _start(shape: Sequence[Any]) -> _Order:
    dims = [dim for dim, size in enumerate(shape) if not is_one(size)]
    groups: list[tuple[int, ...]] = [()] * len(shape)
    for atom, dim in enumerate(dims):
        groups[dim] = (atom,)
    return _Order(tuple(shape[dim] for dim in dims), tuple(groups))


def _permuted(order: _Order, dims: Sequence[int]) -> _Order:
    return _Order(order.sizes, tuple(order.groups[dim] for dim in dims))


def _reshaped(order: _Order, shape: Sequence[Any]) -> _Order | None:
    """Group the atoms to another shape, cutting them where needed; None where it cuts across."""
    left = [[(atom, order.sizes[atom])] for atom in order.sequence]  # the pieces of each atom
    place, groups = 0, []
    for wanted in shape:
        group: list[tuple[int, int]] = []
        while not is_one(wanted):
            if place == len(left):
                return None
            atom, size = left[place][-1]
            rest = _quotient(wanted, size)
            if rest is None:
                inner = _quotient(size, wanted)
                if inner is None:
                    return None
                left[place][-1:] = [(atom, wanted), (atom, inner)]
                group.append((place, len(left[place]) - 2))
                break
            group.append((place, len(left[place]) - 1))
            place, wanted = place + 1, rest
        groups.append(group)
    return _renumbered(left, groups) if place == len(left) else None


def _renumbered(left: list[list[tuple[int, Any]]], groups: list[list[tuple[int, int]]]) -> _Order:
    """Number the pieces of atoms in the order of the source, as atoms of their own."""
    pieces = [(atom, place, n) for place, row in enumerate(left) for n, (atom, _) in enumerate(row)]
    number = {(place, n): index for index, (_, place, n) in enumerate(sorted(pieces))}
    sizes = [left[place][n][1] for _, place, n in sorted(pieces)]
    return _Order(tuple(sizes), tuple(tuple(number[piece] for piece in g) for g in groups))


def _quotient(a: Any, b: Any) -> Any:
    """Return a / b where it is known to be whole; None where not."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if isinstance(a, int):
        return None
    if isinstance(b, int):
        found = a // b
        return found if same_shape([found * b], [a]) else None
    ratio = a.node.expr / b.node.expr
    return int(ratio) if ratio.is_Integer else None


# -- how it is written -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """reshape to `before`, permute by `dims`, reshape to `after`; None leaves out a step."""

    before: tuple[Any, ...] | None
    dims: tuple[int, ...] | None
    after: tuple[Any, ...] | None

    @property
    def steps(self) -> int:
        return sum(step is not None for step in (self.before, self.dims, self.after))


def _plans(order: _Order, source: Sequence[Any], result: Sequence[Any]) -> Iterator[_Plan]:
    """Yield the ways to write a chain: along the result's dimensions, the source's, or blocks."""
    if list(order.sequence) == sorted(order.sequence):
        yield _Plan(None, None, None if same_shape(source, result) else tuple(result))
        return
    for units in (_result_units(order), _source_units(order, source), _blocks(order)):
        if units is None:
            continue
        first = sorted(units)  # the units in the source's order; those of size 1 lie between
        before = [_product(order.sizes[atom] for atom in unit[1]) for unit in first]
        dims = tuple(first.index(unit) for unit in units)
        after = [before[dim] for dim in dims]
        yield _Plan(
            None if same_shape(before, source) else tuple(before),
            dims,
            None if same_shape(after, result) else tuple(result),
        )


def _joined(order: _Order) -> _Order:
    """Join the atoms that stay together: how they were cut before does not matter any more."""
    blocks = [atoms for _, atoms in _blocks(order)]
    number = {block: n for n, block in enumerate(sorted(blocks))}
    sizes = [_product(order.sizes[atom] for atom in block) for block in sorted(blocks)]
    return _Order(tuple(sizes), tuple((number[block],) for block in blocks))


# A unit is what a permute moves: (its place in the source, its atoms). A place is an atom's number,
# or for a dimension of size 1, which has none, the number after which it stands.
_Unit = tuple[tuple[float, int], tuple[int, ...]]


def _result_units(order: _Order) -> list[_Unit] | None:
    """Return the dimensions of the result as units, where each is a run of the source's atoms."""
    if not all(b == a + 1 for group in order.groups for a, b in pairwise(group)):
        return None
    units: list[_Unit] = []
    last = -1.0
    for index, group in enumerate(order.groups):
        last = group[-1] if group else last
        units.append(((group[0], 0) if group else (last + 0.5, index), group))
    return units


def _source_units(order: _Order, source: Sequence[Any]) -> list[_Unit] | None:
    """Return the dimensions of the source as units, where each is a run in the result."""
    place = {atom: n for n, atom in enumerate(order.sequence)}
    atom, last, units = 0, -1.0, []
    for index, size in enumerate(source):
        group: tuple[int, ...] = ()
        while not is_one(size):
            size = _quotient(size, order.sizes[atom])
            if size is None or group and place[atom] != place[group[-1]] + 1:
                return None
            group, atom = (*group, atom), atom + 1
        last = group[-1] if group else last
        units.append(((group[0], 0) if group else (last + 0.5, index), group))
    ones = [unit for unit in units if not unit[1]]
    full = sorted((unit for unit in units if unit[1]), key=lambda unit: place[unit[1][0]])
    arranged: list[_Unit] = []
    for group in order.groups:  # a size of 1 goes where the result has one
        if not group and ones:
            arranged.append(ones.pop(0))
        while full and group and place[full[0][1][0]] <= place[group[-1]]:
            arranged.append(full.pop(0))
    return [*arranged, *ones]


def _blocks(order: _Order) -> list[_Unit]:
    """Return the longest runs of atoms that stay together as units."""
    runs: list[list[int]] = []
    for atom in order.sequence:
        if runs and atom == runs[-1][-1] + 1:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return [((run[0], 0), tuple(run)) for run in runs]


def _product(sizes: Any) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


# -- the rule --------------------------------------------------------------------------------------


@rule(
    lambda y, size: y.reshape(size),
    lambda y, first, last: torch.flatten(y, first, last),
    lambda y, dim, sizes: aten.unflatten.int(y, dim, sizes),
    lambda y, dims: aten.squeeze.dims(y, dims),
    lambda y, dim: y.unsqueeze(dim),
    lambda y, other: aten.view_as(y, other),
    lambda y, other: aten.reshape_as(y, other),
    lambda y, dim, i: torch.select(y, dim, i),
    lambda y, dims: y.permute(dims),
)
def merge_moves(y: Value, match: Match) -> Any:
    """A chain of reshapes and permutes is reshape · permute · reshape, or less."""
    if not _is_move(match.root):
        return None
    moves = _chain(match.root)
    alone = sum(1 for _ in takewhile(lambda node: len(node.users) == 1, moves[1:])) + 1
    chains = [found for found in (_planned(moves), _planned(moves[:alone])) if found]
    respelled = match.root.target in _RESPELLED
    shorter = [c for c in chains if c.plan.steps < min(c.length, alone) + respelled]
    if not shorter:
        longer = [c for c in chains if c.plan.steps < c.length]
        return f"{moves[alone].name} is used elsewhere too" if longer else None
    best = min(shorter, key=lambda c: c.plan.steps - min(c.length, alone))
    steps = (best.plan.before, best.plan.after)
    if any(step is not None and _spelled(step) is None for step in steps):
        return "its shape has several symbolic sizes"
    while y.node is not best.source:
        y = y.args[0]
    return _write(best.plan, y)


# What becomes a reshape also by itself: these keep another tensor alive, or look like more.
_RESPELLED = (aten.view_as.default, aten.reshape_as.default, aten.select.int)
_LONGEST = 16  # moves of a chain that are looked at together


def _chain(root: fx.Node) -> list[fx.Node]:
    """Return the moves from `root` upwards."""
    moves = [root]
    while len(moves) < _LONGEST and _is_move(moves[-1].args[0]):
        moves.append(moves[-1].args[0])  # type: ignore[arg-type]
    return moves


def _is_move(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.select.int:  # of the only index there is
        return is_one(shape_of(node.args[0])[node.args[1]])  # type: ignore[index]
    return node.target in _RESHAPES or node.target is _PERMUTE


@dataclass(frozen=True)
class _Chain:
    """The last so many moves before a result, from their source, and how else to write them."""

    source: fx.Node
    length: int
    plan: _Plan


def _planned(moves: Sequence[fx.Node]) -> _Chain | None:
    """Plan the longest chain that ends at the first of `moves`; None where that cuts across."""
    source: Any = moves[-1].args[0]
    length, order = len(moves), _start(shape_of(source))
    for left, move in zip(range(len(moves), 0, -1), reversed(moves), strict=True):
        new = _moved(order, move)
        if new is None:  # only reshapes right before this one still count: they go anyway
            above = takewhile(lambda node: node.target in _RESHAPES, moves[left:])
            length = left + sum(1 for _ in above)
            source = moves[length - 1].args[0]
            new = _moved(_start(shape_of(source)), move)
        if new is None:
            return None
        order = new
    plans = _plans(order, shape_of(source), shape_of(moves[0]))
    return _Chain(source, length, min(plans, key=lambda plan: plan.steps))


def _moved(order: _Order, move: fx.Node) -> _Order | None:
    if move.target is _PERMUTE:
        return _permuted(order, move.args[1])  # type: ignore[arg-type]
    shape = shape_of(move)
    return _reshaped(order, shape) or _reshaped(_joined(order), shape)


def _spelled(shape: Sequence[Any]) -> list[int] | None:
    """Return a shape with its symbolic size as −1; None where there are several."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return None if sizes.count(-1) > 1 or -1 in sizes and 0 in sizes else sizes


def _write(plan: _Plan, x: Value) -> Value:
    if plan.before is not None:
        x = x.reshape(_spelled(plan.before))
    if plan.dims is not None:
        x = x.permute(list(plan.dims))
    return x if plan.after is None else x.reshape(_spelled(plan.after))


@dataclass(frozen=True)
class MergeMoves:
    """Write each chain of reshapes and permutes as reshape, permute, reshape, or less."""

    name: ClassVar[str] = "merge-moves"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Merge until no chain can be shorter."""
        return apply_rules(graph, (merge_moves,))
