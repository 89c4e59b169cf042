"""Rewrite rules: a pattern, guards that say why not, and what to build instead.

    @rule(lambda x: F.relu(F.relu(x)))
    def merge_relus(x):
        '''relu(relu(x)) = relu(x)'''
        return F.relu(x)

`fxopt.pattern` describes patterns. A rule's parameters are the pattern's symbols: a `Value` for a
tensor, the operator for one that is called, the plain number or list for anything else. Torch
functions, methods and operators on a `Value` build new nodes, `new_constant` computes new weights.
A rule that returns a string held back, and the string says why; one that returns None does not
apply here, and there is nothing to say about it. Whatever a rule returns, it is held back where
shape or dtype would change, and where a copy would go that keeps an output apart from memory that
others write to.

Keywords of the decorator are conditions on symbols, asked while matching (`fxopt.conditions`):

    @rule(lambda x, w: x * w, x=floating, w=constant)

A rule, and a `RuleSet`, is a pass: `fxopt.compile(model, passes=[merge_relus, ...])`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import conditions as ready_conditions
from fxopt.conditions import Condition, equal_to
from fxopt.contract import Effect, PassResult, Precondition, RuleCount
from fxopt.effects import effect
from fxopt.errors import FxoptError, OptionError, RuleError
from fxopt.graph_module import GraphModule
from fxopt.matching import Attempt, find
from fxopt.memory import memory_obstacle, same_call, type_obstacle
from fxopt.pattern import (
    AnyCall,
    CallPattern,
    Match,
    Outputs,
    Var,
    depth_of,
    everything_in,
    needs_of,
    operator_text,
    root_targets,
    symbols_of,
)
from fxopt.recording import record
from fxopt.replay import remember_reads
from fxopt.rewrite import Rewriter
from fxopt.sizes import SizeAsked, environment_of, undecided
from fxopt.spelling import is_operator, operators_named
from fxopt.values import (
    Place,
    SizedFactories,
    Value,
    new_constant,
    node_of,
    reads,
    values_of,
    version_of,
)

__all__ = [
    "Match", "Rule", "RuleSet", "Value", "apply_rules", "new_constant", "rule",
]  # fmt: skip

aten = torch.ops.aten


# -- one rule --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rule:
    """A named rewrite, and a pass of that one rewrite; make one with the `rule` decorator."""

    name: str
    patterns: tuple[Any, ...]
    build: Callable[..., Any]
    doc: str = ""
    source: str = ""
    parameters: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()  # of its patterns, in the order in which they are written
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # what it has as a member of a family
    targets: tuple[Any, ...] | None = None  # where it may have its root; None: anywhere
    effect: Effect = Effect.EXACT
    requires: tuple[Precondition, ...] = ()

    def __repr__(self) -> str:
        return f"<rule {self.name} ({self.source})>"

    @functools.cached_property
    def depth(self) -> int:
        """How many operators deep its patterns are."""
        return max(map(depth_of, self.patterns))

    @functools.cached_property
    def operators(self) -> frozenset[Any] | None:
        """The operators that may stand in a match; None: any."""
        parts = [part for pattern in self.patterns for part in everything_in(pattern)]
        if any(isinstance(part, AnyCall) for part in parts):
            return None
        calls = (part for part in parts if isinstance(part, CallPattern))
        return frozenset(target for call in calls for target in root_targets(call) or ())

    @functools.cached_property
    def _needs(self) -> list[frozenset[frozenset[Any]]]:
        return list(map(needs_of, self.patterns))

    def can_match(self, present: Collection[Any]) -> bool:
        """Whether a graph with these operators has all that one of the patterns needs."""
        return any(
            all(any(target in present for target in choices) for choices in needs)
            for needs in self._needs
        )

    def match(self, node: fx.Node, attempt: Attempt | None = None) -> Match | None:
        """Return the match of one of the patterns with its root at `node`, or None."""
        for pattern in self.patterns:
            try:
                found = find(pattern, node, self.conditions, attempt)
            except FxoptError as error:
                where = self._place_of(node)
                raise type(error)(f"A condition of the {where}: {error}") from error
            except Exception as error:
                raise self._failed(node, error, "A condition of the") from error
            if found is not None:
                return found
        return None

    def rewrite(self, match: Match, rewriter: Rewriter) -> dict[fx.Node, fx.Node] | str | None:
        """Build what replaces the roots of a match, and return it by root.

        Returns the reason, in words, where the rule held back, and None where it does not apply.
        What is built and not needed is left to `Rewriter.prune` and `discard`.
        """
        for node in match.nodes:
            reason = effect(node)
            if reason is not None:
                return f"{node.name} must stay: {reason}"
        before = _gather_inputs(match, rewriter)
        if isinstance(before, str):
            return before
        try:
            new = self._built(match, Place(rewriter, match, before))
        except SizeAsked as question:
            return str(question)
        if new is None or isinstance(new, str):
            return new
        pairs = dict(zip(match.roots, self._checked(match, new), strict=True))
        built = set(rewriter.built)
        if all(same_call(old, new) for old, new in pairs.items()):
            return None
        for old, replacement in pairs.items():
            obstacle = type_obstacle(old, replacement) or memory_obstacle(old, replacement, built)
            if obstacle is not None:
                return obstacle
        return pairs

    def _built(self, match: Match, place: Place) -> Any:
        values = {name: values_of(value, place) for name, value in match.values.items()}
        known = {**values, **self.fixed, "match": match}
        given = {name: known.get(name) for name in self.parameters}
        info = place.rewriter.graph.info
        env = environment_of(info.fake_mode)
        try:
            if env is None:
                with _silent_torch():
                    return node_of(self.build(**given))
            with _silent_torch(), undecided(env, info.dimensions), SizedFactories(place):
                return node_of(self.build(**given))
        except SizeAsked:
            raise
        except FxoptError as error:
            raise type(error)(f"The {self._place_of(match.root)}: {error}") from error
        except Exception as error:
            raise self._failed(match.root, error, "The") from error

    def _checked(self, match: Match, new: Any) -> list[fx.Node]:
        """Return one new node for each root."""
        several = len(match.roots) > 1
        nodes = list(new) if several and isinstance(new, (list, tuple)) else [new]
        if len(nodes) != len(match.roots) or not all(isinstance(n, fx.Node) for n in nodes):
            wanted = f"{len(match.roots)} values" if several else "a value"
            raise OptionError(
                f"The rule {self.name} ({self.source}) returned {new!r}. It must return {wanted} "
                "of the graph, or a reason in words, or None."
            )
        return nodes

    def _failed(self, node: fx.Node, error: Exception, what: str) -> RuleError:
        return RuleError(
            f"{what} {self._place_of(node)} with {type(error).__name__}: {error}"
        )

    def _place_of(self, node: fx.Node) -> str:
        return f"rule {self.name} ({self.source}) failed at {node.name}{_line(node)}"

    # -- as a pass, and as a part of a set ------------------------------------------------------

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rule until it does not fire any more."""
        return apply_rules(graph, (self,))

    def __iter__(self) -> Iterator[Rule]:
        yield self

    def __add__(self, other: Iterable[Rule]) -> RuleSet:
        return RuleSet(self, other)


