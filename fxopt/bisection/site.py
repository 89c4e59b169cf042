"""Where one rewrite took place: the nodes before and after it, and what of the model they were."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fxopt.bisection.attempt import parts_of
from fxopt.diff import Diff, diff_nodes, diff_text
from fxopt.graph_module import GraphModule
from fxopt.story import Recorder, Snapshot
from fxopt.text import graph_text


@dataclass(frozen=True)
class Site:
    """Two graphs, one rewrite apart."""

    before: GraphModule
    after: GraphModule

    @property
    def created(self) -> tuple[str, ...]:
        """The nodes that are new."""
        return tuple(self._diff.added)

    @property
    def erased(self) -> tuple[str, ...]:
        """The nodes that are gone."""
        return tuple(self._diff.removed)

    @property
    def changed(self) -> tuple[str, ...]:
        """The nodes that have other arguments; not those that only read what was replaced."""
        return tuple(self._diff.changed)

    @cached_property
    def diff(self) -> str:
        """The lines of the graph's text that differ, headed by their place in the model."""
        return diff_text(*self._snapshots)

    @cached_property
    def part(self) -> tuple[str, GraphModule, GraphModule]:
        """The sub-graph of control flow that differs, with its name; or the graphs themselves."""
        others = dict(parts_of(self.after))
        for name, part in parts_of(self.before):
            if name in others and graph_text(part) != graph_text(others[name]):
                return name, part, others[name]
        return "", self.before, self.after

    @cached_property
    def core(self) -> tuple[fx.Node, ...]:
        """The calls before that the rewrite was about.

        Those that it erased, replaced, or gave other arguments, and those that took their place.
        """
        found = self._diff
        names = {*found.removed, *found.changed}
        for name in found.added:
            names.update(found.added[name].meta.get("replaces", ()))
        for successors in found.successors.values():
            names.update(reference.removeprefix("%") for reference in successors)
        return tuple(_calls(self.part[1], names))

    @property
    def replaced(self) -> list[tuple[fx.Node, fx.Node]]:
        """The calls that are gone, each with the one node that its readers use now."""
        _, before, after = self.part
        old = {node.name: node for node in before.graph.nodes}
        new = {f"%{node.name}": node for node in after.graph.nodes}
        return [
            (old[name], new[found[0]])
            for name, found in self._diff.successors.items()
            if len(found) == 1 and found[0] in new and old[name].op == "call_function"
        ]

    @cached_property
    def made(self) -> tuple[fx.Node, ...]:
        """The calls after that the rewrite made, or gave other arguments."""
        return tuple(_calls(self.part[2], {*self._diff.added, *self._diff.changed}))

    @cached_property
    def place(self) -> dict[str, str | None]:
        """The module path, the module's class and the source line of what was rewritten."""
        nodes = [*self.core, *self.made]
        named = [node for node in nodes if node.meta.get("source")] or nodes
        meta = named[0].meta if named else {}
        return {key: meta.get(key) or None for key in ("path", "module", "source")}

    @cached_property
    def _snapshots(self) -> tuple[Snapshot, Snapshot]:
        return Recorder().snapshot(self.before), Recorder().snapshot(self.after)

    @cached_property
    def _diff(self) -> Diff:
        _, before, after = self.part
        return diff_nodes(Recorder().snapshot(before).records, Recorder().snapshot(after).records)


def _calls(graph: GraphModule, names: set[str]) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if n.op == "call_function" and n.name in names]
