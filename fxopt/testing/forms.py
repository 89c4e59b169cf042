"""Every form of a rule's pattern, run as an example: alternatives, optional parts, repetitions.

A symbol's value is the shape of a tensor (a tuple), a tensor, a number, a list of numbers, or an
operator where the pattern calls it. A symbol that stands for something in each item of a list gets
another tensor for each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._ops import OpOverload

from fxopt.conditions import constant
from fxopt.errors import OptionError
from fxopt.pattern import (
    AnyCall,
    AnyOf,
    CallPattern,
    Each,
    Named,
    Near,
    Outputs,
    Repeated,
    Rest,
    Var,
    everything_in,
    operator_text,
    pattern_text,
    siblings_of,
)
from fxopt.rules import Rule
from fxopt.spelling import ANY
from fxopt.testing.examples import Example, given_shape

MOST_COMBINED = 12  # forms; with more, each choice is made by itself


class Form(Example):
    """One form of a pattern as an example."""

    at_edge = False  # a number lies at the edge of its tolerance: equal up to rounding
    must_fire = True
    first = False  # of its pattern
    brief = False  # a combination of choices each of which was tried by itself
    words = ""  # which other numbers stand in it
    failure: Exception | None = None  # with which the pattern does not run

    def __init__(
        self, function: Any, inputs: Mapping[str, Any], weights: Mapping[str, Any],
        positive: set[str], source: str,
    ) -> None:  # fmt: skip
        super().__init__(function, *inputs.values(), weights=weights, positive=positive)
        self._names, self._source = list(inputs), source

    @property
    def source(self) -> str:
        """The line where the rule was written."""
        return self._source

    @property
    def names(self) -> list[str]:
        """The symbols that the inputs stand for."""
        return self._names


def values_by_symbol(
    rule: Rule, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what was given for each symbol; raise OptionError for what does not fit."""
    known = f"{rule.name} has the symbols {', '.join(rule.symbols)}, and no others."
    if len(inputs) > len(rule.symbols) or any(name not in rule.symbols for name in named):
        raise OptionError(f"check_rule: {known}")
    values = {**dict(zip(rule.symbols, inputs, strict=False)), **named}
    for pattern in rule.patterns:
        for call in everything_in(pattern):
            if isinstance(call, CallPattern) and isinstance(call.target, OpOverload):
                _check_lists(rule, call, values)
    return values


def _check_lists(rule: Rule, call: CallPattern, values: Mapping[str, Any]) -> None:
    """Refuse a tuple, which is a shape, where the operator takes a list of numbers."""
    for arg, argument in zip(call.args, call.target._schema.arguments, strict=False):
        value = values.get(arg.name) if isinstance(arg, Var) else None
        kind = str(argument.type)
        if isinstance(value, tuple) and "int" in kind.lower() and "Tensor" not in kind:
            raise OptionError(
                f"check_rule({rule.name}): '{arg.name}' stands for numbers, '{argument.name}' of "
                f"{operator_text(call.target)}, and a tuple is the shape of a tensor. Give a list: "
                f"{arg.name}={list(value)}."
            )


# -- which forms there are -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """What a form does where a pattern leaves a choice."""

    rule: Rule
    pattern: Any
    values: Mapping[str, Any]
    chosen: Mapping[Any, Any] = field(default_factory=dict)  # by pattern; one of its `_offers`
    open: Mapping[tuple[int, Any], Any] = field(default_factory=dict)  # what `...` stands for
    alike: bool = False  # the same number in each item of a list


def forms(rule: Rule, values: Mapping[str, Any]) -> Iterator[Form]:
    """Yield each form: the first choices, each other choice, combinations, and other numbers."""
    for pattern in rule.patterns:
        first = _Choice(rule, pattern, values)
        form = _form(first)
        form.first = True
        yield form
        parts = {_key(p): _offers(p, values) for p in everything_in(pattern)}
        parts = {key: offers for key, offers in parts.items() if len(offers) > 1}
        several = math.prod(map(len, parts.values())) <= MOST_COMBINED
        for choice in itertools.product(*parts.values()) if several else _singles(parts.values()):
            pairs = zip(parts, choice, strict=True)
            made = {key: chosen for key, chosen in pairs if chosen is not parts[key][0]}
            if made:
                form = _form(replace(first, chosen=made))
                form.brief = len(made) > 1
                form.must_fire = not any(isinstance(k, Rest) and c == 0 for k, c in made.items())
                yield form
        yield from _edges(first)
        yield from _other_numbers(first)
        yield from _other_arguments(first)


