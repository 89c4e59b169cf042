"""Lowering: the graph through our ONNX emitter, in memory, into OpenVINO's model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.backends.onnx import Onnx
from fxopt.backends.onnx.describe import all_rules
from fxopt.backends.onnx.executable import split_weights, torch_of
from fxopt.backends.onnx.lower import lower as lower_to_onnx
from fxopt.backends.openvino.executable import OpenVinoExecutable, core, reason
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule

if TYPE_CHECKING:
    from fxopt.backends.openvino import OpenVino

aten = torch.ops.aten

# The CPU plugin computes these in narrower types, and says nothing.
_CUT = {
    torch.float64: "float32",
    torch.uint64: "int32",
    torch.uint32: "int32",
}
# Types in which PyTorch wraps around; it saturates in 8 bits, and keeps what overflows 16.
_NARROW = {torch.uint8, torch.int8, torch.int16, torch.uint16}
# What cannot leave the range of a narrow type, beside operators that only move data.
_WITHIN = {
    "amax", "amin", "bitwise_and", "bitwise_not", "bitwise_or", "bitwise_xor", "clamp",
    "clamp_max", "clamp_min", "clone", "max", "maximum", "min", "minimum", "relu", "sort", "topk",
    "where", "_to_copy", "to", "masked_fill", "quantize_per_tensor", "quantize_per_channel",
}  # fmt: skip
# Operators whose kernels compute integers as such. Others (division, remainders, sums, clamps) may
# compute in float32, which knows every integer up to 2²⁴ only.
_EXACT = {
    "abs", "add", "argmax", "argsort", "bitwise_and", "bitwise_xor", "embedding", "eq", "gather",
    "gt", "index", "index_select", "maximum", "minimum", "mul", "neg", "sort", "sub", "to",
    "_to_copy", "topk", "where",
    "fake_quantize",  # of 16 bits at most
}  # fmt: skip
_INTEGERS = (torch.int64, torch.int32)
_IN_MEMORY = "*/_ORT_MEM_ADDR_/*"  # as the place of a constant: its offset is an address


def lower(graph: GraphModule, options: OpenVino) -> OpenVinoExecutable:
    """Lower a graph; raise LoweringError, naming the node, for what OpenVINO would get wrong."""
    for one in (graph, *graph.subgraphs()):
        for node in one.graph.nodes:
            _check(one, node)
    try:
        # another provider than ONNX Runtime's for CPUs, whose gaps are not OpenVINO's
        lowered = lower_to_onnx(graph, Onnx(opset=22, providers=("OpenVINOExecutionProvider",)))
    except LoweringError as error:
        raise LoweringError(f"OpenVINO gets graphs as ONNX. {error}") from error
    model = read_onnx(lowered.ir_model)
    shield_permutations(model)
    largest = _largest_integer(graph)
    return OpenVinoExecutable(model, lowered.input_names, largest, options, lowered.notes)


def _check(graph: GraphModule, node: fx.Node) -> None:
    """Raise LoweringError for what OpenVINO would accept and compute differently."""
    if node.target is aten.copy_.default:
        changed = node.args[0].target if isinstance(node.args[0], fx.Node) else "a tensor"
        raise _refusal(
            node,
            f"the model changes '{changed}' at each run, and this backend keeps no state",
            "Remove the update, use backend='onnx' with state='io'",
        )
    for fake in pytree.tree_leaves(node.meta.get("val")):
        if not isinstance(fake, torch.Tensor):
            continue
        if fake.dtype in _CUT:
            raise _refusal(
                node,
                f"OpenVINO computes {_name(fake.dtype)} in {_CUT[fake.dtype]}",
                "Compile with precision='fp32'" if fake.dtype == torch.float64 else
                "Use int64 for what fits in 32 bits",
            )  # fmt: skip
        if fake.dtype in _NARROW and node.op == "call_function" and not _stays_within(node):
            raise _refusal(
                node,
                f"OpenVINO does not wrap around where {_name(fake.dtype)} overflows",
                "Convert to int32 before it",
            )
    if _needs_64_bits(graph, node):
        raise _refusal(
            node, "it has integers that need more than OpenVINO's 32 bits", "Use smaller ones"
        )


def _needs_64_bits(graph: GraphModule, node: fx.Node) -> bool:
    """Whether a constant, or a number that a node computes with, does not fit into an int32."""
    if node.op == "get_attr":
        value = graph.value(node)
        is_wide = isinstance(value, torch.Tensor) and value.dtype == torch.int64
        return is_wide and bool((value != value.int()).any())
    if getattr(node.meta.get("val"), "dtype", None) != torch.int64 or _moves(node):
        return False
    numbers = [x for x in (*node.args, *node.kwargs.values()) if type(x) is int]
    return any(not -(2**31) <= number < 2**31 for number in numbers)


def _largest_integer(graph: GraphModule) -> int:
    """Return the largest absolute value that inputs may hold, for all operators to be exact."""
    for one in (graph, *graph.subgraphs()):
        for node in one.graph.nodes:
            if node.op == "call_function" and not _moves(node) and _called(node) not in _EXACT:
                values = [given.meta.get("val") for given in node.all_input_nodes]
                if any(getattr(value, "dtype", None) in _INTEGERS for value in values):
                    return 2**24
    return 2**31 - 1


def _moves(node: fx.Node) -> bool:
    rule = all_rules().get(node.target)
    return rule is not None and rule.moves


def _stays_within(node: fx.Node) -> bool:
    return _moves(node) or _called(node) in _WITHIN


def _called(node: fx.Node) -> str:
    """Return the operator's bare name: "add" for aten.add.Tensor."""
    name = str(getattr(getattr(node.target, "_schema", None), "name", node.target))
    return name.rpartition("::")[2]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(node: fx.Node, why: str, remedy: str) -> LoweringError:
    where = [f"node '{node.name}'"]
    where += [f"{key}: {node.meta[key]}" for key in ("path", "source") if node.meta.get(key)]
    return LoweringError(
        f"Cannot express {node.target} in OpenVINO ({', '.join(where)}): {why}. {remedy}, or use "
        "backend='eager'."
    )


