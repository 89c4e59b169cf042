"""Call signatures as JSON: parameters, structures, symbolic sizes and the conditions on them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch

from fxopt import expressions
from fxopt.encode import DTYPES, decode, decode_spec, dtype_name, encode, encode_spec, malformed
from fxopt.errors import ArtefactError
from fxopt.signature import ConstantLeaf, Dim, Signature, Structure, TensorLeaf


class Unsaved:
    """Stands for a default that has no JSON form: the call must leave that argument out."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def encode_signature(signature: Signature) -> dict[str, Any]:
    """Return a call signature as JSON; raise ArtefactError for values that cannot be saved."""
    sizes = [size for leaf in signature.tensors for size in (*leaf.shape, leaf.symbol)]
    sizes += signature.guards
    symbols = {s for size in sizes if isinstance(size, sympy.Basic) for s in size.free_symbols}
    return {
        "symbols": sorted([str(s), bool(s.is_positive)] for s in symbols),
        "parameters": [_parameter(p) for p in signature.parameters.parameters.values()],
        "names": list(signature.names),
        "spec": encode_spec(signature.spec),
        "leaves": [_leaf(leaf) for leaf in signature.leaves],
        "output": {
            "spec": encode_spec(signature.output.spec),
            "leaves": [
                leaf if isinstance(leaf, int) else _leaf(leaf) for leaf in signature.output.leaves
            ],
            "numbers": [list(pair) for pair in signature.output.numbers],
        },
        "ranges": {name: list(bounds) for name, bounds in signature.ranges.items()},
        "guards": [_condition(guard) for guard in signature.guards],
    }


def decode_signature(
    written: Mapping[str, Any], symbols: Mapping[str, sympy.Symbol] | None = None
) -> Signature:
    """Return the signature; `symbols` gives those of a graph that was read beside it."""
    if symbols is None:
        symbols = {
            str(name): sympy.Symbol(str(name), integer=True, positive=True if positive else None)
            for name, positive in written["symbols"]
        }
    output = written["output"]
    leaves: list[int | ConstantLeaf] = []
    for written_leaf in output["leaves"]:
        leaf = written_leaf if type(written_leaf) is int else _read_leaf(written_leaf, {})
        if isinstance(leaf, TensorLeaf):
            raise malformed("the structure of the outputs")
        leaves.append(leaf)
    structure = Structure(
        decode_spec(output["spec"]), tuple(leaves), _numbers(output["numbers"])
    )
    signature = Signature(
        parameters=inspect.Signature([_read_parameter(p) for p in written["parameters"]]),
        names=tuple(map(str, written["names"])),
        spec=decode_spec(written["spec"]),
        leaves=tuple(_read_leaf(leaf, symbols) for leaf in written["leaves"]),
        output=structure,
        ranges={
            str(symbols.get(name, name)): (int(low), None if high is None else int(high))
            for name, (low, high) in written["ranges"].items()
        },
        guards=tuple(_read_condition(guard, symbols) for guard in written["guards"]),
    )
    _check_counts(signature)
    return signature


def _check_counts(signature: Signature) -> None:
    spec, output = signature.spec, signature.output
    named = spec.type is dict and list(spec.context) == list(signature.names)
    known = set(signature.names) <= set(signature.parameters.parameters)
    if not (named and known and spec.num_leaves == len(signature.leaves)):
        raise malformed("the structure of the inputs")
    if output.spec.num_leaves != len(output.leaves):
        raise malformed("the structure of the outputs")


def _parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    written: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
    if parameter.default is not parameter.empty:
        try:
            written["default"] = encode(parameter.default)
        except ArtefactError:
            written["unsaved"] = plain_text(parameter.default)
    return written


def _read_parameter(written: Mapping[str, Any]) -> inspect.Parameter:
    default: Any = inspect.Parameter.empty
    if "default" in written:
        default = decode(written["default"])
    elif "unsaved" in written:
        default = Unsaved(str(written["unsaved"]))
    kinds = {kind.name: kind for kind in inspect._ParameterKind}
    return inspect.Parameter(written["name"], kinds[written["kind"]], default=default)


def _leaf(leaf: TensorLeaf | ConstantLeaf) -> dict[str, Any]:
    if isinstance(leaf, ConstantLeaf):
        try:
            return {"path": leaf.path, "value": encode(leaf.value)}
        except ArtefactError as error:
            raise ArtefactError(f"'{leaf.path}' of the model's call: {error}") from None
    return {
        "path": leaf.path,
        "shape": [write_size(size) for size in leaf.shape],
        "dtype": None if leaf.dtype is None else dtype_name(leaf.dtype),
        "device": None if leaf.device is None else str(leaf.device),
        "symbol": None if leaf.symbol is None else write_size(leaf.symbol),
    }


def _read_leaf(
    written: Mapping[str, Any], symbols: Mapping[str, sympy.Symbol]
) -> TensorLeaf | ConstantLeaf:
    path = str(written["path"])
    if "value" in written:
        return ConstantLeaf(path, decode(written["value"]))
    dtype, device, symbol = written["dtype"], written["device"], written["symbol"]
    return TensorLeaf(
        path,
        tuple(read_size(size, symbols) for size in written["shape"]),
        None if dtype is None else DTYPES[dtype],
        None if device is None else torch.device(device),
        None if symbol is None else sympy.sympify(read_size(symbol, symbols)),
    )


def write_size(size: Dim) -> int | str:
    """Return a size as JSON: an integer, or the text of an expression."""
    if isinstance(size, int):
        return int(size)
    return int(size) if size.is_Integer else expressions.write(size)


def read_size(written: Any, symbols: Mapping[str, sympy.Symbol]) -> Dim:
    """Return the size that `write_size` wrote."""
    if type(written) is int:
        return written
    found = expressions.parse(written, symbols)
    return int(found) if found.is_Integer else found


_CONDITIONS: dict[str, Any] = {
    "==": sympy.Eq, "!=": sympy.Ne, "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge,
    "and": sympy.And, "or": sympy.Or, "not": sympy.Not,
}  # fmt: skip


def _condition(guard: Any) -> list[Any]:
    """Return a condition on sizes as JSON: its name, then its parts."""
    for name, kind in _CONDITIONS.items():
        if isinstance(guard, kind):
            of_sizes = isinstance(guard, sympy.core.relational.Relational)
            return [name, *(map(write_size if of_sizes else _condition, guard.args))]
    raise ArtefactError(
        f"The condition {guard} on the model's sizes cannot be saved. Compile again with the "
        "dimensions fixed."
    )


def _read_condition(written: Any, symbols: Mapping[str, sympy.Symbol]) -> sympy.Basic:
    name, *parts = written
    if name in ("and", "or", "not"):
        return _CONDITIONS[name](*(_read_condition(part, symbols) for part in parts))
    left, right = (sympy.sympify(read_size(part, symbols)) for part in parts)
    return _CONDITIONS[name](left, right)


def plain_text(value: Any) -> str:
    """Return a value's text without its address, which differs from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))[:500]


def _numbers(written: Any) -> tuple[tuple[int, str], ...]:
    """Read which outputs are Python numbers, and of which type."""
    pairs = tuple((index, kind) for index, kind in written)
    if any(type(i) is not int or kind not in ("int", "float", "bool") for i, kind in pairs):
        raise malformed("the structure of the outputs")
    return pairs
