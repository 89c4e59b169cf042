"""Patterns: an ordinary Python function over tensors, run once on symbols.

    lambda x, w, b: F.relu(F.conv2d(x, w, b, ...))

Each parameter is a symbol that matches anything (a tensor, or a number or list that then is
captured); `...` stands for "whatever the remaining arguments are"; an argument that is not written
must equal its default. Calls may be spelled as functions, methods or operators, by keyword or by
position: both the pattern and the graph are brought to the one canonical spelling. The operands of
commutative operators match in either order. A number matches a number within 1e-9, and a constant
of one element with that value. `f(x)`, with a symbol f, is a call of any operator on x.

A pattern with several outputs returns a tuple. These functions may stand in a pattern:

    any_of(F.gelu(x), F.silu(x))                 one of several; symbols of the others are None
    optional(lambda s: s + mask, scores)         a part that may be missing
    repeated(lambda y, a: y * a, x)              the same part any number of times; a is a list
    torch.cat(each(lambda p: F.relu(p)), dim)    a list of items of one form; p is a list
    torch.cat([x, *rest], dim)                   the other items of a list
    named(y, F.conv2d(x, w, b, ...))             a name for a value inside
    near(1.702, 1e-3)                            a number with a tolerance of its own

`fxopt.recording` makes a pattern of a function, and `fxopt.matching` finds patterns in graphs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.errors import OptionError
from fxopt.normalize import Call, ShapeNeeded, canonical
from fxopt.spelling import ANY, Traced, has_further_results, operator_of, results_of

aten = torch.ops.aten
F = torch.nn.functional


# -- what a pattern is made of ---------------------------------------------------------------------


Replace = Callable[[Any], Any]  # from a part of a pattern to what stands in its place


class Pattern:
    """What may stand in a pattern, besides literals, lists and ANY."""

    is_value: ClassVar[bool] = True  # it stands for one value of the graph

    @property
    def _is_call(self) -> bool:
        """Whether every form of it has a call at its root."""
        return False

    @property
    def _parts(self) -> tuple[Any, ...]:
        """The patterns directly inside."""
        return ()

    def _rebuilt(self, replace: Replace) -> Any:
        """Return it with other parts, and with other names for the symbols of lists."""
        return self

    def _text(self) -> str:
        """Write it as an expression."""
        raise NotImplementedError


@dataclass(frozen=True)
class Var(Pattern):
    """A symbol: the same value wherever it stands.

    Besides the author's names there are `a#1`, what `a` is in the second item of a list (or time
    of a repetition), `a#` for how many there are, and `<y:3>` for the hole of a repetition.
    """

    name: str

    def _text(self) -> str:
        return base_name(self.name)


def base_name(name: str) -> str:
    """Return the author's name of a symbol: `a` for `a#1#0`, `y` for `<y:3>`."""
    return name.split("#")[0].strip("<").split(":")[0]


def indexed(name: str, index: int) -> str:
    """Return the name of what a symbol stands for in one item of a list."""
    return f"{name}#{index}"


def counted(name: str) -> str:
    """Return the name under which it is bound how many items a symbol has."""
    return f"{name}#"


def _is_hole(name: str) -> bool:
    return name.startswith("<")


@dataclass(frozen=True)
class Rest(Pattern):
    """A symbol for the other items of a list: `[x, *rest]`."""

    name: str

    is_value = False

    def _text(self) -> str:
        return f"*{base_name(self.name)}"


@dataclass(frozen=True)
class Near(Pattern):
    """A number with a relative tolerance."""

    value: float
    tolerance: float

    is_value = False

    def _text(self) -> str:
        return f"≈{self.value:.6g}"