@contextlib.contextmanager
def _silent_torch() -> Iterator[None]:
    """Keep PyTorch from printing the traceback of an error that becomes a RuleError."""
    before, _TORCH_LOG.disabled = _TORCH_LOG.disabled, True
    try:
        yield
    finally:
        _TORCH_LOG.disabled = before


_TORCH_LOG = logging.getLogger("torch._subclasses.fake_tensor")


def _line(node: fx.Node) -> str:
    source = node.meta.get("source")
    return f" ({source})" if source else ""


class RuleSet(Sequence[Rule]):
    """Rules that are applied together, and a pass of them; sets add up: `RuleSet(a, b) + c`.

    Raises OptionError where two rules bear one name.
    """

    effect: Effect
    requires: tuple[Precondition, ...] = ()

    def __init__(self, *rules: Rule | Iterable[Rule], name: str = "rules") -> None:
        self.name = name
        self._rules = tuple(dict.fromkeys(itertools.chain.from_iterable(map(_each, rules))))
        named: dict[str, Rule] = {}
        for one in self._rules:
            if named.setdefault(one.name, one) is not one:
                raise OptionError(
                    f"Two rules are called '{one.name}': {named[one.name].source} and {one.source}."
                )
        lossy = any(one.effect is Effect.LOSSY for one in self._rules)
        self.effect = Effect.LOSSY if lossy else Effect.EXACT

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires any more."""
        return apply_rules(graph, self)

    def without(self, *names: str) -> RuleSet:
        """Return the set without the rules of these names; raise OptionError for unknown ones."""
        for name in names:
            if name not in (one.name for one in self):
                raise OptionError(f"There is no rule '{name}' in {self.name}.")
        return RuleSet(*(one for one in self if one.name not in names), name=self.name)

    @overload
    def __getitem__(self, index: int) -> Rule: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Rule, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._rules[index]

    def __len__(self) -> int:
        return len(self._rules)

    def __add__(self, other: Iterable[Rule]) -> RuleSet:
        return RuleSet(self, other, name=self.name)

    def __repr__(self) -> str:
        return f"<{self.name}: {', '.join(one.name for one in self)}>"


def _each(one: Any) -> tuple[Rule, ...]:
    rules = tuple(one) if isinstance(one, Iterable) else (one,)
    for found in rules:
        if not isinstance(found, Rule):
            raise OptionError(f"{found!r} is not a rule; make one with @fxopt.rule(pattern).")
    return rules


# -- making rules ----------------------------------------------------------------------------------


def rule(
    *patterns: Any, family: Mapping[str, Iterable[Any]] | None = None,
    effect: Effect = Effect.EXACT, **conditions: Any,
) -> Callable[[Callable[..., Any]], Any]:  # fmt: skip
    """Make a rule of a function; its pattern is one of `patterns`, each a function or expression.

    A parameter called `match` receives the `Match` itself; one that is not a symbol of the pattern
    which matched is None; one that no pattern has keeps its default; `**symbols` receives all that
    have no parameter. `conditions` are asked of symbols while matching: a predicate, a value
    to be equal to, or a set of operators for a symbol that is called. With `family={"f": (F.relu,
    torch.abs)}` it makes a `RuleSet` with one rule for each; `f` is no symbol then, but that
    member's. Raises OptionError for a pattern that is not made of operators, and for a parameter or
    a condition that no pattern has, or that can never hold.
    """
    if not patterns:
        raise OptionError("A rule needs a pattern: @rule(lambda x: F.relu(F.relu(x))).")
    if not isinstance(effect, Effect):
        raise OptionError(f"effect={effect!r}: it is Effect.EXACT or Effect.LOSSY.")
    forms = [_Form(patterns, fixed) for fixed in _members(family, patterns)]
    if any("match" in symbols_of(pattern) for pattern in forms[0].patterns):
        raise OptionError("'match' is what a rule gets its Match by; call the symbol otherwise.")

    def decorate(build: Callable[..., Any]) -> Any:
        function = _as_function(build)
        parameters = _parameters(function.__name__, build)
        made = [_rule(function, parameters, form, effect, conditions) for form in forms]
        return made[0] if family is None else RuleSet(*made, name=function.__name__)

    return _Unfinished(decorate)


class _Form:
    """The patterns of one member of a family, or of the one rule that there is."""

    def __init__(self, written: tuple[Any, ...], fixed: dict[str, Any]) -> None:
        self.fixed = fixed
        self.patterns = tuple(record(pattern, fixed) for pattern in written)
        self.symbols = tuple(dict.fromkeys(_in_order(written, self.patterns)))


@dataclass(frozen=True)
class _Unfinished:
    """What `rule(pattern)` is until it is put over a function."""

    decorate: Callable[[Callable[..., Any]], Any]

    def __call__(self, build: Callable[..., Any]) -> Any:
        return self.decorate(build)

    def __repr__(self) -> str:
        return "<a pattern without a rule: write @rule(lambda x: …) above def name(x): …>"


def _members(
    family: Mapping[str, Iterable[Any]] | None, patterns: tuple[Any, ...]
) -> list[dict[str, Any]]:
    """Return what each member of a family has; one that has nothing, where there is none."""
    if family is None:
        return [{}]
    good = isinstance(family, Mapping) and family and all(
        isinstance(several, Iterable) and not isinstance(several, str) and tuple(several)
        for several in family.values()
    )  # fmt: skip
    if not good:
        raise OptionError(
            f"family={family!r}: for each name give what its members have, in a tuple: "
            "family={'f': (F.relu, torch.abs)}."
        )
    functions = filter(inspect.isfunction, patterns)
    known = {name for one in functions for name in inspect.signature(one).parameters}
    for name in family:
        if name not in known:
            raise OptionError(f"family: no pattern has a parameter '{name}': {_listed(known)}.")
    values = itertools.product(*map(tuple, family.values()))
    return [dict(zip(family, each, strict=True)) for each in values]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _as_function(build: Any) -> Any:
    """Return what is called to build as a function with a name, a line and a docstring."""
    if inspect.isroutine(build):
        return build
    if not callable(build) or isinstance(build, (type, Rule)):
        raise OptionError(f"@rule(…) stands above a function, not above {build!r}.")
    inner = build
    while isinstance(inner, functools.partial):
        inner = inner.func

    def function(**values: Any) -> Any:
        return build(**values)

    functools.update_wrapper(function, inner if inspect.isroutine(inner) else type(inner).__call__)
    if not inspect.isroutine(inner):
        function.__name__ = type(inner).__name__
    return function


@dataclass
class _Parameters:
    """What a rule's function asks for."""

    needed: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)  # those with a default
    takes_all: bool = False  # **symbols

    @property
    def names(self) -> list[str]:
        return [*self.needed, *self.optional]


