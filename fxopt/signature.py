"""How a model is called: from its own arguments to flat tensors, and back to its own outputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import sympy
import torch
from torch.utils import _pytree as pytree

from fxopt.errors import ShapeError

Dim: TypeAlias = int | sympy.Expr
Ranges = Mapping[str, tuple[int, int | None]]


@dataclass(frozen=True)
class TensorLeaf:
    """One tensor (or symbolic integer) among a model's inputs, as the graph takes it."""

    path: str
    shape: tuple[Dim, ...]
    dtype: torch.dtype | None  # None: a Python integer whose value is symbolic
    device: torch.device | None
    symbol: sympy.Expr | None = None


@dataclass(frozen=True)
class ConstantLeaf:
    """One Python value among a model's inputs or outputs; the graph was captured for this value."""

    path: str
    value: Any


Kind = tuple[torch.Size, torch.dtype, str]


def _fixed_kinds(leaves: Sequence[TensorLeaf]) -> tuple[Kind, ...] | None:
    """Return shape, dtype and device type of each tensor; None where any of it is open."""
    kinds = []
    for leaf in leaves:
        if leaf.dtype is None or leaf.device is None:
            return None
        if not all(isinstance(size, int) for size in leaf.shape):
            return None
        kinds.append((torch.Size(leaf.shape), leaf.dtype, leaf.device.type))
    return tuple(kinds)


def _fits(flat: Sequence[Any], kinds: Sequence[Kind]) -> bool:
    """Whether flat inputs are plain tensors of these kinds: the common call, told quickly."""
    if len(flat) != len(kinds):
        return False
    for value, (shape, dtype, device) in zip(flat, kinds, strict=True):
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            return False
        if value.dtype is not dtype or value.device.type != device:
            return False
        if value.layout is not torch.strided:
            return False
    return True


_NUMBERS = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class Structure:
    """A nested value: its pytree spec and, for each leaf, a flat index or a constant."""

    spec: pytree.TreeSpec
    leaves: tuple[int | ConstantLeaf, ...]
    numbers: tuple[tuple[int, str], ...] = ()  # flat indices of Python numbers, and their types

    def unflatten(self, flat: Sequence[Any]) -> Any:
        """Rebuild the nested value from the flat tensors."""
        if self._is_one_tensor:
            return flat[0]
        if self.numbers:
            flat = list(flat)
            for index, kind in self.numbers:
                flat[index] = _NUMBERS[kind](flat[index])
        values = [flat[leaf] if isinstance(leaf, int) else leaf.value for leaf in self.leaves]
        return pytree.tree_unflatten(values, self.spec)

    @functools.cached_property
    def _is_one_tensor(self) -> bool:
        """Whether the value is the first flat tensor itself, as for most models."""
        return self.spec.is_leaf() and self.leaves == (0,) and not self.numbers


_REMEMBERED = 4096  # how many combinations of symbolic sizes are known to pass


