"""Finding a pattern in a graph: `find` returns the first match with its root at a node.

Matching goes from the root to the inputs. Wherever there is a choice (the order of operands, an
alternative, one repetition more or less) it tries each, and goes back where what follows does not
fit. What does not match at a node with what the symbols stand for is not tried there again,
and a search ends without a match after `MOST_STEPS` steps. What fails is remembered by how far it
came, for `fxopt.explain`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.normalize import Call, canonical, complete
from fxopt.pattern import (
    NOT_KNOWN,
    AnyCall,
    AnyOf,
    CallPattern,
    Counted,
    Deeper,
    Each,
    Match,
    Named,
    Near,
    Outputs,
    Repeated,
    Rest,
    Var,
    base_name,
    counted,
    depth_of,
    indexed,
    is_pattern,
    operator_text,
    pattern_text,
    root_targets,
    shared_symbols,
    siblings_of,
    turned_round,
)
from fxopt.sizes import SizeAsked, environment_at, names_of_sizes, undecided
from fxopt.spelling import ANY

aten = torch.ops.aten

COMMUTATIVE = {
    aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default,
    aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
    aten.eq.Tensor, aten.ne.Tensor, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor,
}  # fmt: skip

# A condition gets what a symbol stands for; it returns True, False, or why not in words.
Condition = Callable[[Any], Any]

MOST_CANDIDATES = 64  # users of one value that are looked at for a further output
MOST_STEPS = 20_000  # comparisons of a pattern with a value, and candidates, in one search


@dataclass
class Attempt:
    """How far a match came, and where it failed, for `explain`."""

    covered: int = -1
    failure: str = ""
    nodes: tuple[fx.Node, ...] = ()

    def fail(self, nodes: tuple[fx.Node, ...], reason: Callable[[], str]) -> None:
        """Remember the failure behind which the most nodes match; the first of several."""
        if len(nodes) > self.covered:
            self.covered, self.failure, self.nodes = len(nodes), reason(), nodes

    def give_up(self, reason: str) -> None:
        """Remember that the search went no further."""
        self.failure = f"{self.failure}; {reason}" if self.failure else reason


class _Silent(Attempt):
    """The attempt of somebody who does not ask."""

    def give_up(self, reason: str) -> None:
        """Remember nothing."""

    def fail(self, nodes: tuple[fx.Node, ...], reason: Callable[[], str]) -> None:
        """Remember nothing."""


_SILENT = _Silent()


@dataclass(frozen=True)
class _State:
    """What is bound so far, and which nodes are covered."""

    bound: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()


_States = Iterator[_State]


class _TooLong(Exception):
    """A search has made all the steps that it may make."""


def find(
    pattern: Any,
    node: fx.Node,
    conditions: Mapping[str, Condition] | None = None,
    attempt: Attempt | None = None,
) -> Match | None:
    """Return the first match of `pattern` with its (first) root at `node`, or None."""
    search = _Search(conditions or {}, attempt or _SILENT)
    try:
        if not isinstance(pattern, Outputs):
            for state in search.match(pattern, node, _State()):
                return _match((node,), state)
            return None
        for roots, state in search.outputs(pattern.patterns[1:], (node,), pattern.patterns[0]):
            return _match(roots, state)
    except _TooLong:
        search.attempt.give_up(f"the search was cut off after {MOST_STEPS} steps")
    return None


def _match(roots: tuple[fx.Node, ...], state: _State) -> Match:
    return Match(roots, tuple(dict.fromkeys(state.nodes)), _gathered(state.bound))


def _gathered(bound: Mapping[str, Any]) -> dict[str, Any]:
    """Put what stands for a#0, a#1, … into one list called a, with None where there is nothing.

    How many items a list has stands under "a#"; the items of lists in lists are a#0#0, a#0#1, …
    """

    def gathered(name: str) -> Any:
        count = bound.get(counted(name))
        if count is None:
            return bound.get(name)
        return [gathered(indexed(name, index)) for index in range(count)]

    return {name: gathered(name) for name in dict.fromkeys(map(base_name, bound))}


def _with_counts(state: _State, names: Iterable[str], count: int) -> _State:
    counts = {counted(name): count for name in names}
    return _State({**state.bound, **counts}, state.nodes) if counts else state


@dataclass
class _Search:
    """One search: the conditions on symbols, and where failures go."""

    conditions: Mapping[str, Condition]
    attempt: Attempt
    failed: set[Any] = field(default_factory=set)  # what matches nowhere, as `_key` writes it
    steps: int = 0  # comparisons that it has made, and candidates that it has listed

    # -- several outputs ----------------------------------------------------------------------

    def outputs(
        self, others: Sequence[Any], roots: tuple[fx.Node, ...], first: Any
    ) -> Iterator[tuple[tuple[fx.Node, ...], _State]]:
        """Yield the roots and the state of each way to match all outputs."""
        for state in self.match(first, roots[0], _State()):
            yield from self._further(others, roots, state)

    def _further(
        self, others: Sequence[Any], roots: tuple[fx.Node, ...], state: _State
    ) -> Iterator[tuple[tuple[fx.Node, ...], _State]]:
        if not others:
            yield roots, state
            return
        pattern, *rest = others
        candidates = self._candidates(pattern, state, roots)
        key = None if rest else (tuple(candidates), self._key(pattern, None, state))
        if key is not None and key in self.failed:
            return
        matched = False
        for node in candidates:
            for further in self.match(pattern, node, state):
                matched = True
                yield from self._further(rest, (*roots, node), further)
        if key is not None and not matched:
            self.failed.add(key)
        text = pattern_text(pattern)
        self.attempt.fail(state.nodes, lambda: f"nothing beside it is {text}")

    def _candidates(
        self, pattern: Any, state: _State, roots: tuple[fx.Node, ...]
    ) -> list[fx.Node]:
        """Return where a further output may have its root: downstream of what is matched."""
        targets = root_targets(pattern)
        bound = (value for value in state.bound.values() if isinstance(value, fx.Node))
        level = list(dict.fromkeys((*bound, *state.nodes)))
        found: dict[fx.Node, None] = {}
        for _ in range(depth_of(pattern)):
            level = list(dict.fromkeys(u for n in level for u in _first_users(n) if u not in found))
            found.update(dict.fromkeys(level))
        self.steps += len(found)
        return [n for n in found if n not in roots and (targets is None or n.target in targets)]

    # -- one value ----------------------------------------------------------------------------

    def match(self, pattern: Any, value: Any, state: _State) -> _States:
        """Yield the state after each way in which `pattern` matches `value`."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise _TooLong
        if pattern is ANY:
            return iter((state,))
        matched_by = _MATCHED_BY.get(type(pattern), _Search._literal)
        if _has_choice(pattern) and isinstance(value, fx.Node):
            return self._remembered(matched_by, pattern, value, state)
        return matched_by(self, pattern, value, state)

    def _remembered(
        self, matched_by: Callable[..., _States], pattern: Any, value: fx.Node, state: _State
    ) -> _States:
        """Match, unless it is known that nothing here does."""
        key = self._key(pattern, value, state)
        if key in self.failed:
            return
        matched = False
        for after in matched_by(self, pattern, value, state):
            matched = True
            yield after
        if not matched:
            self.failed.add(key)

    def _key(self, pattern: Any, value: Any, state: _State) -> Any:
        """Return all on which it depends whether a pattern matches a node."""
        known = shared_symbols(pattern).intersection(state.bound) if state.bound else ()
        bound = tuple((name, _identity(state.bound[name])) for name in sorted(known))
        return id(pattern), value, bound

    def _literal(self, pattern: Any, value: Any, state: _State) -> _States:
        if _is_literal(pattern, value):
            yield state
        else:
            self.attempt.fail(state.nodes, lambda: f"{pattern_text(pattern)} wanted, {_is(value)}")

    def _symbol(self, pattern: Var, value: Any, state: _State) -> _States:
        return self._bind(pattern.name, value, state)

    def _any_of(self, pattern: AnyOf, value: Any, state: _State) -> _States:
        for choice in pattern.choices:
            yield from self.match(choice, value, state)

    def _named(self, pattern: Named, value: Any, state: _State) -> _States:
        for bound in self._bind(pattern.symbol.name, value, state):
            yield from self.match(pattern.pattern, value, bound)

    def _repeated(self, pattern: Repeated, value: Any, state: _State) -> _States:
        return self.match(pattern.unrolled(0), value, state)

    def _deeper(self, pattern: Deeper, value: Any, state: _State) -> _States:
        yield from self.match(pattern.unrolled(), value, state)

    def _counted(self, pattern: Counted, value: Any, state: _State) -> _States:
        for after in self.match(pattern.pattern, value, state):
            yield _with_counts(after, pattern.names, pattern.count)

    def _bind(self, name: str, value: Any, state: _State) -> _States:
        if name in state.bound:
            if same_value(state.bound[name], value):
                yield state
            else:
                both = state.bound[name], value
                self.attempt.fail(state.nodes, lambda: _two_values(name, *both))
            return
        condition = self.conditions.get(base_name(name))
        answer = True if condition is None else _answer(condition, value)
        if answer is True:
            yield _State({**state.bound, name: value}, state.nodes)
        else:
            self.attempt.fail(state.nodes, lambda: _refusal(name, value, condition, answer))

    def _all(self, pairs: Sequence[tuple[Any, Any]], state: _State) -> _States:
        if not pairs:
            yield state
            return
        pattern, value = pairs[0]
        for after in self.match(pattern, value, state):
            yield from self._all(pairs[1:], after)

    def _list(self, pattern: Any, value: Any, state: _State) -> _States:
        if not isinstance(value, (list, tuple)):
            self.attempt.fail(state.nodes, lambda: f"a list wanted, {_is(value)}")
        elif isinstance(pattern, Each):
            items = [(pattern.at(index), item) for index, item in enumerate(value)]
            for after in self._all(items, state) if items else ():
                yield _with_counts(after, pattern.names, len(items))
        else:
            yield from self._items(pattern, value, state)

    def _items(self, patterns: list[Any], values: Sequence[Any], state: _State) -> _States:
        """Match the items of a list; `*rest` takes any number of them, and so does `...`."""
        if not patterns:
            if not values:
                yield state
            else:
                self.attempt.fail(state.nodes, lambda: f"the list has {len(values)} items more")
            return
        first, *rest = patterns
        if isinstance(first, Rest) or first is ANY:
            for count in range(len(values), -1, -1):
                taken = (
                    self._bind(first.name, list(values[:count]), state) if first is not ANY
                    else iter((state,))
                )  # fmt: skip
                for after in taken:
                    yield from self._items(rest, values[count:], after)
        elif values:
            for after in self.match(first, values[0], state):
                yield from self._items(rest, values[1:], after)
        else:
            self.attempt.fail(state.nodes, lambda: f"the list has {len(patterns)} items less")

    # -- calls --------------------------------------------------------------------------------

    def _call(self, pattern: CallPattern, node: Any, state: _State) -> _States:
        fits = isinstance(node, fx.Node) and node.target in (root_targets(pattern) or ())
        spelled = _spell(pattern, node) if fits else pattern
        if not fits or spelled.target is not node.target or len(spelled.args) != len(node.args):
            self.attempt.fail(
                state.nodes,
                lambda: f"{operator_text(spelled.target or pattern.target)} wanted, {_is(node)}",
            )
            return
        state = _State(state.bound, (*state.nodes, node))
        kwargs = [(spelled.kwargs[key], node.kwargs.get(key)) for key in spelled.kwargs]
        for args in _orders(node):
            yield from self._all([*zip(spelled.args, args, strict=True), *kwargs], state)

    def _any_call(self, pattern: AnyCall, node: Any, state: _State) -> _States:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            name = pattern.symbol.name
            self.attempt.fail(state.nodes, lambda: f"a call of {name} wanted, {_is(node)}")
            return
        for bound in self._bind(pattern.symbol.name, node.target, state):
            covering = _State(bound.bound, (*bound.nodes, node))
            written = [a for a in pattern.args if a is not ANY]
            if ANY not in pattern.args and not _rest_is_default(node, len(written)):
                self.attempt.fail(
                    covering.nodes, lambda: f"{node.name} has arguments that are not written"
                )
                return
            for args in _orders(node):
                if len(written) <= len(args):
                    pairs = list(zip(written, args, strict=False))
                    yield from self._all(pairs, covering)


