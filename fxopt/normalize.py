"""One spelling per operation: the canonical form in which every call stands in a graph.

`complete` writes every argument of a call (positional ones positionally, keyword-only ones by
name). `canonical` also replaces synonyms: `x.t()`, `x.transpose(0, 1)` and `x.permute(1, 0)` become
one `permute`, negative dimensions become positive, defaults that depend on shapes become explicit.
Capture and rule patterns both go through here, so a rule matches whatever the user wrote.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

aten = torch.ops.aten
INT_MAX = 9223372036854775807  # how ATen writes "to the end"


class Call(NamedTuple):
    """An operator with its arguments; tensors among them are nodes (or a pattern's symbols)."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class ShapeNeeded(Exception):
    """The canonical form depends on a shape that is not known here (in a pattern)."""


Describe = Callable[[Any], Any]  # from an argument to its fake tensor; None where unknown


@functools.lru_cache(maxsize=None)
def _arguments(target: OpOverload) -> tuple[tuple[tuple[str, Any, bool], ...], tuple[Any, ...]]:
    """Return ((name, default, has_default) of positional arguments, same of keyword-only ones)."""
    positional: list[tuple[str, Any, bool]] = []
    keyword: list[tuple[str, Any, bool]] = []
    for argument in target._schema.arguments:
        row = (argument.name, argument.default_value, argument.has_default_value())
        (keyword if argument.kwarg_only else positional).append(row)
    return tuple(positional), tuple(keyword)


@functools.lru_cache(maxsize=None)
def argument_index(target: OpOverload, name: str) -> int | None:
    """Return the position of a positional argument, or None where there is no such one."""
    names = [row[0] for row in _arguments(target)[0]]
    return names.index(name) if name in names else None


def complete(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Write out every argument of an ATen call; other callables are left as they are."""
    if not isinstance(target, OpOverload):
        return Call(target, tuple(args), dict(kwargs))
    positional, keyword = _arguments(target)
    full = list(args)
    for name, default, has_default in positional[len(args) :]:
        if name in kwargs:
            full.append(kwargs[name])
        elif has_default:
            full.append(default)
        else:
            raise TypeError(f"{target} needs an argument '{name}'.")
    named = {
        name: kwargs.get(name, default)
        for name, default, has_default in keyword
        if has_default or name in kwargs
    }
    return Call(target, tuple(full), named)


def canonical(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], describe: Describe
) -> Call:
    """Return the canonical spelling of a call.

    `describe(argument)` gives an argument's fake tensor, or None where it is not known; then
    ShapeNeeded is raised if the spelling depends on it. A call that only names its first argument
    (a squeeze of nothing) comes back with target None and that argument.
    """
    call = complete(target, args, kwargs)
    for _ in range(4):  # a synonym may lead to another; the longest chain has three
        call = _positive_dims(call, describe)
        spell = _SPELLINGS.get(call.target)
        if spell is None:
            return call
        spelled = spell(call, describe)
        if spelled.target is None:
            return spelled
        spelled = complete(*spelled)
        if spelled.target is call.target:
            return spelled
        call = spelled
    return call


def keep(argument: Any) -> Call:
    """The result of `canonical` for a call that returns its argument unchanged."""
    return Call(None, (argument,), {})


def node_name(target: Any) -> str:
    """Return the name that a node of this operator gets, before it is made unique."""
    if isinstance(target, OpOverload):
        return target._schema.name.split("::")[-1].strip("_")
    return str(getattr(target, "__name__", "call")).strip("_")


# -- helpers -----------------------------------------------------------------------------------


def _value(argument: Any, describe: Describe) -> Any:
    value = describe(argument)
    if value is None:
        raise ShapeNeeded
    return value


def _rank(argument: Any, describe: Describe) -> int:
    return int(_value(argument, describe).dim())


def is_static(size: Any) -> bool:
    """Whether a size is a plain integer (not symbolic)."""
    return isinstance(size, int)


def _wrap(dim: int, rank: int) -> int:
    return dim + max(rank, 1) if dim < 0 else dim


_RANK_PLUS_ONE = {aten.unsqueeze.default, aten.stack.default, aten.diag_embed.default}
_DIM_NAMES = ("dim", "dim0", "dim1", "dim2", "dims", "start_dim", "end_dim", "axis0", "axis1")


_DIM_KINDS = ("int", "Optional[int]", "List[int]", "Optional[List[int]]")


@functools.lru_cache(maxsize=None)
def _dim_positions(target: OpOverload) -> tuple[int, ...]:
    """Return the positions of the arguments that count dimensions of the first tensor."""
    if not isinstance(target, OpOverload) or not target._schema.arguments:
        return ()
    if "Tensor" not in str(target._schema.arguments[0].type):
        return ()
    names = [row[0] for row in _arguments(target)[0]]
    found = []
    for position, name in enumerate(names):
        kind = str(target._schema.arguments[position].type)
        if name in _DIM_NAMES and kind in _DIM_KINDS:
            found.append(position)
    return tuple(found)


def _positive_dims(call: Call, describe: Describe) -> Call:
    if not isinstance(call.target, OpOverload):
        return call
    positions = _dim_positions(call.target)
    args = list(call.args)
    for position in positions:
        value = args[position]
        negative = (
            isinstance(value, int) and value < 0
            or isinstance(value, (list, tuple))
            and any(isinstance(d, int) and d < 0 for d in value)
        )
        if not negative:
            continue
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        rank = _rank(first, describe) + (call.target in _RANK_PLUS_ONE)
        if isinstance(value, int):
            args[position] = _wrap(value, rank)
        else:
            args[position] = [_wrap(d, rank) for d in value]
    return Call(call.target, tuple(args), call.kwargs)


# -- the synonyms ------------------------------------------------------------------------------

Spell = Callable[[Call, Describe], Call]
_SPELLINGS: dict[Any, Spell] = {}


def _spells(*targets: Any) -> Callable[[Spell], Spell]:
    def register(spell: Spell) -> Spell:
        for target in targets:
            _SPELLINGS[target] = spell
        return spell

    return register


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


_SAME_ARGUMENTS = {
    "view": "reshape",
    "_unsafe_view": "reshape",
    "true_divide.Tensor": "div.Tensor",
    "divide.Tensor": "div.Tensor",
    "divide.Scalar": "div.Tensor",
    "divide.Tensor_mode": "div.Tensor_mode",
    "multiply.Tensor": "mul.Tensor",
    "multiply.Scalar": "mul.Tensor",
    "subtract.Tensor": "sub.Tensor",
    "mul.Scalar": "mul.Tensor",
    "div.Scalar": "div.Tensor",
    "absolute": "abs",
    "negative": "neg",
    "lift_fresh_copy": "clone",
    "lift_fresh": "clone",
    "concat": "cat",
    "concatenate": "cat",
    "unsafe_split.Tensor": "split.Tensor",
    "unsafe_split_with_sizes": "split_with_sizes",
    "split.sizes": "split_with_sizes",
    "unsafe_chunk": "chunk",
    "greater.Tensor": "gt.Tensor",
    "greater.Scalar": "gt.Scalar",
    "greater_equal.Tensor": "ge.Tensor",
    "greater_equal.Scalar": "ge.Scalar",
    "less.Tensor": "lt.Tensor",
    "less.Scalar": "lt.Scalar",
    "less_equal.Tensor": "le.Tensor",
    "less_equal.Scalar": "le.Scalar",
    "not_equal.Tensor": "ne.Tensor",
    "not_equal.Scalar": "ne.Scalar",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "swapaxes": "transpose.int",
    "swapdims": "transpose.int",
    "moveaxis.int": "movedim.int",
    "moveaxis.intlist": "movedim.intlist",
    "numpy_T": "t",
    "special_softmax": "softmax.int",
}


def _rename(target: Any) -> Spell:
    return lambda call, describe: Call(target, call.args, call.kwargs)


for _old, _canonical in _SAME_ARGUMENTS.items():
    if _canonical is not None:
        _SPELLINGS[_overload(_old)] = _rename(_overload(_canonical))


def _permute(x: Any, dims: list[int]) -> Call:
    return Call(aten.permute.default, (x, dims), {})


@_spells(aten.permute.default)
def _permute_dims(call: Call, describe: Describe) -> Call:
    return _permute(call.args[0], list(call.args[1]))


@_spells(aten.transpose.int)
def _transpose(call: Call, describe: Describe) -> Call:
    x, a, b = call.args
    dims = list(range(_rank(x, describe)))
    if not dims:
        return keep(x)
    dims[a], dims[b] = dims[b], dims[a]
    return _permute(x, dims)


@_spells(aten.t.default, aten.mT.default)
def _matrix_transpose(call: Call, describe: Describe) -> Call:
    rank = _rank(call.args[0], describe)
    dims = list(range(rank))
    if call.target is aten.t.default:
        dims.reverse()
    elif rank >= 2:
        dims[-1], dims[-2] = dims[-2], dims[-1]
    return keep(call.args[0]) if rank < 2 else _permute(call.args[0], dims)


@_spells(aten.movedim.int, aten.movedim.intlist)
def _movedim(call: Call, describe: Describe) -> Call:
    x, source, destination = call.args
    rank = _rank(x, describe)
    if isinstance(source, int):
        source, destination = [source], [destination]
    sources = [_wrap(d, rank) for d in source]
    places = [_wrap(d, rank) for d in destination]
    rest = iter(d for d in range(rank) if d not in sources)
    at = dict(zip(places, sources, strict=True))
    return _permute(x, [at[d] if d in at else next(rest) for d in range(rank)])


@_spells(aten.add.Scalar, aten.sub.Scalar)
def _scalar_sum(call: Call, describe: Describe) -> Call:
    x, other, alpha = call.args
    target = aten.add.Tensor if call.target is aten.add.Scalar else aten.sub.Tensor
    return Call(target, (x, other), {"alpha": alpha})


@_spells(aten.slice.Tensor)
def _slice(call: Call, describe: Describe) -> Call:
    x, dim, start, end, step = call.args
    start = 0 if start is None else start
    end = INT_MAX if end is None else end
    value = describe(x)
    size: Any = None if value is None else value.shape[dim]
    if is_static(size):
        if isinstance(start, int) and start < 0:
            start = max(start + size, 0)
        if isinstance(end, int):
            end = max(end + size, 0) if end < 0 else end
            end = INT_MAX if end >= size else end
    return Call(call.target, (x, dim, start, end, step), {})


@_spells(aten.narrow.default)
def _narrow(call: Call, describe: Describe) -> Call:
    x, dim, start, length = call.args
    if not (isinstance(start, int) and isinstance(length, int) and start >= 0):
        return call
    return Call(aten.slice.Tensor, (x, dim, start, start + length, 1), {})


@_spells(aten.select.int)
def _select(call: Call, describe: Describe) -> Call:
    x, dim, index = call.args
    value = describe(x)
    if isinstance(index, int) and index < 0 and value is not None and is_static(value.shape[dim]):
        index += value.shape[dim]
    return Call(call.target, (x, dim, index), {})


@_spells(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(call: Call, describe: Describe) -> Call:
    value = _value(call.args[0], describe)
    if call.target is aten.squeeze.default:
        wanted = list(range(value.dim()))
    elif call.target is aten.squeeze.dim:
        wanted = [call.args[1]]
    else:
        wanted = list(call.args[1])
    if value.dim() == 0:
        return keep(call.args[0])
    dims = [d for d in wanted if is_static(value.shape[d]) and value.shape[d] == 1]
    if not dims:
        return keep(call.args[0])
    return Call(aten.squeeze.dims, (call.args[0], dims), {})


@_spells(aten.chunk.default)
def _chunk(call: Call, describe: Describe) -> Call:
    x, chunks, dim = call.args
    size = _value(x, describe).shape[dim]
    if not is_static(size) or size == 0:
        return call
    return _split_evenly(x, -(-size // chunks), size, dim)


@_spells(aten.split.Tensor)
def _split(call: Call, describe: Describe) -> Call:
    x, width, dim = call.args
    size = _value(x, describe).shape[dim]
    if not is_static(size) or not is_static(width) or size == 0 or width == 0:
        return call
    return _split_evenly(x, width, size, dim)


def _split_evenly(x: Any, width: int, size: int, dim: int) -> Call:
    sizes = [min(width, size - start) for start in range(0, size, width)]
    return Call(aten.split_with_sizes.default, (x, sizes, dim), {})


@_spells(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default)
def _to(call: Call, describe: Describe) -> Call:
    x = call.args[0]
    names = [row[0] for row in _arguments(call.target)[0]]
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    value = describe(x)
    dtype, device = given.get("dtype"), given.get("device")
    if call.target is aten.to.other:
        other = _value(given["other"], describe)
        dtype, device = other.dtype, other.device
    if value is not None:
        dtype = value.dtype if dtype is None else dtype
        device = None if device is None or torch.device(device) == value.device else device
    elif dtype is None:
        raise ShapeNeeded
    if device is None:
        copies = given.get("copy") or call.target is aten._to_copy.default
        if copies and value is not None and value.dtype == dtype:
            return Call(aten.clone.default, (x,), {"memory_format": given.get("memory_format")})
        return Call(aten.to.dtype, (x, dtype, False, False, None), {})
    return Call(aten.to.device, (x, torch.device(device), dtype, False, False, None), {})


@_spells(aten.type_as.default)
def _type_as(call: Call, describe: Describe) -> Call:
    return Call(aten.to.other, (call.args[0], call.args[1]), {})


@_spells(aten.relu6.default)
def _relu6(call: Call, describe: Describe) -> Call:
    return Call(aten.hardtanh.default, (call.args[0], 0.0, 6.0), {})


@_spells(aten.clamp_min.default, aten.clip.default)
def _clamp_min(call: Call, describe: Describe) -> Call:
    upper = call.args[2] if call.target is aten.clip.default else None
    return Call(aten.clamp.default, (call.args[0], call.args[1], upper), {})


@_spells(aten.clamp_max.default)
def _clamp_max(call: Call, describe: Describe) -> Call:
    return Call(aten.clamp.default, (call.args[0], None, call.args[1]), {})


@_spells(aten.pad.default, aten.constant_pad_nd.default)
def _pad(call: Call, describe: Describe) -> Call:
    if call.target is aten.constant_pad_nd.default:
        x, pad, value = call.args
        return Call(aten.pad.default, (x, pad, "constant", float(value)), {})
    x, pad, mode, value = call.args
    if mode == "constant":
        value = 0.0 if value is None else float(value)
    return Call(call.target, (x, pad, mode, value), {})


_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


@_spells(*_CONVOLUTIONS)
def _convolution(call: Call, describe: Describe) -> Call:
    n = _CONVOLUTIONS[call.target]
    args = tuple(
        list(arg) * n if isinstance(arg, (list, tuple)) and len(arg) == 1 else arg
        for arg in call.args
    )
    return Call(call.target, args, {})


_PADDING_BY_NAME = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


@_spells(*_PADDING_BY_NAME)
def _named_padding(call: Call, describe: Describe) -> Call:
    x, weight, bias, stride, padding, dilation, groups = call.args
    kernel = [int(k) for k in _value(weight, describe).shape[2:]]
    dilations = list(dilation) * (len(kernel) if len(dilation) == 1 else 1)
    total = [
        0 if padding == "valid" else d * (k - 1) for d, k in zip(dilations, kernel, strict=True)
    ]
    if any(t % 2 for t in total):
        return call  # asymmetric: no equal spelling as one convolution
    pads = [t // 2 for t in total]
    target = _PADDING_BY_NAME[call.target]
    return Call(target, (x, weight, bias, stride, pads, dilation, groups), {})


_POOLS = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
}


@_spells(*_POOLS)
def _pool(call: Call, describe: Describe) -> Call:
    n = _POOLS[call.target]

    def spread(value: Any) -> Any:
        is_one = isinstance(value, (list, tuple)) and len(value) == 1
        return list(value) * n if is_one else value

    args = [spread(arg) for arg in call.args]
    if not args[2]:
        args[2] = list(args[1])  # the stride defaults to the kernel
    return Call(call.target, tuple(args), {})


@_spells(aten.scaled_dot_product_attention.default)
def _attention(call: Call, describe: Describe) -> Call:
    kwargs = dict(call.kwargs)
    value = describe(call.args[0])
    if kwargs.get("scale") is None and value is not None and is_static(value.shape[-1]):
        kwargs["scale"] = 1.0 / math.sqrt(value.shape[-1]) if value.shape[-1] else 1.0
    return Call(call.target, call.args, kwargs)


# -- tensors made of one number ----------------------------------------------------------------


def _full(size: Any, fill: Any, like: Any, kwargs: Mapping[str, Any]) -> Call:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if like is not None:
        dtype, device = dtype or like.dtype, device or like.device
    named = {
        "dtype": dtype or torch.get_default_dtype(),
        "layout": None,
        "device": torch.device(device or "cpu"),
        "pin_memory": None,
    }
    return Call(aten.full.default, (list(size), fill), named)


@_spells(aten.zeros.default, aten.ones.default)
def _zeros(call: Call, describe: Describe) -> Call:
    return _full(call.args[0], int(call.target is aten.ones.default), None, call.kwargs)


@_spells(aten.full.default)
def _full_default(call: Call, describe: Describe) -> Call:
    fill, kwargs = call.args[1], dict(call.kwargs)
    if kwargs.get("dtype") is None and isinstance(fill, (bool, int)):
        kwargs["dtype"] = torch.bool if isinstance(fill, bool) else torch.int64
    elif kwargs.get("dtype") is None and not isinstance(fill, float):
        return call
    return _full(call.args[0], fill, None, kwargs)


@_spells(aten.scalar_tensor.default)
def _scalar_tensor(call: Call, describe: Describe) -> Call:
    return _full([], call.args[0], None, call.kwargs)


@_spells(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
def _new(call: Call, describe: Describe) -> Call:
    x, size = call.args[:2]
    fill = call.args[2] if len(call.args) > 2 else int(call.target is aten.new_ones.default)
    return _full(size, fill, _value(x, describe), call.kwargs)


@_spells(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.fill.Scalar)
def _like(call: Call, describe: Describe) -> Call:
    fill = call.args[1] if len(call.args) > 1 else int(call.target is aten.ones_like.default)
    value = _value(call.args[0], describe)
    if all(is_static(size) for size in value.shape):
        return _full(value.shape, fill, value, call.kwargs)
    names = ("dtype", "layout", "device", "pin_memory", "memory_format")
    kwargs = dict.fromkeys(names) | {"dtype": call.kwargs.get("dtype") or value.dtype}
    kwargs["device"] = call.kwargs.get("device") or value.device
    return Call(aten.full_like.default, (call.args[0], fill), kwargs)


@_spells(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(call: Call, describe: Describe) -> Call:
    start, end, step = {1: (0, *call.args, 1), 2: (*call.args, 1), 3: call.args}[len(call.args)]
    kwargs = dict(call.kwargs)
    if kwargs.get("dtype") is None:
        floats = any(isinstance(v, float) for v in (start, end, step))
        kwargs["dtype"] = torch.get_default_dtype() if floats else torch.int64
    named = {"dtype": kwargs["dtype"], "layout": None, "pin_memory": None}
    named["device"] = torch.device(kwargs.get("device") or "cpu")
    return Call(aten.arange.start_step, (start, end, step), named)
