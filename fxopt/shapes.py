"""Fake tensors: the shape, dtype and device of every node, computed without running anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def describe(argument: Any) -> Any:
    """Return what stands for an argument of a node: its fake tensor, or the plain value."""
    if isinstance(argument, fx.Node):
        return argument.meta.get("val")
    return argument


def fake_of(tensor: torch.Tensor, mode: FakeTensorMode) -> Any:
    """Return the fake tensor of a real one, with static sizes."""
    is_special = tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    is_dense = tensor.layout is torch.strided
    if type(tensor) not in _PLAIN or not is_dense or is_special or tensor.storage_offset():
        return mode.from_tensor(tensor.detach(), static_shapes=True)
    # what the mode would make of it, without asking all that a tensor could be: a tenth of the time
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, meta, tensor.device)


def infer(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """Return the value of a call on fake tensors: what `node.meta["val"]` must be."""
    fake_args = fx.map_arg(args, describe)
    fake_kwargs = fx.map_arg(kwargs, describe)
    with torch.no_grad(), mode, enable_python_dispatcher():
        return target(*fake_args, **fake_kwargs)


def shape_of(node: Any) -> tuple[Any, ...]:
    """Return the shape of a node's value; entries may be symbolic."""
    return tuple(node.meta["val"].shape)


def dtype_of(node: Any) -> torch.dtype:
    """Return the dtype of a node's value."""
    dtype = node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def rank_of(node: Any) -> int:
    """Return the number of dimensions of a node's value."""
    return int(node.meta["val"].dim())


def is_tensor(node: Any) -> bool:
    """Whether a node's value is one tensor (not a list, nor a symbolic number)."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def is_one(size: Any) -> bool:
    """Whether a size is 1, whatever the symbols are; a symbolic size is not asked."""
    return isinstance(size, int) and size == 1


def is_static_shape(node: Any) -> bool:
    """Whether every size of a node's value is a plain integer."""
    return is_tensor(node) and all(isinstance(size, int) for size in node.meta["val"].shape)


def same_metadata(a: Any, b: Any) -> bool:
    """Whether two nodes are tensors of provably the same shape, dtype and device."""
    if not (is_tensor(a) and is_tensor(b)):
        return False
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.device == y.device and same_shape(x.shape, y.shape)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two shapes are provably equal; symbolic sizes must be the same expression."""
    return len(a) == len(b) and all(_same_size(p, q) for p, q in zip(a, b, strict=True))


def _same_size(p: Any, q: Any) -> bool:
    if isinstance(p, int) and isinstance(q, int):
        return p == q
    if isinstance(p, int) or isinstance(q, int):
        return False
    return bool(p.node.expr == q.node.expr)
