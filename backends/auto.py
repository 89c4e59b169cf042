"""The backend that measures the others on the model's own example inputs, and takes the fastest.

    1. lower the graph with every backend that is installed
    2. leave out those whose results are not the graph's, within verification's bound
    3. time the rest in turns, and remember the winner for this graph on this machine

What comes out is the winner's executable, and `CompiledModel.backend` is the winner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt.backend import Backend, Executable
from fxopt.comparison.race import Latency, race
from fxopt.contract import Pass
from fxopt.errors import ArtefactError, LoweringError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.pipeline import run_pass
from fxopt.registry import classes, resolve_backend
from fxopt.text import graph_text
from fxopt.timings import Timings
from fxopt.verify import compare, runner

# in this order where two are as fast; others build for too long, or are there for old models only
_USUAL = ("eager", "onnx", "openvino")


@dataclass(frozen=True)
class Auto:
    """Use the backend that is the fastest for this model on this machine."""

    backends: tuple[str | Backend, ...] = _USUAL  # those that are installed take part
    threads: int | None = None  # for all of them; as torch.set_num_threads says, unless given
    seconds: float = 10.0  # for the race
    remember: bool = True  # ask the same question only once on this machine

    name: ClassVar[str] = "auto"
    suffix: ClassVar[str] = ".auto"  # of no file: the winner writes its own
    legalize: ClassVar[tuple[Pass, ...]] = ()
    on_request: ClassVar[bool] = True  # a comparison of all backends has the others already

    def __post_init__(self) -> None:
        if isinstance(self.backends, str) or not self.backends:
            raise OptionError(
                f"backends must be a list of names, such as ['eager', 'onnx'], got "
                f"{self.backends!r}."
            )
        if self.threads is not None and (type(self.threads) is not int or self.threads < 1):
            raise OptionError(f"threads must be a whole number above 0, got {self.threads!r}.")
        if not self.seconds > 0:
            raise OptionError(f"seconds must be above 0, got {self.seconds!r}.")

    def missing(self) -> str | None:
        """Return None: PyTorch is always there."""
        return None

    def lower(self, graph: GraphModule) -> Executable:
        """Return the fastest executable; its `lowered_by` is the backend that made it.

        Raises LoweringError where no backend can do it, with the reason of each.
        """
        contest = _Contest(graph, tuple(self._candidates()), self)
        return contest.winner()

    def load(self, path: Path) -> tuple[Executable, str]:
        """Raise ArtefactError: files are the winners'."""
        raise ArtefactError(f"'{path}' is no file of a backend. fxopt.load knows them by suffix.")

    def _candidates(self) -> Iterator[Backend]:
        for one in self.backends:
            options: dict[str, Any] = {}
            if isinstance(one, str):
                if one == self.name:
                    raise OptionError("'auto' cannot be one of the backends that 'auto' tries.")
                known = classes("backends").get(one)
                fields = getattr(known, "__dataclass_fields__", {})
                if self.threads is not None and "threads" in fields:
                    options["threads"] = self.threads
            backend: Backend = resolve_backend(one, options)
            if backend.missing() is None:
                yield backend


@dataclass(frozen=True)
class _Entrant:
    """A backend whose results are right, and how long its calls took."""

    backend: Backend
    executable: Executable
    latency: Latency


@dataclass
class _Contest:
    """One graph, the backends that take part, and what is known of each."""

    graph: GraphModule
    backends: tuple[Backend, ...]
    options: Auto
    failures: list[tuple[str, str]] = field(default_factory=list)  # backends' names, and why

    def winner(self) -> Executable:
        """Return the executable of the fastest, or of the one that is known to be."""
        timings = Timings(self.options.threads or torch.get_num_threads())
        question = self._question()
        known = timings.known(question) if self.options.remember else None
        if known is not None:
            for backend in self.backends:
                if repr(backend) == known:
                    note = f"auto: {backend.name} was the fastest when this was last measured."
                    return _signed(_lower(self.graph, backend), backend, [note])
        right = [(b, e) for b in self.backends if (e := self._lowered(b)) is not None]
        entrants = self._race(right)
        if not entrants:
            reasons = "".join(f"\n  {name}: {why}" for name, why in self.failures)
            raise LoweringError(f"No backend can run this model:{reasons}")
        best = min(entrants, key=lambda one: one.latency.median)
        timings.remember(question, repr(best.backend))
        executable = best.executable
        if self.graph.info.mutated:  # the race has changed its state
            executable = _lower(self.graph, best.backend)
        return _signed(executable, best.backend, self._notes(entrants, best))

    def _lowered(self, backend: Backend) -> Executable | None:
        """Return a backend's executable where it computes what the graph does, else None."""
        try:
            executable = _lower(self.graph, backend)
        except LoweringError as error:
            self.failures.append((backend.name, str(error)))
            return None
        verdict = compare(
            backend.name, _pure(self.graph, backend, executable), runner(self.graph), self.graph,
            [self.graph.info.example_inputs], None,
        )  # fmt: skip
        if not verdict.passed:
            wrong = f"it is wrong by {verdict.error:.3g}, and the bound is {verdict.bound:.3g}"
            self.failures.append((backend.name, wrong))
            return None
        return executable

    def _race(self, right: list[tuple[Backend, Executable]]) -> list[_Entrant]:
        """Time those that are right by turns; return those that ran."""
        inputs = self.graph.info.example_inputs
        names = [f"{index} {backend.name}" for index, (backend, _) in enumerate(right)]
        calls: dict[str, Callable[[], object]] = {
            name: partial(executable.run, *inputs)
            for name, (_, executable) in zip(names, right, strict=True)
        }
        outcome = race(calls, seconds=self.options.seconds, least=3)
        entrants = []
        for name, (backend, executable) in zip(names, right, strict=True):
            if name in outcome.latencies:
                entrants.append(_Entrant(backend, executable, outcome.latencies[name]))
            else:
                self.failures.append((backend.name, outcome.failures[name]))
        return entrants

    def _notes(self, entrants: list[_Entrant], best: _Entrant) -> list[str]:
        """Return what the report says: every latency, and why others have none."""
        order = sorted(entrants, key=lambda one: one.latency.median)
        times = ", ".join(f"{one.backend.name} {one.latency.median:.2f} ms" for one in order)
        return [f"auto: {best.backend.name} is the fastest: {times}."] + [
            f"auto: {name} took no part: {why}." for name, why in self.failures
        ]

    def _question(self) -> str:
        """Return what the answer depends on, the graph by its text: its weights do not matter."""
        shapes = [
            (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
            for value in self.graph.info.example_inputs
        ]
        text = hashlib.sha256(graph_text(self.graph).encode()).hexdigest()
        return f"auto {self.backends!r} {shapes} {text}"


def _lower(graph: GraphModule, backend: Backend) -> Executable:
    """Lower a copy of a graph, after the backend's own passes."""
    private = graph.copy()
    for one in backend.legalize:
        run_pass(one, private)
    return backend.lower(private)


def _pure(graph: GraphModule, backend: Backend, executable: Executable) -> Callable[..., Any]:
    """Return what runs flat inputs and leaves the executable's state alone."""

    def run(flat: Any) -> Any:
        one = _lower(graph, backend) if graph.info.mutated else executable
        return one.run(*flat)

    return run


def _signed(executable: Executable, backend: Backend, notes: list[str]) -> Executable:
    """Return the executable, knowing who made it and how it was chosen."""
    executable.notes = (*notes, *executable.notes)
    executable.lowered_by = backend  # type: ignore[attr-defined]
    return executable
