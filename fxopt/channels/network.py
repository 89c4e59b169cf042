"""How channels tie layers together, for people's own analysis and for pictures: as networkx."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from graphviz import escape

from fxopt.channels.analysis import Channels
from fxopt.channels.groups import Role
from fxopt.errors import OptionError
from fxopt.files import write_atomic
from fxopt.picture.draw import new_picture
from fxopt.picture.render import render
from fxopt.picture.write import check_drawable

if TYPE_CHECKING:
    import networkx


def channels_network(channels: Channels) -> networkx.DiGraph:
    """Return layers and families of channels, and which layer computes or reads which family.

    Family nodes are called ("family", name) and have `channels` and `kind`; layer nodes are called
    ("layer", path) and have `frozen`: how many of the channels that they compute may not go, and
    `reason`: why. An edge from a layer to a family has `role` "computes", one back "reads".
    """
    import networkx

    graph = networkx.DiGraph(name=channels.graph.info.model_name)
    for family in channels.families:
        name = ("family", family.name)
        graph.add_node(name, channels=family.channels, kind=family.kind)
        for layer in family.layers:
            _layer(graph, layer)
            graph.add_edge(("layer", layer), name, role="computes")
        for member in family.members:
            if member.role is Role.INPUT:
                layer = member.constant.rpartition(".")[0] or member.constant
                _layer(graph, layer)
                graph.add_edge(name, ("layer", layer), role="reads")
    for one in channels.frozen():
        _layer(graph, one.layer)
        graph.nodes["layer", one.layer].update(frozen=one.count, reason=one.reason.text)
    return graph


def draw(channels: Channels, path: str | Path) -> None:
    """Draw which channels tie which layers, and what is frozen, into a .svg, .png, .pdf or .dot.

    Raises OptionError for another suffix, FxoptError where Graphviz's `dot` is not installed.
    """
    target = Path(path)
    kind = check_drawable(target)
    if kind == "html":
        raise OptionError(f"Cannot draw channels into '{path}': a .svg, .png, .pdf or .dot can be.")
    network = channels_network(channels)
    picture = new_picture(network.name, f"{network.name}: which channels go together")
    picture.attr(rankdir="LR")
    names = {node: f"n{number}" for number, node in enumerate(network)}
    for node, facts in network.nodes(data=True):
        if node[0] == "family":
            text = f"{facts['channels']} {facts['kind']}"
            picture.node(names[node], text, fillcolor="#d8ecd8", tooltip=escape(node[1]))
        else:
            held = f"\n{facts['frozen']} frozen: {facts['reason']}" if facts["frozen"] else ""
            picture.node(names[node], escape(node[1] + held), fillcolor="white")
    for source, sink in network.edges:
        picture.edge(names[source], names[sink])
    source = str(picture.source)
    is_text = kind in ("dot", "gv")
    write_atomic(target, source if is_text else render(source, kind, len(names)))


def _layer(graph: networkx.DiGraph, path: str) -> None:
    if ("layer", path) not in graph:
        graph.add_node(("layer", path), frozen=0, reason="")
