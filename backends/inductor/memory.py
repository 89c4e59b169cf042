"""Which outputs may lie in the memory of a constant, and must be copied before they are given out.

Or in that of a state, which to the graph is a constant that it writes to: an output that shows the
state as it was before a call must not follow the next one, nor a caller's writes change the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

aten = torch.ops.aten
# they return their input where there is nothing to do, and their schema does not say so
_MAYBE_VIEWS = {
    aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.to.device,
    aten.to.dtype_layout, aten._to_copy.default, aten.flatten.using_ints, aten.clone.default,
    aten.dropout.default, aten.cat.default,
}  # fmt: skip


def lies_in_constants(node: fx.Node) -> bool:
    """Whether an output may be a constant, a view of one, or follow from constants alone."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    return not _follows_from_inputs(node) or _is_view_of_constant(node)


def _follows_from_inputs(node: fx.Node) -> bool:
    """Whether values (not only sizes) of the graph's inputs reach a node."""
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one in seen or one.target is aten.sym_size.int:
            continue
        seen.add(one)
        if one.op == "placeholder":
            return True
        pending += one.all_input_nodes
    return False


def _is_view_of_constant(node: fx.Node) -> bool:
    """Whether views lead from a constant to a node."""
    pending: list[Any] = [node]
    seen: set[fx.Node] = set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        if one.op == "get_attr":
            return True
        if one.op == "call_function" and _may_be_view(one.target):
            pending += one.all_input_nodes
    return False


def _may_be_view(target: Any) -> bool:
    if not isinstance(target, OpOverload):
        return True  # taking an item of a list, or control flow
    return target in _MAYBE_VIEWS or any(r.alias_info is not None for r in target._schema.returns)
