"""Which function emits which operator: a table filled by the decorator `emits`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# The files that hold emitters, by subject.
SUBJECTS = (
    "elementwise",
    "activations",
    "arithmetic",
    "shaping",
    "sizes",
    "convolution",
    "pooling",
    "normalization",
    "linear",
    "attention",
    "reduction",
    "ordering",
    "indexing",
    "scattering",
    "creation",
    "resampling",
    "recurrent",
    "padding",
    "control",
    "quantization",
)


@dataclass(frozen=True)
class Rule:
    """How one operator is emitted."""

    emit: Callable[..., Any]
    moves: bool  # it only moves data, so any dtype will do and none is converted


_RULES: dict[Any, Rule] = {}


def emits(*targets: Any, moves: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the emitter of operators: `"relu"`, `"add.Tensor"`, or a callable.

    It is called with the Emitter and the node's own arguments, and returns the ONNX value (or the
    list of values) of the node. A name that this version of torch does not have is skipped.
    """

    def register(emit: Callable[..., Any]) -> Callable[..., Any]:
        for target in targets:
            operator = _overload(target) if isinstance(target, str) else target
            if operator is not None:
                _RULES[operator] = Rule(emit, moves)
        return emit

    return register


def rules() -> dict[Any, Rule]:
    """Return every emitter by operator."""
    for subject in SUBJECTS:
        importlib.import_module(f"fxopt.backends.onnx.{subject}")
    return _RULES


def _overload(name: str) -> Any:
    space, _, rest = name.rpartition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, space or "aten"), packet, None)
    return getattr(found, overload or "default", None)
