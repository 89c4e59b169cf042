"""The table of formulas: which function counts which operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from fxopt.cost.call import Call, Size, operator_name


class Work(NamedTuple):
    """What a call computes: multiply-accumulates, and operations that are no part of one."""

    macs: Size = 0
    operations: Size = 0

    @property
    def flops(self) -> Size:
        """Two for each multiply-accumulate, one for each other operation."""
        return 2 * self.macs + self.operations


Count = Callable[[Call], Work]


@dataclass(frozen=True)
class Formula:
    """How one kind of operator is counted; the docstring of `count` says it in words."""

    names: tuple[str, ...]
    count: Count

    @property
    def words(self) -> str:
        """The formula in words."""
        return " ".join((self.count.__doc__ or "").split())


FORMULAS: dict[str, Formula] = {}


def formula(*names: str) -> Callable[[Count], Count]:
    """Register how operators are counted, by name: `conv2d`, or `mylib::op` outside of ATen.

    The function takes a `Call` and returns its `Work`; its docstring is the formula in words. A
    later registration of a name replaces the earlier one.
    """

    def register(count: Count) -> Count:
        one = Formula(names, count)
        FORMULAS.update(dict.fromkeys(names, one))
        formula_of.cache_clear()
        return count

    return register


def nothing(call: Call) -> Work:
    """Nothing: it only moves or creates data."""
    return Work()


def pointwise(call: Call) -> Work:
    """One operation per output element."""
    return Work(0, call.out_elements)


def reduction(call: Call) -> Work:
    """One operation per input element."""
    return Work(0, call.first_elements)


_NOTHING = Formula((), nothing)
_POINTWISE = Formula((), pointwise)
_REDUCTION = Formula((), reduction)


@functools.lru_cache(maxsize=None)
def formula_of(target: Any) -> Formula | None:
    """Return the formula of an operator, or None where nobody knows one.

    What has none of its own is counted by what PyTorch says about it: a view does nothing, a
    pointwise operator is one operation per output element, a reduction one per input element.
    """
    named = FORMULAS.get(operator_name(target))
    if named is not None:
        return named
    if not isinstance(target, OpOverload):
        return _NOTHING if callable(target) else None  # arithmetic on sizes, and getitem
    if torch.Tag.view_copy in target.tags or aliases(target):
        return _NOTHING
    if not any("Tensor" in str(r.type) for r in target._schema.returns):
        return _NOTHING
    if torch.Tag.pointwise in target.tags:
        return _POINTWISE
    if torch.Tag.reduction in target.tags:
        return _REDUCTION
    return None


@functools.lru_cache(maxsize=None)
def aliases(target: Any) -> bool:
    """Whether an operator's result may share memory with its first argument, by its schema."""
    if not isinstance(target, OpOverload) or not target._schema.arguments:
        return False
    info = target._schema.arguments[0].alias_info
    return info is not None and not info.is_write and not target._schema.is_mutable


def work_of(call: Call) -> Work:
    """Return what a call computes; nothing where no formula is known."""
    found = formula_of(call.target)
    return found.count(call) if found is not None else Work()