def _parameters(name: str, build: Any) -> _Parameters:
    asked = _Parameters()
    bound = build.keywords if isinstance(build, functools.partial) else {}
    for one in inspect.signature(build).parameters.values():
        if one.kind in (one.POSITIONAL_ONLY, one.VAR_POSITIONAL):
            star = "*" if one.kind is one.VAR_POSITIONAL else ""
            raise OptionError(
                f"The rule {name} gets its symbols by name, and '{star}{one.name}' has none to it."
            )
        if one.kind is one.VAR_KEYWORD:
            asked.takes_all = True
        elif one.name not in bound:
            (asked.needed if one.default is one.empty else asked.optional).append(one.name)
    return asked


def _in_order(patterns: tuple[Any, ...], recorded: tuple[Any, ...]) -> Iterator[str]:
    """Yield the symbols as their functions list them, and then those of parts."""
    known = {name for pattern in recorded for name in symbols_of(pattern)}
    for pattern in patterns:
        if inspect.isfunction(pattern):
            yield from (name for name in inspect.signature(pattern).parameters if name in known)
    for pattern in recorded:
        yield from symbols_of(pattern)


def _rule(
    build: Callable[..., Any], parameters: _Parameters, form: _Form, effect: Effect,
    conditions: Mapping[str, Any],
) -> Rule:  # fmt: skip
    there = {*form.symbols, *form.fixed, "match"}
    for name in (*parameters.needed, *conditions):
        if name not in there or name in conditions and name == "match":
            raise OptionError(
                f"The rule {build.__name__} asks for '{name}', and no pattern of it has that "
                f"symbol: {', '.join(form.symbols) or 'none'}."
            )
    names = [name for name in parameters.names if name in there]
    names += form.symbols if parameters.takes_all else ()
    code = getattr(inspect.unwrap(build), "__code__", None)
    asked = {name: _condition(name, wanted, form.patterns) for name, wanted in conditions.items()}
    operators = {name: targets for name, (_, targets) in asked.items() if targets}
    suffix = ", ".join(map(_member_text, form.fixed.values()))
    return Rule(
        name=f"{build.__name__}[{suffix}]" if form.fixed else build.__name__,
        patterns=form.patterns,
        build=build,
        doc=inspect.getdoc(build) or "",
        source=f"{code.co_filename}:{code.co_firstlineno}" if code else "",
        parameters=tuple(dict.fromkeys(names)),
        symbols=form.symbols,
        conditions={name: condition for name, (condition, _) in asked.items()},
        fixed=form.fixed,
        targets=_all_targets(form.patterns, operators),
        effect=effect,
    )


