"""What differs between two moments of one graph, node by node, and that as text.

A node is the same one where its name is. One that uses another value than before did not change by
that, if the value it used is gone: it follows what now stands for it, its successor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from fxopt.text import node_text, type_text, value_text

if TYPE_CHECKING:
    from fxopt.story import NodeRecord, Snapshot


@dataclass(frozen=True)
class Diff:
    """The nodes that two moments do not share, by name, in graph order."""

    removed: Mapping[str, NodeRecord]
    added: Mapping[str, NodeRecord]
    changed: Mapping[str, tuple[NodeRecord, NodeRecord]]
    successors: Mapping[str, tuple[str, ...]]  # of removed nodes: what their users use now

    def __bool__(self) -> bool:
        return bool(self.removed or self.added or self.changed)


def diff_nodes(before: Iterable[NodeRecord], after: Iterable[NodeRecord]) -> Diff:
    """Compare two moments of a graph."""
    old = {record.name: record for record in before}
    new = {record.name: record for record in after}
    changed: dict[str, tuple[NodeRecord, NodeRecord]] = {}
    successors: dict[str, dict[str, None]] = {}
    for name in old.keys() & new.keys():
        if old[name] is new[name] or _line(old[name]) == _line(new[name]):
            continue
        followed = _followed(old[name], new[name], new)
        if not followed:
            changed[name] = old[name], new[name]
        for gone, successor in followed:
            successors.setdefault(gone, {})[successor] = None
    return Diff(
        removed={name: record for name, record in old.items() if name not in new},
        added={name: record for name, record in new.items() if name not in old},
        changed={name: changed[name] for name in new if name in changed},
        successors={name: tuple(names) for name, names in successors.items()},
    )


def _followed(
    old: NodeRecord, new: NodeRecord, present: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return which gone values a node used before, and which it uses instead.

    Empty where anything else about the node changed, too.
    """
    if _skeleton(old) != _skeleton(new):
        return []
    inputs = zip(_inputs(old), _inputs(new), strict=True)
    pairs = [(a, b) for a, b in inputs if a.name != b.name]
    if any(a.op == "get_attr" or a.name in present for a, _ in pairs):
        return []
    return [(a.name, _reference(b)) for a, b in pairs]


def _inputs(record: NodeRecord) -> list[fx.Node]:
    """Return the nodes among the arguments, one per use."""
    found: list[fx.Node] = []
    fx.map_arg((record.args, record.kwargs), found.append)
    return found


def _skeleton(record: NodeRecord) -> tuple[Any, ...]:
    """Return all of a node but which values it uses."""
    arguments = fx.map_arg((record.args, dict(record.kwargs)), lambda node: "")
    kind = type_text(record.meta.get("val"))
    return record.op, record.target, kind, value_text(arguments[0]), str(arguments[1])


def _reference(node: fx.Node) -> str:
    return f"'{node.target}'" if node.op == "get_attr" else f"%{node.name}"


def _line(record: NodeRecord) -> str:
    return node_text(record, inline=True)  # type: ignore[arg-type]


# -- as text ---------------------------------------------------------------------------------------


def diff_text(before: Snapshot, after: Snapshot) -> str:
    """Return what differs as text, one line per node, in hunks headed by where in the model.

    `-` and `+` stand before what was and what is; behind a removed node an arrow leads to what its
    users use now. Constants stand by name where they are used, and users that only follow are left
    out. The bodies of control-flow operators come after the graph, headed `@@ body @@`. Empty where
    nothing differs.
    """
    return "\n".join(_lines(before, after, ""))


def _lines(before: Snapshot, after: Snapshot, part: str) -> Iterator[str]:
    """Yield the lines for a graph and its sub-graphs; `part` is the way to it among those."""
    yield from _hunks(before.records, after.records, part)
    for name, body in after.subgraphs.items():
        if name in before.subgraphs:
            yield from _lines(before.subgraphs[name], body, f"{part}{name}/")


def _hunks(
    before: Iterable[NodeRecord], after: Iterable[NodeRecord], part: str
) -> Iterator[str]:
    """Yield the lines that differ; a heading stands where the module is another than before."""
    known = None
    ordered = _in_order(list(before), list(after))
    for differs, group in itertools.groupby(ordered, key=lambda entry: bool(entry[1])):
        if not differs:
            continue
        hunk = sorted(group, key=lambda entry: entry[1][-1][0] == "+")  # what is gone comes first
        place = part + _place([record.meta.get("path") or "" for record, _ in hunk])
        if place != known:
            yield f"@@ {place.rstrip('/') or 'top level'} @@"
        known = place
        yield from (line for _, lines in hunk for line in lines)


def _in_order(
    before: list[NodeRecord], after: list[NodeRecord]
) -> Iterator[tuple[NodeRecord, list[str]]]:
    """Yield all nodes of both, each removed one where it stood; with lines where they differ.

    Constants are left out: they stand where they are used. One that nothing uses is a line.
    """
    found = diff_nodes(before, after)
    position = {record.name: index for index, record in enumerate(before)}
    hidden = (_used_constants(before) | _used_constants(after)) - found.changed.keys()
    passed = 0
    for record in after:
        if record.name in hidden:
            continue
        place = position.get(record.name, passed)
        yield from _removed(before[passed:place], found, hidden)
        passed = max(passed, place + (record.name in position))
        if record.name in found.changed:
            pair = zip("-+", found.changed[record.name], strict=True)
            yield record, [sign + _line(one) for sign, one in pair]
        else:
            yield record, [f"+{_line(record)}"] if record.name in found.added else []
    yield from _removed(before[passed:], found, hidden)


def _removed(
    between: Iterable[NodeRecord], found: Diff, hidden: Set[str]
) -> Iterator[tuple[NodeRecord, list[str]]]:
    for record in between:
        if record.name in found.removed and record.name not in hidden:
            successors = ", ".join(found.successors.get(record.name, ()))
            arrow = f"  → {successors}" if successors else ""
            yield record, [f"-{_line(record)}{arrow}"]


def _used_constants(records: Iterable[NodeRecord]) -> set[str]:
    return {node.name for record in records for node in _inputs(record) if node.op == "get_attr"}


def _place(paths: list[str]) -> str:
    """Return the innermost module that holds all of these."""
    shared = zip(*(path.split(".") for path in paths), strict=False)
    same = itertools.takewhile(lambda names: len(set(names)) == 1, shared)
    return ".".join(names[0] for names in same)
