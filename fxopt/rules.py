"""Rewrite rules: a pattern, guards that say why not, and what to build instead.

    @rule(lambda x: F.relu(F.relu(x)))
    def merge_relus(x):
        '''relu(relu(x)) = relu(x)'''
        return F.relu(x)

A rule's parameters are the pattern's symbols: a `Value` for a tensor, the plain number or list for
anything else. Torch functions, methods and operators on a `Value` build new nodes. A rule that
returns a string held back, and the string says why; one that returns None does not apply here, and
there is nothing to say about it. Whatever a rule returns, it is held back where shape or dtype
would change, and where a copy would go that keeps an output apart from memory that others write to.

`apply_rules` runs a set of rules to a fixpoint: rules are indexed by their root's operator and a
worklist holds what may have changed, so a graph costs about one visit per node plus a few per
rewrite.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.contract import PassResult, RuleCount
from fxopt.effects import effect, training_flag
from fxopt.errors import FxoptError, OptionError
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
    symbols_of,
)
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_tensor, same_metadata
from fxopt.text import type_text

aten = torch.ops.aten


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
    def is_floating(self) -> bool:
        """Whether this is a tensor of real floating-point numbers."""
        return is_tensor(self.node) and self.dtype.is_floating_point

    @property
    def graph(self) -> GraphModule:
        """The graph that holds it."""
        return self._rewriter.graph

    @property
    def is_constant(self) -> bool:
        """Whether this is a constant of the graph that nothing writes to."""
        return self.node.op == "get_attr" and self.node.target not in self.graph.info.mutated

    @property
    def users(self) -> int:
        """How many nodes use this value."""
        return len(self.node.users)

    @property
    def target(self) -> Any:
        """The operator that computes it; a name for an input or a constant."""
        return self.node.target

    @property
    def args(self) -> Any:
        """The positional arguments of the call that computes it, with values for the tensors."""
        return _values_of(self.node.args, self._rewriter, self._place)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        args, kwargs = _map((args, kwargs), _node_of)
        node = self._rewriter.insert(
            target, *args, before=self._place.root, origin=self._place.nodes, **kwargs
        )
        return Value(node, self._rewriter, self._place)


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, Value) else value


def _values_of(nested: Any, rewriter: Rewriter, place: Match) -> Any:
    """Return nested arguments of a node with a Value for each node."""
    return _map(
        nested, lambda leaf: Value(leaf, rewriter, place) if isinstance(leaf, fx.Node) else leaf
    )


_map: Callable[[Any, Callable[[Any], Any]], Any] = fx.node.map_aggregate  # wider than its types


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

    def __call__(self, found: Match, rewriter: Rewriter) -> fx.Node | str | None:
        """Build and return what replaces the match's root.

        Returns the reason, in words, where the rule held back, and None where it does not apply.
        """
        for node in found.nodes:
            reason = effect(node)
            if reason is not None:
                return f"{node.name} must stay: {reason}"

        values = {key: _values_of(value, rewriter, found) for key, value in found.values.items()}
        arguments = {name: values.get(name) for name in self.parameters}
        if self.wants_match:
            arguments["match"] = found
        new = _node_of(self.build(**arguments))
        if new is None or isinstance(new, str):
            return new
        if not isinstance(new, fx.Node):
            raise OptionError(
                f"The rule {self.name} ({self.source}) returned {new!r}. It must return a value of "
                "the graph, or a reason in words, or None."
            )
        root, built = found.root, set(rewriter._uncommitted)
        if _same_call(root, new):
            return None
        return _type_obstacle(root, new) or _memory_obstacle(root, new, built) or new


def rule(*patterns: Callable[..., Any]) -> Callable[[Callable[..., Any]], Rule]:
    """Make a rule of a function; its pattern is one of `patterns`, each a Python function.

    A parameter called `match` receives the `Match` itself; one that is not a symbol of the pattern
    which matched is None. Raises OptionError for a pattern that is not made of operators, and for a
    parameter that no pattern has.
    """
    if not patterns:
        raise OptionError("A rule needs a pattern: @rule(lambda x: F.relu(F.relu(x))).")
    recorded = tuple(map(record, patterns))
    symbols = set().union(*map(symbols_of, recorded))

    def decorate(build: Callable[..., Any]) -> Rule:
        names = tuple(inspect.signature(build).parameters)
        code = build.__code__
        unknown = [name for name in names if name not in symbols and name != "match"]
        if unknown:
            raise OptionError(
                f"The rule {build.__name__} asks for '{unknown[0]}', and no pattern of it has that "
                f"symbol: {', '.join(sorted(symbols)) or 'none'}."
            )
        return Rule(
            name=build.__name__,
            patterns=recorded,
            build=build,
            doc=inspect.getdoc(build) or "",
            source=f"{code.co_filename}:{code.co_firstlineno}",
            wants_match="match" in names,
            parameters=tuple(name for name in names if name != "match"),
        )

    return decorate


# -- what no rule may change -----------------------------------------------------------------------


def _same_call(a: fx.Node, b: fx.Node) -> bool:
    return (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)


def _type_obstacle(root: fx.Node, new: fx.Node) -> str | None:
    """Why `new` is not the same kind of value as `root`, in words."""
    if not is_tensor(root) or same_metadata(root, new):
        return None
    old_type, new_type = (type_text(node.meta.get("val")) for node in (root, new))
    if old_type == new_type:
        return f"the result would be on another device than {root.name}"
    return f"the result would be {new_type}, and {root.name} is {old_type}"


_LAYOUT_READERS = (aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default)
_LAYOUT_MAKERS = (aten.contiguous.default, aten.clone.default)


def _memory_obstacle(root: fx.Node, new: fx.Node, built: Collection[fx.Node]) -> str | None:
    """Why readers of `root` must not be given the memory behind `new`, in words.

    A caller may write to an output, and the graph writes its state back at its end. So an output
    that was a copy must not become an input, a constant, or a part of another output; and what
    state is written back must not be read from state that is overwritten before.
    """
    owner = _owner(new)
    if owner in built or owner is _owner(root, certainly=True):
        return None  # memory as new as before, or the same as before
    outside = owner.op in ("placeholder", "get_attr")
    moved = not _same_layout(root, new)
    for user in _readers(root):
        if user.op == "output":
            if outside:
                return f"the output would be {owner.name} itself, which a caller may write to"
            if any(reader.op == "output" for reader in _readers(owner, beside=root)):
                return "two outputs would share their memory"
            if moved and root.target in _LAYOUT_MAKERS:
                return "a caller may count on the memory layout of the output"
        elif user.target is aten.copy_.default:
            if any(u.target is aten.copy_.default and u.args[0] is owner for u in owner.users):
                return f"{owner.name} is overwritten at the end of the graph"
        elif moved and _reads_layout(user):
            return f"{user.name} depends on the memory layout"
    return None


def _shares(node: fx.Node) -> fx.Node | None:
    """Return the argument whose memory a call's result shares, or may share; None without one."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    dropout = training_flag(node.target) == 2 and node.args[2] is not True
    shares = node.target is operator.getitem or dropout or _is_view(node.target)
    return node.args[0] if shares else None


