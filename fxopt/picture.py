"""A graph as a picture, for Graphviz."""

from __future__ import annotations

from pathlib import Path

import graphviz

from fxopt.errors import FxoptError, OptionError
from fxopt.files import atomic_path, write_atomic
from fxopt.graph_module import GraphModule
from fxopt.text import target_text, type_text

FORMATS = ("svg", "png", "pdf")
_COLOURS = {"placeholder": "#d9ead3", "get_attr": "#eeeeee", "output": "#d9ead3"}


def visualize(graph: GraphModule, path: str | Path) -> None:
    """Write a picture: `.dot` always works; `.svg`, `.png` and `.pdf` need Graphviz's `dot`.

    Raises OptionError for another suffix, FxoptError where `dot` is not installed.
    """
    target = Path(path)
    kind = target.suffix.removeprefix(".").lower()
    if kind in ("dot", "gv"):
        write_atomic(target, dot(graph))
        return
    if kind not in FORMATS:
        raise OptionError(
            f"Cannot draw into '{target}'. Give a file that ends in .dot, .{', .'.join(FORMATS)}."
        )
    try:
        content = graphviz.Source(dot(graph)).pipe(format=kind)
    except graphviz.ExecutableNotFound:
        raise FxoptError(
            f"Drawing a .{kind} needs Graphviz's program 'dot', which is not installed (on Debian: "
            "apt-get install graphviz). A .dot file needs nothing."
        ) from None
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def dot(graph: GraphModule) -> str:
    """Return the graph in the DOT language: constants small and grey, edges with their types."""
    picture = graphviz.Digraph(
        graph.info.model_name or "graph",
        node_attr={"shape": "box", "style": "filled,rounded", "fontname": "sans-serif"},
        edge_attr={"fontname": "sans-serif", "fontsize": "9"},
    )
    for node in graph.graph.nodes:
        label = {"output": "output", "get_attr": str(node.target)}.get(node.op, node.name)
        if node.op == "call_function":
            label = target_text(node.target)
        size = "9" if node.op == "get_attr" else "12"
        colour = _COLOURS.get(node.op, "#ffffff")
        picture.node(node.name, graphviz.escape(label), fillcolor=colour, fontsize=size)
        for used in node.all_input_nodes:
            picture.edge(used.name, node.name, graphviz.escape(type_text(used.meta.get("val"))))
    return str(picture.source)
