"""The story of an optimization: what the graph was, and what each pass made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from fxopt.contract import Effect, Miss, RuleCount
from fxopt.cost import macs
from fxopt.diff import diff_text
from fxopt.graph_module import GraphModule
from fxopt.text import node_text


class NodeRecord:
    """One node as it was at one moment; it does not change when the graph does."""

    def __init__(self, node: fx.Node) -> None:
        self.name, self.op, self.target = node.name, node.op, node.target
        self.args, self.kwargs = node.args, node.kwargs
        self.meta: Mapping[str, Any] = dict(node.meta)

    def is_of(self, node: fx.Node) -> bool:
        """Whether the node still is what was recorded."""
        return (
            self.args is node.args
            and self.kwargs is node.kwargs
            and self.meta.get("val") is node.meta.get("val")
        )

    @property
    def all_input_nodes(self) -> list[str]:
        """The names of the nodes among the arguments."""
        names: list[str] = []
        fx.map_arg((self.args, self.kwargs), lambda node: names.append(node.name))
        return names

    @cached_property
    def macs(self) -> int:
        """The multiply-accumulates of this call."""
        return macs(self)  # type: ignore[arg-type]

    @cached_property
    def text(self) -> str:
        """The node as a line of text."""
        return node_text(self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Counts:
    """The size of a graph: calls, elements of all parameters, and multiply-accumulates."""

    nodes: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Snapshot:
    """A graph at one moment; unchanged nodes are shared with the snapshot before.

    `subgraphs` holds the bodies of control-flow operators, by the constant's name.
    """

    records: tuple[NodeRecord, ...] = field(repr=False)
    parameters: int
    subgraphs: Mapping[str, Snapshot] = field(default_factory=dict, repr=False)

    @cached_property
    def counts(self) -> Counts:
        """The size of the graph; the calls in its sub-graphs are among its nodes."""
        calls = [record for record in self.records if record.op == "call_function"]
        inside = sum(snapshot.counts.nodes for snapshot in self.subgraphs.values())
        return Counts(len(calls) + inside, self.parameters, sum(record.macs for record in calls))

    @cached_property
    def text(self) -> str:
        """The graph as text, its sub-graphs indented below it."""
        lines = [record.text for record in self.records]
        for name, snapshot in self.subgraphs.items():
            lines += [f"{name}:", *(f"  {line}" for line in snapshot.text.splitlines())]
        return "\n".join(lines) + "\n"


class Recorder:
    """Takes snapshots of one graph as it changes."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, NodeRecord] = {}
        self._inside: dict[str, Recorder] = {}

    def snapshot(self, graph: GraphModule) -> Snapshot:
        """Record the graph as it is now, re-using the records of nodes that did not change."""
        known: dict[fx.Node, NodeRecord] = {}
        for node in graph.graph.nodes:
            record = self._known.get(node)
            if record is None or not record.is_of(node):
                record = NodeRecord(node)
            known[node] = record
        self._known = known
        subgraphs = {
            str(node.target): value
            for node in graph.graph.find_nodes(op="get_attr")
            if isinstance(value := graph.value(node), GraphModule)
        }
        self._inside = {name: self._inside.get(name, Recorder()) for name in subgraphs}
        parameters = sum(
            p.numel() for m in graph.modules() for p in m._parameters.values() if p is not None
        )
        inside = {name: self._inside[name].snapshot(part) for name, part in subgraphs.items()}
        return Snapshot(tuple(known.values()), parameters, inside)


@dataclass(frozen=True, repr=False)
class Step:
    """What one pass did."""

    name: str
    options: Mapping[str, Any]
    effect: Effect
    before: Snapshot
    after: Snapshot
    seconds: float
    rewrites: int
    misses: tuple[Miss, ...] = ()
    created: tuple[str, ...] = ()
    erased: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rules: Mapping[str, RuleCount] = field(default_factory=dict)
    details: Any = None  # what else the pass had to say; text when printed
    skipped: str | None = None  # why the pass was rolled back

    def __repr__(self) -> str:
        return f"<Step {self.name}: {self.rewrites} rewrites>"

    def diff(self) -> str:
        """What differs, as text; see `fxopt.diff.diff_text`."""
        return diff_text(self.before, self.after)


@dataclass(frozen=True)
class Verification:
    """One comparison of a result with its original."""

    what: str  # what was compared, for instance "optimized graph"
    error: float  # max |Δ| / max |reference|
    bound: float
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound


@dataclass(repr=False)
class Story:
    """What happened to a graph between capture and lowering."""

    model_name: str
    captured: Snapshot
    capture_seconds: float = 0.0
    regularizers: tuple[str, ...] = ()
    steps: list[Step] = field(default_factory=list)
    verifications: list[Verification] = field(default_factory=list)
    renamed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Story of {self.model_name}: {', '.join(step.name for step in self.steps)}>"

    @property
    def final(self) -> Snapshot:
        """The graph after the last step."""
        return self.steps[-1].after if self.steps else self.captured

    @property
    def pass_seconds(self) -> float:
        """The time that all passes took together."""
        return sum(step.seconds for step in self.steps)
