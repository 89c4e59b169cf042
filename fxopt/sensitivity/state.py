"""What was measured so far, in a file: a run that was ended goes on from there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxopt.difference import bytes_of
from fxopt.errors import OptionError
from fxopt.files import write_atomic
from fxopt.graph_module import GraphModule
from fxopt.pruning.importance import Importance
from fxopt.text import graph_text

_FORMAT = "fxopt sensitivity 1"


@dataclass
class State:
    """The measurements of one model with one importance and one function that evaluates.

    `values` maps a family and a number of removed channels to what was measured, `orders` a family
    to the order in which its channels go.
    """

    path: Path | None
    model: str  # a digest of its graph and weights
    settings: dict[str, str]
    baseline: float | None = None
    orders: dict[str, list[int]] = field(default_factory=dict)
    values: dict[str, dict[int, float]] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: str | Path | None, graph: GraphModule, importance: Importance, evaluate: Any
    ) -> State:
        """Read a state, or begin one. Raises OptionError for a file that is none of this run."""
        settings = {"importance": importance_text(importance), "evaluate": _named(evaluate)}
        state = cls(Path(path) if path is not None else None, "", settings)
        if state.path is None:
            return state
        state.model = digest(graph)
        if state.path.exists():
            state._read(state.path)
        return state

    def _read(self, path: Path) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            known = document["format"] == _FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OptionError(
                f"'{path}' is no state of sensitivity() ({type(error).__name__}: {error}). Choose "
                "another file, or remove it."
            ) from None
        if not known:
            raise OptionError(f"'{path}' was written by another version of fxopt: remove it.")
        if document["model"] != self.model:
            raise OptionError(
                f"'{path}' holds what was measured on another model, or on other weights. Choose "
                "another state=, or remove it."
            )
        for key, value in self.settings.items():
            if document["settings"].get(key) != value:
                raise OptionError(
                    f"'{path}' was measured with {key}={document['settings'].get(key)}, this run "
                    f"has {key}={value}. Choose another state=, or remove it."
                )
        self.baseline = document["baseline"]
        self.orders = document["orders"]
        self.values = {
            name: {int(count): value for count, value in values.items()}
            for name, values in document["values"].items()
        }

    def write(self) -> None:
        """Write the state, whole or not at all."""
        if self.path is not None:
            document = {
                "format": _FORMAT, "model": self.model, "settings": self.settings,
                "baseline": self.baseline, "values": self.values, "orders": self.orders,
            }  # fmt: skip
            write_atomic(self.path, json.dumps(document))


def digest(graph: GraphModule) -> str:
    """Return a short text that another graph, or the same with other weights, does not have."""
    found = hashlib.blake2b(graph_text(graph).encode(), digest_size=16)
    for name, tensor in sorted(graph.constants().items()):
        found.update(name.encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def importance_text(importance: Importance) -> str:
    """Return an importance with its options; a function by its name."""
    function = getattr(importance, "function", None)
    return _named(function) if function is not None else repr(importance)


def _named(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"