_MATCHED_BY: Mapping[type, Callable[..., _States]] = {  # anything else is a literal
    CallPattern: _Search._call, AnyCall: _Search._any_call, Var: _Search._symbol,
    AnyOf: _Search._any_of, Named: _Search._named, Counted: _Search._counted,
    Repeated: _Search._repeated, Deeper: _Search._deeper, list: _Search._list, Each: _Search._list,
}  # fmt: skip


def _has_choice(pattern: Any) -> bool:
    """Whether a pattern is tried in several ways, so that it pays to remember where none fits."""
    if isinstance(pattern, CallPattern):
        return pattern.target in COMMUTATIVE
    return isinstance(pattern, (AnyOf, Deeper))


def _identity(value: Any) -> Any:
    """Return something that tells a bound value from others, and can be a key."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_identity, value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def _answer(condition: Condition, value: Any) -> Any:
    """Ask a condition; one that depends on a symbolic size does not hold."""
    env = environment_at(value)
    if env is None:
        return condition(value)
    try:
        with undecided(env, names_of_sizes(value)):
            return condition(value)
    except SizeAsked as question:
        return str(question)


def _rest_is_default(node: fx.Node, written: int) -> bool:
    """Whether a call's arguments behind the first few are their operator's defaults."""
    if not isinstance(node.target, OpOverload):
        return len(node.args) <= written and not node.kwargs
    given = [*node.args[:written], *([None] * (written - len(node.args)))]
    try:
        plain = complete(node.target, tuple(given), {})
    except TypeError:  # one without a default
        return False
    rest = zip(plain.args[written:], node.args[written:], strict=False)
    named = ((plain.kwargs.get(key), value) for key, value in node.kwargs.items())
    return all(same_value(a, b) for a, b in (*rest, *named))


def _orders(node: fx.Node) -> list[tuple[Any, ...]]:
    """Return the arguments of a call, in each order that means the same."""
    args = node.args
    swaps = node.target in COMMUTATIVE and len(args) == 2 and args[0] is not args[1]
    if swaps and node.kwargs.get("alpha", 1) == 1:
        return [args, (args[1], args[0])]
    return [args]


def _first_users(node: fx.Node) -> list[fx.Node]:
    return [user for user, _ in zip(node.users, range(MOST_CANDIDATES), strict=False)]


# -- how a call of a pattern is spelled at a node --------------------------------------------------


# the spellings that do not depend on what they meet
_spellings: weakref.WeakKeyDictionary[CallPattern, Call] = weakref.WeakKeyDictionary()


def _spell(pattern: CallPattern, node: fx.Node) -> Call:
    """Return the pattern's call in canonical spelling, with the shapes of the node it meets."""
    if node.target is not pattern.target:
        if node.target in siblings_of(pattern):
            return complete(node.target, pattern.args, pattern.kwargs)
        other = turned_round(pattern, node.target)
        if other is not None and not isinstance(node.args[1], fx.Node):
            return other
    known = _spellings.get(pattern)
    if known is not None:
        return known
    if not isinstance(pattern.target, OpOverload):
        return Call(pattern.target, pattern.args, pattern.kwargs)
    first = next((a for a in _flat(node.args) if isinstance(a, fx.Node)), None)
    places = {id(a): n for a, n in zip(pattern.args, node.args, strict=False)}
    asked = False

    def described(argument: Any) -> Any:
        nonlocal asked
        asked = True
        if not is_pattern(argument):
            return None
        found = places.get(id(argument))
        found = found if isinstance(found, fx.Node) else first
        return None if found is None else found.meta.get("val")

    try:
        call = canonical(pattern.target, pattern.args, pattern.kwargs, described)
    except NOT_KNOWN:
        return complete(pattern.target, pattern.args, pattern.kwargs)
    if not asked and call.target is not None:
        _spellings[pattern] = call
    return call


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    for value in args:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


