"""A graph as DOT: boxes in nested clusters, arrows with the types of what they carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any

import graphviz

from fxopt.picture.collapse import Box, Network, contract
from fxopt.picture.frames import Frame, Key, frame_tree, mark_frames
from fxopt.picture.labels import (
    call_label,
    cluster_label,
    input_label,
    module_label,
    sizes_text,
    type_label,
)
from fxopt.picture.palette import CLUSTERS, LINE, QUIET_TEXT, TEXT
from fxopt.picture.side import Side

FONT = "Helvetica"  # every Graphviz knows how wide it is
INVISIBLE = {"style": "invis", "label": ""}
LARGE = 500  # boxes and arrows: `dot` then stops improving positions earlier
PARALLEL = 3  # how many arrows between the same two boxes say what they carry
FAN = 4  # how many arrows that carry the same value say so
CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}  # classes that say nothing

Paint = Callable[[Box], tuple[str, str]]  # the fill of a box, and a note for its last line


def new_picture(name: str, label: str) -> graphviz.Digraph:
    """Return an empty picture with a label above."""
    return graphviz.Digraph(
        name,
        graph_attr={
            "label": label, "labelloc": "t", "fontname": FONT, "fontsize": "14", "fontcolor": TEXT,
            "nodesep": "0.25", "ranksep": "0.3",
        },
        node_attr={
            "shape": "box", "style": "filled,rounded", "fontname": FONT, "fontsize": "12",
            "fontcolor": TEXT, "color": LINE, "margin": "0.12,0.05", "height": "0.3",
        },
        edge_attr={
            "fontname": FONT, "fontsize": "9", "fontcolor": QUIET_TEXT, "color": LINE,
            "arrowsize": "0.7",
        },
    )  # fmt: skip


def finish(picture: graphviz.Digraph, *drawn: Network) -> tuple[str, int]:
    """Return a picture as DOT, and how many boxes it has; a large one is laid out in less time."""
    boxes = sum(graph.number_of_nodes() for graph in drawn)
    if boxes + sum(graph.number_of_edges() for graph in drawn) > LARGE:
        picture.attr(nslimit="1", mclimit="0.1")  # with nslimit1, too, some graphs crash `dot`
    return str(picture.source), boxes


def boxed(network: Network, open_paths: Set[str]) -> Network:
    """Return a graph as boxes, for `columns_for` and `divide`."""
    boxes = contract(network, open_paths)
    mark_frames(boxes)
    return boxes


def draw_side(
    picture: graphviz.Digraph, side: Side, drawn: Network, paint: Paint, word: str = ""
) -> None:
    """Draw what `divide` returned; each column lies in a frame headed by `word`, if there is one.

    The columns of a picture stand in the order they are drawn in: `dot` keeps the order of clusters
    that are not inside of others and whose boxes begin at the top.
    """
    columns: dict[int, list[str]] = {}
    for name, column in drawn.nodes(data="column"):
        columns.setdefault(column, []).append(name)
    begun: set[Key] = set()
    prefix = f"{word} " if word else ""
    for column, names in sorted(columns.items()):
        with picture.subgraph(name=f"cluster {prefix}{column}") as cluster:
            note = "continued" if column else sizes_text(side.whole)
            look = {"style": "rounded", "label": cluster_label(word, note)} if word else INVISIBLE
            cluster.attr(color=LINE, penwidth="0.5", margin="8", **look)
            pen = _Pen(side, drawn, paint, prefix, f"{column} ", begun)
            pen.draw(cluster, frame_tree(drawn, names))
        begun |= {frame for name in names for frame in drawn.nodes[name]["frames"]}
    _draw_arrows(picture, drawn, prefix)


def _draw_arrows(into: graphviz.Digraph, drawn: Network, prefix: str) -> None:
    fans = Counter(value for _, _, value in drawn.edges(keys=True))
    said: set[str] = set()
    for source, target in dict.fromkeys(drawn.edges()):
        values = drawn[source][target]
        fan = len(values) == 1 and fans[next(iter(values))] >= FAN
        label = "" if fan and said >= values.keys() else _words(values.values())
        said |= values.keys()
        # the many arrows of one value must not bend the chain that they lead to
        into.edge(prefix + source, prefix + target, label, weight="1" if fan else "4")


def _words(values: Iterable[Any]) -> str:
    words = [type_label(data) for data in values]
    if len(words) > PARALLEL:
        words = [f"{len(words)} values"]
    return graphviz.escape("\n".join(f" {word} " for word in words))


# -- boxes in clusters -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pen:
    """Draws the frames of one column."""

    side: Side
    drawn: Network
    paint: Paint
    prefix: str
    column: str
    begun: set[Key]  # the modules that an earlier column shows a part of

    def draw(self, into: graphviz.Digraph, frame: Frame, depth: int = 0) -> None:
        """Draw what is in a frame, and the frames inside."""
        for name in frame.names:
            self._node(into, name, frame.path)
        for inner in frame.inside.values():
            name = f"cluster {self.prefix}{self.column}{inner.path} {inner.number}"
            with into.subgraph(name=name) as cluster:
                cluster.attr(
                    label=self._title(inner, frame.path), labeljust="l", fontsize="11",
                    style="filled,rounded", color=LINE, penwidth="0.5", margin="10",
                    fillcolor=CLUSTERS[min(depth, len(CLUSTERS) - 1)],
                )  # fmt: skip
                self.draw(cluster, inner, depth + 1)

    def _node(self, into: graphviz.Digraph, name: str, around: str) -> None:
        data = self.drawn.nodes[name]
        if "letter" in data:
            into.node(
                self.prefix + name, data["letter"], shape="circle", fontsize="9", width="0.25",
                fixedsize="true", fillcolor="white",
            )  # fmt: skip
            return
        fill, note = self.paint(data["box"])
        label = self._label(data["box"], name, around, note)
        more = {"penwidth": "1.6"} if data["box"].is_module else {}
        tip = self._tooltip(data["box"])
        into.node(self.prefix + name, label, fillcolor=fill, tooltip=graphviz.escape(tip), **more)

    def _label(self, box: Box, name: str, around: str, note: str) -> str:
        data = self.side.network.nodes[box.members[0]]
        place = _relative(box.path, around)
        if box.is_module:
            part = f"part {box.part} of {box.parts}" if box.parts > 1 else ""
            sizes = self.side.sizes(box.members)
            return module_label(place, self._class(box.path), part, sizes, note)
        if data["op"] == "output":
            return "<<B>output</B>>"
        if data["op"] in ("placeholder", "get_attr"):
            return input_label(name, data)
        return call_label(data, self.side.constants.get(name, ()), place)

    def _title(self, frame: Frame, around: str) -> str:
        """Return the label of an open module."""
        continued = "continued" if (frame.path, frame.number) in self.begun else ""
        words = " ".join(filter(None, (self._class(frame.path), continued)))
        return cluster_label(_relative(frame.path, around), words)

    def _class(self, path: str) -> str:
        name = self.side.classes.get(path, "")
        return "" if name in CONTAINERS else name

    def _tooltip(self, box: Box) -> str:
        """Return what a browser shows over a box: a node as text, or what is in a module."""
        members = [self.side.network.nodes[member] for member in box.members]
        if box.is_module:
            counts = Counter(data["target"] for data in members)
            return "\n".join(f"{count} {name}" for name, count in counts.most_common())
        return "\n".join(filter(None, (members[0]["text"], members[0]["source"])))


def _relative(path: str, around: str) -> str:
    return path.removeprefix(around).removeprefix(".") if around else path