@dataclass(frozen=True, eq=False)
class CallPattern(Pattern):
    """A call; its arguments are patterns, literals or ANY."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    _is_call = True

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (*self.args, *self.kwargs.values())

    def _rebuilt(self, replace: Replace) -> CallPattern:
        named = {key: replace(value) for key, value in self.kwargs.items()}
        return CallPattern(self.target, tuple(map(replace, self.args)), named)

    def _text(self) -> str:
        args = list(map(pattern_text, self.args))
        sign = _INFIX.get(self.target)
        if sign is not None and len(args) == 2:
            return f"({args[0]} {sign} {args[1]})"
        while args[-2:] == ["…", "…"]:
            args.pop()
        if self.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        named = [f"{k}={pattern_text(v)}" for k, v in self.kwargs.items() if v is not ANY]
        return f"{operator_text(self.target).split('.')[0]}({', '.join([*args, *named])})"


@dataclass(frozen=True, eq=False)
class AnyCall(Pattern):
    """A call of whatever operator `symbol` stands for; arguments that are not written are free."""

    symbol: Var
    args: tuple[Any, ...]

    _is_call = True

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self.symbol, *self.args)

    def _rebuilt(self, replace: Replace) -> AnyCall:
        return AnyCall(replace(self.symbol), tuple(map(replace, self.args)))

    def _text(self) -> str:
        return f"{self.symbol.name}({', '.join(map(pattern_text, self.args))})"


@dataclass(frozen=True, eq=False)
class AnyOf(Pattern):
    """One of several patterns, tried in order."""

    choices: tuple[Any, ...]

    @property
    def _is_call(self) -> bool:
        return all(map(is_call, self.choices))

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.choices

    def _rebuilt(self, replace: Replace) -> AnyOf:
        return AnyOf(tuple(map(replace, self.choices)))

    def _text(self) -> str:
        return f"({' | '.join(map(pattern_text, self.choices))})"


@dataclass(frozen=True, eq=False)
class Named(Pattern):
    """A pattern whose value has a name, too."""

    symbol: Var
    pattern: Any

    @property
    def _is_call(self) -> bool:
        return is_call(self.pattern)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self.symbol, self.pattern)

    def _rebuilt(self, replace: Replace) -> Named:
        return Named(replace(self.symbol), replace(self.pattern))

    def _text(self) -> str:
        return pattern_text(self.pattern)


@dataclass(frozen=True, eq=False)
class Repeated(Pattern):
    """A part around itself, `least` times or more, around `start`; `hole` is where it repeats."""

    part: Any
    hole: Var
    start: Any
    names: frozenset[str]  # symbols of the part: a list each
    least: int

    @property
    def _is_call(self) -> bool:
        return is_call(self.part) and (self.least > 0 or is_call(self.start))

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self.part, self.start)

    def _rebuilt(self, replace: Replace) -> Repeated:
        names = frozenset(replace(Var(name)).name for name in self.names)
        return Repeated(replace(self.part), self.hole, replace(self.start), names, self.least)

    def _text(self) -> str:
        return f"({pattern_text(self.part)})* around {pattern_text(self.start)}"

    @functools.cache  # noqa: B019 - kept for good, as the patterns of modules are
    def unrolled(self, depth: int) -> Any:
        """Return what stands at this depth: the part around the next depth, or the start."""
        end = Counted(self.start, self.names, depth)
        if depth >= LONGEST_REPETITION:
            return end
        deeper = Deeper(self, depth + 1)
        part = _replaced(self.part, {self.hole.name: deeper}, self.names, depth)
        return part if depth < self.least else AnyOf((part, end))


@dataclass(frozen=True, eq=False)
class Deeper(Pattern):
    """The rest of a repetition; unrolled when it is met."""

    repeated: Repeated
    depth: int

    def unrolled(self) -> Any:
        """Return what stands at its depth."""
        return self.repeated.unrolled(self.depth)

    def _text(self) -> str:
        return pattern_text(self.repeated)


@dataclass(frozen=True, eq=False)
class Counted(Pattern):
    """What stands at the end of a repetition: its symbols have one item for each time."""

    pattern: Any
    names: frozenset[str]
    count: int

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self.pattern,)

    def _text(self) -> str:
        return pattern_text(self.pattern)


@dataclass(frozen=True, eq=False)
class Each(Pattern):
    """A list of at least one item, each of which matches `item`."""

    item: Any
    names: frozenset[str]  # symbols of the item: a list each

    is_value = False

    @property
    def _parts(self) -> tuple[Any, ...]:
        return (self.item,)

    def _rebuilt(self, replace: Replace) -> Each:
        names = frozenset(replace(Var(name)).name for name in self.names)
        return Each(replace(self.item), names)

    def _text(self) -> str:
        return f"[{pattern_text(self.item)}, …]"

    @functools.cache  # noqa: B019 - see above
    def at(self, index: int) -> Any:
        """Return the pattern of the item at this index."""
        return _replaced(self.item, {}, self.names, index)


@dataclass(frozen=True, eq=False)
class Outputs(Pattern):
    """Several patterns that share symbols; each has a root of its own."""

    patterns: tuple[Any, ...]

    is_value = False

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.patterns

    def _text(self) -> str:
        return ", ".join(map(pattern_text, self.patterns))


LONGEST_REPETITION = 16


def parts_of(pattern: Any) -> tuple[Any, ...]:
    """Return the patterns directly inside a pattern or a list."""
    if isinstance(pattern, Pattern):
        return pattern._parts
    return tuple(pattern) if isinstance(pattern, list) else ()


def is_call(pattern: Any) -> bool:
    """Whether every form of a pattern has a call at its root."""
    return isinstance(pattern, Pattern) and pattern._is_call


def is_pattern(argument: Any) -> bool:
    """Whether an argument of a pattern's call stands for a value of the graph."""
    return isinstance(argument, Pattern) and argument.is_value


