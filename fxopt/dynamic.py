"""Dynamic shapes: what the user wrote, in the form that torch.export takes; what came out of it.

A dimension is named by a string, True, a `torch.export.Dim` or a hint like `Dim.DYNAMIC`. One whose
example is 0 or 1 gets an example of 2, since torch.export fixes those sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError

_TORCH = str(Path(torch.__file__).parent)
_TORCH_NN = str(Path(torch.nn.__file__).parent)
_FORMS = (
    "Write {'x': {0: 'batch'}}, or {0: 'batch'} for every tensor, or what torch.export takes."
)


Names = dict[tuple[int, int], str]  # (leaf, axis) of a dynamic dimension; -1 for an integer


@dataclass
class _Entry:
    """One dynamic dimension of one tensor, or one dynamic integer."""

    leaf: int
    path: str
    axis: int
    size: int
    dim: Any

    @property
    def name(self) -> str | None:
        """The name that ties it to other dimensions, where it has one."""
        if isinstance(self.dim, str):
            return self.dim
        return getattr(self.dim, "__name__", None) if isinstance(self.dim, Dim) else None

    def __str__(self) -> str:
        return f"dimension {self.axis} of '{self.path}'" if self.axis >= 0 else f"'{self.path}'"


def make_dynamic(
    parameters: inspect.Signature, arguments: Mapping[str, Any], dynamic_shapes: Any
) -> tuple[dict[str, Any], Any, Names]:
    """Return the arguments with examples of at least 2, their shapes for torch.export, and names.

    `arguments` are bound: a name of `parameters` to a value. Raises CaptureError for a form, name
    or dimension that does not fit.
    """
    spec = _by_name(parameters, arguments, dynamic_shapes)
    values, structure = pytree.tree_flatten(dict(arguments))
    entries: list[_Entry] = []
    at = 0
    for name, value in arguments.items():
        for leaf_spec, path in _leaf_specs(value, spec.get(name), name):
            entries += _entries(at, path, values[at], leaf_spec)
            at += 1
    for entry, size in _example_sizes(entries):
        values[entry.leaf] = _resized(values[entry.leaf], entry.axis, size)
    shapes: list[Any] = [None] * len(values)
    for entry in entries:
        dim = Dim.DYNAMIC if isinstance(entry.dim, str) or entry.dim is True else entry.dim
        if entry.axis < 0:
            shapes[entry.leaf] = dim
        else:
            shapes[entry.leaf] = {**(shapes[entry.leaf] or {}), entry.axis: dim}
    names = {(entry.leaf, entry.axis): entry.name for entry in entries if entry.name is not None}
    return pytree.tree_unflatten(values, structure), _shape_tree(structure, iter(shapes)), names


def names_of_sizes(names: Names, leaves: Sequence[Any]) -> dict[str, str]:
    """Return the user's name of each symbol that stands for a dimension of the inputs."""
    found: dict[str, str] = {}
    for (leaf, axis), name in names.items():
        size = getattr(leaves[leaf], "symbol", None) if axis < 0 else leaves[leaf].shape[axis]
        if isinstance(size, sympy.Symbol):
            found.setdefault(str(size), name)
    return found


def _shape_tree(structure: pytree.TreeSpec, leaves: Iterator[Any]) -> Any:
    """Nest the shapes of the leaves as torch.export does: registered classes become lists."""
    if structure.is_leaf():
        return next(leaves)
    children = [_shape_tree(child, leaves) for child in structure.children()]
    if structure.type not in pytree.BUILTIN_TYPES:
        return children
    empty = pytree.tree_unflatten([0] * structure.num_leaves, structure)
    keys = pytree.SUPPORTED_NODES[structure.type].flatten_fn(empty)[1]
    return pytree.SUPPORTED_NODES[structure.type].unflatten_fn(children, keys)


def _by_name(
    parameters: inspect.Signature, arguments: Mapping[str, Any], given: Any
) -> dict[str, Any]:
    """Return the spec of each argument; `given` may also be positional, or one for every tensor."""
    if isinstance(given, Mapping) and given and all(type(key) is int for key in given):
        return _everywhere(arguments, given)
    if isinstance(given, (tuple, list)):
        if len(given) > len(arguments):
            raise CaptureError(
                f"dynamic_shapes has {len(given)} entries, but the inputs are {_names(arguments)}."
            )
        return dict(zip(arguments, given, strict=False))
    if not isinstance(given, Mapping):
        raise CaptureError(f"dynamic_shapes cannot be {given!r}. {_FORMS}")
    spec = dict(given)
    for parameter in parameters.parameters.values():
        extra = arguments.get(parameter.name)
        if parameter.kind is parameter.VAR_KEYWORD and extra and parameter.name not in spec:
            spec[parameter.name] = {name: spec.pop(name, None) for name in extra}
    for name, shapes in list(spec.items()):
        if shapes is None and name in parameters.parameters:
            del spec[name]
        elif name not in arguments:
            raise CaptureError(
                f"dynamic_shapes names '{name}', but the inputs are {_names(arguments)}."
            )
    return spec


