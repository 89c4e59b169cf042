"""Rewrite rules: a pattern, guards that say why not, and what to build instead.

    @rule(lambda x: F.relu(F.relu(x)))
    def merge_relus(x):
        '''relu(relu(x)) = relu(x)'''
        return F.relu(x)

A rule's parameters are the pattern's symbols: a `Value` for a tensor, the plain number or list for
anything else. Torch functions, methods and operators on a `Value` build new nodes. A rule that
returns a string held back, and the string says why. `apply_rules` runs a set of rules to a
fixpoint: rules are indexed by their root's operator and a worklist holds what may have changed, so
a graph costs about one visit per node plus one per rewrite.
"""

from __future__ import annotations

import inspect
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.contract import PassResult, RuleCount
from fxopt.effects import effect
from fxopt.graph_module import GraphModule
from fxopt.pattern import (
    Attempt,
    CallPattern,
    Match,
    Traced,
    depth_of,
    match,
    record,
    root_targets,
)
from fxopt.rewrite import Rewriter


class Value(Traced):
    """A matched tensor: ask it for shape, dtype, users; compute with it to build new nodes."""

    def __init__(self, node: fx.Node, rewriter: Rewriter, place: Match) -> None:
        self.node = node
        self._rewriter = rewriter
        self._place = place

    @property
    def fake(self) -> Any:
        """The fake tensor: shape, dtype and device without data."""
        return self.node.meta["val"]

    @property
    def shape(self) -> Any:
        """The shape; sizes may be symbolic."""
        return self.fake.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        dtype = self.fake.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return int(self.fake.dim())

    @property
    def is_constant(self) -> bool:
        """Whether this is a constant of the graph that nothing writes to."""
        graph = self._rewriter.graph
        return self.node.op == "get_attr" and self.node.target not in graph.info.mutated

    @property
    def users(self) -> int:
        """How many nodes use this value."""
        return len(self.node.users)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        args, kwargs = (fx.node.map_aggregate(a, _node_of) for a in (args, kwargs))
        node = self._rewriter.insert(
            target, *args, before=self._place.root, origin=self._place.nodes, **kwargs
        )
        return Value(node, self._rewriter, self._place)


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, Value) else value


@dataclass(frozen=True)
class Rule:
    """A named rewrite; make one with the `rule` decorator."""

    name: str
    patterns: tuple[CallPattern, ...]
    build: Callable[..., Any]
    doc: str = ""
    source: str = ""
    wants_match: bool = False
    parameters: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """How many operators deep its patterns are."""
        return max(map(depth_of, self.patterns))

    def match(self, node: fx.Node, attempt: Attempt | None = None) -> Match | None:
        """Return the match of one of the patterns with its root at `node`, or None."""
        for pattern in self.patterns:
            found = match(pattern, node, attempt)
            if found is not None:
                return found
        return None

    def __call__(self, found: Match, rewriter: Rewriter) -> Any:
        """Return the replacement's Value (or node), or the reason for not rewriting, in words."""
        for node in found.nodes:
            reason = effect(node)
            if reason is not None:
                return f"{node.name} must stay: {reason}"
        values = {
            name: Value(value, rewriter, found) if isinstance(value, fx.Node) else value
            for name, value in found.values.items()
        }
        arguments = {name: values.get(name) for name in self.parameters}
        if self.wants_match:
            arguments["match"] = found
        return self.build(**arguments)


def rule(*patterns: Callable[..., Any]) -> Callable[[Callable[..., Any]], Rule]:
    """Make a rule of a function; its pattern is one of `patterns`, each a Python function.

    A parameter called `match` receives the `Match` itself. Raises OptionError for a pattern that
    is not made of operators.
    """

    def decorate(build: Callable[..., Any]) -> Rule:
        names = tuple(inspect.signature(build).parameters)
        code = build.__code__
        return Rule(
            name=build.__name__,
            patterns=tuple(map(record, patterns)),
            build=build,
            doc=inspect.getdoc(build) or "",
            source=f"{code.co_filename}:{code.co_firstlineno}",
            wants_match="match" in names,
            parameters=tuple(name for name in names if name != "match"),
        )

    return decorate