def _key(pattern: Any) -> Any:
    return pattern if isinstance(pattern, Rest) else id(pattern)


def _offers(pattern: Any, values: Mapping[str, Any]) -> Sequence[Any]:
    """Return what a part of a pattern may be: a choice, or how many times; the usual one first."""
    if isinstance(pattern, AnyOf):
        return pattern.choices
    if isinstance(pattern, Rest):
        given = values.get(pattern.name)
        return (len(given),) if isinstance(given, list) else (1, 2, 0)
    if isinstance(pattern, Repeated):
        return (pattern.least + 1, pattern.least, pattern.least + 2)
    return (1, 2, 3) if isinstance(pattern, Each) else (None,)


def _edges(first: _Choice) -> Iterator[Form]:
    """Yield forms in which a number lies at the edge of its tolerance."""
    numbers = [part for part in everything_in(first.pattern) if isinstance(part, Near)]
    for part, tolerances in itertools.product(numbers, (0.99, -0.99)):
        number = part.value * (1 + tolerances * part.tolerance)
        form = _form(replace(first, chosen={id(part): number}))
        form.at_edge = True
        yield form


def _singles(parts: Iterable[Sequence[Any]]) -> Iterator[list[Any]]:
    """Yield choices of which one is not the usual one."""
    usual = [offers[0] for offers in parts]
    for place, offers in enumerate(parts):
        for choice in offers[1:]:
            yield [*usual[:place], choice, *usual[place + 1 :]]


def _form(choice: _Choice) -> Form:
    """Return the form that makes these choices, with a weight or an input for each tensor in it."""
    collected = _collect(choice)
    if not choice.alike and collected.failure is not None:
        same = _collect(replace(choice, alike=True))
        collected = same if same.failure is None else collected
    tensors = {k: v for k, v in collected.tensors.items() if k not in collected.weights}
    weights = {k: v for k, v in collected.tensors.items() if k in collected.weights}
    alike = collected.choice

    def function(*args: Any, **parameters: Any) -> Any:
        known = {**dict(zip(tensors, args, strict=True)), **parameters}
        return _Run(alike, known).value(alike.pattern)

    form = Form(function, tensors, weights, collected.positive, choice.rule.source)
    form.failure = collected.failure
    return form


def _other_numbers(first: _Choice) -> Iterator[Form]:
    """Yield forms in which one number, or list of numbers, is another, or two are exchanged."""
    for name, value in first.values.items():
        for other in _instead_of(value):
            form = _form(replace(first, values={**first.values, name: other}))
            form.must_fire, form.words = False, f"with {name}={other!r}"
            yield form
    numbers = [name for name, value in first.values.items() if type(value) in (int, float)]
    for one, other in itertools.combinations(numbers, 2):
        pair = {one: first.values[other], other: first.values[one]}
        if pair[one] != pair[other]:
            form = _form(replace(first, values={**first.values, **pair}))
            words = " and ".join(f"{name}={value!r}" for name, value in pair.items())
            form.must_fire, form.words = False, f"with {words}"
            yield form


def _instead_of(value: Any) -> list[Any]:
    """Return numbers that may stand in the place of one."""
    others: list[Any] = []
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        others = [value + 1, -value, 0, 1, -1]
    elif isinstance(value, float):
        others = [value + 1.7, -value, 0.0, 1.0, value / 100]
    elif isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        others = [[*value[1:], value[0]], value[::-1], [item + 1 for item in value]]
    return [one for i, one in enumerate(others) if one != value and one not in others[:i]]


def _other_arguments(first: _Choice) -> Iterator[Form]:
    """Yield forms in which one argument that the pattern leaves open has another value."""
    sizes = sorted({s for v in first.values.values() if is_for_tensor(v) for s in given_shape(v)})
    for call in everything_in(first.pattern):
        if isinstance(call, CallPattern) and isinstance(call.target, OpOverload):
            for place, argument in _open_arguments(call):
                for other in _other_than_default(argument, sizes):
                    form = _form(replace(first, open={(id(call), place): other}))
                    form.must_fire = False
                    shown = f"a tensor of {other}" if is_for_tensor(other) else repr(other)
                    form.words = f"where {argument.name} of {operator_text(call.target)} is {shown}"
                    yield form


def _open_arguments(call: CallPattern) -> Iterator[tuple[Any, Any]]:
    schema = call.target._schema.arguments
    for place, (arg, argument) in enumerate(zip(call.args, schema, strict=False)):
        if arg is ANY:
            yield place, argument
    by_name = {argument.name: argument for argument in schema}
    yield from ((key, by_name[key]) for key, arg in call.kwargs.items() if arg is ANY)