def _member_text(value: Any) -> str:
    return operator_text(value) if callable(value) else str(value)


def _condition(
    name: str, wanted: Any, patterns: tuple[Any, ...]
) -> tuple[Condition, tuple[Any, ...] | None]:
    """Return a condition as a predicate on what is matched, and the operators that it allows."""
    calls = any(
        isinstance(part, AnyCall) and part.symbol.name == name
        for pattern in patterns for part in everything_in(pattern)
    )  # fmt: skip
    choices = isinstance(wanted, (set, frozenset, tuple, list))
    if calls and (choices or is_operator(wanted) or not callable(wanted)):
        several = wanted if choices else (wanted,)
        targets = tuple(dict.fromkeys(t for one in several for t in operators_named(one)))
        return lambda target: target in targets or f"{name} is none of those wanted", targets
    _check_condition(name, wanted, patterns)
    asked = wanted if callable(wanted) and not isinstance(wanted, OpOverload) else equal_to(wanted)

    def condition(found: Any) -> Any:
        answer = asked(values_of(found))
        if callable(answer):
            raise OptionError(f"the condition of '{name}' answers {answer!r}: call it with values.")
        return answer if isinstance(answer, str) else bool(answer)

    functools.update_wrapper(condition, asked)
    return condition, None


def _check_condition(name: str, wanted: Any, patterns: tuple[Any, ...]) -> None:
    """Raise OptionError for a condition that can never hold, or that is none."""
    where = f"The condition {name}={wanted!r}"
    if isinstance(wanted, (type, torch.Tensor)):
        raise OptionError(f"{where} is no condition; write a function, a number, or a set of them.")
    several = wanted if isinstance(wanted, (set, frozenset, tuple, list)) else (wanted,)
    if any(map(is_operator, several)):
        raise OptionError(
            f"{where} never holds: '{name}' is not called in the pattern, so it stands for no "
            "operator."
        )
    if isinstance(wanted, (set, frozenset, tuple)) and not wanted:
        raise OptionError(f"{where} allows nothing.")
    if isinstance(wanted, str) and not any(_takes_text(name, p) for p in patterns):
        known = getattr(ready_conditions, wanted, None)
        hint = f" The one of fxopt.conditions is written without quotes: {name}={wanted}."
        raise OptionError(
            f"{where} never holds: '{name}' does not stand for a text.{hint if known else ''}"
        )