@dataclass
class _Tally:
    tried: int = 0
    matched: int = 0
    rewritten: int = 0


@dataclass
class _Driver:
    """One run of a set of rules over one graph."""

    rewriter: Rewriter
    rules: Sequence[Rule]
    tallies: dict[str, _Tally] = field(default_factory=lambda: defaultdict(_Tally))

    def run(self) -> None:
        index: dict[Any, list[Rule]] = defaultdict(list)
        for one in self.rules:
            for target in dict.fromkeys(t for p in one.patterns for t in root_targets(p)):
                index[target].append(one)
        depth = max((one.depth for one in self.rules), default=1)
        pending = deque(n for n in self.rewriter.graph.graph.nodes if n.target in index)
        queued = set(pending)
        while pending and not self.rewriter.out_of_fuel:
            node = pending.popleft()
            queued.discard(node)
            if node._erased:
                continue
            for one in index[node.target]:
                changed = self._try(one, node)
                if changed is None:
                    continue
                for again in _downstream(changed, depth):
                    if again.target in index and again not in queued:
                        queued.add(again)
                        pending.append(again)
                break

    def _try(self, one: Rule, node: fx.Node) -> list[fx.Node] | None:
        """Try a rule at a node; return the nodes around the change, or None without one."""
        tally = self.tallies[one.name]
        tally.tried += 1
        found = one.match(node)
        if found is None:
            return None
        tally.matched += 1
        rewriter = self.rewriter
        rewriter.rule = one.name
        try:
            result = one(found, rewriter)
            if isinstance(result, str):
                rewriter.discard()
                rewriter.miss(node, f"{one.name}: {result}")
                return None
            new = _node_of(result)
            inputs = [i for covered in found.nodes for i in covered.all_input_nodes]
            if not rewriter.replace(node, new):
                return None
        finally:
            rewriter.rule = None
        tally.rewritten += 1
        around = [new, *new.all_input_nodes]
        around += [u for i in inputs if not i._erased and len(i.users) == 1 for u in i.users]
        return [n for n in around if not n._erased]


def _downstream(nodes: Iterable[fx.Node], depth: int) -> list[fx.Node]:
    """Return the nodes, and those that use them within `depth` steps."""
    found = dict.fromkeys(nodes)
    level = list(found)
    for _ in range(depth):
        level = [u for n in level if len(n.users) <= 16 for u in n.users if u not in found]
        found.update(dict.fromkeys(level))
    return list(found)


def apply_rules(graph: GraphModule, rules: Sequence[Rule]) -> PassResult:
    """Apply rules until none fires any more; the `run` of a pass that is made of rules."""
    driver = _Driver(Rewriter(graph), rules)
    driver.run()
    driver.rewriter.rule_counts = {
        one.name: RuleCount(**vars(driver.tallies[one.name])) for one in rules
    }
    return driver.rewriter.result()


@dataclass(frozen=True)
class Explanation:
    """Why a rule fired or not: for each place where its root operator stands, what happened."""

    rule: str
    matched: tuple[str, ...]
    best: str

    def __str__(self) -> str:
        if self.matched:
            return f"{self.rule} matches at {', '.join(self.matched)}."
        return f"{self.rule} matches nowhere. {self.best}"


def explain(one: Rule, graph: GraphModule) -> Explanation:
    """Say where a rule matches and, if nowhere or only where a guard holds it back, why."""
    roots = {target for pattern in one.patterns for target in root_targets(pattern)}
    matched, best = [], Attempt(-1, "Its root operator does not stand in the graph.")
    twin = graph.copy()
    for node in [n for n in twin.graph.nodes if n.target in roots]:
        attempt = Attempt()
        found = one.match(node, attempt)
        if found is None:
            if attempt.covered > best.covered:
                best = Attempt(attempt.covered, f"Nearest at {node.name}: {attempt.failure}.")
            continue
        rewriter = Rewriter(twin)
        reason = one(found, rewriter)
        rewriter.discard()
        if isinstance(reason, str):
            best = Attempt(10**6, f"At {node.name} it held back: {reason}.")
        else:
            matched.append(node.name)
    return Explanation(one.name, tuple(matched), best.failure)
