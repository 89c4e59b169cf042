"""A package of machine code that is loaded, and called with flat tensors."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.backends.inductor.flat import FlatGraph, Slot, channels_last, is_channels_last
from fxopt.errors import ShapeError


@dataclass(frozen=True)
class CallPlan:
    """How flat inputs become those of the code, and its outputs the graph's.

    `layouts` has one word for each of the graph's inputs: "contiguous" or "channels_last" for a
    tensor, since the code counts on how it lies in memory, and "integer".
    """

    layouts: tuple[str, ...]
    slots: tuple[Slot, ...]
    results: int
    constant: frozenset[int]  # outputs that may lie in the memory of a constant

    @classmethod
    def of(cls, flat: FlatGraph) -> CallPlan:
        """Return the plan for a graph that was flattened."""
        states = sum(slot.input is None for slot in flat.slots)
        given = flat.inputs[: len(flat.inputs) - states]
        layouts = tuple(
            "integer" if index in flat.integers
            else "channels_last" if is_channels_last(fake)
            else "contiguous"
            for index, fake in enumerate(given)
        )
        return cls(layouts, flat.slots, flat.results, frozenset(flat.constant))


class InductorExecutable:
    """Machine code and its weights, in a folder of its own until the executable is gone.

    Calls from several threads are right; `runners` of them run at once, and the others wait. A
    graph that changes state takes one call at a time.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        folder: tempfile.TemporaryDirectory[str],
        package: Path,
        plan: CallPlan,
        runners: int = 1,
    ) -> None:
        self.package = package
        self.plan = plan
        self._folder = folder  # removed with this object
        self._loader = torch._C._aoti.AOTIModelPackageLoader(
            str(package), "model", False, runners, -1
        )
        self._states: list[torch.Tensor] = []
        self._turn: Any = threading.Lock() if plan.slots else contextlib.nullcontext()
        self.reset_state()

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        """The tensors that calls change."""
        return tuple(self._states)

    def reset_state(self) -> None:
        """Give the tensors that calls change their initial values again."""
        slots = self.plan.slots
        self._states = [slot.initial.clone() for slot in slots if slot.initial is not None]

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs, in the order of the graph's placeholders."""
        if len(flat) != len(self.plan.layouts):
            raise ShapeError(f"Expected {len(self.plan.layouts)} inputs, got {len(flat)}.")
        with torch.no_grad(), torch._C._DisableAutocast(), self._turn:
            given = list(map(_laid_out, flat, self.plan.layouts))
            outputs = self._loader.boxed_run([*given, *self._states])
            results = tuple(
                result.clone() if index in self.plan.constant else result
                for index, result in enumerate(outputs[: self.plan.results])
            )
            self._write(flat, outputs)  # only now: an output may show the state as it was
        return results

    def _write(self, flat: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        """Give what the call changes its new value."""
        states = iter(self._states)
        for slot in self.plan.slots:
            target = next(states) if slot.input is None else flat[slot.input]
            target.copy_(outputs[slot.output])

    def save(self, path: Path, manifest: str) -> None:
        """Write one file: the package, with the manifest and checksums of all parts in it."""
        from fxopt.backends.inductor.artefact import save

        save(self, Path(path), manifest)


def _laid_out(value: Any, layout: str) -> torch.Tensor:
    """Return an input as it must lie in memory; most do already."""
    if layout == "integer":
        return torch.empty((value, 0))
    if value.is_complex():
        value = value.resolve_conj()
    if layout == "channels_last":
        return value.contiguous(memory_format=channels_last(value))
    return value.resolve_neg().contiguous()