def _takes_text(name: str, pattern: Any) -> bool:
    """Whether a symbol may stand for a text somewhere in a pattern."""
    for call in everything_in(pattern):
        if not isinstance(call, CallPattern):
            continue
        schema = getattr(getattr(call.target, "_schema", None), "arguments", None)
        by_name = {one.name: one for one in schema or ()}
        given = [*zip(schema or (), call.args, strict=False)]
        given += [(by_name[key], value) for key, value in call.kwargs.items() if key in by_name]
        if schema is None or any(
            isinstance(value, Var) and value.name == name and "str" in str(one.type)
            for one, value in given
        ):
            return True
    return False


def _all_targets(
    patterns: tuple[Any, ...], operators: Mapping[str, tuple[Any, ...]]
) -> tuple[Any, ...] | None:
    """Return the operators at which any of the patterns may have its root; None: anywhere."""
    found: dict[Any, None] = {}
    for pattern in patterns:
        targets = _targets(pattern, operators)
        if targets is None:
            return None
        found.update(dict.fromkeys(targets))
    return tuple(found)


def _targets(
    pattern: Any, operators: Mapping[str, tuple[Any, ...]]
) -> tuple[Any, ...] | None:
    root = pattern.patterns[0] if isinstance(pattern, Outputs) else pattern
    if isinstance(root, AnyCall):
        return operators.get(root.symbol.name)
    return root_targets(root)


# -- several outputs -------------------------------------------------------------------------------

_MOST_MOVED = 200