def _other_than_default(argument: Any, sizes: list[int]) -> list[Any]:
    value = _usual(argument)
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1 if isinstance(value, int) else 2 * value + 0.125]
    if isinstance(value, (list, tuple)) and value:
        return [[item + 1 for item in value]] if isinstance(value[0], int) else []
    return [(size,) for size in sizes] if value is None and "Tensor" in str(argument.type) else []


# -- running a form --------------------------------------------------------------------------------


def is_for_tensor(value: Any) -> bool:
    """Whether what was given for a symbol is a tensor, or the shape of one."""
    shape = isinstance(value, tuple) and all(isinstance(size, int) for size in value)
    return isinstance(value, torch.Tensor) or shape


@dataclass
class _Collected:
    """The tensors that a form needs, as the first run of it met them."""

    choice: _Choice
    tensors: dict[str, Any] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    positive: set[str] = field(default_factory=set)
    failure: Exception | None = None


def _collect(choice: _Choice) -> _Collected:
    found = _Collected(choice)
    try:
        with torch.no_grad():
            _Run(choice, {}, found).value(choice.pattern)
    except OptionError:
        raise
    except Exception as error:
        found.failure = error
    return found


class _Run:
    """Runs one form of a pattern on tensors; with `collected`, finds out which it needs."""

    def __init__(
        self, choice: _Choice, known: Mapping[str, Any], collected: _Collected | None = None,
        items: Mapping[str, tuple[int, ...]] | None = None,
        holes: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.choice, self.known, self.collected = choice, known, collected
        self.items, self.holes = items or {}, holes or {}
        self.named = {p.symbol.name: p for p in everything_in(choice.pattern)
                      if isinstance(p, Named)}  # fmt: skip
        self.statistics = _statistics(choice.pattern)
        self._done: dict[int, Any] = {}

    def value(self, pattern: Any) -> Any:
        """Return the value of a pattern; a call that stands in several places runs once."""
        if isinstance(pattern, (CallPattern, Named)):
            if id(pattern) not in self._done:
                self._done[id(pattern)] = self._computed(pattern)
            return self._done[id(pattern)]
        return self._computed(pattern)

    def _computed(self, pattern: Any) -> Any:
        if isinstance(pattern, Var):
            return self._symbol(pattern.name)
        if isinstance(pattern, CallPattern):
            return self._call(pattern)
        if isinstance(pattern, AnyOf):
            return self.value(self._chosen(pattern))
        if isinstance(pattern, Named):
            return self.value(pattern.pattern)
        if isinstance(pattern, Outputs):
            return tuple(map(self.value, pattern.patterns))
        if isinstance(pattern, Near):
            return self.choice.chosen.get(id(pattern), pattern.value)
        if isinstance(pattern, Repeated):
            return self._repeated(pattern, self._chosen(pattern))
        if isinstance(pattern, Each):
            numbers = range(self._chosen(pattern))
            inner = (self._inside(pattern.names, number) for number in numbers)
            return [run.value(pattern.item) for run in inner]
        if isinstance(pattern, AnyCall):
            return self._symbol(pattern.symbol.name)(*self._args(pattern.args))
        return self._list(pattern) if isinstance(pattern, list) else pattern

    def _chosen(self, pattern: Any) -> Any:
        """Return which of its offers a part of the pattern is in this form."""
        usual = _offers(pattern, self.choice.values)[0]
        return self.choice.chosen.get(_key(pattern), usual)

    def _inside(self, names: Iterable[str], number: int, **holes: Any) -> _Run:
        """Return the run of one item, whose own symbols have values of their own."""
        items = {**self.items, **{n: (*self.items.get(n, ()), number) for n in names}}
        return _Run(self.choice, self.known, self.collected, items, {**self.holes, **holes})

    def _repeated(self, pattern: Repeated, times: int) -> Any:
        value = self.value(pattern.start)
        for number in range(times):
            inner = self._inside(pattern.names, number, **{pattern.hole.name: value})
            value = inner.value(pattern.part)
        return value

    def _list(self, patterns: list[Any]) -> list[Any]:
        found: list[Any] = []
        for one in patterns:
            if isinstance(one, Rest):
                found.extend(self._rest(one))
            elif one is not ANY:
                found.append(self.value(one))
        return found

    def _rest(self, pattern: Rest) -> list[Any]:
        self._given(pattern.name)
        items = self.items.get(pattern.name, ())
        numbers = range(self._chosen(pattern))
        return [self._item(pattern.name, (*items, number)) for number in numbers]

    def _symbol(self, name: str) -> Any:
        if name in self.holes:
            return self.holes[name]
        if name in self.named:
            return self.value(self.named[name])
        return self._item(name, self.items.get(name, ()))

    def _item(self, name: str, items: tuple[int, ...]) -> Any:
        key = "__".join([name, *map(str, items)])
        if key in self.known:
            return self.known[key]
        value = self._given(name)
        if items and isinstance(value, list):
            value = value[items[-1] % len(value)]
        elif items and isinstance(value, (int, float)) and not self.choice.alike:
            value = value + items[-1] * (1 if isinstance(value, int) else 0.5)
        return self._tensor(key, name, value) if is_for_tensor(value) else value

    def _given(self, name: str) -> Any:
        if name not in self.choice.values:
            rule, pattern = self.choice.rule.name, self.choice.pattern
            calls = (part for part in everything_in(pattern) if isinstance(part, AnyCall))
            called = any(call.symbol.name == name for call in calls)
            wanted = "an operator" if called else "a shape, a tensor or a number"
            raise OptionError(
                f"check_rule({rule}): give '{name}' {wanted}, or give function=. The pattern is "
                f"{pattern_text(pattern)}."
            )
        return self.choice.values[name]

    def _tensor(self, key: str, name: str, value: Any) -> Any:
        """Note a tensor that is needed, and return one of its shape."""
        if self.collected is None:
            raise RuntimeError(f"{key} was not met when the form was first run")
        asked = getattr(self.choice.rule.conditions.get(name), "__wrapped__", None)
        if isinstance(value, torch.nn.Parameter) or asked is constant:
            self.collected.weights.add(key)
            if name in self.statistics:
                value = torch.empty(given_shape(value))  # a buffer, as of a batch norm
            if self.statistics.get(name) == "running_var":
                self.collected.positive.add(key)
        self.collected.tensors[key] = value
        return Example(lambda x: x, value).draw(1)[0]

    def _args(self, args: Iterable[Any]) -> list[Any]:
        return [self.value(arg) for arg in args if arg is not ANY]

    def _call(self, pattern: CallPattern) -> Any:
        if not isinstance(pattern.target, OpOverload):
            return pattern.target(*self._args(pattern.args))
        arguments = dict(_open_arguments(pattern))
        args = [
            self._open(pattern, place, arguments[place]) if arg is ANY else self.value(arg)
            for place, arg in enumerate(pattern.args)
        ]
        named = {
            key: self._open(pattern, key, arguments[key]) if arg is ANY else self.value(arg)
            for key, arg in pattern.kwargs.items()
        }
        number = any(isinstance(arg, (int, float)) for arg in args)
        chooses = number and siblings_of(pattern)  # x > s has another overload for a number s
        target = pattern.target.overloadpacket if chooses else pattern.target
        return target(*args, **named)

    def _open(self, pattern: CallPattern, place: Any, argument: Any) -> Any:
        """Return what stands where the pattern leaves an argument open."""
        other = self.choice.open.get((id(pattern), place))
        if other is None:
            return _default(pattern, argument)
        if not is_for_tensor(other):
            return other
        key = f"{argument.name}__open"
        if key not in self.known and self.collected is not None:
            self.collected.weights.add(key)
            self.collected.tensors[key] = other
            return torch.zeros(other, dtype=torch.float64)
        return self.known[key]


_USUAL = {"bool": False, "int": 1, "SymInt": 1, "float": 0.1, "number": 1}


def _usual(argument: Any) -> Any:
    """Return the default of an argument, or else a usual value."""
    if argument.has_default_value():
        return argument.default_value
    return _USUAL.get(str(argument.type))


def _statistics(pattern: Any) -> dict[str, str]:
    """Return the symbols that stand for running statistics, and for which."""
    return {
        arg.name: argument.name
        for call in everything_in(pattern)
        if isinstance(call, CallPattern) and isinstance(call.target, OpOverload)
        for arg, argument in zip(call.args, call.target._schema.arguments, strict=False)
        if isinstance(arg, Var) and argument.name.startswith("running_")
    }


def _default(pattern: CallPattern, argument: Any) -> Any:
    value, optional = _usual(argument), str(argument.type).startswith("Optional")
    if value is None and not optional and not argument.has_default_value():
        raise OptionError(
            f"check_rule: '{argument.name}' of {pattern.target} is left open in the pattern and "
            "has no default; give function=."
        )
    return value
