"""What is known of a tensor whatever the inputs are, and of each value of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from fxopt.shapes import dtype_of, rank_of


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a tensor: `values` where `known`. Both have the tensor's rank.

    A dimension of size 1 stands for one of any size along which all elements are alike.
    """

    values: torch.Tensor
    known: torch.Tensor
    whole: bool = False  # all of it is known, as of a constant: nobody has to look

    def along(self, dim: int) -> Known:
        """Return, for each index of a dimension, the one number that stands everywhere at it."""
        count = self.values.shape[dim]
        known = self.known.movedim(dim, 0).reshape(count, -1)
        values = self.values.movedim(dim, 0).reshape(count, -1)
        alike = (values == values[:, :1]).all(1)
        return Known(values[:, 0], known.all(1) & alike)

    @property
    def is_whole(self) -> bool:
        """Whether all of it is known."""
        return self.whole or bool(self.known.all())

    @property
    def is_zero(self) -> torch.Tensor:
        """Where the value is known to be 0."""
        return self.known & (self.values == 0)


Found = Known | None  # None: nothing is known
Evaluate = Callable[["Constancy", fx.Node], "Found | list[Found]"]
AnyEvaluate = TypeVar("AnyEvaluate", bound=Evaluate)
_EVALUATE: dict[Any, Evaluate] = {}


class Constancy:
    """What is known of each value of a graph, when its constants have these values.

    `constants` maps names to tensors; constants that it lacks, such as state, are unknown.
    """

    def __init__(self, nodes: Iterable[fx.Node], constants: dict[str, torch.Tensor]) -> None:
        self._constants = constants
        self._found: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in nodes:
                self._found[node] = self._visit(node)

    def of(self, node: Any) -> Found:
        """Return what is known of a tensor."""
        found = self._found.get(node)
        return found if isinstance(found, Known) else None

    def parts(self, node: Any) -> list[Found]:
        """Return what is known of each of several tensors; nothing where that is unknown."""
        found = self._found.get(node)
        return found if isinstance(found, list) else []

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            value = self._constants.get(str(node.target))
            if value is None or value.numel() == 0:
                return None
            value = value.detach()
            known = torch.ones((), dtype=torch.bool, device=value.device).expand_as(value)
            return Known(value, known, whole=True)
        if node.op != "call_function":
            return None
        evaluate = _EVALUATE.get(node.target)
        if evaluate is None and _is_elementwise(node.target):
            evaluate = _EVALUATE["elementwise"]
        found = None if evaluate is None else evaluate(self, node)
        return [_finite(one) for one in found] if isinstance(found, list) else _finite(found)


def _is_elementwise(target: Any) -> bool:
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _finite(found: Found) -> Found:
    """Keep what is a finite number; nothing where none is."""
    if found is None:
        return None
    known = found.known & torch.isfinite(found.values)
    return Known(found.values, known) if bool(known.any()) else None


def evaluates(*targets: Any) -> Callable[[AnyEvaluate], AnyEvaluate]:
    """Register what is known of the results of these operators."""

    def register(function: AnyEvaluate) -> AnyEvaluate:
        for target in targets:
            _EVALUATE[target] = function
        return function

    return register


def call(node: fx.Node, operands: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
    """Run a call on other tensors."""
    target: Any = node.target
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operands.__getitem__)
    result = target(*args, **kwargs)
    assert isinstance(result, torch.Tensor)
    return result


def with_zeros(node: fx.Node, found: Found, zero: torch.Tensor) -> Found:
    """Add to what is known of a result that it is 0 at some places."""
    if not bool(zero.any()):
        return found
    zero = zero.reshape((1,) * (rank_of(node) - zero.dim()) + tuple(zero.shape))
    if found is None:
        return Known(torch.zeros(zero.shape, dtype=dtype_of(node), device=zero.device), zero)
    values = torch.where(zero, torch.zeros_like(found.values), found.values)
    return Known(values, found.known | zero)