@functools.cache
def _is_view(target: Any) -> bool:
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    return any(returned.alias_info is not None for returned in target._schema.returns)


def _owner(node: fx.Node, certainly: bool = False) -> fx.Node:
    """Return the node whose memory `node` may share; only through sure views where `certainly`."""
    while (source := _shares(node)) is not None:
        if certainly and node.target is aten.contiguous.default:
            break
        node = source
    return node


def _readers(node: fx.Node, beside: fx.Node | None = None) -> Iterator[fx.Node]:
    """Yield the users of `node`'s memory, except those through `beside`."""
    pending = [node]
    for value in pending:
        for user in value.users:
            if user is not beside:
                yield user
                if _shares(user) is value:
                    pending.append(user)


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    if not (is_tensor(a) and is_tensor(b)):
        return True
    p, q = a.meta["val"].stride(), b.meta["val"].stride()
    return all(isinstance(step, int) for step in (*p, *q)) and p == q


def _reads_layout(node: fx.Node) -> bool:
    """Whether a call's result, or whether it runs at all, depends on strides."""
    if not isinstance(node.target, OpOverload):
        return node.target is not operator.getitem
    custom = node.target.namespace not in ("aten", "prims", "torchvision")
    return custom or node.target in _LAYOUT_READERS


# -- the driver ------------------------------------------------------------------------------------


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
    misses: dict[tuple[fx.Node, str], str] = field(default_factory=dict)
    changed: dict[fx.Node, None] = field(default_factory=dict)  # where to look again

    def run(self) -> None:
        index: dict[Any, list[Rule]] = defaultdict(list)
        for one in self.rules:
            for target in dict.fromkeys(t for p in one.patterns for t in root_targets(p)):
                index[target].append(one)
        depth = max((one.depth for one in self.rules), default=1)
        pending = [n for n in self.rewriter.graph.graph.nodes if n.target in index]
        limit = 500 + 50 * len(pending)
        while pending:
            for node in pending:
                if not node._erased and not self.rewriter.out_of_fuel:
                    any(self._try(one, node) for one in index[node.target])
            if self.rewriter.rewrites > limit:
                raise FxoptError(self._endless())
            pending = sorted(n for n in _downstream(self.changed, depth) if n.target in index)
            self.changed.clear()
        for (node, name), reason in self.misses.items():
            if not node._erased:
                self.rewriter.miss(node, f"{name}: {reason}")

    def _try(self, one: Rule, node: fx.Node) -> bool:
        """Try a rule at a node; return whether it replaced it."""
        tally = self.tallies[one.name]
        tally.tried += 1
        self.misses.pop((node, one.name), None)
        found = one.match(node)
        if found is None:
            return False
        tally.matched += 1
        rewriter = self.rewriter
        rewriter.rule = one.name
        try:
            result = one(found, rewriter)
        finally:
            rewriter.rule = None
        if result is None or isinstance(result, str):
            rewriter.discard()
            if result is not None:
                self.misses[node, one.name] = result
            return False
        built, moved = tuple(rewriter._uncommitted), tuple(node.users)
        around = dict.fromkeys((*found.nodes, *(i for n in found.nodes for i in n.all_input_nodes)))
        rewriter.rule = one.name
        replaced = rewriter.replace(node, result)
        rewriter.rule = None
        if not replaced:
            return False
        tally.rewritten += 1
        alone = (u for n in around if not n._erased and len(n.users) == 1 for u in n.users)
        self.changed.update(dict.fromkeys((*built, *moved, *alone)))
        return True

    def _endless(self) -> str:
        counts = sorted(((t.rewritten, name) for name, t in self.tallies.items()), reverse=True)
        names = ", ".join(f"{name} ({count} times)" for count, name in counts[:3] if count)
        return (
            f"The rules come to no end: {names}. One undoes what another does; let one of them "
            "return None where the other applies."
        )


def _downstream(nodes: Iterable[fx.Node], depth: int) -> list[fx.Node]:
    """Return those of the nodes that are left, and what uses them within `depth` steps."""
    found = dict.fromkeys(n for n in nodes if not n._erased)
    level = list(found)
    for _ in range(depth):
        level = list(dict.fromkeys(u for n in level for u in n.users if u not in found))
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
        elif reason is None and best.covered < 10**6:
            best = Attempt(10**5, f"At {node.name} the pattern matches, and the rule does not.")
        elif reason is not None:
            matched.append(node.name)
    return Explanation(one.name, tuple(matched), best.failure)
