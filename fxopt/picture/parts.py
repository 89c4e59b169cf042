"""What holds together of a module: a module that is called several times is several parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxopt.picture.collapse import Network


def parts_by_path(graph: Network, paths: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """Return, by module path, the part of each node in it, from 1 on.

    `paths` are the modules that each node is in. No path of the graph, whose nodes are in
    topological order, leaves a part and comes back into it.
    """
    order = list(graph)
    position = {name: index for index, name in enumerate(order)}
    members: dict[str, list[str]] = {}
    for name in order:
        for path in paths[name]:
            members.setdefault(path, []).append(name)
    return {
        path: _parts(graph, order[position[names[0]] : position[names[-1]] + 1], set(names))
        for path, names in members.items()
    }


def _parts(graph: Any, stretch: Sequence[str], members: set[str]) -> dict[str, int]:
    """Divide the members, all of which lie in a stretch of the topological order."""
    parts: dict[str, int] = {}
    reached: dict[str, int] = {}  # of a node outside: the latest part that leads to it
    latest = 1
    for name in stretch:
        sources = list(graph.predecessors(name))
        outside = max((reached.get(source, 0) for source in sources), default=0)
        if name not in members:
            inside = max((parts.get(source, 0) for source in sources), default=0)
            reached[name] = max(outside, inside)
            continue
        latest += outside == latest
        parts[name] = latest
    return parts
