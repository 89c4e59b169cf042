"""The backend that measures the others on the model's own example inputs, and takes the fastest.

    1. lower the graph with every backend that is installed, as it is and in each lower precision
       that the user allows
    2. leave out those whose results are not the graph's, within verification's bound, or, in a
       lower precision, within the user's
    3. time the rest in turns, and remember the winner for this graph on this machine

What comes out is the winner's executable, and `CompiledModel.backend` is the winner.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt.backend import Backend, Executable
from fxopt.backends.eager.onednn import library
from fxopt.comparison.failure import reason_of
from fxopt.comparison.race import Latency, race
from fxopt.compiled import CompiledModel
from fxopt.contract import Pass
from fxopt.errors import (
    ArtefactError,
    LoweringError,
    OptionError,
    VerifyError,
    check_option,
    is_count,
)
from fxopt.graph_module import GraphModule
from fxopt.passes.lower_precision import HALF_DTYPES, LowerPrecision
from fxopt.pipeline import run_pass
from fxopt.registry import resolve_backend
from fxopt.text import graph_text
from fxopt.timings import Timings
from fxopt.verify import compare, runner

# in this order where two are as fast; others build for too long, or are there for old models only
_USUAL = ("eager", "onnx", "openvino")


_require = partial(check_option, "Auto")


@dataclass(frozen=True)
class Auto:
    """Use the backend that is the fastest for this model on this machine."""

    backends: tuple[str | Backend, ...] = _USUAL  # those that are installed take part
    threads: int | None = None  # for all of them that leave theirs open
    precisions: tuple[str, ...] = ()  # "bf16", "fp16": what else it may compute in
    max_error: float = 0.02  # of these: max |Δ| / max |reference| on the example inputs
    seconds: float = 10.0  # for the race
    remember: bool = True  # ask the same question only once on this machine

    name: ClassVar[str] = "auto"
    suffix: ClassVar[str] = ""  # the winner writes its own files
    quantization: ClassVar[None] = None  # each engine rounds elsewhere
    legalize: ClassVar[tuple[Pass, ...]] = ()
    on_request: ClassVar[bool] = True  # a comparison of all backends has the others already

    def __post_init__(self) -> None:
        _require(
            isinstance(self.backends, (list, tuple)) and bool(self.backends), "backends",
            self.backends, "a list of names, such as ['eager', 'onnx']",
        )  # fmt: skip
        _require(
            self.threads is None or is_count(self.threads), "threads", self.threads,
            "a whole number above 0, or None to leave it to each backend",
        )  # fmt: skip
        _require(
            isinstance(self.precisions, (list, tuple))
            and all(one in tuple(HALF_DTYPES) for one in self.precisions),
            "precisions", self.precisions, f"a list of some of {', '.join(map(repr, HALF_DTYPES))}",
        )  # fmt: skip
        _require(_is_positive(self.max_error), "max_error", self.max_error, "a number above 0")
        _require(type(self.remember) is bool, "remember", self.remember, "True or False")
        _require(_is_positive(self.seconds), "seconds", self.seconds, "a number above 0")

    def missing(self) -> str | None:
        """Return None: PyTorch is always there."""
        return None

    def lower(self, graph: GraphModule) -> Executable:
        """Return the fastest executable; its `lowered_by` is the backend that made it.

        In a lower precision its `lowered_from` is the graph in that. Raises LoweringError where no
        backend can do it, with the reason of each.
        """
        contest = _Contest(graph, [], self)
        for backend in self._candidates():
            missing = backend.missing()
            if missing is None:
                precisions = (None, *dict.fromkeys(self.precisions))
                contest.ways += [_Way(backend, one) for one in precisions]
            elif backend.name not in _USUAL:  # those are taken where there are any
                contest.failures.append((backend.name, missing))
        return contest.winner()

    def that_write(self, path: Path) -> Auto:
        """Return the same choice among those backends alone whose files have this suffix.

        Without a suffix all remain. Raises OptionError where none writes such files.
        """
        if not path.suffix:
            return self
        writers = tuple(one for one in self._candidates() if one.suffix == path.suffix)
        if not writers:
            known = ", ".join(sorted({one.suffix for one in self._candidates()}))
            raise OptionError(
                f"None of the backends that 'auto' tries writes '{path.suffix}' files. Use one of "
                f"{known}, which leaves it no choice, or a name without a suffix."
            )
        return replace(self, backends=writers)

    def load(self, path: Path) -> tuple[Executable, str]:
        """Raise ArtefactError: files are the winners'."""
        raise ArtefactError(f"'{path}' is no file of a backend. fxopt.load knows them by suffix.")

    def _candidates(self) -> Iterator[Backend]:
        for one in self.backends:
            backend: Backend = resolve_backend(one)
            if isinstance(backend, Auto):
                raise OptionError("'auto' cannot be one of the backends that 'auto' tries.")
            if self.threads is not None and getattr(backend, "threads", self.threads) is None:
                backend = replace(backend, threads=self.threads)  # type: ignore[type-var]
            yield backend