def read_onnx(model: Any) -> Any:
    """Return OpenVINO's model of an ONNX model, with copies of its constants.

    Larger constants are read from where they lie: nothing is serialised, and there is no limit of
    2 GB. OpenVINO takes addresses since it has served as a provider of ONNX Runtime.
    """
    proto, weights = split_weights(model)
    held = {name: torch_of(tensor).contiguous() for name, tensor in weights.items()}
    for message in proto.graph.initializer:
        tensor = held.get(message.name)
        if tensor is None:
            continue
        del message.external_data[:]
        place = {
            "location": _IN_MEMORY,
            "offset": str(tensor.data_ptr()),
            "length": str(tensor.nbytes),
        }
        for key, value in place.items():
            entry = message.external_data.add()
            entry.key, entry.value = key, value
    try:
        return core().read_model(proto.SerializeToString())
    except Exception as error:
        raise LoweringError(
            f"OpenVINO cannot read the graph as ONNX: {reason(error)} Replace what it names in the "
            "model, or use backend='eager' or 'onnx'."
        ) from error


def shield_permutations(model: Any) -> None:
    """Write what may reorder channels so that OpenVINO does not fold it into weights.

    OpenVINO folds `x[:, order]` into the convolution behind it. In 2026.4 that is right only for an
    order that is its own inverse, such as RGB to BGR, but not for a channel shuffle. It knows a
    Gather with indices of one dimension, and a Split whose parts are concatenated again; so the
    ones get indices of two, and the others become a VariadicSplit, which is as fast.
    """
    for one in model.get_ops():
        if one.get_type_name() == "Gather":
            _shield_gather(one)
        elif one.get_type_name() == "Split":
            _shield_split(one)


def _shield_gather(gather: Any) -> None:
    from openvino import opset8

    data, indices, axis = (gather.input_value(place) for place in range(3))
    if any(one.get_node().get_type_name() != "Constant" for one in (indices, axis)):
        return
    order, place = indices.get_node().data, int(axis.get_node().data.item())
    if order.ndim != 1 or sorted(order) != list(range(order.size)):
        return
    if (order[order] == range(order.size)).all():
        return  # its own inverse
    place %= data.get_partial_shape().rank.get_length()
    _replace(gather, opset8.squeeze(opset8.gather(data, order[None], place), [place]))


def _shield_split(split: Any) -> None:
    from openvino import opset8

    data, axis = (split.input_value(place) for place in range(2))
    if axis.get_node().get_type_name() != "Constant":
        return
    place = int(axis.get_node().data.item())
    size = split.output(0).get_partial_shape()[place]
    if size.is_static:
        lengths = [size.get_length()] * split.get_output_size()
        _replace(split, opset8.variadic_split(data, place, lengths))


def _replace(old: Any, new: Any) -> None:
    new.set_friendly_name(old.get_friendly_name())
    for index in range(old.get_output_size()):
        new.output(index).set_names(old.output(index).get_names())
        old.output(index).replace(new.output(index))
