"""The symbolic sizes of a graph: the names that the user gave them, and their example values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils import _pytree as pytree

from fxopt.errors import OptionError, unknown_name
from fxopt.graph_module import GraphModule
from fxopt.signature import TensorLeaf


@dataclass(frozen=True)
class Dimensions:
    """The symbolic sizes of one graph.

    `names` gives, for the graph's own symbols (`s77`), symbols in the user's words (`batch`, or
    `x.shape[0]` for a dimension without a name); `example` the value of each of these, by name.
    """

    names: Mapping[sympy.Symbol, sympy.Symbol]
    example: Mapping[str, int]

    def named(self, size: Any) -> Any:
        """Return a size, or a figure made of sizes, in the user's words."""
        return size if isinstance(size, int) else plain(size.xreplace(dict(self.names)))

    def values(self, sizes: Mapping[str, Any]) -> dict[sympy.Symbol, sympy.Integer]:
        """Return what to put in the place of each symbol.

        Raises OptionError for a name that no dimension has, and for a size that is none.
        """
        known = {str(symbol): symbol for symbol in self.names.values()}
        found = {}
        for name, size in sizes.items():
            if name not in known:
                raise unknown_name("dimension", str(name), known)
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise OptionError(f"The size of '{name}' must be an int, at least 0, not {size!r}.")
            found[known[name]] = sympy.Integer(size)
        return found


def plain(size: Any) -> Any:
    """Return a sympy integer as a Python int, and any other expression as it is."""
    return int(size) if isinstance(size, sympy.Integer) else size


def dimensions_of(graph: GraphModule, flat: Sequence[Any]) -> Dimensions:
    """Return the symbolic sizes of `graph`; `flat` are the inputs that they are examples of."""
    symbols = _symbols(graph)
    if not symbols:
        return Dimensions({}, {})
    words = {**_places(graph), **graph.info.dimensions}
    names = {
        symbol: sympy.Symbol(words.get(str(symbol), str(symbol)), integer=True, nonnegative=True)
        for symbol in sorted(symbols, key=str)
    }
    examples = {**dict.fromkeys(symbols, 1), **_captured_sizes(graph), **_sizes(graph, flat)}
    return Dimensions(names, {str(name): int(examples[s]) for s, name in names.items()})


def _symbols(graph: GraphModule) -> set[sympy.Symbol]:
    """Return the symbols in the shapes of all values; most graphs have none."""
    found: set[sympy.Symbol] = set()
    for node in graph.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else [value]
            for size in sizes:
                if isinstance(size, torch.SymInt):
                    found |= size.node.expr.free_symbols
    for body in graph.subgraphs():
        found |= _symbols(body)
    return found


def _leaves(graph: GraphModule) -> Sequence[TensorLeaf]:
    return graph.info.signature.tensors if graph.info.signature is not None else ()


def _places(graph: GraphModule) -> dict[str, str]:
    """Return where each symbol is first seen among the inputs: `x.shape[0]`."""
    found: dict[str, str] = {}
    for leaf in _leaves(graph):
        if isinstance(leaf.symbol, sympy.Symbol):
            found.setdefault(str(leaf.symbol), leaf.path)
        for axis, size in enumerate(leaf.shape):
            if isinstance(size, sympy.Symbol):
                found.setdefault(str(size), f"{leaf.path}.shape[{axis}]")
    return found


def _sizes(graph: GraphModule, flat: Sequence[Any]) -> dict[sympy.Symbol, int]:
    """Return the sizes that inputs have."""
    found: dict[sympy.Symbol, int] = {}
    for leaf, value in zip(_leaves(graph), flat, strict=True):
        actual = (*value.shape, None) if isinstance(value, torch.Tensor) else (value,)
        for symbol, size in zip((*leaf.shape, leaf.symbol), actual, strict=True):
            if isinstance(symbol, sympy.Symbol):
                found[symbol] = int(size)
    return found


def _captured_sizes(graph: GraphModule) -> dict[sympy.Symbol, int]:
    """Return the sizes that the graph was captured with."""
    environment = getattr(graph.info.fake_mode, "shape_env", None)
    known = getattr(environment, "backed_var_to_val", {})
    return {symbol: int(size) for symbol, size in known.items()}