# -- values ----------------------------------------------------------------------------------------


def _is_literal(wanted: Any, value: Any) -> bool:
    """Whether a value is the one that a pattern writes out."""
    tolerance = 1e-9
    if isinstance(wanted, Near):
        wanted, tolerance = wanted.value, wanted.tolerance
    if isinstance(wanted, (int, float)) and not isinstance(wanted, bool):
        number, stored = _number(value, wanted)
        if number is None or isinstance(number, bool):
            return False
        return number == stored or math.isclose(number, wanted, rel_tol=tolerance)
    return same_value(wanted, value)


_COPIES = (aten.clone.default, aten.detach.default)


def _number(value: Any, wanted: float) -> tuple[Any, float]:
    """Return a number, or that of a constant of one element, and what `wanted` is in its dtype."""
    if isinstance(value, (int, float)):
        return value, wanted
    while isinstance(value, fx.Node) and value.target in _COPIES:
        value = value.args[0]
    if isinstance(value, fx.Node) and value.op == "get_attr":
        graph: Any = value.graph.owning_module
        tensor = graph.fixed_tensor(str(value.target)) if hasattr(graph, "fixed_tensor") else None
        if tensor is not None and tensor.numel() == 1 and not tensor.is_complex():
            exact = not tensor.dtype.is_floating_point
            rounded = wanted if exact else torch.tensor(wanted, dtype=tensor.dtype).item()
            return tensor.item(), rounded
    return None, wanted


