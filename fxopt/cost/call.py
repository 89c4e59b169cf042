"""A call as formulas see it: its arguments by name, and shapes of integers or of expressions."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

Size: TypeAlias = Any  # an int, or a sympy expression in the symbolic sizes


@functools.lru_cache(maxsize=None)
def _schema_name(target: OpOverload) -> str:
    space, name = target._schema.name.split("::")
    return str(name) if space == "aten" else f"{space}::{name}"


@functools.lru_cache(maxsize=None)
def _places(target: OpOverload) -> dict[str, tuple[int, Any]]:
    """Return, for each argument, its position and its default."""
    arguments = enumerate(target._schema.arguments)
    return {argument.name: (at, argument.default_value) for at, argument in arguments}


def operator_name(target: Any) -> str:
    """Return an operator's name without its overload: `conv2d`, `torchvision::nms`, `getitem`."""
    if isinstance(target, OpOverload):
        return _schema_name(target)
    return str(getattr(target, "__name__", target))


def size_of(size: Any, *, symbolic: bool) -> Size:
    """Return a size as an int (a symbolic one counts as its example), or as an expression.

    A size that depends on the data has no example, and counts as 1.
    """
    if isinstance(size, int):
        return size
    if symbolic:
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return int(size.node.hint) if size.node.has_hint() else 1


class Call:
    """One call node (or the record of one), with sizes read in one of two ways.

    A formula is written once, over `Size`: with `symbolic=False` every size is an int, with
    `symbolic=True` it is a sympy expression wherever the graph's size is symbolic.
    """

    def __init__(self, node: fx.Node | Any, *, symbolic: bool = False) -> None:
        self.node = node
        self.target = node.target
        self.name = operator_name(node.target)
        self.symbolic = symbolic

    def __getitem__(self, name: str) -> Any:
        """Return the argument called `name` in the operator's schema; None where it has none."""
        at, default = _places(self.target).get(name, (-1, None))
        if 0 <= at < len(self.node.args):
            return self.node.args[at]
        return self.node.kwargs.get(name, default)

    def size(self, size: Any) -> Size:
        """Read one size; a node that computes a size is read from its value."""
        if isinstance(size, fx.Node):
            size = size.meta["val"]
        return size_of(size, symbolic=self.symbolic)

    def sizes(self, tensor: Any) -> tuple[Size, ...]:
        """Return the shape of a node's value, or of a fake tensor."""
        value = tensor.meta["val"] if isinstance(tensor, fx.Node) else tensor
        symbolic = self.symbolic
        return tuple(
            size if type(size) is int else size_of(size, symbolic=symbolic) for size in value.shape
        )

    def shape(self, name: str) -> tuple[Size, ...]:
        """Return the shape of the tensor argument called `name`."""
        return self.sizes(self[name])

    def elements(self, name: str) -> Size:
        """Return the number of elements of the tensor argument called `name`."""
        return math.prod(self.shape(name))

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The fake tensors that the call returns."""
        return list(tensors_in(self.node.meta.get("val")))

    @property
    def out_shape(self) -> tuple[Size, ...]:
        """The shape of the first tensor that the call returns; `()` where it returns none."""
        outputs = self.outputs
        return self.sizes(outputs[0]) if outputs else ()

    @property
    def out_elements(self) -> Size:
        """The number of elements of the first tensor that the call returns."""
        return math.prod(self.out_shape) if self.outputs else 0

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes among the arguments, each once."""
        found: dict[fx.Node, None] = {}
        fx.map_arg((self.node.args, dict(self.node.kwargs)), found.setdefault)
        return list(found)

    @property
    def first(self) -> tuple[Size, ...]:
        """The shape of the first tensor among the arguments."""
        for node in self.inputs:
            for tensor in tensors_in(node.meta.get("val")):
                return self.sizes(tensor)
        return ()

    @property
    def first_elements(self) -> Size:
        """The number of elements of the first tensor among the arguments."""
        return math.prod(self.first)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a node's value: one, or those of a list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def log2(size: Size) -> Size:
    """Return ⌈log₂ size⌉, the number of halvings that take `size` to 1."""
    if isinstance(size, int):
        return max(size - 1, 0).bit_length()
    return sympy.ceiling(sympy.log(size, 2))


def largest(a: Size, b: Size) -> Size:
    """Return the larger of two sizes."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Max(a, b)


def smallest(a: Size, b: Size) -> Size:
    """Return the smaller of two sizes."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Min(a, b)


def common_divisor(a: Size, b: Size) -> Size:
    """Return the greatest common divisor of two sizes."""
    if isinstance(a, int) and isinstance(b, int):
        return math.gcd(a, b)
    return GreatestCommonDivisor(a, b)


class GreatestCommonDivisor(sympy.Function):  # type: ignore[misc]
    """The greatest common divisor of two symbolic integers (sympy's own is of polynomials)."""

    is_integer = True
    is_positive = True

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        """Compute it where that is possible."""
        if a == 1 or b == 1:
            return sympy.Integer(1)
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(math.gcd(int(a), int(b)))
        return None
