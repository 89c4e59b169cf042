"""Calls replayed from CUDA graphs: when one is recorded, when it is used, and when it goes.

A small network's kernels take less time than Python takes to start them. A CUDA graph starts all of
them at once. It always reads and writes the same memory, so inputs are copied there, outputs are
copied from there, and one call at a time may do that.

What talks to CUDA is behind `Recorder`; all else here runs, and is tested, without a GPU.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fxopt.backends.eager.program import Function
from fxopt.errors import LoweringError

log = logging.getLogger("fxopt")

LIMIT = 8  # recordings at once; each holds the memory of one run
_SECOND = 2  # the call of a shape that is recorded: what comes once is not worth it
_PATIENT = 16  # the same where another shape must go: recording costs several calls
_REMEMBERED = 256  # shapes whose calls are counted


@dataclass(frozen=True)
class Recording:
    """One recorded run. `replay()` computes `outputs` from what lies in `inputs`, on the GPU."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    replay: Callable[[], None]
    forget: Callable[[], None]  # waits for the GPU, and gives up the memory


class Recorder(Protocol):
    """What records on one device."""

    def index(self) -> int:
        """Return what `Tensor.get_device` says of tensors on this device."""
        ...

    def is_busy(self) -> bool:
        """Whether the caller is recording a CUDA graph of its own."""
        ...

    def settings(self) -> Hashable:
        """Return what the user may switch that decides which kernels a run starts."""
        ...

    def record(self, function: Function, inputs: Sequence[Any]) -> Recording:
        """Record one run on copies of the inputs; RuntimeError where CUDA does not allow it."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Let work inside follow, on the GPU, that of the turn before."""
        ...


class Replays:
    """A function of tensors and integers that replays calls of shapes it has seen before.

    The first call of a shape runs as it is, which also shows whether it runs at all; the next one
    is recorded. Several threads may call: replays take turns, other calls do not. Where CUDA does
    not allow a recording, LoweringError is raised if it is `required`; else there is a warning, and
    no other is tried.
    """

    def __init__(
        self, function: Function, make: Callable[[], Recorder], *, required: bool = False
    ) -> None:
        self.function = function
        self.required = required
        self.failure: str | None = None  # why nothing is recorded any more
        self._make = make
        self._recorder: Recorder | None = None
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()  # last used at the end
        self._seen: OrderedDict[Hashable, int] = OrderedDict()  # calls that were not replayed
        self._turn = threading.Lock()

    def __len__(self) -> int:
        """Return how many recordings there are."""
        return len(self._recordings)

    def __call__(self, *flat: Any) -> tuple[Any, ...]:
        """Compute, by a replay where there is or should be one."""
        recorder = self._recorder
        if recorder is None:
            with self._turn:
                recorder = self._recorder = self._recorder or self._make()
        if recorder.is_busy():
            return self.function(*flat)
        key = (recorder.settings(), *map(_key, flat))
        with self._turn:
            recording = self._recordings.get(key) or self._recorded(recorder, key, flat)
            if recording is not None:
                self._recordings.move_to_end(key)
                with recorder.turn():
                    return _replayed(recording, flat)
        outputs = self.function(*flat)
        with self._turn:
            self._count(key)
        return outputs

    def _count(self, key: Hashable) -> None:
        """Note a call that was not replayed, and did not fail."""
        self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def _recorded(self, recorder: Recorder, key: Hashable, flat: Sequence[Any]) -> Recording | None:
        """Record a run where it is time to; None where it is not, or not possible."""
        if self.failure is not None or not _are_on(recorder.index(), flat):
            return None
        needed = _SECOND if len(self._recordings) < LIMIT else _PATIENT
        if self._seen.get(key, 0) + 1 < needed:
            return None
        if len(self._recordings) >= LIMIT:
            _, oldest = self._recordings.popitem(last=False)
            oldest.forget()
        try:
            recording = recorder.record(self.function, flat)
        except RuntimeError as error:
            self.failure = _reason(error)
            if self.required:
                raise LoweringError(
                    f"cuda_graphs=True is not possible: CUDA does not allow it here "
                    f"({self.failure}). Leave cuda_graphs out to run without a CUDA graph."
                ) from error
            log.warning("no CUDA graph, calls run as they are: %s", self.failure)
            return None
        self._seen.pop(key)
        self._recordings[key] = recording
        return recording


def _replayed(recording: Recording, flat: Sequence[Any]) -> tuple[Any, ...]:
    for own, given in zip(recording.inputs, flat, strict=True):
        if isinstance(own, torch.Tensor):
            own.copy_(given, non_blocking=True)
    recording.replay()
    return tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in recording.outputs)


def _key(value: Any) -> Hashable:
    """Return what calls of one recording have in common: layouts too, for kernels follow them."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.get_device()
    number: int = value
    return number


def _are_on(index: int, flat: Sequence[Any]) -> bool:
    """Whether all tensors are on one device; others get PyTorch's own error."""
    return all(one.get_device() == index for one in flat if isinstance(one, torch.Tensor))


def _reason(error: BaseException) -> str:
    """Return the first line of the error that came first: ending a recording raises another."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).partition("\n")[0]
