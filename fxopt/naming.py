"""Nodes by what users call them: paths of layers, names of nodes, operators, and patterns."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import fx

from fxopt.errors import unknown_name
from fxopt.graph_module import GraphModule


def operators(names: str) -> frozenset[str]:
    """Return the full names of operators of PyTorch, which overloads share: "aten::conv2d"."""
    return frozenset(f"aten::{name}" for name in names.split())


def fits(node: fx.Node, pattern: str) -> bool:
    """Whether a pattern fits a node.

    It is compared with the path of the node's layer and of the modules around it ("layer1.*",
    "head"), with its name in the graph ("conv2d_3"), and with its operator ("aten.linear").
    """
    names = (node.name, node.meta.get("path") or node.name)
    if any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and fnmatchcase(schema.name.replace("::", "."), pattern)


def check_patterns(graph: GraphModule, patterns: Iterable[str]) -> None:
    """Raise OptionError for a pattern that fits no node."""
    for pattern in patterns:
        if not any(fits(node, pattern) for node in graph.graph.nodes):
            paths = {node.meta["path"] for node in graph.graph.nodes if node.meta.get("path")}
            raise unknown_name("layer, node or pattern of them:", pattern, paths)
