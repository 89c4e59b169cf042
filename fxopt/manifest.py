"""What an artefact says about itself: versions, signature, passes; as JSON text.

The text holds plain data only. Reading it never imports or runs anything it names: see
`fxopt.encode` for values and classes, `fxopt.expressions` for symbolic sizes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import sympy
import torch

from fxopt import expressions
from fxopt.backend import Backend
from fxopt.encode import DTYPES, decode, decode_spec, dtype_name, encode, encode_spec, malformed
from fxopt.errors import ArtefactError
from fxopt.signature import ConstantLeaf, Dim, Signature, Structure, TensorLeaf
from fxopt.story import Story

FORMAT = 1  # raised by every change that an older fxopt would misread
_LARGEST = 512 * 2**20  # characters


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read."""

    signature: Signature
    format: int = FORMAT
    fxopt: str = ""  # the versions that wrote it
    torch: str = ""
    backend: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "model"
    passes: tuple[Mapping[str, Any], ...] = ()  # name, options, rewrites, skipped
    verifications: tuple[Mapping[str, Any], ...] = ()  # what, error, bound


class Unsaved:
    """Stands for a default that has no JSON form: the call must leave that argument out."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def write_manifest(signature: Signature, backend: Backend, story: Story | None) -> str:
    """Return the manifest of a compiled model.

    Raises ArtefactError where the signature holds values that cannot be saved.
    """
    content = {
        "format": FORMAT,
        "fxopt": fxopt_version(),
        "torch": torch.__version__,
        "backend": {"name": backend.name, "options": _options(backend)},
        "model": "model" if story is None else story.model_name,
        "passes": [] if story is None else [_step(step) for step in story.steps],
        "verifications": [] if story is None else [
            {"what": one.what, "error": encode(one.error), "bound": encode(one.bound)}
            for one in story.verifications
        ],
        "signature": encode_signature(signature),
    }  # fmt: skip
    return dump(content)


def read_manifest(text: str, source: Path) -> Manifest:
    """Read a manifest; raise ArtefactError where it is damaged or newer than this version."""
    try:
        content = parse_json(text)
        check_format(content)
        return Manifest(
            signature=decode_signature(content["signature"]),
            format=content["format"],
            fxopt=str(content["fxopt"]),
            torch=str(content["torch"]),
            backend=str(content["backend"]["name"]),
            options=decode(content["backend"]["options"]),
            model=str(content["model"]),
            passes=tuple(map(_read_step, content["passes"])),
            verifications=tuple(map(_read_verification, content["verifications"])),
        )
    except ArtefactError as error:
        raise ArtefactError(f"'{source}': {error}") from error
    except Exception as error:  # whatever else is not as it should be
        raise ArtefactError(
            f"'{source}' has a manifest that cannot be read ({type(error).__name__}: "
            f"{error!s:.200}). Get the file again, or save the model again."
        ) from error


def dump(content: Any) -> str:
    """Return JSON text, the same for the same content."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def parse_json(text: str) -> Any:
    """Return what a JSON object says; NaN and infinity are no numbers here."""
    if len(text) > _LARGEST:
        raise malformed("a text of more than 512 MiB")

    def refuse(name: str) -> Any:
        raise malformed(f"the number {name}")

    content = json.loads(text, parse_constant=refuse)
    if not isinstance(content, dict):
        raise malformed("the manifest")
    return content


def check_format(content: Mapping[str, Any]) -> None:
    """Raise ArtefactError for a format that a newer fxopt wrote."""
    version = content.get("format")
    if type(version) is not int or version < 1:
        raise malformed("the number of the format")
    if version > FORMAT:
        raise ArtefactError(
            f"It has format {version}, written by fxopt {content.get('fxopt')!s:.40}; this is "
            f"fxopt {fxopt_version()}, which reads formats up to {FORMAT}. Upgrade fxopt, or save "
            "the model with this version."
        )


def fxopt_version() -> str:
    """Return this version of fxopt."""
    from fxopt import __version__

    return __version__


def _options(one: Any) -> Any:
    """Return the fields of a backend as JSON; what has no such form, as its text."""
    values = {f.name: getattr(one, f.name) for f in fields(one)} if is_dataclass(one) else {}
    return encode({name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    try:
        encode(value)
    except ArtefactError:
        return _text(value)
    return value


def _text(value: Any) -> str:
    """Return a value's text without its address, which differs from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))[:500]


def _step(step: Any) -> dict[str, Any]:
    options = encode({name: _plain(value) for name, value in step.options.items()})
    return {
        "name": step.name, "options": options, "rewrites": step.rewrites, "skipped": step.skipped,
    }  # fmt: skip


def _read_step(step: Mapping[str, Any]) -> dict[str, Any]:
    return {**step, "options": decode(step["options"])}


def _read_verification(one: Mapping[str, Any]) -> dict[str, Any]:
    return {**one, "error": decode(one["error"]), "bound": decode(one["bound"])}


# -- the call signature -------------------------------------------------------------------------


def encode_signature(signature: Signature) -> dict[str, Any]:
    """Return a call signature as JSON; raise ArtefactError for values that cannot be saved."""
    sizes = [size for leaf in signature.tensors for size in (*leaf.shape, leaf.symbol)]
    symbols = {s for size in sizes if isinstance(size, sympy.Expr) for s in size.free_symbols}
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
            "integers": sorted(signature.output.integers),
        },
        "ranges": {name: list(bounds) for name, bounds in signature.ranges.items()},
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
    leaves = tuple(
        leaf if type(leaf) is int else _read_leaf(leaf, {}) for leaf in output["leaves"]
    )
    if any(isinstance(leaf, TensorLeaf) for leaf in leaves):
        raise malformed("the structure of the outputs")
    structure = Structure(
        decode_spec(output["spec"]), leaves, frozenset(map(int, output["integers"]))  # type: ignore[arg-type]
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
            written["unsaved"] = _text(parameter.default)
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
