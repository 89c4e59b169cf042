"""A graph made ready for drawing: its constants stand in the labels of their users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fxopt.picture.collapse import Network
from fxopt.picture.labels import type_label


@dataclass(frozen=True)
class Side:
    """A graph without its constants; a picture shows one, or one beside the other."""

    network: Network
    constants: Mapping[str, list[tuple[str, str]]]  # by user: the argument and the type of each
    classes: Mapping[str, str]  # by module path, without the package

    @classmethod
    def of(cls, full: Network, modules: Mapping[str, str] | None = None) -> Side:
        """Fold the constants of a graph; one that is returned as it is stays a node.

        `modules` adds classes by path to those that the graph knows itself.
        """
        network = full.copy()
        constants: dict[str, list[tuple[str, str]]] = {}
        for name, data in full.nodes(data=True):
            uses = list(full.out_edges(name, data=True))
            if data["op"] != "get_attr" or any(full.nodes[u]["op"] == "output" for _, u, _ in uses):
                continue
            network.remove_node(name)
            for _, user, use in uses:
                constants.setdefault(user, []).append((use["name"], type_label(use)))
        known = {data["path"]: data["module"] for _, data in network.nodes(data=True)}
        known = {**known, **full.graph["modules"], **(modules or {})}
        return cls(network, constants, {p: name.rpartition(".")[2] for p, name in known.items()})

    @property
    def whole(self) -> tuple[int, int, int]:
        """The `sizes` of the whole graph."""
        return self.sizes(self.network)

    def sizes(self, names: Iterable[str]) -> tuple[int, int, int]:
        """Return how many calls, parameters and multiply-accumulates these nodes are."""
        calls = {n: self.network.nodes[n] for n in names}
        calls = {n: data for n, data in calls.items() if data["op"] == "call_function"}
        parameters = {k: v for data in calls.values() for k, v in data["parameters"].items()}
        macs = sum(data["macs"] for n, data in calls.items() if "/" not in n)  # bodies: by the call
        return len(calls), sum(parameters.values()), macs