def _gather_inputs(match: Match, rewriter: Rewriter) -> fx.Node | str:
    """Return the node to build in front of: the first root, with all inputs of the match before it.

    With several outputs, inputs of the later ones may stand behind the first; they are moved, where
    none of them depends on a root. Returns the reason, in words, where one does.
    """
    first = min(match.roots)
    if len(match.roots) == 1:
        return first
    if any(value in match.roots for value in match.values.values() if isinstance(value, fx.Node)):
        return "one output depends on another"
    late: dict[fx.Node, None] = {}
    pending = [v for node in match.nodes for v in node.all_input_nodes if v not in match.nodes]
    while pending:
        node = pending.pop()
        if node < first or node in late:
            continue
        if node in match.nodes:
            return "one output depends on another"
        late[node] = None
        if len(late) > _MOST_MOVED or effect(node) is not None:
            return f"{node.name} cannot be moved in front of {first.name}"
        pending.extend(node.all_input_nodes)
    rewriter.move(sorted(late), before=first)
    return first


# -- leaving rules out -----------------------------------------------------------------------------

_disabled: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
    "disabled", default=frozenset()
)


@contextlib.contextmanager
def disabled(*names: str) -> Iterator[None]:
    """Leave the rules of these names out of whatever passes run inside: to see what they do."""
    token = _disabled.set(_disabled.get() | set(names))
    try:
        yield
    finally:
        _disabled.reset(token)


# -- the driver ------------------------------------------------------------------------------------


@dataclass
class _Tally:
    tried: int = 0
    matched: int = 0
    rewritten: int = 0
    seconds: float = 0.0


