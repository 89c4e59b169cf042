"""The graph with every module that is not open as one node.

Contracting must not make cycles: where a module is called twice, or shared between others, what
runs between its calls would be both before and behind it. Such a module becomes several parts.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import networkx

Network: TypeAlias = "networkx.MultiDiGraph"


@dataclass
class Box:
    """What is drawn as one: a node, or a part of a module."""

    path: str  # of the module that it is, or of the module that its one node was traced in
    members: list[str]
    part: int = 1
    parts: int = 1  # in how many parts its module had to be drawn

    @property
    def is_module(self) -> bool:
        """Whether it stands for several nodes."""
        return len(self.members) > 1


def contract(network: Network, open_paths: Set[str]) -> Network:
    """Return the graph with each module that is not open as one node, free of cycles.

    Nodes stand in topological order and have a Box as their attribute `box`. The key of an edge is
    the name of the node whose value it carries: one that a box uses several times is one edge.
    """
    import networkx

    place: dict[str, str] = {}
    quotient = networkx.MultiDiGraph()
    for box in _partition(network, open_paths):
        name = _identifier(box)
        while name in quotient:
            name += "'"
        quotient.add_node(name, box=box)
        place.update(dict.fromkeys(box.members, name))
    for source, target, data in network.edges(data=True):
        start, end = place[source], place[target]
        if start != end:
            quotient.add_edge(start, end, key=source, **data)
    return _sorted(quotient)


def _sorted(graph: Network) -> Network:
    """Return the graph with its nodes in topological order, and else as they were."""
    import networkx

    position = {name: number for number, name in enumerate(graph)}
    result = networkx.MultiDiGraph()
    for name in networkx.lexicographical_topological_sort(graph, key=position.__getitem__):
        result.add_node(name, **graph.nodes[name])
    result.add_edges_from(graph.edges(keys=True, data=True))
    return result


def enclosing(path: str) -> list[str]:
    """Return the paths of a module and of those around it, outermost first."""
    names = path.split(".") if path else []
    return [".".join(names[:length]) for length in range(1, len(names) + 1)]


def _identifier(box: Box) -> str:
    """Return a name of characters that mean nothing to Graphviz."""
    name = box.members[0]
    if box.is_module:
        name = f"module {box.path}" + (f" {box.part}" if box.parts > 1 else "")
    return re.sub(r"[^\w./ ]", "_", name)


def _partition(network: Network, open_paths: Set[str]) -> list[Box]:
    """Divide the nodes, in topological order, into boxes whose quotient graph has no cycle.

    A node joins the latest box of its module unless that box reaches, through another one, a box
    that the node uses; then it begins a new box.
    """
    boxes: list[Box] = []
    above: list[int] = []  # for each box the set of boxes that reach it, as bits
    latest: dict[str, int] = {}
    where: dict[str, int] = {}
    for name, path in network.nodes(data="path"):  # in graph order, which is topological
        module = _closed(path, open_paths)
        index = latest.get(module) if module is not None else None
        used = {where[source] for source in network.predecessors(name)}
        if index is not None and any(above[one] >> index & 1 for one in used - {index}):
            index = None
        if index is None:
            index = len(boxes)
            boxes.append(Box(path if module is None else module, []))
            above.append(0)
            if module is not None:
                latest[module] = index
        boxes[index].members.append(name)
        where[name] = index
        _place_behind(above, index, used - {index}, is_new=len(boxes[index].members) == 1)
    _count_parts([box for box in boxes if box.is_module])
    return boxes


def _closed(path: str, open_paths: Set[str]) -> str | None:
    """Return the outermost module on the path that is not open."""
    return next((outer for outer in enclosing(path) if outer not in open_paths), None)


def _place_behind(above: list[int], index: int, used: set[int], *, is_new: bool) -> None:
    """Note that box `index`, and so whatever it reaches, comes behind the boxes `used`."""
    bits = above[index]
    for one in used:
        bits |= above[one] | 1 << one
    if bits == above[index]:
        return
    above[index] = bits
    if not is_new:
        for other, those in enumerate(above):
            if those >> index & 1:
                above[other] = those | bits


def _count_parts(boxes: list[Box]) -> None:
    by_path: dict[str, list[Box]] = {}
    for box in boxes:
        by_path.setdefault(box.path, []).append(box)
    for same in by_path.values():
        for number, box in enumerate(same, start=1):
            box.part, box.parts = number, len(same)