@dataclass(frozen=True)
class _Way:
    """A backend, and what it is to compute in: None for the graph as it is."""

    backend: Backend
    precision: str | None

    @property
    def name(self) -> str:
        """The backend's name, with the precision if that is another one."""
        words = [self.backend.name] + ([f"in {self.precision}"] if self.precision else [])
        return " ".join(words)


@dataclass(frozen=True)
class _Entrant:
    """A way whose results are right, and how long its calls took."""

    way: _Way
    executable: Executable
    latency: Latency


@dataclass
class _Contest:
    """One graph, the ways that take part, and what is known of each."""

    graph: GraphModule
    ways: list[_Way]
    options: Auto
    failures: list[tuple[str, str]] = field(default_factory=list)  # ways' names, and why
    # by precision; what moves the outputs too far has an error instead
    _lowered_to: dict[str, GraphModule | Exception] = field(default_factory=dict)
    _moved: dict[str, str] = field(default_factory=dict)  # by precision: how far, in words

    def winner(self) -> Executable:
        """Return the executable of the fastest, or of the one that is known to be."""
        timings = Timings.here(self.options.threads or torch.get_num_threads())
        question = self._question()
        known = timings.known(question) if self.options.remember else None
        if known is not None:
            for way in self.ways:
                executable = self._lowered(way) if repr(way) == known else None
                if executable is not None:
                    note = f"auto: {way.name} was the fastest when this was last measured."
                    return self._signed(executable, way, [note])
        left = [way for way in self.ways if repr(way) != known]  # that one has just failed
        right = [(way, e) for way in left if (e := self._lowered(way)) is not None]
        entrants = self._race(right)
        if not entrants:
            reasons = "".join(f"\n  {name}: {why}" for name, why in self.failures)
            raise LoweringError(f"No backend can run this model:{reasons}")
        best = min(entrants, key=lambda one: one.latency.median)
        if self.options.remember:
            timings.remember(question, repr(best.way))
        executable = best.executable
        if self.graph.info.mutated:  # the race has changed its state
            executable = self._lower(best.way)
        notes = self._notes(entrants, best)
        if timings.note is not None:
            notes.append(f"auto: {timings.note}.")
        return self._signed(executable, best.way, notes)

    def _lowered(self, way: _Way) -> Executable | None:
        """Return a way's executable where it computes what the graph does, else None."""
        try:
            executable = self._lower(way)
            verdict = compare(
                way.name, self._pure(way, executable), runner(self.graph), self.graph,
                [self.graph.info.example_inputs], self.options.max_error if way.precision else None,
            )  # fmt: skip
        except Exception as error:  # whatever an engine raises
            self.failures.append((way.name, reason_of(error)))
            return None
        if not verdict.passed:
            wrong = f"it is wrong by {verdict.error:.3g}, and the bound is {verdict.bound:.3g}"
            self.failures.append((way.name, wrong))
            return None
        return executable

    def _lower(self, way: _Way) -> Executable:
        """Lower a copy of the graph, in the way's precision, after the backend's own passes."""
        graph = self.graph
        if way.precision is not None:
            graph = self._in_precision(way.precision)
        return CompiledModel.lower(graph, way.backend).executable

    def _in_precision(self, precision: str) -> GraphModule:
        """Return the graph in a lower precision, where that stays within the bound."""
        if precision not in self._lowered_to:
            graph = self.graph.copy()
            lower = LowerPrecision(precision, max_error=self.options.max_error)
            try:
                result = run_pass(lower, graph)
            except VerifyError as error:
                self._lowered_to[precision] = error
            else:
                nothing = LoweringError(f"it has nothing to compute in {precision}")
                self._lowered_to[precision] = graph if result.rewrites else nothing
                self._moved[precision] = str(result.details)
        found = self._lowered_to[precision]
        if isinstance(found, Exception):
            raise found
        return found

    def _pure(self, way: _Way, executable: Executable) -> Callable[..., Any]:
        """Return what runs flat inputs and leaves the executable's state alone."""

        def run(flat: Any) -> Any:
            one = self._lower(way) if self.graph.info.mutated else executable
            return one.run(*flat)

        return run

    def _race(self, right: list[tuple[_Way, Executable]]) -> list[_Entrant]:
        """Time those that are right by turns; return those that ran."""
        names = [f"{index} {way.name}" for index, (way, _) in enumerate(right)]
        calls: dict[str, Callable[[], object]] = {
            name: partial(executable.run, *self._inputs())  # its own: a model may write to them
            for name, (_, executable) in zip(names, right, strict=True)
        }
        outcome = race(calls, seconds=self.options.seconds, least=3)
        entrants = []
        for name, (way, executable) in zip(names, right, strict=True):
            if name in outcome.latencies:
                entrants.append(_Entrant(way, executable, outcome.latencies[name]))
            else:
                self.failures.append((way.name, outcome.failures[name]))
        return entrants

    def _inputs(self) -> list[Any]:
        """Return copies of the example inputs."""
        given = self.graph.info.example_inputs
        return [value.clone() if isinstance(value, torch.Tensor) else value for value in given]

    def _notes(self, entrants: list[_Entrant], best: _Entrant) -> list[str]:
        """Return what the report says: every latency, and why others have none."""
        order = sorted(entrants, key=lambda one: one.latency.median)
        times = ", ".join(f"{one.way.name} {one.latency.median:.2f} ms" for one in order)
        return [f"auto: {best.way.name} is the fastest: {times}."] + [
            f"auto: {name} took no part: {why.rstrip('.')}." for name, why in self.failures
        ]

    def _signed(self, executable: Executable, way: _Way, notes: list[str]) -> Executable:
        """Return the executable, knowing who made it of what, and how it was chosen."""
        executable.notes = (*notes, *executable.notes)
        executable.lowered_by = way.backend  # type: ignore[attr-defined]
        if way.precision is not None:
            executable.notes += (f"auto: {self._moved[way.precision]}",)
            lowered = self._in_precision(way.precision)
            executable.lowered_from = lowered  # type: ignore[attr-defined]
        return executable

    def _question(self) -> str:
        """Return what the answer depends on, the graph by its text: its weights do not matter."""
        shapes = [
            (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
            for value in self.graph.info.example_inputs
        ]
        text = hashlib.sha256(graph_text(self.graph).encode()).hexdigest()
        engines = [_version(way.backend.name) for way in self.ways]
        return f"auto {self.ways!r} {self.options.max_error} {engines} {shapes} {text}"


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _version(name: str) -> str:
    """Return the version of a backend's engine, where that is a package of its own."""
    if name == "eager":
        api = library()
        return "" if api is None else api.version
    package = {"onnx": "onnxruntime"}.get(name, name)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
