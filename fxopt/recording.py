"""Recording: from a function that an author writes to the pattern that it stands for.

The function runs once, on symbols, with its globals and closure replaced: torch's modules and
functions by such as take `...` and record what they are called with, and helper functions by
functions that are recorded likewise.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverloadPacket

from fxopt.errors import OptionError
from fxopt.pattern import (
    CallPattern,
    Outputs,
    Symbol,
    Var,
    everything_in,
    is_call,
    operator_text,
    plain,
    record_call,
)

aten = torch.ops.aten


def record(function: Any, fixed: Mapping[str, Any] | None = None) -> Any:
    """Run a pattern function on symbols and return what it computes.

    `fixed` gives values to parameters that are no symbols; so does a default: `lambda x, f=f:`. An
    expression over `symbols` is a pattern already. Raises OptionError where a function does
    something else than calling operators, or returns no call.
    """
    where = "expression" if isinstance(function, (Symbol, tuple)) else _where(function)
    try:
        pattern = _outputs(plain(_run(function, fixed or {})))
        _check_spelling(pattern)
    except OptionError as error:
        raise OptionError(f"The pattern {where} cannot be recorded: {error}") from None
    except Exception as error:
        hint = " A pattern only calls tensor operators; ask for shapes and values in the rule."
        if "llipsis" in str(error):
            hint = " Spell a call with `...` by torch, torch.nn.functional or torch.ops.aten."
        raise OptionError(
            f"The pattern {where} cannot be recorded: {type(error).__name__}: {error}.{hint}"
        ) from error
    for one in pattern.patterns if isinstance(pattern, Outputs) else (pattern,):
        if not is_call(one):
            raise OptionError(f"The pattern {where} must return the result of an operator.")
    return pattern


def _run(function: Any, fixed: Mapping[str, Any]) -> Any:
    if not isinstance(function, types.FunctionType):
        if not isinstance(function, (Symbol, tuple)):
            raise OptionError("it is neither a function nor an expression over symbols.")
        return function
    of_torch = str(function.__module__).split(".")[0] == "torch"
    twin = function if of_torch else _twin(function)
    values: list[Any] = []
    named = {}
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        own = fixed.get(name, Symbol(Var(name)) if default is parameter.empty else default)
        if parameter.kind is parameter.VAR_KEYWORD:
            raise OptionError(f"'**{name}' is no symbol; write each one, or ... in the call.")
        if parameter.kind is parameter.VAR_POSITIONAL:
            values.extend(own)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = _stand_in(own)
        else:
            values.append(_stand_in(own))
    return twin(*values, **named)


def _twin(function: types.FunctionType) -> types.FunctionType:
    """Return a function that computes the same with torch's functions as they are recorded."""
    used = _names_in(function.__code__)
    twin = types.FunctionType(
        function.__code__,
        {n: _recording(v) if n in used else v for n, v in function.__globals__.items()},
        function.__name__,
        function.__defaults__,
        tuple(map(_recording_cell, function.__closure__ or ())),
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _names_in(code: types.CodeType) -> set[str]:
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _outputs(pattern: Any) -> Any:
    several = isinstance(pattern, list) and len(pattern) > 1
    return Outputs(tuple(pattern)) if several else pattern


def _recording(value: Any) -> Any:
    """Return what stands for a name of the function: torch's take `...`, and helpers do so too."""
    if not isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return _stand_in(value)
    place = str(value.__module__ or "").split(".")[0]
    if place == "torch":
        return _recorder(value)
    if isinstance(value, types.BuiltinFunctionType) or place in ("fxopt", "functools"):
        return value
    return functools.wraps(value)(_Helper(value))


def _stand_in(value: Any) -> Any:
    """Return what stands for a module or a packet of torch, and any other value as it is."""
    if isinstance(value, OpOverloadPacket):
        return _Packet(value)
    of_torch = isinstance(value, types.ModuleType) and value.__name__.split(".")[0] == "torch"
    return _Namespace(value) if of_torch else value


class _Helper:
    """A function that a pattern calls; it is recorded like the pattern itself."""

    def __init__(self, function: types.FunctionType) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _twin(self._function)(*args, **kwargs)


def _recording_cell(cell: types.CellType) -> types.CellType:
    try:
        return types.CellType(_recording(cell.cell_contents))
    except ValueError:  # the name has no value yet
        return cell


def _where(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    return f"{function.__name__} ({code.co_filename}:{code.co_firstlineno})"


_PERMUTES = (aten.transpose.int, aten.movedim.int, aten.movedim.intlist)


def _check_spelling(pattern: Any) -> None:
    """Raise OptionError for a call that cannot stand in a graph because its numbers are symbols."""
    for one in everything_in(pattern):
        if isinstance(one, CallPattern) and one.target in _PERMUTES:
            if any(isinstance(a, Var) for a in one.args[1:]):
                raise OptionError(
                    f"{operator_text(one.target)} is written as permute in a graph, and how "
                    "depends on its numbers. Write the numbers, or x.permute(dims)."
                )


# -- what stands for torch while a pattern is recorded ---------------------------------------------


class _Namespace:
    """Stands for `torch`, `F` or `aten` while a pattern is recorded, so that it may pass `...`."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        inner = _stand_in(value)
        if inner is not value or isinstance(value, type) or not callable(value):
            return inner
        return _recorder(value)


class _Packet:
    def __init__(self, packet: OpOverloadPacket) -> None:
        self._packet = packet

    def __call__(self, *args: Any, **kwargs: Any) -> Symbol:
        return record_call(self._packet, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _recorder(getattr(self._packet, name))


def _recorder(function: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: record_call(function, args, kwargs)