class Signature:
    """The model's own call signature, bound to the graph's flat inputs and outputs."""

    def __init__(
        self,
        parameters: inspect.Signature,
        names: tuple[str, ...],
        spec: pytree.TreeSpec,
        leaves: tuple[TensorLeaf | ConstantLeaf, ...],
        output: Structure,
        ranges: Ranges,
        guards: tuple[sympy.Basic, ...] = (),
    ) -> None:
        self.parameters = parameters
        self.names = names  # the parameters that were given at capture
        self.spec = spec  # of the dict {name: value} of those
        self.leaves = leaves
        self.output = output
        self.ranges = dict(ranges)
        self.guards = guards  # conditions on the symbolic sizes that held at capture
        self.tensors = tuple(leaf for leaf in leaves if isinstance(leaf, TensorLeaf))
        self._origins = _origins(self.tensors)
        self._passed: set[tuple[int, ...]] = set()  # symbolic sizes that the guards allow
        self._fixed = None if guards else _fixed_kinds(self.tensors)
        self._simple = all(isinstance(leaf, TensorLeaf) for leaf in leaves) and (
            spec == argument_spec(parameters, names)
        )

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the flat inputs of one call.

        Raises ShapeError when the call's structure, or a constant among its arguments, differs
        from the captured one.
        """
        if self._simple and not kwargs and len(args) == len(self.leaves):
            if all(isinstance(value, torch.Tensor) for value in args):
                return list(args)  # the common call: plain tensors, one per parameter
        arguments = self._bind(args, kwargs)
        values, spec = pytree.tree_flatten({name: arguments[name] for name in self.names})
        if spec != self.spec:
            raise ShapeError(
                "The arguments are nested differently from the captured ones.\n"
                f"  captured: {_structure_text(self.spec)}\n  given:    {_structure_text(spec)}\n"
                "Pass the same structure, or compile again with such example_inputs."
            )
        flat = []
        for leaf, value in zip(self.leaves, values, strict=True):
            if isinstance(leaf, TensorLeaf):
                flat.append(value)
            elif not _same(leaf.value, value):
                raise ShapeError(
                    f"Argument '{leaf.path}' is {_text(value)}, but the graph was captured with "
                    f"{_text(leaf.value)}, which is baked in. Compile again with that value."
                )
        return flat

    def check(self, flat: Sequence[Any]) -> None:
        """Compare flat inputs with what was captured; raise ShapeError where they differ."""
        if self._fixed is not None and _fits(flat, self._fixed):
            return
        if len(flat) != len(self.tensors):
            raise ShapeError(f"Expected {len(self.tensors)} tensors, got {len(flat)}.")
        sizes: dict[sympy.Symbol, int] = {}
        deferred: list[tuple[TensorLeaf, int, sympy.Expr, int]] = []
        for leaf, value in zip(self.tensors, flat, strict=True):
            if leaf.dtype is None:
                if type(value) is not int:
                    raise ShapeError(f"Argument '{leaf.path}' must be an int, got {value!r}.")
                if isinstance(leaf.symbol, sympy.Symbol):
                    self._take(leaf, -1, leaf.symbol, value, sizes)
                continue
            self._check_tensor(leaf, value)
            for axis, (expected, actual) in enumerate(zip(leaf.shape, value.shape, strict=True)):
                if isinstance(expected, int):
                    if expected != actual:
                        raise self._dimension_error(leaf, axis, str(expected), actual)
                elif isinstance(expected, sympy.Symbol) and expected not in sizes:
                    self._take(leaf, axis, expected, actual, sizes)
                else:
                    deferred.append((leaf, axis, expected, actual))
        for leaf, axis, expression, actual in deferred:
            self._check_expression(leaf, axis, expression, actual, sizes)
        if self.guards:
            self._check_guards(sizes)

    def _take(
        self, leaf: TensorLeaf, axis: int, symbol: sympy.Symbol, size: int, sizes: dict[Any, int]
    ) -> None:
        """Give a symbolic size its value, which must be within its range."""
        low, high = self.ranges.get(str(symbol), (0, None))
        if size < low or (high is not None and size > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise self._dimension_error(leaf, axis, allowed, size)
        sizes[symbol] = size

    def _check_expression(
        self,
        leaf: TensorLeaf,
        axis: int,
        expression: sympy.Expr,
        actual: int,
        sizes: dict[Any, int],
    ) -> None:
        """Compare a size with the expression of other sizes that it must be."""
        missing = expression.free_symbols - sizes.keys()
        if len(missing) == 1:  # as in 2·n: the size itself tells n
            symbol = missing.pop()
            start = expression.subs(sizes).subs(symbol, 0)
            step = expression.subs(sizes).subs(symbol, 1) - start
            if step.is_Integer and start.is_Integer and step != 0:
                sizes[symbol] = (actual - int(start)) // int(step)
                low, high = self.ranges.get(str(symbol), (0, None))
                if sizes[symbol] < low or (high is not None and sizes[symbol] > high):
                    allowed = f"at least {low}" if high is None else f"{low} to {high}"
                    wanted = f"{expression}, where {symbol} is {allowed}"
                    raise self._dimension_error(leaf, axis, wanted, actual)
        expected = expression.subs(sizes)
        if expected.is_Integer and int(expected) != actual:
            tie = self._named(expression)
            wanted = f"{int(expected)}, that is {tie}" if str(tie) != str(expression) else f"{tie}"
            raise self._dimension_error(leaf, axis, wanted, actual)

    def _check_guards(self, sizes: dict[Any, int]) -> None:
        key = tuple(sizes.values())
        if key in self._passed:
            return
        for guard in self.guards:
            if guard.subs(sizes) == sympy.false:
                given = ", ".join(f"{self._named(s)} = {size}" for s, size in sizes.items())
                raise ShapeError(
                    f"The model was captured for sizes with {self._named(guard)}, and the call has "
                    f"{given}. It may take another way for these: compile again with such "
                    "example_inputs."
                )
        if len(self._passed) < _REMEMBERED:
            self._passed.add(key)

    def _named(self, expression: Any) -> Any:
        """Return an expression in the user's terms: `x.shape[0] + 1` for `s77 + 1`."""
        return expression.subs({s: sympy.Symbol(name) for s, name in self._origins.items()})

    def _dimension_error(
        self, leaf: TensorLeaf, axis: int, expected: str, actual: int
    ) -> ShapeError:
        if axis < 0:
            return ShapeError(
                f"Argument '{leaf.path}' is {actual}, but the graph was captured for {expected}."
            )
        advice = ""
        if isinstance(leaf.shape[axis], int):
            advice = ", or make the dimension dynamic with dynamic_shapes="
            if leaf.path.isidentifier():
                advice += f"{{'{leaf.path}': {{{axis}: 'size'}}}}"
        return ShapeError(
            f"Argument '{leaf.path}': dimension {axis} is {actual}, but the graph was captured for "
            f"{expected} (shape {self._shape_text(leaf)}). Compile again with such "
            f"example_inputs{advice}."
        )

    def _shape_text(self, leaf: TensorLeaf) -> str:
        """Return the captured shape; a size that is free to change is `any`."""
        parts = []
        for axis, size in enumerate(leaf.shape):
            text = str(size if isinstance(size, int) else self._named(size))
            parts.append("any" if text == f"{leaf.path}.shape[{axis}]" else text)
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"

    def admitting(self, flat: Sequence[Any]) -> Signature:
        """Return a signature that allows the sizes 0 and 1 in `flat`, too; self where it does."""
        sizes: dict[Any, int] = {}
        for leaf, value in zip(self.tensors, flat, strict=True):
            actual = (*value.shape, None) if isinstance(value, torch.Tensor) else (value,)
            for symbol, size in zip((*leaf.shape, leaf.symbol), actual, strict=True):
                if isinstance(symbol, sympy.Symbol):
                    sizes.setdefault(symbol, size)
        small = {str(symbol): size for symbol, size in sizes.items() if size < 2}
        ranges = {
            name: (min(low, small.get(name, low)), high)
            for name, (low, high) in self.ranges.items()
        }
        about_small = {g for g in self.guards if {str(s) for s in g.free_symbols} & small.keys()}
        guards = tuple(
            guard for guard in self.guards
            if guard.subs(sizes) != sympy.false or guard not in about_small
        )
        if ranges == self.ranges and guards == self.guards:
            return self
        return Signature(
            self.parameters, self.names, self.spec, self.leaves, self.output, ranges, guards
        )

    def moved(self, move: Callable[[Any], Any]) -> Signature:
        """Return this signature with `move` applied to every dtype and device."""
        leaves = tuple(
            replace(leaf, dtype=move(leaf.dtype), device=move(leaf.device))
            if isinstance(leaf, TensorLeaf)
            else leaf
            for leaf in self.leaves
        )
        return Signature(
            self.parameters, self.names, self.spec, leaves, self.output, self.ranges, self.guards
        )

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = self.parameters.bind(*args, **kwargs)
        except TypeError as error:
            raise ShapeError(f"The call does not fit forward{self.parameters}: {error}.") from None
        arguments = dict(bound.arguments)
        for name in self.names:
            if name not in arguments:
                parameter = self.parameters.parameters[name]
                if parameter.kind is parameter.VAR_POSITIONAL:
                    arguments[name] = ()
                elif parameter.kind is parameter.VAR_KEYWORD:
                    arguments[name] = {}
                else:
                    arguments[name] = parameter.default
        for name, value in arguments.items():
            default = self.parameters.parameters[name].default
            if name not in self.names and not _same(default, value):
                raise ShapeError(
                    f"Argument '{name}' was not given when the model was captured, so its default "
                    f"is baked in. Compile again with '{name}' among the example_inputs."
                )
        return _in_captured_order(arguments, self.spec, self.names)

    def _check_tensor(self, leaf: TensorLeaf, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            raise ShapeError(
                f"Argument '{leaf.path}' must be a tensor, got {_text(value)}. Convert it with "
                "torch.as_tensor, or compile again with such example_inputs."
            )
        if value.dtype != leaf.dtype:
            raise ShapeError(
                f"Argument '{leaf.path}' has dtype {value.dtype}, captured with {leaf.dtype}. "
                f"Convert it with .to({leaf.dtype}), or compile again with such example_inputs."
            )
        if leaf.device is not None and value.device.type != leaf.device.type:
            raise ShapeError(
                f"Argument '{leaf.path}' is on {value.device}, captured on {leaf.device}. "
                f"Move it with .to('{leaf.device}')."
            )
        if value.layout is not torch.strided:
            raise ShapeError(
                f"Argument '{leaf.path}' is a sparse tensor, and the graph takes dense ones. "
                "Convert it with .to_dense()."
            )
        if value.dim() != len(leaf.shape):
            raise ShapeError(
                f"Argument '{leaf.path}' has {value.dim()} dimensions {tuple(value.shape)}, "
                f"captured with {len(leaf.shape)}: {self._shape_text(leaf)}. Reshape it, or "
                "compile again with such example_inputs."
            )


def _origins(tensors: Sequence[TensorLeaf]) -> dict[sympy.Symbol, str]:
    """Return how a user would write each symbolic size: the first `x.shape[0]` that is it."""
    found: dict[sympy.Symbol, str] = {}
    for leaf in tensors:
        if isinstance(leaf.symbol, sympy.Symbol):
            found.setdefault(leaf.symbol, leaf.path)
        for axis, size in enumerate(leaf.shape):
            if isinstance(size, sympy.Symbol):
                found.setdefault(size, f"{leaf.path}.shape[{axis}]")
    return found


def argument_spec(parameters: inspect.Signature, names: Sequence[str]) -> pytree.TreeSpec | None:
    """Return the spec of plain positional arguments `names`, or None where they are not plain."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    order = [p.name for p in parameters.parameters.values() if p.kind in positional]
    if list(names) != order[: len(names)]:
        return None
    return pytree.tree_structure(dict.fromkeys(names, 0))


def _in_captured_order(
    arguments: dict[str, Any], spec: pytree.TreeSpec, names: Sequence[str]
) -> dict[str, Any]:
    """Put the keys of dict arguments in the order in which they were captured."""
    for name, child in zip(names, spec.children(), strict=True):
        value = arguments.get(name)
        if type(value) is dict and child.type is dict and set(child.context) == set(value):
            arguments[name] = {key: value[key] for key in child.context}
    return arguments


def _same(captured: Any, given: Any) -> bool:
    if captured is given:
        return True
    if isinstance(given, torch.Tensor) or isinstance(captured, torch.Tensor):
        return False
    return type(captured) is type(given) and bool(captured == given)


def _text(value: Any) -> str:
    """Return a value in few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"


def _structure_text(spec: pytree.TreeSpec) -> str:
    """Return the structure of arguments as Python would write it, each leaf a `*`."""

    class Star:
        def __repr__(self) -> str:
            return "*"

    arguments = pytree.tree_unflatten([Star()] * spec.num_leaves, spec)
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