def everything_in(pattern: Any) -> Iterator[Any]:
    """Yield a pattern and all patterns inside, each object once."""
    pending, seen = [pattern], set()
    while pending:
        one = pending.pop()
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            pending.extend(reversed(parts_of(one)))


def symbols_of(pattern: Any) -> dict[str, None]:
    """Return the names of a pattern's symbols, in the order in which they stand in the text."""
    found = (part for part in everything_in(pattern) if isinstance(part, (Var, Rest)))
    return {symbol.name: None for symbol in found if not _is_hole(symbol.name)}


@functools.cache
def shared_symbols(pattern: Any) -> frozenset[str]:
    """Return the symbols of a pattern whose value may be known before it is matched."""
    if isinstance(pattern, Deeper):
        return shared_symbols(pattern.repeated)
    if isinstance(pattern, (Var, Rest)):
        return frozenset((pattern.name,))
    inside = frozenset[str]().union(*map(_shared_in, parts_of(pattern)))
    if isinstance(pattern, (Repeated, Each)):
        inside -= pattern.names
    return inside - {pattern.hole.name} if isinstance(pattern, Repeated) else inside


def _shared_in(part: Any) -> frozenset[str]:
    if isinstance(part, list):
        return frozenset[str]().union(*map(_shared_in, part))
    inside = is_pattern(part) or isinstance(part, (Each, Rest))
    return shared_symbols(part) if inside else frozenset()


def depth_of(pattern: Any) -> int:
    """Return how many calls lie between the root of a pattern and its deepest one."""
    deepest = max(map(depth_of, parts_of(pattern)), default=0)
    if isinstance(pattern, Repeated):
        return depth_of(pattern.part) * LONGEST_REPETITION + depth_of(pattern.start)
    return deepest + isinstance(pattern, (CallPattern, AnyCall))


def _replaced(pattern: Any, values: Mapping[str, Any], names: frozenset[str], index: int) -> Any:
    """Return a pattern with other values for some symbols, and an index on some names."""

    def replaced(part: Any) -> Any:
        return _replaced(part, values, names, index)

    if isinstance(pattern, (Var, Rest)):
        if pattern.name in values:
            return values[pattern.name]
        return type(pattern)(indexed(pattern.name, index)) if pattern.name in names else pattern
    if isinstance(pattern, list):
        return list(map(replaced, pattern))
    return pattern._rebuilt(replaced) if isinstance(pattern, Pattern) else pattern


# -- symbols, and what an author writes with them --------------------------------------------------


class Symbol(Traced):
    """A value inside a pattern that is being recorded."""

    _in_pattern: ClassVar[bool] = True

    @property
    def _may_be_number(self) -> bool:
        return not isinstance(self._pattern, (CallPattern, AnyCall))

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
        return record_call(target, args, kwargs)

    def __call__(self, *args: Any) -> Symbol:
        """Match a call of any operator on these arguments."""
        if not isinstance(self._pattern, Var):
            raise TypeError("only a symbol can stand for an operator: f(x)")
        return Symbol(AnyCall(self._pattern, tuple(map(plain, args))))

    def __getattr__(self, name: str) -> Any:
        if name in _QUESTIONS:
            raise OptionError(f"a pattern cannot ask for '{name}'; a rule can, or a condition.")
        return super().__getattr__(name)

    def __getitem__(self, index: Any) -> Any:
        several = _is_list(self._pattern)
        if several is False or not isinstance(index, (int, Symbol)):
            return self._indexed(index)
        item = Symbol(CallPattern(operator.getitem, (self._pattern, plain(index))))
        return item if several else any_of(item, self._indexed(index))

    def _results(self) -> list[str]:
        pattern = self._pattern
        while isinstance(pattern, Named):
            pattern = pattern.pattern
        return results_of(pattern.target) if isinstance(pattern, CallPattern) else []

    def _whole(self, dim: int) -> Any:
        if isinstance(self._pattern, Var):
            return self
        return any_of(record_call(aten.slice.Tensor, (self, dim), {}), self)

    def __bool__(self) -> bool:
        raise TypeError("a pattern cannot branch on a value; write one pattern per branch")

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._pattern, Var):
            yield Symbol(Rest(self._pattern.name))
            return
        count = _count_of(self._pattern)
        if count is None:
            raise TypeError("a pattern cannot unpack a value; index it: parts[0]")
        yield from (self[index] for index in range(count))

    def __repr__(self) -> str:
        return pattern_text(self._pattern)


