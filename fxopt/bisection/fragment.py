"""A fragment: some calls of a graph, with what goes into them and what comes out."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.shapes import is_tensor


@dataclass(frozen=True)
class Fragment:
    """Calls of one graph, in its order; they need not be neighbours."""

    graph: GraphModule
    calls: tuple[fx.Node, ...]

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values that come from outside: tensors, and symbolic sizes as numbers."""
        return tuple(node for node in self._arguments if node.op != "get_attr")

    @cached_property
    def constants(self) -> tuple[fx.Node, ...]:
        """The get_attr nodes of the constants that are used."""
        return tuple(node for node in self._arguments if node.op == "get_attr")

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The tensors that are read outside; where none are, those that nobody reads."""
        inside = set(self.calls)
        tensors = [node for node in self.calls if is_tensor(node)]
        read = [node for node in tensors if any(user not in inside for user in node.users)]
        return tuple(read or [node for node in tensors if not node.users])

    @cached_property
    def _arguments(self) -> tuple[fx.Node, ...]:
        inside = set(self.calls)
        used = (node for call in self.calls for node in call.all_input_nodes)
        return tuple(dict.fromkeys(node for node in used if node not in inside))

    def grown(self) -> Fragment:
        """Return this fragment with the calls around it: those it reads, and those that read it."""
        around = set(self.calls)
        for node in self.calls:
            around.update(n for n in (*node.all_input_nodes, *node.users) if _is_call(n))
        return fragment(self.graph, around)

    @property
    def path(self) -> str:
        """The path of the innermost module that holds all calls; empty for the model itself."""
        paths = [str(node.meta.get("path") or "").split(".") for node in self.calls]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join(parts[0] for parts in shared)

    def within(self, path: str) -> Fragment:
        """Return this fragment with all calls of the module at `path`."""
        inside = [n for n in self.graph.graph.nodes if _is_call(n) and _is_under(n, path)]
        return fragment(self.graph, {*self.calls, *inside})

    def without(self, dropped: Collection[fx.Node]) -> Fragment:
        """Return this fragment without some of its calls."""
        return fragment(self.graph, [node for node in self.calls if node not in dropped])


def fragment(graph: GraphModule, nodes: Iterable[fx.Node]) -> Fragment:
    """Return the fragment of these calls, and of those that lists and tuples tie to them."""
    found: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found[node] = None
            pending.extend(_tied(node))
    return Fragment(graph, tuple(node for node in graph.graph.nodes if node in found))


def _tied(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the makers of the lists that a call reads, and the readers of one that it makes."""
    yield from (used for used in node.all_input_nodes if _is_call(used) and _is_list(used))
    if _is_list(node):
        yield from (user for user in node.users if user.target is operator.getitem)


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def _is_list(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (list, tuple))


def _is_under(node: fx.Node, path: str) -> bool:
    own = str(node.meta.get("path") or "")
    return not path or own == path or own.startswith(f"{path}.")