def same_value(a: Any, b: Any) -> bool:
    """Whether two arguments are the same node, or equal numbers, lists or other literals."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b or (isinstance(a, float) or isinstance(b, float)) and math.isclose(a, b)
    return type(a) is type(b) and bool(a == b)


# -- words -----------------------------------------------------------------------------------------


def _is(value: Any) -> str:
    """Say what stands where something else was wanted."""
    if not isinstance(value, fx.Node):
        return f"found {value!r}"
    if value.op == "call_function":
        return f"found {value.name} ({operator_text(value.target)})"
    return f"found {value.name} ({'an input' if value.op == 'placeholder' else 'a constant'})"


def _two_values(name: str, one: Any, other: Any) -> str:
    shown = " and ".join(str(getattr(value, "name", value)) for value in (one, other))
    return f"'{name}' would stand for two different values, {shown}"


def _refusal(name: str, value: Any, condition: Any, answer: Any) -> str:
    shown = value.name if isinstance(value, fx.Node) else operator_text(value)
    if isinstance(answer, str):
        return f"'{base_name(name)}' would be {shown}, and {answer}"
    wanted = getattr(condition, "__name__", "<").replace("_", " ")
    wanted = "as asked" if "<" in wanted else wanted
    return f"'{base_name(name)}' would be {shown}, which is not {wanted}"
