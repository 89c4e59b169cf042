"""Constants and example inputs as an artefact stores them, in both directions.

Tensors that share memory are stored once, in the order in which they lie in memory, and in a dtype
that safetensors has; flags beside them say what they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fxopt.container import STORED
from fxopt.encode import DTYPES, decode, dtype_name, encode, malformed
from fxopt.errors import ArtefactError
from fxopt.graph_module import GraphModule

_CONSTANT_NAME = re.compile(r"[^\"\\\x00-\x1f\x7f.]+(\.[^\"\\\x00-\x1f\x7f.]+)*")
_MOST_ELEMENTS = 1 << 26  # of an example input that is made up


def constant_name(name: Any) -> str:
    """Return a dotted name; it becomes part of the graph's code, so nothing may end a string."""
    if not isinstance(name, str) or len(name) > 1000 or not _CONSTANT_NAME.fullmatch(name):
        raise ArtefactError(
            f"A constant has the name {name!r:.100}, which no artefact may hold. Rename its module."
        )
    return name


# -- writing --------------------------------------------------------------------------------------


def constants_of(graph: GraphModule) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the flags of every constant, and the tensors to store: one for each memory."""
    flags: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    objects: dict[int, str] = {}
    memory: dict[Any, str] = {}
    for name, tensor in graph.constants().items():  # in their order: an optimizer counts on it
        _check_storable(constant_name(name), tensor)
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        same = objects.setdefault(id(tensor), name)
        first = memory.setdefault(place, name) if tensor.numel() else same
        if first == name:
            tensors[name] = _storable(name, tensor)
        flags.append({
            "name": name,
            "same": same,  # the first name of this very tensor
            "data": first,  # the name under which its bytes are stored
            "dtype": dtype_name(tensor.dtype),
            "device": str(tensor.device),
            "order": _order(tensor),
            "parameter": isinstance(tensor, torch.nn.Parameter),
            "requires_grad": tensor.requires_grad,
            "persistent": graph.is_persistent(name),
        })  # fmt: skip
    return flags, tensors


def _check_storable(name: str, tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise _cannot_store(name, f"a {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise _cannot_store(name, f"{tensor.layout}, {tensor.dtype} on {tensor.device}")


def _storable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, in the order of its memory, in a dtype that safetensors has."""
    data = tensor.detach().resolve_conj().resolve_neg().permute(_order(tensor))
    if data.is_complex():
        return torch.view_as_real(data)
    if data.dtype in STORED:
        return data
    if data.dtype.itemsize == 1 and data.dtype.is_floating_point:
        return data.view(torch.uint8)
    raise _cannot_store(name, str(tensor.dtype))


def _cannot_store(name: str, kind: str) -> ArtefactError:
    return ArtefactError(
        f"Constant '{name}' is {kind}, which cannot be saved. Convert it to a plain dense tensor "
        "before compiling."
    )


def _order(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions from the outermost in memory to the innermost."""
    axes = range(tensor.dim())
    if tensor.is_contiguous() or 0 in tensor.stride():
        return list(axes)
    strides = tensor.stride()
    return sorted(axes, key=lambda axis: -strides[axis])


def examples_of(
    inputs: Iterable[Any], with_values: bool
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return what example inputs were, and their values where these are asked for."""
    described: list[dict[str, Any]] = []
    values: dict[str, torch.Tensor] = {}
    for index, value in enumerate(inputs):
        if not isinstance(value, torch.Tensor):
            described.append({"value": encode(value)})
            continue
        described.append({
            "shape": list(value.shape), "dtype": dtype_name(value.dtype),
            "device": str(value.device), "order": _order(value), "range": _range(value),
        })  # fmt: skip
        if with_values:
            _check_storable(f"example input {index}", value)
            values[str(index)] = _storable(f"example input {index}", value)
    return described, values


def _range(value: torch.Tensor) -> Any:
    """Return the least and the largest element: enough to make inputs of the same kind."""
    if value.numel() == 0 or value.is_complex():
        return None
    wide = value.detach().double() if value.is_floating_point() else value.detach().long()
    wide = wide[wide.isfinite()]
    return [wide.min().item(), wide.max().item()] if wide.numel() else None


# -- reading --------------------------------------------------------------------------------------


def read_constants(
    described: list[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the constants by name; names of one tensor stay names of one tensor."""
    found: dict[str, torch.Tensor] = {}
    data: dict[str, torch.Tensor] = {}
    for flags in described:
        name, same, stored = flags["name"], flags["same"], flags["data"]
        if name in found or (same != name and same not in found):
            raise malformed("the list of constants")
        if same != name:
            found[name] = found[same]
            continue
        if stored not in data:
            data[stored] = _as(tensors[stored], flags)
        tensor = data[stored] if stored == name else data[stored].detach()
        if flags["parameter"] is True:
            tensor = torch.nn.Parameter(tensor, requires_grad=flags["requires_grad"] is True)
        found[name] = tensor
    return found


def _as(stored: torch.Tensor, flags: Mapping[str, Any]) -> torch.Tensor:
    """Return a stored tensor in its own dtype, order of dimensions, and place."""
    dtype, order = DTYPES[flags["dtype"]], flags["order"]
    if dtype.is_complex:
        stored = torch.view_as_complex(stored)
    elif stored.dtype is torch.uint8 and dtype.itemsize == 1 and dtype.is_floating_point:
        stored = stored.view(dtype)
    if stored.dtype is not dtype or sorted(order) != list(range(stored.dim())):
        raise malformed("a constant")
    device = torch.device(flags["device"])
    if device.type != "cpu" and not torch.get_device_module(device.type).is_available():
        raise ArtefactError(
            f"The model was saved on '{device}', and there is none here. Save it from a graph that "
            "fxopt.dialect.retarget(graph, device='cpu') moved."
        )
    return stored.permute([order.index(axis) for axis in range(len(order))]).to(device)


def read_example(index: int, one: Mapping[str, Any], stored: Mapping[str, torch.Tensor]) -> Any:
    """Return one example input: the stored one, or random numbers in the range of the original."""
    if "value" in one:
        return decode(one["value"])
    if str(index) in stored:
        return _as(stored[str(index)], one)
    shape, dtype = one["shape"], DTYPES[one["dtype"]]
    low, high = one["range"] if one["range"] is not None else (0, 1)
    if math.prod(shape) > _MOST_ELEMENTS:
        return torch.tensor(low, dtype=dtype, device=one["device"]).expand(shape)
    generator = torch.Generator().manual_seed(index)
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    else:
        made = torch.randint(int(low), int(high) + 1, shape, generator=generator)
    order = one["order"]
    made = made.to(dtype).permute(order).contiguous()
    return made.permute([order.index(axis) for axis in range(len(shape))]).to(one["device"])
