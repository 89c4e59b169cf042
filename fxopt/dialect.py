"""The dialect's invariants, checked one by one; and the only way to move a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.errors import DialectError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.normalize import canonical
from fxopt.shapes import describe, fake_of, infer, is_tensor

aten = torch.ops.aten
Check = Callable[[GraphModule], Iterator[str]]


def check(graph: GraphModule, changed: Collection[str] | None = None) -> None:
    """Raise DialectError with every broken invariant of the graph, and of its sub-graphs.

    Where the names of the `changed` nodes are given, spelling is checked for those only.
    """
    problems = _problems(graph, changed)
    for subgraph in graph.subgraphs():
        problems += [f"in a sub-graph: {problem}" for problem in _problems(subgraph, None)]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DialectError(f"The graph is not legal:\n{shown}{more}")


def _problems(graph: GraphModule, changed: Collection[str] | None) -> list[str]:
    nodes = [n for n in graph.graph.nodes if changed is None or n.name in changed]
    return [*(p for one in CHECKS for p in one(graph)), *_misspelled(nodes)]


def _is_well_formed(graph: GraphModule) -> Iterator[str]:
    """Every argument is defined before its use, and placeholders come before everything else."""
    seen: set[fx.Node] = set()
    calls_began = False
    for node in graph.graph.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                yield f"{node.name} uses {used.name} before it is defined"
        if node.op == "placeholder" and calls_began:
            yield f"input {node.name} stands behind a call"
        calls_began |= node.op == "call_function"
        seen.add(node)


def _has_known_nodes(graph: GraphModule) -> Iterator[str]:
    """Only the five kinds of nodes, and only targets whose schema is known."""
    for node in graph.graph.nodes:
        if node.op in ("call_module", "call_method"):
            yield f"{node.name} is a {node.op}"
        elif node.op == "call_function":
            if not is_operator(node.target):
                yield f"{node.name} calls {node.target}, which is not an operator"
            elif node.target is operator.getitem and is_tensor(node.args[0]):
                yield f"{node.name} indexes a tensor; that is select, slice or unsqueeze"


_PLAIN_MODULES = {operator.getitem.__module__, "math", "torch", "torch.fx.experimental.sym_node"}


def is_operator(target: Any) -> bool:
    """Whether `target` may be called in a graph: an ATen or custom operator, or arithmetic."""
    if isinstance(target, (OpOverload, HigherOrderOperator)):
        return True
    return callable(target) and getattr(target, "__module__", "") in _PLAIN_MODULES


def _has_constants(graph: GraphModule) -> Iterator[str]:
    """Every get_attr names a tensor or a sub-graph, and each constant has one node."""
    seen: dict[str, fx.Node] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if not graph.has_constant(name):
            yield f"{node.name} names the constant '{name}', which does not exist"
        elif name in seen:
            yield f"{node.name} and {seen[name].name} both stand for the constant '{name}'"
        seen[name] = node


def _is_functional(graph: GraphModule) -> Iterator[str]:
    """No writes but copy_ to an input or a mutated constant, after everything that reads."""
    wrote = False
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target is aten.copy_.default:
            wrote = True
            owner = node.args[0]
            if owner.op == "get_attr" and owner.target not in graph.info.mutated:
                yield f"{node.name} writes to '{owner.target}', which is not state"
            elif owner.op not in ("get_attr", "placeholder"):
                yield f"{node.name} writes to {owner.name}, which is neither state nor an input"
        elif node.target._schema.is_mutable:
            yield f"{node.name} is in place: {node.target}"
        elif wrote:
            yield f"{node.name} stands behind the state's write-back"


def _misspelled(nodes: Iterable[fx.Node]) -> Iterator[str]:
    """Every call is written in its one spelling, with complete arguments."""
    for node in nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            call = canonical(node.target, node.args, node.kwargs, describe)
            same = call.target is node.target and len(call.args) == len(node.args)
            if not same or list(call.kwargs) != list(node.kwargs):
                yield f"{node.name} is {node.target}, whose canonical form is {call.target}"


def _has_values(graph: GraphModule) -> Iterator[str]:
    """Every node but the output and sub-graphs carries `meta["val"]`."""
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "call_function") and "val" not in node.meta:
            yield f"{node.name} has no value"
        elif node.op == "get_attr" and "val" in node.meta and graph.has_constant(str(node.target)):
            value, known = graph.value(node), node.meta["val"]
            if tuple(value.shape) != tuple(known.shape) or value.dtype != known.dtype:
                yield f"constant '{node.target}' is not what its node says"


def _has_flat_output(graph: GraphModule) -> Iterator[str]:
    """One output node, last, with a tuple of nodes (a loop's condition returns just one)."""
    outputs = [node for node in graph.graph.nodes if node.op == "output"]
    if len(outputs) != 1 or outputs[0] is not graph.output_node:
        yield "the output must be one node, and the last"
    elif not isinstance(outputs[0].args[0], (tuple, fx.Node) if graph.is_subgraph else tuple):
        yield "the output must be a tuple"


CHECKS: tuple[Check, ...] = (
    _is_well_formed,
    _has_known_nodes,
    _has_constants,
    _is_functional,
    _has_values,
    _has_flat_output,
)


def retarget(
    graph: GraphModule,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> GraphModule:
    """Return a copy of the graph that computes in another floating dtype or on another device.

    Rewrites what `.to()` cannot reach: casts, factory calls, the signature and the example inputs.
    Every floating dtype in the graph becomes `dtype`, so islands of another precision go; integers
    and complex numbers stay what they are. Raises OptionError for another dtype or device.
    """
    if dtype not in _FLOATS:
        known = ", ".join(str(one) for one in _FLOATS if one is not None)
        raise OptionError(f"A graph can be retargeted to {known}, not to {dtype!r}.")
    place = None if device is None else _usable(device)

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            wanted = dtype if value.is_floating_point() else None
            return value.to(device=place, dtype=wanted)
        if isinstance(value, torch.dtype) and value.is_floating_point and dtype is not None:
            return dtype
        if isinstance(value, torch.device) and place is not None:
            return place
        return value

    moved = graph.copy()
    for one in (*moved.subgraphs(), moved):
        _retarget_nodes(one, move)
    info = moved.info
    info.example_inputs = tuple(move(value) for value in info.example_inputs)
    if info.signature is not None:
        info.signature = info.signature.moved(move)
    info.shares_storage = True
    moved.recompile()
    return moved


_FLOATS = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _usable(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(f"The device {str(device)!r} cannot be used here: {reason}") from None
    if place.type == "meta":
        raise OptionError("A graph cannot be moved to the meta device: its weights would be lost.")
    return place


def _retarget_nodes(graph: GraphModule, move: Callable[[Any], Any]) -> None:
    for tensor in graph.constants().values():
        tensor.data = move(tensor.data)
    mode = graph.info.fake_mode
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = move(node.meta["val"])
        elif node.op == "get_attr" and "val" in node.meta:
            node.meta["val"] = fake_of(graph.value(node), mode)
        elif node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, move)
            node.kwargs = fx.node.map_aggregate(node.kwargs, move)
            if isinstance(node.target, HigherOrderOperator):
                node.meta["val"] = fx.node.map_aggregate(node.meta["val"], move)
            elif node.target is not aten.copy_.default:
                node.meta["val"] = infer(node.target, node.args, node.kwargs, mode)