def _everywhere(arguments: Mapping[str, Any], given: Mapping[int, Any]) -> dict[str, Any]:
    """Give every tensor those of the dimensions that it has."""
    ranks = [t.dim() for t in pytree.tree_leaves(dict(arguments)) if isinstance(t, torch.Tensor)]
    for axis in given:
        if not any(-rank <= axis < rank for rank in ranks):
            raise CaptureError(f"dynamic_shapes names dimension {axis}, which no input has.")

    return dict.fromkeys(arguments, _Everywhere(given))


@dataclass
class _Everywhere:
    """A spec for every tensor in a nested value, whatever the nesting."""

    dims: Mapping[int, Any]

    def of(self, value: Any) -> Any:
        """Return those of the dimensions that a leaf has."""
        if not isinstance(value, torch.Tensor):
            return None
        rank = value.dim()
        return {axis: dim for axis, dim in self.dims.items() if -rank <= axis < rank}


def _leaf_specs(value: Any, spec: Any, path: str) -> Iterator[tuple[Any, str]]:
    """Yield the spec and the path of each leaf of `value`, in pytree order."""
    children = None if _is_leaf(value) else pytree.tree_flatten_with_path(
        value, is_leaf=lambda v: v is not value
    )[0]
    if children is None:
        yield spec.of(value) if isinstance(spec, _Everywhere) else spec, path
        return
    positions = range(len(children))
    for position, (keys, child) in zip(positions, children, strict=True):
        part = _child(spec, keys[0], position, value, path)
        yield from _leaf_specs(child, part, path + str(keys[0]))
    if isinstance(spec, (tuple, list)) and len(spec) != len(children):
        raise CaptureError(
            f"dynamic_shapes has {len(spec)} entries for '{path}', which has {len(children)}."
        )
    known = [_key(keys[0]) for keys, _ in children]
    unknown = [key for key in spec if key not in known] if isinstance(spec, Mapping) else []
    if unknown:
        raise CaptureError(
            f"dynamic_shapes names {unknown[0]!r} in '{path}', which has {_names(known)}."
        )


def _is_leaf(value: Any) -> bool:
    return bool(pytree.tree_structure(value).is_leaf())


def _key(key: Any) -> Any:
    """Return the dict key, field name or index that a pytree key stands for."""
    return next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))


def _child(spec: Any, key: Any, position: int, value: Any, path: str) -> Any:
    """Return the part of a spec that belongs to one child of a container."""
    if spec is None or isinstance(spec, _Everywhere):
        return spec
    if isinstance(spec, Mapping):
        return spec.get(_key(key))
    if is_dataclass(spec) and not isinstance(spec, type):
        return getattr(spec, fields(spec)[position].name)
    if isinstance(spec, (tuple, list)):
        return spec[position] if position < len(spec) else None
    raise CaptureError(
        f"dynamic_shapes gives {spec!r} for '{path}', which is a {type(value).__name__}: give one "
        "entry for each of its parts."
    )


def _entries(leaf: int, path: str, value: Any, spec: Any) -> Iterator[_Entry]:
    """Yield the dynamic dimensions of one leaf, checked."""
    if spec is None:
        return
    if isinstance(value, int) and not isinstance(value, bool):
        if _is_dim(spec):
            yield _Entry(leaf, path, -1, value, spec)
            return
        raise CaptureError(f"dynamic_shapes gives {spec!r} for the integer '{path}'; give a name.")
    if not isinstance(value, torch.Tensor):
        raise CaptureError(
            f"dynamic_shapes gives {spec!r} for '{path}', which is a {type(value).__name__}. Only "
            "tensors and integers can be dynamic."
        )
    if isinstance(spec, (tuple, list)) and len(spec) == value.dim():
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping):
        raise CaptureError(
            f"dynamic_shapes gives {spec!r} for '{path}', a tensor of {value.dim()} dimensions. "
            f"{_FORMS}"
        )
    for axis, dim in spec.items():
        if type(axis) is not int or not -value.dim() <= axis < value.dim():
            raise CaptureError(
                f"dynamic_shapes names dimension {axis!r} of '{path}', which has the shape "
                f"{tuple(value.shape)}."
            )
        entry = _Entry(leaf, path, axis % value.dim(), value.shape[axis], dim)
        if type(dim) is int and dim == entry.size:
            continue
        if dim is not None and not _is_dim(dim):
            raise CaptureError(
                f"dynamic_shapes gives {dim!r} for {entry}, whose size is {entry.size}. Give it a "
                "name, as in 'batch', or a torch.export.Dim."
            )
        if dim is not None:
            yield entry


