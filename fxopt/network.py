"""The graph for people's own analysis, and for our pictures: as a networkx graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.cost import cost_of, parameters_of
from fxopt.errors import OptionError
from fxopt.families import family_of
from fxopt.graph_module import GraphModule
from fxopt.story import NodeRecord, Recorder, Snapshot
from fxopt.text import dtype_text, target_text, type_text, value_text

if TYPE_CHECKING:
    import networkx


def to_networkx(graph: GraphModule | Snapshot) -> networkx.MultiDiGraph:
    """Return the graph with one node per fx node, by name, and one edge per use of a value.

    Node attributes:
        op, target, text       as in the text form: `call_function`, `conv2d`, `%conv2d: f32[…] = …`
        family                 one of `fxopt.families.FAMILIES`
        path, module, source   of the module it was traced in: its path, its class, the user's line
        type                   `f32[1,64]`, of whatever the node returns
        shape, dtype           for one tensor: a tuple (symbolic sizes as text), and `f32`
        arguments              the arguments that are no tensors and differ from the operator's
                               defaults, as text by name
        macs, flops, params    counts; `read` and `written` are bytes (see `fxopt.cost.Cost`)
        parameters             the number of elements by the parameter's name: a parameter that
                               several nodes use counts in the `params` of each
        rule, replaces         on what a pass made: its rule or None, and the nodes it stands for
    Edges carry `argument`, the position of the argument, its `name` (`weight`, `tensors[1]`), and
    the `type`, and `shape` and `dtype`, of what they carry.

    The bodies of control-flow operators are in it, too: a body's nodes are called `body/name`, and
    their path begins with that of the call, whose cost is that of its bodies.
    """
    import networkx

    if not isinstance(graph, (GraphModule, Snapshot)):
        raise OptionError(
            f"to_networkx() takes a graph, not a {type(graph).__name__}. For a model: "
            "fxopt.to_networkx(fxopt.capture(model, inputs))."
        )
    if isinstance(graph, GraphModule):
        name, modules = graph.info.model_name, graph.info.modules
        snapshot = Recorder().snapshot(graph)
    else:
        name, modules, snapshot = "graph", {}, graph
    result = networkx.MultiDiGraph(name=name, modules=dict(modules))
    _add(result, snapshot, "", "")
    return result


def _add(network: networkx.MultiDiGraph, snapshot: Snapshot, prefix: str, within: str) -> None:
    """Add the nodes of one snapshot; `prefix` stands before names, `within` before paths."""
    calls = _callers(snapshot)
    for record in snapshot.records:
        name = prefix + record.name
        network.add_node(name, **_attributes(record, within))
        for position, argument, used in _uses(record):
            value = used.meta.get("val")
            network.add_edge(
                prefix + used.name, name, argument=position, name=argument, type=type_text(value),
                **_tensor(value),
            )  # fmt: skip
    for constant, body in snapshot.subgraphs.items():
        path = _join(within, calls.get(constant, ""), constant)
        _add(network, body, f"{prefix}{constant}/", path)


def _callers(snapshot: Snapshot) -> dict[str, str]:
    """Return, for each sub-graph by name, the module path of the call that runs it."""
    return {
        str(used.target): record.meta.get("path") or ""
        for record in snapshot.records
        for _, _, used in _uses(record)
        if used.op == "get_attr" and str(used.target) in snapshot.subgraphs
    }


def _attributes(record: NodeRecord, within: str) -> dict[str, Any]:
    value, cost = record.meta.get("val"), cost_of(record)
    return {
        "op": record.op,
        "target": target_text(record.target),
        "text": record.text,
        "family": family_of(record),
        "path": _join(within, record.meta.get("path") or ""),
        "module": record.meta.get("module") or "",
        "source": record.meta.get("source") or "",
        "type": "" if record.op == "output" else type_text(value),
        **_tensor(value),
        "arguments": _arguments(record),
        "macs": cost.macs,
        "flops": cost.flops,
        "params": cost.params,
        "read": cost.read,
        "written": cost.written,
        "parameters": parameters_of(record),
        "rule": record.meta.get("rule"),
        "replaces": tuple(record.meta.get("replaces") or ()),
    }


def _join(*paths: str) -> str:
    return ".".join(path for path in paths if path)


def _tensor(value: Any) -> dict[str, Any]:
    if not isinstance(value, torch.Tensor):
        return {}
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return {"shape": shape, "dtype": dtype_text(value.dtype)}


# -- arguments -------------------------------------------------------------------------------------


def _uses(record: NodeRecord) -> Iterator[tuple[int, str, fx.Node]]:
    """Yield each use of a node: the position and name of the argument, and the node."""
    for position, (name, value, _) in enumerate(_named(record)):
        yield from ((position, where, node) for where, node in _nodes(name, value))


def _nodes(name: str, value: Any) -> Iterator[tuple[str, fx.Node]]:
    if isinstance(value, fx.Node):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _nodes(f"{name}[{index}]", inner)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _nodes(f"{name}.{key}", inner)
    elif isinstance(value, slice):
        yield from _nodes(name, (value.start, value.stop, value.step))


def _arguments(record: NodeRecord) -> dict[str, str]:
    """Return what a reader cannot guess: plain arguments that differ from their defaults."""
    if record.op != "call_function":
        return {}
    found = {}
    for name, value, declared in _named(record):
        default = declared.default_value if declared and declared.has_default_value() else None
        if value in (None, default, sys.maxsize) or any(_nodes(name, value)):
            continue  # the largest integer stands for "to the end"
        found[name] = _short(value, fixed=declared is not None and bool(declared.N))
    return found


def _named(record: NodeRecord) -> Iterator[tuple[str, Any, Any]]:
    """Yield each argument with its name and its declaration in the operator's schema, if any."""
    declared: list[Any] = []
    if isinstance(record.target, OpOverload):
        declared = list(record.target._schema.arguments)
    if record.op == "output":
        results: Any = record.args[0]
        yield from ((f"results[{i}]", value, None) for i, value in enumerate(results))
        return
    for position, value in enumerate(record.args):
        one = declared[position] if position < len(declared) else None
        yield one.name if one is not None else str(position), value, one
    by_name = {one.name: one for one in declared}
    yield from ((name, value, by_name.get(name)) for name, value in record.kwargs.items())


def _short(value: Any, *, fixed: bool) -> str:
    """Write a value shortly: sizes as 7×7, and 3 for 3×3 where the operator fixes how many."""
    if isinstance(value, (list, tuple)) and value:
        parts = [value_text(part) for part in value]
        if fixed:
            return parts[0] if len(set(parts)) == 1 else "×".join(parts)
        return ", ".join(parts)
    return f"{value:g}" if isinstance(value, float) else value_text(value)
