"""Operators by name: what a saved graph may call, and nothing else.

    aten::conv2d.default      an overload that is registered in this process
    higher_order::cond        control flow, from a list
    python::operator.add      arithmetic on symbolic sizes, from a list

A name from a file is only ever looked up, never imported. Operators that reach outside the process
(files, network, other processes) are refused, and so are those that write to their arguments.
"""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.errors import ArtefactError

aten = torch.ops.aten

_CONTROL_FLOW = ("cond", "while_loop", "map_impl", "scan", "associative_scan")

_OPERATOR_NAMES = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt",
    "le", "gt", "ge", "and_", "or_", "xor", "not_", "invert", "lshift", "rshift", "getitem",
)  # fmt: skip
_MATH_NAMES = ("ceil", "floor", "trunc", "sqrt", "log2")
_TORCH_NAMES = (
    "sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "_sym_sqrt",
    "_sym_log2", "_sym_sin", "_sym_cos", "_sym_tan", "_sym_sinh", "_sym_cosh", "_sym_tanh",
    "_sym_asin", "_sym_acos", "_sym_atan",
)  # fmt: skip
PYTHON: dict[str, Any] = {
    f"python::{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (operator, _OPERATOR_NAMES), (math, _MATH_NAMES), (torch, _TORCH_NAMES),
    )
    for name in names
}  # fmt: skip
_PYTHON_NAMES = {function: name for name, function in PYTHON.items()}

# Namespaces and operators that reach outside: files, streams of text, devices, other processes.
_OUTSIDE = {
    "image", "torchaudio", "torchcodec", "c10d", "_c10d_functional", "c10d_functional", "symm_mem",
    "_c10d_functional_autograd", "_dtensor", "fsdp", "rpc", "profiler", "debugprims", "_test",
    "debug_mode_ops", "streams", "inductor", "_inductor_test", "prim", "onnx_symbolic", "export",
    "static_runtime", "caffe2",
}  # fmt: skip
_OUTSIDE_OPERATORS = {"aten::from_file", "aten::save", "aten::_print", "aten::warn"}

_NAME = re.compile(r"([A-Za-z_]\w*)::(\w+)\.(\w+)", re.ASCII)
_LARGEST_LITERAL = 2**63
_LARGEST_EXPONENT = 64
_EXPONENTIAL = {operator.pow, operator.lshift}


def write(target: Any) -> str:
    """Return the name of a node's target; raise ArtefactError for one that cannot be saved."""
    name = ""
    if isinstance(target, OpOverload):
        name = f"{target._schema.name}.{target._overloadname}"
    elif isinstance(target, HigherOrderOperator):
        name = f"higher_order::{target.name()}"
    elif callable(target):
        name = _PYTHON_NAMES.get(target, "")
    if not name:
        raise ArtefactError(
            f"{target} cannot be saved: it is not an operator. Register it with torch.library."
        )
    resolve(name)
    return name


def resolve(name: Any) -> Any:
    """Return the operator of that name; raise ArtefactError where there is none that may run."""
    if not isinstance(name, str) or len(name) > 500:
        raise ArtefactError("An operator has no name. The file is damaged or not fxopt's.")
    if name in PYTHON:
        return PYTHON[name]
    space, _, rest = name.partition("::")
    if space == "higher_order" and rest in _CONTROL_FLOW:
        return getattr(torch.ops.higher_order, rest)
    match = _NAME.fullmatch(name)
    if match is None or space in ("higher_order", "python"):
        raise _refused(name, "it is not an operator that a graph may call")
    return _overload(name, *match.groups())


def check_arguments(target: Any, args: Any, kwargs: Any) -> None:
    """Raise ArtefactError where numbers among a Python function's arguments would run away."""
    if isinstance(target, (OpOverload, HigherOrderOperator)):
        return
    if kwargs or not isinstance(args, tuple):
        raise _refused(_PYTHON_NAMES[target], "it takes no arguments by name")
    literals = [
        value
        for argument in args
        for value in (argument if isinstance(argument, (list, tuple)) else (argument,))
    ]
    if any(isinstance(v, (str, bytes, dict, list, tuple, slice)) for v in literals):
        raise _refused(_PYTHON_NAMES[target], "its arguments must be numbers")
    limit = _LARGEST_EXPONENT if target in _EXPONENTIAL else _LARGEST_LITERAL
    if any(isinstance(v, int) and abs(v) > _LARGEST_LITERAL for v in literals):
        raise _refused(_PYTHON_NAMES[target], "a number among its arguments is too large")
    if target in _EXPONENTIAL and not (
        len(literals) == 2 and isinstance(literals[1], (int, float)) and abs(literals[1]) <= limit
    ):
        raise _refused(_PYTHON_NAMES[target], f"its exponent is not a number up to {limit}")


def _overload(name: str, space: str, packet: str, overload: str) -> OpOverload:
    operator_name = f"{space}::{packet}"
    if space in _OUTSIDE or operator_name in _OUTSIDE_OPERATORS:
        raise _refused(name, "it reaches outside the process")
    schemas = torch._C._jit_get_schemas_for_operator(operator_name)
    wanted = "" if overload == "default" else overload
    if all(schema.overload_name != wanted for schema in schemas):
        known = schemas or space in ("aten", "prims")
        hint = "" if known else f" If '{space}' is a library of yours, import it before loading."
        raise _refused(name, f"no such operator is registered in this process.{hint}")
    found = getattr(getattr(getattr(torch.ops, space), packet), overload, None)
    if not isinstance(found, OpOverload) or found._schema.name != operator_name:
        raise _refused(name, "no such operator is registered in this process")
    if found._schema.is_mutable and found is not aten.copy_.default:
        raise _refused(name, "it writes to its arguments")
    return found


def _refused(name: str, reason: str) -> ArtefactError:
    return ArtefactError(f"The graph calls '{name[:100]}', which is refused: {reason}.")
