"""Python values as JSON: arguments of nodes, constants of calls, and pytree specs.

None, bool, int, str and finite floats stand for themselves, lists are lists; everything else is an
object with one key that says what it is: {"tuple": [...]}, {"dtype": "float32"}, {"node": "relu"}.
Reading is strict, looks names up in fixed tables, and never imports.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt.errors import ArtefactError

log = logging.getLogger("fxopt")

_CONSTANTS: dict[str, dict[str, Any]] = {
    tag: {name: v for name, v in vars(torch).items() if isinstance(v, kind)}
    for tag, kind in (
        ("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format),
    )
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = _CONSTANTS["dtype"]


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's one name: float32, not float."""
    return str(dtype).removeprefix("torch.")


# -- values -------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """Return a value as JSON; raise ArtefactError for one that has no such form."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, (slice, range)):
        parts = (value.start, value.stop, value.step)
        return {type(value).__name__: [encode(part) for part in parts]}
    if value is Ellipsis:
        return {"ellipsis": True}
    for tag, kind in _TORCH_KINDS.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    if isinstance(value, int):  # numpy's, for instance
        return int(value)
    raise ArtefactError(
        f"{value!r:.100} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be "
        "saved. Use numbers, strings, lists, tuples or dicts."
    )


_TORCH_KINDS = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
    "device": torch.device,
}


def decode(value: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """Return the value that `encode` wrote; `nodes` are those that it may refer to."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise malformed("a value")
    ((tag, content),) = value.items()
    reader = _READERS.get(tag)
    if tag == "node" and nodes is not None and content in nodes:
        return nodes[content]
    if reader is None:
        raise malformed(f"a value of the kind '{tag!s:.40}'")
    return reader(content, nodes)


def malformed(what: str) -> ArtefactError:
    """The error for JSON that says something else than it should."""
    return ArtefactError(
        f"The file is damaged or not fxopt's: {what} cannot be read. Get it again, or save the "
        "model again."
    )


def _parts(content: Any, nodes: Any) -> list[Any]:
    if not isinstance(content, list):
        raise malformed("a value")
    return [decode(item, nodes) for item in content]


def _torch_constant(tag: str) -> Callable[[Any, Any], Any]:
    def read(content: Any, nodes: Any) -> Any:
        if not isinstance(content, str) or content not in _CONSTANTS[tag]:
            raise malformed(f"the {tag} '{content!s:.40}'")
        return _CONSTANTS[tag][content]

    return read


_READERS: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda content, nodes: tuple(_parts(content, nodes)),
    "dict": lambda content, nodes: dict(_parts(pair, nodes) for pair in content),
    "slice": lambda content, nodes: slice(*_parts(content, nodes)),
    "range": lambda content, nodes: range(*_parts(content, nodes)),
    "ellipsis": lambda content, nodes: Ellipsis,
    "float": lambda content, nodes: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[content],
    "complex": lambda content, nodes: complex(*_parts(content, nodes)),
    "device": lambda content, nodes: torch.device(str(content)),
    "dtype": _torch_constant("dtype"),
    "layout": _torch_constant("layout"),
    "memory_format": _torch_constant("memory_format"),
}


# -- pytree specs ---------------------------------------------------------------------------------

_PLAIN: dict[str, Any] = {
    "tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict,
    "defaultdict": defaultdict, "deque": deque,
}  # fmt: skip
_FACTORIES: dict[str, Any] = {t.__name__: t for t in (list, dict, int, float, set, str, tuple)}


def encode_spec(spec: pytree.TreeSpec) -> Any:
    """Return a pytree spec as JSON: None for a leaf."""
    if spec.is_leaf():
        return None
    kind: Any = spec.type
    context: Any = spec.context
    written: dict[str, Any] = {"children": [encode_spec(child) for child in spec.children()]}
    if kind is namedtuple:
        written |= {"kind": "namedtuple", "class": _class_name(context)}
        written["fields"] = list(context._fields)
    elif kind is defaultdict:
        factory, keys = context
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and _FACTORIES.get(name) is not factory:
            raise ArtefactError(f"A defaultdict of {factory} cannot be saved; return a dict.")
        written |= {"kind": "defaultdict", "factory": name, "context": encode(keys)}
    elif kind in _PLAIN.values():
        written |= {"kind": str(kind.__name__), "context": encode(context)}
    else:
        written |= {"kind": "class", "class": _class_name(kind), "context": encode(context)}
        written["fields"] = _field_names(spec)
    return written


def decode_spec(written: Any) -> pytree.TreeSpec:
    """Return the pytree spec; a class that is not at hand becomes a dict of its fields.

    A class is used only where its module is imported already and it is registered as a pytree.
    """
    if written is None:
        return pytree.tree_structure(0)
    children = [decode_spec(child) for child in written["children"]]
    kind, context = written["kind"], decode(written.get("context"))
    if kind == "class":
        return _class_spec(written, context, children)
    if kind == "namedtuple":
        return _namedtuple_spec(written, children)
    if kind not in _PLAIN:
        raise malformed(f"a structure of the kind '{kind!s:.40}'")
    if kind in ("dict", "OrderedDict", "defaultdict"):
        if not isinstance(context, list) or len(set(context)) != len(children):
            raise malformed("the keys of a dict")
        if kind == "defaultdict":
            name = written["factory"]
            context = [None if name is None else _FACTORIES[name], context]
    elif kind != "deque" and context is not None:
        raise malformed("a structure")
    return pytree.TreeSpec(_PLAIN[kind], context, children)


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _field_names(spec: pytree.TreeSpec) -> list[str] | None:
    """Return the names of a class's children, where its context holds them."""
    context = spec.context
    for names in (context, context[0] if isinstance(context, (list, tuple)) and context else None):
        if isinstance(names, (list, tuple)) and len(names) == spec.num_children:
            if all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _find_class(name: Any) -> Any:
    """Return a class whose module is imported, or None; nothing is imported or run."""
    module, _, path = str(name).partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) else None


def _class_spec(written: Any, context: Any, children: list[Any]) -> pytree.TreeSpec:
    name, fields = written["class"], written["fields"]
    cls = _find_class(name)
    if cls is not None and cls in pytree.SUPPORTED_NODES and cls not in _PLAIN.values():
        return pytree.TreeSpec(cls, context, children)
    if not _are_names(fields, children):
        raise ArtefactError(
            f"The model's inputs or outputs are a '{name!s:.200}', which is not known here. Import "
            "its module, and register it with torch.export.register_dataclass, before loading."
        )
    log.info(
        "'%s' is not imported, or not registered with torch.export.register_dataclass: a dict "
        "with the keys %s stands for it", name, ", ".join(fields),
    )  # fmt: skip
    return pytree.TreeSpec(dict, fields, children)


def _namedtuple_spec(written: Any, children: list[Any]) -> pytree.TreeSpec:
    name, fields = written["class"], written["fields"]
    if not _are_names(fields, children):
        raise malformed("the fields of a named tuple")
    cls = _find_class(name)
    is_plain = cls is not None and cls.__bases__ == (tuple,)  # no constructor of its own
    if is_plain and getattr(cls, "_fields", ()) == tuple(fields):
        return pytree.TreeSpec(namedtuple, cls, children)
    log.info("the named tuple '%s' is not imported: a plain tuple stands for it", name)
    return pytree.TreeSpec(tuple, None, children)


def _are_names(fields: Any, children: list[Any]) -> bool:
    is_list = isinstance(fields, list) and all(isinstance(name, str) for name in fields)
    return is_list and len(set(fields)) == len(fields) == len(children)
