"""Patterns: an ordinary Python function over tensors, run once on symbols, and matched on graphs.

    lambda x, w, b: F.relu(F.conv2d(x, w, b, ...))

Each parameter is a symbol that matches anything (a tensor, or a number or list that then is
captured); `...` stands for "whatever the remaining arguments are"; an argument that is not written
must equal its default. Calls may be spelled as functions, methods or operators, by keyword or by
position: both the pattern and the graph are brought to the one canonical spelling. The operands of
commutative operators match in either order.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import operator
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from fxopt.errors import OptionError
from fxopt.normalize import Call, ShapeNeeded, canonical, complete

aten = torch.ops.aten
F = torch.nn.functional
ANY = ...  # matches every argument


@dataclass(frozen=True)
class Var:
    """A symbol of a pattern: the same value wherever it stands."""

    name: str


@dataclass(frozen=True, eq=False)
class CallPattern:
    """A call in a pattern; its arguments are patterns, literals or ANY."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


# -- from what people write to operators -----------------------------------------------------------

_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow", "matmul": "matmul",
    "floordiv": "floor_divide", "mod": "remainder", "and": "__and__", "or": "__or__",
    "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
}  # fmt: skip


class Traced:
    """A tensor that stands for itself: calls on it become operators, by `_call`."""

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        owner = next(a for a in _flat(args, kwargs) if isinstance(a, Traced))
        return owner._call(*operator_of(function, tuple(args), dict(kwargs or {})))

    if TYPE_CHECKING:  # _add_operators makes them, and more

        def __add__(self, other: Any) -> Any: ...
        def __sub__(self, other: Any) -> Any: ...
        def __mul__(self, other: Any) -> Any: ...
        def __truediv__(self, other: Any) -> Any: ...
        def __pow__(self, other: Any) -> Any: ...
        def __matmul__(self, other: Any) -> Any: ...

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "mT"):
            return self._call(*operator_of({"T": "numpy_T", "mT": "mT"}[name], (self,), {}))
        if name.startswith("_") or not callable(getattr(torch.Tensor, name, None)):
            raise AttributeError(f"{type(self).__name__} has no method '{name}'")
        return lambda *args, **kwargs: self._call(*operator_of(name, (self, *args), kwargs))

    def __neg__(self) -> Any:
        return self._call(*operator_of("neg", (self,), {}))

    def __abs__(self) -> Any:
        return self._call(*operator_of("abs", (self,), {}))

    def __invert__(self) -> Any:
        return self._call(*operator_of("bitwise_not", (self,), {}))

    def __getitem__(self, index: int) -> Any:
        return self._call(operator.getitem, (self, index), {})


