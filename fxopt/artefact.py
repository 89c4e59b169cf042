"""fxopt's own artefact, `model.fxopt`: a graph, its constants and a manifest in one file.

    manifest.json          how the model is called, and what was done to it (fxopt.manifest)
    graph.json             nodes, sub-graphs, symbolic sizes, flags of the constants
    constants.safetensors  every constant, those that share memory once
    examples.safetensors   the example inputs, in a pickled graph only: a file holds their ranges
    checksums              of the parts above

Reading never runs code from the file (see fxopt.rebuild). Pickle and deepcopy of a GraphModule go
through the same format.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from fxopt import operators
from fxopt.container import (
    CONSTANTS,
    EXAMPLES,
    GRAPH,
    MANIFEST,
    Content,
    open_container,
    write_container,
)
from fxopt.encode import dtype_name, encode
from fxopt.encode_signature import encode_signature, write_size
from fxopt.errors import ArtefactError
from fxopt.files import atomic_path
from fxopt.graph_module import GraphModule
from fxopt.manifest import FORMAT, check_format, dump, fxopt_version, parse_json
from fxopt.rebuild import rebuild
from fxopt.stored import constants_of, examples_of

_META = ("path", "module", "source", "rule", "replaces", "switch")  # what a node keeps


def write_artefact(path: Path, graph: GraphModule, manifest: str) -> None:
    """Write a graph and its manifest, atomically; the same graph gives the same bytes.

    Raises ArtefactError where the path cannot be written or the graph holds what cannot be saved.
    """
    members = {MANIFEST: manifest.encode(), **_members(graph, with_examples=False)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write_container(file, members)


def read_artefact(path: Path) -> tuple[GraphModule, str]:
    """Read a graph and its manifest; raise ArtefactError for a file that is damaged or foreign."""
    with open_container(path) as container:
        manifest = container.text(MANIFEST)
        check_format(parse_json(manifest))
        content = parse_json(container.text(GRAPH))
        check_format(content)
        return rebuild(content, container.tensors(CONSTANTS), {}), manifest


def graph_to_bytes(graph: GraphModule, *, with_examples: bool = True) -> bytes:
    """Return a graph as bytes, with the values of its example inputs or only their ranges."""
    file = io.BytesIO()
    write_container(file, _members(graph, with_examples=with_examples))
    return file.getvalue()


def graph_from_bytes(content: bytes) -> GraphModule:
    """Return the graph that `graph_to_bytes` wrote; raise ArtefactError for anything else."""
    with open_container(bytes(content)) as container:
        graph = parse_json(container.text(GRAPH))
        check_format(graph)
        examples = container.tensors(EXAMPLES) if EXAMPLES in container.names else {}
        return rebuild(graph, container.tensors(CONSTANTS), examples)


# -- the graph as JSON ----------------------------------------------------------------------------


def _members(graph: GraphModule, *, with_examples: bool) -> dict[str, Content]:
    info = graph.info
    flags, tensors = constants_of(graph)
    examples, values = examples_of(info.example_inputs, with_examples)
    content = {
        "format": FORMAT,
        "fxopt": fxopt_version(),
        "name": info.model_name,
        "modules": dict(info.modules),
        "dimensions": dict(info.dimensions),
        "training": graph.training,
        "signature": None if info.signature is None else encode_signature(info.signature),
        "symbols": _symbols(graph),
        "graph": _graph(graph),
        "constants": flags,
        "examples": examples,
        "sources": sorted(info.sources),
        "state": sorted(info.state),
        "ties": {name: list(names) for name, names in sorted(info.ties.items())},
        "fitted": sorted(info.fitted),
        "regularizers": list(info.regularizers),
        "recipes": [[recipe.name, list(recipe.sources)] for recipe in info.recipes],
        "looked_at": {name: list(by) for name, by in sorted(info.looked_at.items())},
    }
    members: dict[str, Content] = {GRAPH: dump(content).encode(), CONSTANTS: tensors}
    return members | ({EXAMPLES: values} if with_examples else {})


def _graph(graph: GraphModule) -> dict[str, Any]:
    subgraphs = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = graph.value(node)
        if isinstance(value, GraphModule):
            subgraphs[str(node.target)] = _graph(value)
        elif not isinstance(value, torch.Tensor):
            raise ArtefactError(f"Constant '{node.target}' is no tensor, and cannot be saved.")
    return {
        "nodes": [_node(node) for node in graph.graph.nodes],
        "subgraphs": subgraphs,
        "mutated": sorted(graph.info.mutated),
    }


def _node(node: fx.Node) -> dict[str, Any]:
    written: dict[str, Any] = {"op": node.op, "name": node.name}
    meta = {key: node.meta[key] for key in _META if node.meta.get(key) is not None}
    if meta:
        written["meta"] = {k: list(v) if isinstance(v, tuple) else v for k, v in meta.items()}
    try:
        if node.op == "placeholder":
            written["val"] = write_value(node.meta["val"])
        elif node.op == "get_attr":
            written["target"] = str(node.target)
        elif node.op == "output":
            written["args"] = encode(node.args)
        else:
            written["target"] = operators.write(node.target)
            written["args"] = encode(node.args)
            written["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
            if _is_given(node):
                written["val"] = write_value(node.meta.get("val"))
    except ArtefactError as error:
        where = node.meta.get("source") or "an unknown line"
        raise ArtefactError(f"Node '{node.name}' (from {where}) cannot be saved: {error}") from None
    return written


def _is_given(node: fx.Node) -> bool:
    """Whether a node's value is written, because inferring it again would not give the same.

    Control flow has no value without its sub-graphs' operands, a check has none at all, and the
    sizes that depend on data get new symbols each time.
    """
    value = node.meta.get("val")
    if value is None or isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    plain = not isinstance(value, (torch.SymBool, torch.SymFloat))
    return plain and any(_is_unbacked(symbol) for symbol in _free(value))


def write_value(value: Any) -> Any:
    """Return the fake tensor, symbolic integer, or list of those, that a node stands for."""
    if value is None or isinstance(value, (int, float)):
        return {"plain": encode(value)}
    if isinstance(value, torch.SymInt):
        return {"size": write_size(value.node.expr)}
    if isinstance(value, torch.Tensor):
        return {
            "dtype": dtype_name(value.dtype),
            "device": str(value.device),
            "shape": [_size(size) for size in value.shape],
            "stride": [_size(size) for size in value.stride()],
        }
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [write_value(item) for item in value]}
    raise ArtefactError(f"A value of the type {type(value).__name__} cannot be saved.")


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else write_size(size.node.expr)


# -- symbolic sizes -------------------------------------------------------------------------------


def _symbols(graph: GraphModule) -> list[dict[str, Any]]:
    """Return every symbol with its example value and range, in order of appearance."""
    found: dict[sympy.Symbol, Any] = {}
    for one in (graph, *graph.subgraphs()):
        for node in one.graph.nodes:
            for symbol, env in _free(node.meta.get("val")).items():
                found.setdefault(symbol, env)
    return [_symbol(symbol, env) for symbol, env in found.items()]


def _symbol(symbol: sympy.Symbol, env: Any) -> dict[str, Any]:
    bounds = env.var_to_range.get(symbol)
    limits = [None, None] if bounds is None else [bounds.lower, bounds.upper]
    low, high = (int(b) if b is not None and b.is_Integer else None for b in limits)
    hint = None if _is_unbacked(symbol) else int(env.backed_var_to_val[symbol])
    return {
        "name": str(symbol), "positive": bool(symbol.is_positive), "hint": hint, "low": low,
        "high": high,
    }  # fmt: skip


def _free(value: Any) -> dict[sympy.Symbol, Any]:
    """Return the symbols in a node's value, each with the shape environment that knows it."""
    found: dict[sympy.Symbol, Any] = {}
    for size in _sizes(value):
        for symbol in sorted(size.node.expr.free_symbols, key=str):
            found.setdefault(symbol, size.node.shape_env)
    return found


def _sizes(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield from _sizes([*value.shape, *value.stride()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _sizes(item)
    elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        yield value


def _is_unbacked(symbol: sympy.Symbol) -> bool:
    return symbol_is_type(symbol, (SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT))
