"""What emitters and the walk need to know of graph nodes, and how ONNX wants it said."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.backends.onnx.dtypes import ONNX_DTYPES, SHADOWS_ON_CPU
from fxopt.backends.onnx.registry import Rule, rules
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule


@functools.lru_cache(maxsize=1)
def all_rules() -> dict[Any, Rule]:
    """Return every emitter by operator, read once."""
    return rules()


def shape_of(node: Any) -> list[Any]:
    """Return the sizes of a node's value, with symbols that are known numbers as integers."""
    return [plain(size) for size in node.meta["val"].shape]


def plain(size: Any) -> Any:
    """Return a size as an integer where it is a known one."""
    if type(size) is int:
        return size
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else size
    return size


def number_dtype(value: Any) -> torch.dtype:
    """Return the dtype in which a number, perhaps a symbolic one, is computed."""
    if isinstance(value, (bool, torch.SymBool)):
        return torch.bool
    return torch.float64 if isinstance(value, (float, torch.SymFloat)) else torch.int64


def dimensions(shape: Sequence[Any]) -> list[Any]:
    """Return sizes as ONNX dimensions: integers, and symbols by name."""
    sizes = [plain(size) for size in shape]
    return [size if isinstance(size, int) else str(size.node.expr) for size in sizes]


def describe(value: ir.Value, fake: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Record a fake tensor's shape and dtype (or another dtype) on an ONNX value."""
    value.shape = ir.Shape(dimensions(fake.shape))
    dtype = fake.dtype if dtype is None else dtype
    if dtype in ONNX_DTYPES:
        value.type = ir.TensorType(ONNX_DTYPES[dtype])


def attribute(name: str, given: Any) -> ir.Attr:
    """Return an ONNX attribute of the type that the Python value tells."""
    if isinstance(given, (bool, int)):
        return ir.AttrInt64(name, int(given))
    if isinstance(given, float):
        return ir.AttrFloat32(name, given)
    if isinstance(given, str):
        return ir.AttrString(name, given)
    if isinstance(given, ir.Graph):
        return ir.AttrGraph(name, given)
    if isinstance(given, np.ndarray):
        return ir.AttrTensor(name, ir.Tensor(given))
    if all(isinstance(item, str) for item in given) and given:
        return ir.AttrStrings(name, list(given))
    if any(isinstance(item, float) for item in given):
        return ir.AttrFloat32s(name, [float(item) for item in given])
    return ir.AttrInt64s(name, [int(item) for item in given])


def has_shadow(node: fx.Node) -> bool:
    """Whether a node reads or makes a dtype that the runtime's CPU kernels do not know."""
    return any(
        getattr(fake, "dtype", None) in SHADOWS_ON_CPU
        for one in (node, *node.all_input_nodes)
        for fake in pytree.tree_leaves(one.meta.get("val"))
    )


def results_of(graph: GraphModule) -> list[Any]:
    """Return what a graph returns, node by node."""
    results: Any = graph.output_node.args[0]
    return list(results) if isinstance(results, (list, tuple)) else [results]


def refusal(node: fx.Node, reason: str, remedy: str = "") -> LoweringError:
    """Build the error for a node that has no form in ONNX."""
    where = [f"node '{node.name}'"]
    if node.meta.get("path"):
        where.append(f"module '{node.meta['path']}'")
    if node.meta.get("source"):
        where.append(f"source: {node.meta['source']}")
    remedy = remedy or (
        "Replace it in the model by an equal computation, keep that part outside of the compiled "
        "model, or use backend='eager'."
    )
    return LoweringError(
        f"Cannot express {node.target} in ONNX ({', '.join(where)}): {reason}. {remedy}"
    )
