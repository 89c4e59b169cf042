"""What torch.compile says about the inputs of a graph: weights, sizes, numbers, open sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def is_weight(node: fx.Node, value: Any) -> bool:
    """Whether an input is a tensor that a module holds, and whose changes can be noticed."""
    source = getattr(node, "_dynamo_source", None)
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or source is None:
        return False
    kind = source.guard_source
    of_module = kind.is_specialized_nn_module() or kind.is_unspecialized_nn_module()
    return of_module and value.layout is torch.strided and not value.is_inference()


def is_number(node: fx.Node) -> bool:
    """Whether an input is a Python float that torch.compile wraps in a tensor."""
    value = node.meta.get("example_value")
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and bool(node.users)
        and all(user.op == "call_method" and user.target == "item" for user in node.users)
    )


def sizes_of(nodes: Sequence[fx.Node]) -> dict[int, tuple[fx.Node, int]]:
    """Return which placeholders are sizes of tensors: by position, the tensor and dimension."""
    places: dict[Any, tuple[fx.Node, int]] = {}
    for node in nodes:
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            size: Any
            for axis, size in enumerate(value.shape):
                if _is_open(size):
                    places.setdefault(size.node.expr, (node, axis))
    found = {}
    for index, node in enumerate(nodes):
        value = node.meta.get("example_value")
        if isinstance(value, torch.SymInt) and value.node.expr in places:
            found[index] = places[value.node.expr]
    return found


def dynamic_dimensions(node: fx.Node) -> Any:
    """Return what fxopt.compile takes for a placeholder; None where nothing is dynamic."""
    value = node.meta.get("example_value")
    if _is_open(value):
        return torch.export.Dim.DYNAMIC
    if not isinstance(value, torch.Tensor):
        return None
    shape: Any = value.shape
    sizes = {axis: size for axis, size in enumerate(shape) if _is_open(size)}
    return {axis: _name(size.node.expr) for axis, size in sizes.items()} or None


def _is_open(size: Any) -> bool:
    """Whether a size may differ between calls; some that were open torch.compile fixed later."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _name(expression: Any) -> Any:
    return str(expression) if expression.is_Symbol else torch.export.Dim.DYNAMIC


def example_of(value: Any) -> Any:
    """Return the example's number for a symbolic one; anything else as it is."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value
