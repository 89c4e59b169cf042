"""Bytes that a call moves: operands read once, results written once, views for nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.cost.call import Call, Size, size_of, tensors_in
from fxopt.cost.elementwise import CREATING
from fxopt.cost.formula import aliases

# Which of a table's rows are read is in the indices: as many as there are in the result.
_LOOKUPS = {
    "embedding", "index", "index_select", "gather", "take", "take_along_dim", "masked_select",
    "_unsafe_index",
}  # fmt: skip
# Whose schema does not say so: they are made of several operators, views all.
_ALWAYS_VIEWS = {"atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid"}
_VIEW_WHERE_STRIDES_ALLOW = {"reshape", "reshape_as", "flatten", "ravel", "contiguous", "to"}


def moved_bytes(call: Call) -> tuple[Size, Size]:
    """Return the bytes that a call reads and writes.

    An operator is one kernel here: attention reads q, k, v and the mask and writes its result, and
    a weight is read once. Elements that an expanded dimension repeats count once.
    """
    outputs = call.outputs
    if not outputs or is_view(call):
        return 0, 0
    written = sum(bytes_of(call, tensor) for tensor in outputs)
    if call.name in CREATING:
        return 0, written
    operands = [bytes_of_node(call, node) for node in call.inputs]
    if call.name in _LOOKUPS:
        return written + sum(operands[1:]), written
    if call.name == "embedding_bag":
        rows = math.prod([*call.shape("indices"), call.shape("weight")[-1]])
        return rows * outputs[0].element_size() + sum(operands[1:]), written
    if call.name == "copy_":
        return sum(operands[1:]), written
    return sum(operands), written


def bytes_of_node(call: Call, node: fx.Node) -> Size:
    """Return the bytes of a node's value; 0 for sizes and sub-graphs."""
    return sum(bytes_of(call, tensor) for tensor in tensors_in(node.meta.get("val")))


def bytes_of(call: Call, tensor: torch.Tensor) -> Size:
    """Return the bytes that a tensor's elements take, those of an expanded dimension once."""
    size = tensor.element_size()
    for length, stride in zip(call.sizes(tensor), tensor.stride(), strict=True):
        if not (type(stride) is int and stride == 0):
            size = size * length
    return size


def is_view(call: Call) -> bool:
    """Whether the result shares the memory of the first argument, so that nothing moves.

    For a reshape and its kin this depends on the strides: PyTorch is asked, with example sizes.
    """
    if not isinstance(call.target, OpOverload):
        return call.name == "getitem"
    if call.name.endswith("dropout"):
        return not call["train"]
    if call.name in _ALWAYS_VIEWS:
        return True
    if not aliases(call.target):
        return False
    if call.name not in _VIEW_WHERE_STRIDES_ALLOW:
        return True
    first: Any = call.node.args[0]
    source, result = first.meta["val"], call.outputs[0]
    if call.name == "to":
        same = source.dtype == result.dtype and source.device == result.device
        return same and not call["copy"] and _keeps_format(source, call["memory_format"])
    if call.name == "contiguous":
        return _keeps_format(source, call["memory_format"])
    return _can_view(source, result)


def _keeps_format(source: torch.Tensor, memory_format: Any) -> bool:
    if memory_format in (None, torch.preserve_format):
        return True
    if memory_format == 0:  # how a schema writes its default
        memory_format = torch.contiguous_format
    return bool(_like(source).is_contiguous(memory_format=memory_format))


def _can_view(source: torch.Tensor, result: torch.Tensor) -> bool:
    try:
        _like(source).view(_example(result.shape))
    except RuntimeError:
        return False
    return True


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without data, of the same layout at example sizes."""
    return torch.empty_strided(
        _example(tensor.shape), _example(tensor.stride()), dtype=tensor.dtype, device="meta"
    )


def _example(sizes: Any) -> list[int]:
    return [size_of(size, symbolic=False) for size in sizes]