@dataclass
class _Driver:
    """One run of a set of rules over one graph."""

    rewriter: Rewriter
    rules: Sequence[Rule]
    tallies: dict[str, _Tally] = field(default_factory=lambda: defaultdict(_Tally))
    misses: dict[tuple[fx.Node, str], str] = field(default_factory=dict)
    changed: dict[fx.Node, None] = field(default_factory=dict)  # where to look again
    present: set[Any] = field(default_factory=set)  # operators that stand in the graph, or did
    index: dict[Any, list[Rule]] = field(default_factory=dict)  # by what may be at the root
    looked: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)  # see values.reads
    built: set[fx.Node] = field(default_factory=set)  # by rules, in this run
    grown: int = 0  # rewrites that found nothing but what rules had built, and built more of it

    def run(self) -> None:
        """Try the rules wherever they may match, until none fires any more."""
        token = reads.set(self.looked)
        try:
            self._run()
        finally:
            reads.reset(token)

    def _run(self) -> None:
        nodes = self.rewriter.graph.graph.nodes
        self.present.update(n.target for n in nodes if n.op == "call_function")
        self._make_index()
        followed = _operators_in(self.rules)
        depth = max((one.depth for one in self.rules), default=1)
        pending = [n for n in nodes if self._rules_at(n)]
        most_rewrites, most_grown = 500 + 50 * len(nodes), 500 + 5 * len(nodes)
        while pending:
            for node in pending:
                if not node._erased and not self.rewriter.out_of_fuel:
                    any(self._try(one, node) for one in self._rules_at(node))
                if (
                    self.grown > most_grown
                    or self.rewriter.rewrites > most_rewrites
                    or len(self.changed) > 100 * most_rewrites
                ):
                    raise FxoptError(self._endless())
            new = {n.target for n in self.changed if not n._erased} - self.present
            if new:
                self.present |= new
                self._make_index()
            again = _downstream(self.changed, depth, followed)
            pending = sorted(n for n in again if self._rules_at(n))
            self.changed.clear()
        for (node, name), reason in self.misses.items():
            if not node._erased:
                self.rewriter.miss(node, f"{name}: {reason}")

    def _make_index(self) -> None:
        """List the rules that can match by the operators at their root; None: at any."""
        self.index = defaultdict(list)
        for one in self.rules:
            if one.can_match(self.present):
                for target in (None,) if one.targets is None else one.targets:
                    self.index[target].append(one)

    def _rules_at(self, node: fx.Node) -> list[Rule]:
        known = self.index.get(node.target, [])
        anywhere = self.index.get(None) if node.op == "call_function" else None
        return [*known, *anywhere] if anywhere else known

    def _try(self, one: Rule, node: fx.Node) -> bool:
        """Try a rule at a node; return whether it replaced it."""
        tally = self.tallies[one.name]
        tally.tried += 1
        started = time.perf_counter()
        try:
            return self._tried(one, node, tally)
        finally:
            tally.seconds += time.perf_counter() - started

    def _tried(self, one: Rule, node: fx.Node, tally: _Tally) -> bool:
        self.misses.pop((node, one.name), None)
        self.looked.clear()
        match = one.match(node)
        if self.looked:
            self._check_unwritten(one, node)
        if match is None:
            return False
        tally.matched += 1
        rewriter = self.rewriter
        with rewriter.on_behalf_of(one.name):
            result = one.rewrite(match, rewriter)
            self._check_unwritten(one, node)
            if result is None or isinstance(result, str):
                rewriter.discard()
                if result is not None:
                    self.misses[node, one.name] = result
                return False
            rewriter.prune(result.values())
            built, users = rewriter.built, [u for root in match.roots for u in root.users]
            inputs = (value for n in match.nodes for value in n.all_input_nodes)
            around = dict.fromkeys((*match.nodes, *inputs))
            if not rewriter.replace(result):
                return False
        if self.looked:
            remember_reads(rewriter.graph, one.name, self.looked)
        tally.rewritten += 1
        self._note_growth(match, built)
        # Where to look again: at what was built; at the users of the roots, which now use it; and
        # at the only user that is left of what lies around, which a rule may have held back from
        # as it was shared.
        only_users = (u for n in around if not n._erased and len(n.users) == 1 for u in n.users)
        self.changed.update(dict.fromkeys((*built, *users, *only_users)))
        return True

    def _note_growth(self, match: Match, built: Iterable[fx.Node]) -> None:
        """Count a rewrite that found only what rules had built, and made more of it."""
        calls = [n for n in built if n.op == "call_function"]
        erased = sum(n._erased for n in match.nodes)
        self.grown += len(calls) > erased and self.built.issuperset(match.nodes)
        self.built.update(calls)

    def _check_unwritten(self, one: Rule, node: fx.Node) -> None:
        """Raise RuleError where a rule has written to a constant that it only may look at."""
        for name, (tensor, version) in self.looked.items():
            if version_of(tensor) != version:
                raise RuleError(
                    f"The rule {one.name} ({one.source}) wrote to '{name}' at {node.name}"
                    f"{_line(node)}. It is the model's own: compute another by new_constant(…)."
                )

    def _endless(self) -> str:
        counts = sorted(((t.rewritten, name) for name, t in self.tallies.items()), reverse=True)
        names = ", ".join(f"{name} ({count} times)" for count, name in counts[:3] if count)
        return (
            f"The rules come to no end: {names}. What one builds, it or another one matches again; "
            "let one of them return None there."
        )


def _operators_in(rules: Iterable[Rule]) -> set[Any] | None:
    """Return the operators that may stand in a match of some rule; None: any."""
    operators: set[Any] = set()
    for one in rules:
        if one.operators is None:
            return None
        operators |= one.operators
    return operators


def _downstream(
    nodes: Iterable[fx.Node], depth: int, followed: set[Any] | None
) -> list[fx.Node]:
    """Return those of the nodes that are left, and what uses them within `depth` steps.

    Only operators that stand in patterns are followed, since a match covers what lies between.
    """
    found = dict.fromkeys(n for n in nodes if not n._erased)
    level = list(found)
    for _ in range(depth):
        users = (u for n in level for u in n.users if u not in found)
        level = list(dict.fromkeys(u for u in users if followed is None or u.target in followed))
        found.update(dict.fromkeys(level))
    return list(found)


def apply_rules(graph: GraphModule, rules: Iterable[Rule]) -> PassResult:
    """Apply rules until none fires any more; the `run` of a pass that is made of rules."""
    several = [one for one in RuleSet(rules) if one.name not in _disabled.get()]
    driver = _Driver(Rewriter(graph), several)
    driver.run()
    driver.rewriter.rule_counts = {
        one.name: RuleCount(**vars(driver.tallies[one.name])) for one in several
    }
    return driver.rewriter.result()