def _is_dim(dim: Any) -> bool:
    return isinstance(dim, (str, Dim)) or dim is True or type(dim) is type(Dim.DYNAMIC)


def _is_derived(dim: Any) -> bool:
    return hasattr(dim, "root") and hasattr(dim, "fn")


def _example_sizes(entries: Sequence[_Entry]) -> Iterator[tuple[_Entry, int]]:
    """Yield the dimensions whose example must change, with its new size."""
    sizes: dict[str, tuple[_Entry, int]] = {}
    for entry in entries:
        if _is_derived(entry.dim) or entry.dim == Dim.STATIC:
            continue
        size = max(entry.size, 2)
        if entry.name is not None:
            first, known = sizes.setdefault(entry.name, (entry, size))
            if known != size:
                raise CaptureError(
                    f"dynamic_shapes gives the name '{entry.name}' to {first}, which is "
                    f"{first.size}, and to {entry}, which is {entry.size}. Give them two names."
                )
        low, high = getattr(entry.dim, "min", 0), getattr(entry.dim, "max", size)
        if isinstance(low, int) and not low <= size <= high and isinstance(entry.dim, Dim):
            raise CaptureError(
                f"The example size {entry.size} of {entry} is not in the range of "
                f"Dim('{entry.name}'), from {low} to {high}. Give an example_input within it."
            )
        if size != entry.size:
            yield entry, size
    for entry in entries:
        if _is_derived(entry.dim) and entry.dim.root.__name__ in sizes:
            size = int(entry.dim.fn(sizes[entry.dim.root.__name__][1]))
            root = sizes[entry.dim.root.__name__][0]
            if size != entry.size and root.size >= 2:
                raise CaptureError(
                    f"The example size {entry.size} of {entry} is not {entry.name}, where "
                    f"{root.name} is {root.size}: expected {size}."
                )
            if size != entry.size:
                yield entry, size


def _resized(value: Any, axis: int, size: int) -> Any:
    """Return the example with `size` rows along `axis`, made of the ones it has."""
    if axis < 0:
        return size
    if value.shape[axis] == 0:
        shape = list(value.shape)
        shape[axis] = size
        return value.new_zeros(shape)
    rows = torch.arange(size, device=value.device) % value.shape[axis]
    return value.detach().index_select(axis, rows)


def conditions(mode: Any, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], set[Any]]:
    """Return what must hold of the inputs' sizes, and the sizes that may be 0 or 1 after all.

    A condition is a branch that was taken while the model was traced. Those that only tell 0 and 1
    from larger sizes, inside PyTorch's own shape functions, are not the model's: an operator looks
    at the sizes again when it runs.
    """
    env = getattr(mode, "shape_env", None)
    if env is None:
        return (), set()
    tensors = [leaf for leaf in leaves if hasattr(leaf, "shape")]
    sizes = [size for leaf in tensors for size in (*leaf.shape, leaf.symbol)]
    known: set[Any] = set().union(*(getattr(size, "free_symbols", ()) for size in sizes))
    kept: dict[Any, None] = {}
    small: set[Any] = set()
    for guard in env.guards:
        if is_about_small_sizes(guard.expr) and _is_internal(guard.sloc):
            small |= guard.expr.free_symbols
        elif guard.expr.free_symbols and guard.expr.free_symbols <= known:
            kept[guard.expr] = None
    return tuple(kept), small


def is_about_small_sizes(condition: Any) -> bool:
    """Whether a condition sets small sizes apart: it is no equation, and holds for larger ones."""
    relation = isinstance(condition, sympy.core.relational.Relational)
    if not relation or isinstance(condition, sympy.Eq):
        return False
    larger = (dict.fromkeys(condition.free_symbols, size) for size in (2, 3, 5, 64))
    return any(side in (0, 1, 2) for side in condition.args) or all(
        condition.subs(sizes) == sympy.true for sizes in larger
    )


def _is_internal(place: Any) -> bool:
    """Whether a branch stands in PyTorch's operators, not in the user's code nor in torch.nn."""
    file = getattr(place.framework_loc, "filename", None)
    if file is None or place.maybe_user_loc is not None:
        return False
    return file.startswith(_TORCH) and not file.startswith(_TORCH_NN)


def _names(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