def _flat(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _add_operators() -> None:
    """Give Traced Python's arithmetic: `x + y` is `torch.add(x, y)`, on either side."""
    for python_name, name in _BINARY.items():

        def forward(self: Traced, other: Any, name: str = name) -> Any:
            return self._call(*operator_of(name, (self, other), {}))

        def backward(self: Traced, other: Any, name: str = name) -> Any:
            if name in ("add", "mul"):
                return self._call(*operator_of(name, (self, other), {}))
            if name == "sub":
                return self._call(aten.rsub.Scalar, (self, other), {})
            if name == "div":
                return self._call(*operator_of("mul", (self.reciprocal(), other), {}))
            return self._call(*operator_of(name, (other, self), {}))

        setattr(Traced, f"__{python_name}__", forward)
        setattr(Traced, f"__r{python_name}__", backward)


_add_operators()


def _reordered(name: str, *order: str) -> Callable[..., tuple[str, tuple[Any, ...]]]:
    """Describe a function of torch.nn.functional whose arguments differ from the operator's."""

    def bind(bound: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
        return name, tuple(bound[key] for key in order)

    return bind


_FUNCTIONALS: dict[Any, Callable[..., tuple[str, tuple[Any, ...]]]] = {
    F.batch_norm: _reordered(
        "batch_norm", "input", "weight", "bias", "running_mean", "running_var", "training",
        "momentum", "eps",
    ),
    F.layer_norm: _reordered("layer_norm", "input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: _reordered("group_norm", "input", "num_groups", "weight", "bias", "eps"),
    F.dropout: _reordered("dropout", "input", "p", "training"),
    F.softmax: _reordered("softmax.int", "input", "dim", "dtype"),
    F.log_softmax: _reordered("log_softmax.int", "input", "dim", "dtype"),
    F.embedding: _reordered("embedding", "weight", "input"),
    F.relu: _reordered("relu", "input"),
    F.relu6: _reordered("relu6", "input"),
    F.silu: _reordered("silu", "input"),
    F.mish: _reordered("mish", "input"),
    F.elu: _reordered("elu", "input", "alpha"),
    F.selu: _reordered("selu", "input"),
    F.leaky_relu: _reordered("leaky_relu", "input", "negative_slope"),
    F.hardtanh: _reordered("hardtanh", "input", "min_val", "max_val"),
    F.hardswish: _reordered("hardswish", "input"),
    F.hardsigmoid: _reordered("hardsigmoid", "input"),
    F.adaptive_avg_pool2d: _reordered("adaptive_avg_pool2d", "input", "output_size"),
}  # fmt: skip


def operator_of(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return (operator, args, kwargs) for a call written with a function, a method or a name.

    Raises OptionError for what is not one ATen operator.
    """
    if isinstance(function, OpOverload) or function is operator.getitem:
        return function, args, kwargs
    reordered = _FUNCTIONALS.get(function)
    if reordered is not None:
        signature = inspect.signature(function)
        rest_is_any = bool(args) and args[-1] is ANY
        bound = signature.bind_partial(*(args[:-1] if rest_is_any else args), **kwargs)
        if not rest_is_any:
            bound.apply_defaults()
        values = {name: bound.arguments.get(name, ANY) for name in signature.parameters}
        name, args = reordered(values)
        return _choose(name, args, {})
    name = function if isinstance(function, str) else _name_of(function)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]  # a graph has no in-place calls: relu_ stands for relu
    return _choose(name, args, kwargs)


def _name_of(function: Any) -> str:
    if isinstance(function, OpOverloadPacket):
        return str(function.__name__)
    return str(getattr(function, "__name__", function))


def _choose(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[OpOverload, tuple[Any, ...], dict[str, Any]]:
    """Choose the overload that takes these arguments."""
    packet_name, _, overload = name.partition(".")
    packet = getattr(aten, packet_name, None)
    if packet is None:
        raise OptionError(f"'{name}' is not one ATen operator; write the operators it stands for.")
    names = [overload] if overload else packet.overloads()
    args, kwargs = _in_schema_words(packet, args, kwargs)
    best: tuple[int, OpOverload] | None = None
    preferred = ("default", "Tensor", "Tensor_Scalar", "int", "dim")  # where several fit as well
    for candidate in sorted(names, key=lambda n: preferred.index(n) if n in preferred else 9):
        target = getattr(packet, candidate)
        if not any("Tensor" in str(returned.type) for returned in target._schema.returns):
            continue  # arithmetic of plain numbers
        cost = None if target._schema.is_mutable else _cost(target, args, kwargs)
        if cost is not None and (best is None or cost < best[0]):
            best = (cost, target)
    if best is not None:
        return best[1], *_listed(best[1], args, kwargs)
    packed = _packed(args)
    if packed is not None:
        return _choose(name, packed, kwargs)
    raise OptionError(f"No form of aten.{name} takes the arguments {args!r} {kwargs!r}.")


def _in_schema_words(
    packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rename the keywords that torch takes, and its operators' schemas do not know."""
    known = {a.name for name in packet.overloads() for a in getattr(packet, name)._schema.arguments}
    named = {key if key in known else _KEYWORDS.get(key, key): v for key, v in kwargs.items()}
    if "input" in named and "input" not in known:
        args = (named.pop("input"), *args)
    return args, named


_KEYWORDS = {"axis": "dim", "keepdims": "keepdim"}


def _packed(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments of `x.permute(0, 2, 1)` as those of `x.permute([0, 2, 1])`."""
    rest = args[1:]
    count = next((i for i, value in enumerate(rest) if not _is_size(value)), len(rest))
    return (args[0], list(rest[:count]), *rest[count:]) if count > 1 else None


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, Traced, fx.Node)) and not isinstance(value, bool)


def _listed(
    target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Write a single integer where a list of them is meant, as a list: `x.sum(1)`."""
    kinds = {a.name: str(a.type).removeprefix("Optional[") for a in target._schema.arguments}

    def listed(kind: str, value: Any) -> Any:
        single = kind.startswith("List") and isinstance(value, int)
        return [value] if single else value

    named = {key: listed(kinds[key], value) for key, value in kwargs.items()}
    return tuple(listed(k, v) for k, v in zip(kinds.values(), args, strict=False)), named


def _cost(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return how badly an overload fits the arguments, 0 for exactly; None where it does not."""
    arguments = target._schema.arguments
    open_ended = bool(args) and args[-1] is ANY
    written = args[:-1] if open_ended else args
    positional = [a for a in arguments if not a.kwarg_only]
    kinds = {a.name: str(a.type) for a in arguments}
    if len(written) > len(positional) or any(key not in kinds for key in kwargs):
        return None
    given = {a.name: value for a, value in zip(positional, written, strict=False)}
    if set(given) & set(kwargs):
        return None
    given.update(kwargs)
    missing = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
    if missing and not open_ended:
        return None
    costs = [_argument_cost(kinds[name], value) for name, value in given.items()]
    if any(cost is None for cost in costs):
        return None
    return sum(cost for cost in costs if cost is not None)


def _argument_cost(kind: str, value: Any) -> int | None:
    """Return 0 where a schema type is what the value is, 1 where it converts, None where not."""
    if value is ANY:
        return 0
    if kind.startswith("Optional["):
        return 0 if value is None else _argument_cost(kind[9:-1], value)
    if isinstance(value, (Traced, fx.Node)):  # a symbol of a pattern may turn out to be a number
        return 0 if kind == "Tensor" or isinstance(value, Symbol) else None
    for literal, kinds in _LITERALS:
        if isinstance(value, literal):
            if literal is int and kind == "List[int]":
                return 1
            return 0 if kind in kinds else 1 if kind == "Tensor" and literal is not str else None
    if isinstance(value, (list, tuple)):
        return 0 if kind.startswith("List") else None
    return 0 if kind in _OPAQUE_KINDS and value is not None else None


_LITERALS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (bool, ("bool", "number", "Scalar")),
    (int, ("int", "SymInt", "float", "number", "Scalar")),
    (float, ("float", "number", "Scalar")),
    (str, ("str",)),
)
_OPAQUE_KINDS = ("int", "Device", "Layout", "MemoryFormat", "ScalarType", "Generator")


# -- recording a pattern ---------------------------------------------------------------------------


class Symbol(Traced):
    """A value inside a pattern that is being recorded."""

    def __init__(self, pattern: Var | CallPattern) -> None:
        self._pattern = pattern

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
        return _record(target, args, kwargs)

    def __bool__(self) -> bool:
        raise TypeError("a pattern cannot branch on a value; write one pattern per branch")

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("a pattern cannot unpack a value; index it: parts[0]")

    __hash__ = object.__hash__


def _record(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Symbol:
    target, args, kwargs = operator_of(function, args, kwargs)
    plain = [_plain(a) for a in args]
    if plain and plain[-1] is ANY and isinstance(target, OpOverload):
        names = [a.name for a in target._schema.arguments if not a.kwarg_only]
        plain = plain[:-1] + [ANY] * (len(names) - len(plain) + 1)
        kwargs = {a.name: ANY for a in target._schema.arguments if a.kwarg_only} | kwargs
    return Symbol(CallPattern(target, tuple(plain), {k: _plain(v) for k, v in kwargs.items()}))


def _plain(value: Any) -> Any:
    if isinstance(value, Symbol):
        return value._pattern
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class _Namespace:
    """Stands for `torch`, `F` or `aten` while a pattern is recorded, so that it may pass `...`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, types.ModuleType) or value in (torch.ops, aten):
            return _Namespace(value)
        if isinstance(value, OpOverloadPacket):
            return _Packet(value)
        return _recorder(value) if callable(value) and not isinstance(value, type) else value


class _Packet:
    def __init__(self, packet: OpOverloadPacket) -> None:
        self._packet = packet

    def __call__(self, *args: Any, **kwargs: Any) -> Symbol:
        return _record(self._packet, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _recorder(getattr(self._packet, name))


def _recorder(function: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _record(function, args, kwargs)


def record(function: Callable[..., Any]) -> CallPattern:
    """Run a pattern function on symbols and return what it computes.

    Raises OptionError where it does something else than calling operators, or returns no call.
    """
    twin = types.FunctionType(
        function.__code__,
        {name: _recording(value) for name, value in function.__globals__.items()},
        function.__name__,
        function.__defaults__,
        tuple(map(_recording_cell, function.__closure__ or ())),
    )
    where = f"{function.__name__} ({_place(function)})"
    symbols = [Symbol(Var(name)) for name in inspect.signature(function).parameters]
    try:
        result = twin(*symbols)
        pattern = result._pattern if isinstance(result, Symbol) else None
        _check_spelling(pattern)
    except OptionError as error:
        raise OptionError(f"The pattern {where} cannot be recorded: {error}") from None
    except Exception as error:
        raise OptionError(
            f"The pattern {where} cannot be recorded: {type(error).__name__}: {error}. "
            "A pattern only calls tensor operators; ask for shapes and values in the rule."
        ) from error
    if not isinstance(pattern, CallPattern):
        raise OptionError(f"The pattern {where} must return the result of an operator.")
    return pattern


def _recording(value: Any) -> Any:
    known = any(value is module for module in (torch, F, aten, torch.ops))
    return _Namespace(value) if known else value


def _recording_cell(cell: types.CellType) -> types.CellType:
    try:
        return types.CellType(_recording(cell.cell_contents))
    except ValueError:  # the name has no value yet
        return cell


def _place(function: Callable[..., Any]) -> str:
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def symbols_of(pattern: Any) -> set[str]:
    """Return the names of the symbols in a pattern."""
    if isinstance(pattern, Var):
        return {pattern.name}
    if isinstance(pattern, CallPattern):
        return symbols_of([*pattern.args, *pattern.kwargs.values()])
    if isinstance(pattern, list):
        return set().union(*map(symbols_of, pattern))
    return set()


# -- matching --------------------------------------------------------------------------------------

COMMUTATIVE = {
    aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default,
    aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default,
    aten.eq.Tensor, aten.ne.Tensor, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor,
}  # fmt: skip


@dataclass(frozen=True)
class Match:
    """One occurrence of a pattern: its root, every node it covers, and what the symbols are."""

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    values: Mapping[str, Any]

    @property
    def shared(self) -> str | None:
        """Which value inside the match is also used outside of it, in words; None without one."""
        for node in self.nodes[1:]:
            if any(user not in self.nodes for user in node.users):
                return f"{node.name} is used elsewhere too"
        return None


@dataclass
class Attempt:
    """The state of one try, and the farthest place where it failed, for `explain`."""

    covered: int = 0
    failure: str = ""

    def fail(self, depth: int, reason: str) -> None:
        """Remember the reason that lies deepest."""
        if depth > self.covered or not self.failure:
            self.covered, self.failure = depth, reason


def match(pattern: CallPattern, node: fx.Node, attempt: Attempt | None = None) -> Match | None:
    """Return the first match of `pattern` with its root at `node`, or None."""
    attempt = attempt or Attempt()
    for values, nodes in _match_call(pattern, node, {}, (), attempt):
        return Match(node, nodes, values)
    return None


Bindings = dict[str, Any]
Nodes = tuple[fx.Node, ...]
States = Iterator[tuple[Bindings, Nodes]]


def _match_any(pattern: Any, value: Any, bound: Bindings, nodes: Nodes, attempt: Attempt) -> States:
    if pattern is ANY:
        yield bound, nodes
    elif isinstance(pattern, Var):
        if pattern.name not in bound:
            yield {**bound, pattern.name: value}, nodes
        elif _same_value(bound[pattern.name], value):
            yield bound, nodes
        else:
            attempt.fail(len(nodes), f"'{pattern.name}' would stand for two different values")
    elif isinstance(pattern, CallPattern):
        if isinstance(value, fx.Node):
            yield from _match_call(pattern, value, bound, nodes, attempt)
        else:
            attempt.fail(len(nodes), f"{_op_text(pattern.target)} wanted, found {value!r}")
    elif isinstance(pattern, list):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _match_all(list(zip(pattern, value, strict=True)), bound, nodes, attempt)
        else:
            attempt.fail(len(nodes), f"a list of {len(pattern)} wanted, found {value!r}")
    elif _same_value(pattern, value):
        yield bound, nodes
    else:
        attempt.fail(len(nodes), f"{pattern!r} wanted, found {value}")


def _match_all(
    pairs: Sequence[tuple[Any, Any]], bound: Bindings, nodes: Nodes, attempt: Attempt
) -> States:
    if not pairs:
        yield bound, nodes
        return
    (pattern, value), *rest = pairs
    for bound_next, nodes_next in _match_any(pattern, value, bound, nodes, attempt):
        yield from _match_all(rest, bound_next, nodes_next, attempt)


def _match_call(
    pattern: CallPattern, node: fx.Node, bound: Bindings, nodes: Nodes, attempt: Attempt
) -> States:
    if node.op != "call_function":
        attempt.fail(len(nodes), f"{node.name} is not a call of {_op_text(pattern.target)}")
        return
    spelled = _spell(pattern, node)
    if spelled is None or spelled.target is not node.target:
        attempt.fail(
            len(nodes), f"{node.name} is {_op_text(node.target)}, not {_op_text(pattern.target)}"
        )
        return
    nodes = (*nodes, node)
    kwargs = [(spelled.kwargs[key], node.kwargs.get(key)) for key in spelled.kwargs]
    orders = [node.args]
    if node.target in COMMUTATIVE and node.kwargs.get("alpha", 1) == 1 and len(node.args) == 2:
        orders.append((node.args[1], node.args[0]))
    for args in orders:
        if len(args) == len(spelled.args):
            pairs = [*zip(spelled.args, args, strict=True), *kwargs]
            yield from _match_all(pairs, bound, nodes, attempt)


def _spell(pattern: CallPattern, node: fx.Node) -> Call | None:
    """Return the pattern's call in canonical spelling, with the rank of the node it meets."""
    if not isinstance(pattern.target, OpOverload):
        return Call(pattern.target, pattern.args, pattern.kwargs)
    first = next((a for a in _flat(node.args, None) if isinstance(a, fx.Node)), None)
    places = {id(a): n for a, n in zip(pattern.args, node.args, strict=False)}

    def described(argument: Any) -> Any:
        if not isinstance(argument, (Var, CallPattern)):
            return None
        found = places.get(id(argument))
        found = found if isinstance(found, fx.Node) else first
        return None if found is None else found.meta.get("val")

    try:
        return canonical(pattern.target, pattern.args, pattern.kwargs, described)
    except _NOT_KNOWN:
        return complete(pattern.target, pattern.args, pattern.kwargs)


# what a spelling raises that needs numbers where a pattern has symbols
_NOT_KNOWN = (ShapeNeeded, TypeError, ValueError, IndexError, AttributeError)


@functools.cache
def root_targets(pattern: CallPattern) -> tuple[Any, ...]:
    """Return the operators at which a match may have its root, to index rules by."""
    found = [pattern.target]
    for size, rank in itertools.product((2, 1), (1, 2, 3, 4, 5)):  # squeeze wants a size of 1
        dummy = torch.empty([size] * rank, device="meta")

        def described(argument: Any, dummy: torch.Tensor = dummy) -> Any:
            return dummy if isinstance(argument, (Var, CallPattern)) else None

        with contextlib.suppress(*_NOT_KNOWN):
            found.append(canonical(pattern.target, pattern.args, pattern.kwargs, described).target)
    return tuple(dict.fromkeys(target for target in found if target is not None))


_PERMUTES = (aten.transpose.int, aten.movedim.int, aten.movedim.intlist)


def _check_spelling(pattern: Any) -> None:
    """Raise OptionError for a call that cannot stand in a graph because its numbers are symbols."""
    if isinstance(pattern, list):
        for item in pattern:
            _check_spelling(item)
    elif isinstance(pattern, CallPattern):
        _check_spelling([*pattern.args, *pattern.kwargs.values()])
        if pattern.target in _PERMUTES and any(isinstance(a, Var) for a in pattern.args[1:]):
            raise OptionError(
                f"{_op_text(pattern.target)} is written as permute in a graph, and how depends on "
                "its numbers. Write the numbers, or x.permute(dims)."
            )


def depth_of(pattern: Any) -> int:
    """Return how many calls lie between the root of a pattern and its deepest one."""
    if isinstance(pattern, list):
        return max(map(depth_of, pattern), default=0)
    if isinstance(pattern, CallPattern):
        return 1 + max(map(depth_of, (*pattern.args, *pattern.kwargs.values())), default=0)
    return 0


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b or (isinstance(a, float) or isinstance(b, float)) and math.isclose(a, b)
    return type(a) is type(b) and bool(a == b)


def _op_text(target: Any) -> str:
    if isinstance(target, OpOverload):
        return str(target).removeprefix("aten.").removesuffix(".default")
    return str(getattr(target, "__name__", target))