_QUESTIONS = ("shape", "dtype", "device", "ndim", "size", "dim", "numel", "stride", "nelement")


def _is_list(pattern: Any) -> bool | None:
    """Whether a pattern stands for a list of tensors; None where either may match."""
    if isinstance(pattern, CallPattern):
        return bool(results_of(pattern.target))
    if isinstance(pattern, Named):
        return _is_list(pattern.pattern)
    if isinstance(pattern, (AnyOf, Repeated)):
        found = {_is_list(one) for one in parts_of(pattern)}
        return found.pop() if len(found) == 1 else None
    return None


def _count_of(pattern: Any) -> int | None:
    """Return how many values a call of a pattern returns, where its text tells."""
    if not isinstance(pattern, CallPattern):
        return None
    if pattern.target is aten.chunk.default and isinstance(pattern.args[1], int):
        return pattern.args[1]
    sizes = pattern.args[1] if len(pattern.args) > 1 else None
    if pattern.target in (aten.split_with_sizes.default, aten.split.sizes):
        return len(sizes) if isinstance(sizes, list) else None
    names = results_of(pattern.target)
    return len(names) if len(names) > 1 else None


def symbols(names: str) -> Any:
    """Return a symbol for each name, to write a pattern as an expression: `x, y = symbols("x y")`.

    One name gives one symbol, several a tuple. In an expression, unlike in a function, `...` cannot
    stand for remaining arguments.
    """
    made = tuple(Symbol(Var(name)) for name in names.replace(",", " ").split())
    if not made or not all(s._pattern.name.isidentifier() for s in made):
        raise OptionError(f"symbols({names!r}): write names, such as symbols('x w b').")
    return made if len(made) > 1 else made[0]


def any_of(*choices: Any) -> Any:
    """Match one of several patterns; symbols that stand only in others are None."""
    if len(choices) < 2:
        raise OptionError("any_of needs two patterns or more: any_of(F.gelu(x), F.silu(x)).")
    return Symbol(AnyOf(tuple(map(plain, choices))))


def optional(part: Callable[[Any], Any], value: Any) -> Any:
    """Match `part(value)`, or `value` alone; then the part's own symbols are None."""
    return any_of(part(value), value)


def repeated(part: Callable[..., Any], value: Any, *, at_least: int = 0) -> Any:
    """Match `part` around `value`, around itself, any number of times (at most 16).

    The part's first parameter is what it stands around, the others are symbols; a rule gets a list
    of what each was, the outermost first.
    """
    if not 0 <= at_least <= LONGEST_REPETITION:
        raise OptionError(
            f"repeated: at_least is {at_least}; a part is looked for at most {LONGEST_REPETITION} "
            "times."
        )
    hole, *names = _parameters(part)
    symbol = Symbol(Var(f"<{hole}:{next(_holes)}>"))  # one that no other repetition has
    body = plain(part(symbol, *(Symbol(Var(name)) for name in names)))
    if not any(one == symbol._pattern for one in everything_in(body)) or not depth_of(body):
        raise OptionError(f"repeated: the part has to compute something with '{hole}'.")
    return Symbol(Repeated(body, symbol._pattern, plain(value), _own(names, body), at_least))


_holes = itertools.count()


def _own(names: list[str], body: Any) -> frozenset[str]:
    """Return the symbols that a part has for itself, with those of parts inside it."""
    inside = [p.names for p in everything_in(body) if isinstance(p, (Repeated, Each))]
    return frozenset(names).union(*inside)


def each(part: Callable[..., Any]) -> Any:
    """Match a list of at least one item in which every item matches `part`.

    The part's parameters are symbols; a rule gets a list of what each was.
    """
    names = _parameters(part)
    item = plain(part(*(Symbol(Var(name)) for name in names)))
    return EachSymbol(Each(item, _own(names, item)))


