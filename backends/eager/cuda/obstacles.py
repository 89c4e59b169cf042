"""Which programs a CUDA graph cannot stand for.

A CUDA graph is the list of kernels that one run started, with their addresses and numbers. Whatever
else a run does is not done again: work on the CPU, a decision, a new random number. So the whole
program must be kernels on one device, the same for every input of a shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.backends.eager.reuse import Memory
from fxopt.effects import effect, is_pure
from fxopt.graph_module import GraphModule
from fxopt.shapes import is_tensor

aten = torch.ops.aten
_SIZES = {
    aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default, aten.sym_storage_offset.default,
}  # fmt: skip
_INDEXED_BY = {aten.index.Tensor: 1, aten.index_put.default: 1, aten._unsafe_index.Tensor: 1}
_MASKS = (torch.bool, torch.uint8)
_WAITING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_NEVER_WAITING = {  # of linear algebra, where the others ask the GPU whether they succeeded
    "linalg_vector_norm", "linalg_norm", "linalg_cross", "linalg_vecdot", "linalg_matmul",
    "linalg_multi_dot", "linalg_diagonal",
}  # fmt: skip
_ALSO_LINEAR_ALGEBRA = {
    "inverse", "cholesky", "cholesky_inverse", "pinverse", "qr", "svd", "logdet", "matrix_exp",
    "geqrf", "ormqr", "triangular_solve", "lu_solve",
}  # fmt: skip


def device_of(graph: GraphModule) -> torch.device:
    """Return the CUDA device of a graph that `recording_obstacle` has nothing against."""
    devices = (device for node in graph.graph.nodes for device in _devices(node))
    return next(filter(_is_cuda, devices))


def recording_obstacle(graph: GraphModule) -> str | None:
    """Why a graph's program cannot be replayed from a CUDA graph, in words; None where it can."""
    fixed = _fixed(graph)
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and n not in fixed]
    for node in graph.placeholders:
        if not all(map(_is_cuda, _devices(node))):
            return f"the input '{node.name}' is on {_text(_devices(node))}"
    for node in calls:
        why = effect(node) or _wait(node) or _elsewhere(node, fixed)
        if why is not None:
            return f"{node.name}: {why}"
    used = (*graph.placeholders, *calls, *(n for n in fixed if set(n.users).intersection(calls)))
    devices = {device for node in used for device in _devices(node) if _is_cuda(device)}
    if len(devices) != 1:
        found = " and ".join(sorted(map(str, devices)))
        return f"it computes on {found}" if found else "nothing is computed on cuda"
    memory = Memory(graph.placeholders, calls)
    for value in graph.output_node.all_input_nodes:
        if is_tensor(value) and memory.of_input(value):
            return f"the output {value.name} may share its memory with an input"
    return None


def _fixed(graph: GraphModule) -> set[fx.Node]:
    """Return constants, and the calls that follow from them alone: the program has them already."""
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in graph.info.mutated:
            found.add(node)
        elif node.op == "call_function" and node.all_input_nodes and is_pure(node):
            if found.issuperset(node.all_input_nodes):
                found.add(node)
    return found


def _wait(node: fx.Node) -> str | None:
    """Why a call needs the CPU to wait for the GPU, or depends on where its input lies."""
    target = node.target
    value = node.meta["val"]
    if free_unbacked_symbols(value):
        return "its size depends on what is computed"
    if not isinstance(target, OpOverload):
        return None
    if target is aten.as_strided.default:
        return "it reads memory by strides, which an input's copy does not have"
    if target in _INDEXED_BY:
        indices: Any = node.args[_INDEXED_BY[target]]
        given = [one for one in indices if one is not None]
        return "a mask says what it indexes" if any(map(_is_mask, given)) else None
    if torch.Tag.cudagraph_unsafe in target.tags:
        return "PyTorch says that it cannot be in a CUDA graph"
    is_number = not any(True for _ in _tensors(node)) and target not in _SIZES
    if is_number or _WAITING_TAGS.intersection(target.tags):
        return "the CPU would have to wait for what it computes"
    name = target._schema.name.removeprefix("aten::")
    is_algebra = name.startswith("linalg_") or name in _ALSO_LINEAR_ALGEBRA
    if is_algebra and name not in _NEVER_WAITING:
        return "the CPU waits to hear whether it succeeded"
    return None


def _elsewhere(node: fx.Node, fixed: set[fx.Node]) -> str | None:
    """Why not all that a call reads and computes is on CUDA.

    A constant number is no obstacle: kernels that compute element by element are given its value.
    """
    if not all(map(_is_cuda, _devices(node))):
        return f"it computes on {_text(_devices(node))}"
    by_element = isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    for value in node.all_input_nodes:
        is_number = by_element and value in fixed and is_tensor(value) and _rank(value) == 0
        if not is_number and not all(map(_is_cuda, _devices(value))):
            return f"it reads {value.name}, which is on {_text(_devices(value))}"
    return None


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    value = node.meta.get("val")
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, torch.Tensor):
            yield one


def _devices(node: fx.Node) -> list[torch.device]:
    return [one.device for one in _tensors(node)]


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_mask(node: fx.Node) -> bool:
    return node.meta["val"].dtype in _MASKS


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _text(devices: list[torch.device]) -> str:
    return ", ".join(sorted({str(device) for device in devices if not _is_cuda(device)}))