class EachSymbol(Symbol):
    """A list in a pattern; `[*each(...)]` is the same list."""

    def __iter__(self) -> Iterator[Any]:
        yield self


def named(symbol: Any, value: Any) -> Any:
    """Match `value`, and let `symbol` stand for it."""
    if not isinstance(symbol, Symbol) or not isinstance(symbol._pattern, Var):
        raise OptionError("named(symbol, value): the first argument is a symbol of the pattern.")
    return Symbol(Named(symbol._pattern, plain(value)))


def near(value: float, tolerance: float = 1e-6) -> Any:
    """Match a number whose relative distance from `value` is at most `tolerance`."""
    return Symbol(Near(value, tolerance))


def _parameters(part: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(part).parameters)


def record_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the symbol of a call of a function, a method's name or an operator."""
    args = tuple(_unwrapped(a) for a in args)
    _check_function(function)
    target, args, kwargs = operator_of(function, args, kwargs)
    patterns = plain(args)
    if patterns and patterns[-1] is ANY and isinstance(target, OpOverload):
        names = [a.name for a in target._schema.arguments if not a.kwarg_only]
        patterns = patterns[:-1] + [ANY] * (len(names) - len(patterns) + 1)
        kwargs = {a.name: ANY for a in target._schema.arguments if a.kwarg_only} | kwargs
    named = {key: plain(value) for key, value in kwargs.items()}
    call = Symbol(CallPattern(target, tuple(patterns), named))
    return call[0] if has_further_results(function) else call


def _check_function(function: Any) -> None:
    """Raise OptionError for a function whose result does not stand in a graph as it is written."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if name in ("tensor", "as_tensor", "from_numpy", "scalar_tensor"):
        raise OptionError(
            f"{name}(…) is a constant in a graph. Write the number alone: it matches a constant "
            "of one element, too."
        )
    if name in ("zeros_like", "ones_like"):
        fill = int(name == "ones_like")
        raise OptionError(
            f"{name}(x) does not stand in a graph: with sizes that are known it is "
            f"torch.full(size, {fill}, ...), with a symbol for the size, and with symbolic ones "
            f"torch.full_like(x, {fill}, ...). Write any_of both, or the number where one will do."
        )


def _unwrapped(argument: Any) -> Any:
    """Return `[*each(…)]` as `each(…)`."""
    alone = isinstance(argument, (list, tuple)) and len(argument) == 1
    return argument[0] if alone and isinstance(argument[0], EachSymbol) else argument


def plain(value: Any) -> Any:
    """Return what a symbol, or a list with symbols, stands for."""
    if isinstance(value, Symbol):
        return value._pattern
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


# -- where a pattern can begin ---------------------------------------------------------------------


def needs_of(pattern: Any) -> frozenset[frozenset[Any]]:
    """Return the operators without which a pattern cannot match: of each set, one has to be there.

    Of alternatives, what all need.
    """
    if isinstance(pattern, AnyOf):
        choices = [needs_of(one) for one in pattern.choices]
        return choices[0].intersection(*choices[1:])
    if isinstance(pattern, Repeated):
        return needs_of(pattern.start)
    inside = frozenset[frozenset[Any]]().union(*map(needs_of, parts_of(pattern)))
    if isinstance(pattern, CallPattern):
        return inside | {frozenset(_spelled_targets(pattern))}
    return inside


# what a spelling raises that needs numbers where a pattern has symbols
NOT_KNOWN = (ShapeNeeded, TypeError, ValueError, IndexError, AttributeError)


def root_targets(pattern: Any) -> tuple[Any, ...] | None:
    """Return the operators at which a match may have its root, to index rules by; None: any."""
    if isinstance(pattern, CallPattern):
        return _spelled_targets(pattern)
    if isinstance(pattern, (Named, Counted)):
        return root_targets(pattern.pattern)
    if isinstance(pattern, Outputs):
        return root_targets(pattern.patterns[0])
    if isinstance(pattern, (AnyOf, Repeated)):
        inside = pattern.choices if isinstance(pattern, AnyOf) else (pattern.part, pattern.start)
        found = [root_targets(one) for one in inside if is_call(one)]
        if None in found:
            return None
        return tuple(dict.fromkeys(t for targets in found for t in targets or ()))
    return None


@functools.cache
def _spelled_targets(pattern: CallPattern) -> tuple[Any, ...]:
    """Return the operators that a call may be written as, by what it is applied to."""
    found = [pattern.target, *siblings_of(pattern), *_turned_round(pattern)]
    for size, rank in itertools.product((2, 1), (1, 2, 3, 4, 5)):  # squeeze wants a size of 1
        dummy = torch.empty([size] * rank, device="meta")

        def described(argument: Any, dummy: torch.Tensor = dummy) -> Any:
            return dummy if is_pattern(argument) else None

        with contextlib.suppress(*NOT_KNOWN):
            found.append(canonical(pattern.target, pattern.args, pattern.kwargs, described).target)
    return tuple(dict.fromkeys(target for target in found if target is not None))


@functools.cache
def siblings_of(pattern: CallPattern) -> tuple[Any, ...]:
    """Return the overloads that a call has where its symbols are numbers, or are not."""
    if not isinstance(pattern.target, OpOverload):
        return ()
    packet, arguments = pattern.target.overloadpacket, pattern.target._schema.arguments
    free = {a.name for a, given in zip(arguments, pattern.args, strict=False) if _is_symbol(given)}
    others = (getattr(packet, name) for name in packet.overloads()) if free else ()
    return tuple(
        other for other in others
        if other is not pattern.target and not other._schema.is_mutable
        and _differs_in(free, arguments, other._schema.arguments)
    )  # fmt: skip


def _is_symbol(given: Any) -> bool:
    return isinstance(given, Var)


def _differs_in(free: set[str], own: Any, others: Any) -> bool:
    """Whether arguments differ only in that some free ones are numbers in the place of tensors."""
    names = [[(a.name, a.kwarg_only) for a in one] for one in (own, others)]
    kinds = ((a.name in free, str(a.type), str(b.type)) for a, b in zip(own, others, strict=False))
    return names[0] == names[1] and all(
        a == b or is_free and {_kind(a), _kind(b)} == {"Tensor", "number"}
        for is_free, a, b in kinds
    )


def _kind(type_name: str) -> str:
    return type_name.removeprefix("Optional[").removesuffix("]")


def _turned_round(pattern: CallPattern) -> tuple[Any, ...]:
    """Return what `s - x` and `s / x` are made of in a graph where s is a number."""
    if not (pattern.args and _is_symbol(pattern.args[0])):
        return ()
    if pattern.target is aten.sub.Tensor:
        return (aten.rsub.Scalar,)
    return _DIVISION if pattern.target is aten.div.Tensor else ()


_DIVISION = (aten.mul.Tensor, aten.reciprocal.default)


@functools.cache
def turned_round(pattern: CallPattern, target: Any) -> Call | None:
    """Return `s - x` as rsub(x, s), and `s / x` as mul(reciprocal(x), s)."""
    if target not in _turned_round(pattern) or target is aten.reciprocal.default:
        return None
    number, x = pattern.args[:2]
    if target is aten.rsub.Scalar:
        return Call(target, (x, number, pattern.kwargs.get("alpha", 1)), {})
    return Call(target, (CallPattern(aten.reciprocal.default, (x,)), number), {})


def operator_text(target: Any) -> str:
    """Return an operator's short name: `conv2d`, `add.Tensor`."""
    if isinstance(target, OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return str(getattr(target, "__name__", target))


def pattern_text(pattern: Any) -> str:
    """Write a pattern as an expression: `softmax(matmul(q, k) * s, -1)`."""
    if isinstance(pattern, Pattern):
        return pattern._text()
    if isinstance(pattern, list):
        return f"[{', '.join(map(pattern_text, pattern))}]"
    if isinstance(pattern, float):
        return f"{pattern:.6g}"
    return "…" if pattern is ANY else repr(pattern)


_INFIX = {
    aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.mul.Tensor: "·", aten.div.Tensor: "/",
    aten.matmul.default: "@", aten.pow.Tensor_Scalar: "**",
}  # fmt: skip


# -- what a match is -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """One occurrence of a pattern: its roots, every node it covers, and what the symbols are."""

    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    values: Mapping[str, Any]

    @property
    def root(self) -> fx.Node:
        """The node of the pattern's first output."""
        return self.roots[0]

    @property
    def shared(self) -> str | None:
        """Which value inside the match is also used outside of it, in words; None without one."""
        for node in self.nodes:
            if node not in self.roots and any(user not in self.nodes for user in node.users):
                return f"{node.name} is used elsewhere too"
        return None
