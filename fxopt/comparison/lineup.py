"""Who takes part: the variants that the user gave, each as it is and on each backend."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fxopt.backend import Backend
from fxopt.capture import bind_inputs, capture
from fxopt.comparison.arguments import CallForm, examples_of, fits, in_dtype, inputs_text
from fxopt.comparison.candidate import Candidate, CompiledCandidate, ModelCandidate, with_threads
from fxopt.comparison.failure import reason_of
from fxopt.comparison.result import Row
from fxopt.compile import compile, lower
from fxopt.compiled import CompiledModel, DeferredModel
from fxopt.errors import FxoptError, OptionError
from fxopt.graph_module import GraphModule
from fxopt.inputs import Inputs, as_inputs, forward_signature
from fxopt.registry import classes, resolve_backend
from fxopt.report import spec_of

log = logging.getLogger("fxopt")
ITSELF = "model"  # the name of a single model's own row


@dataclass(frozen=True)
class Plan:
    """What each variant is compiled for, and how."""

    backends: tuple[Backend, ...]
    precisions: tuple[str | None, ...]
    options: Mapping[str, Any]  # of fxopt.compile: passes, verify, tolerance
    threads: int


@dataclass
class Variant:
    """One of the models that the user wants compared."""

    name: str
    given: Any  # a module, a graph, an exported program or a compiled model
    dynamic_shapes: Any = None
    dtype: torch.dtype | None = None  # of its weights, where that is not the baseline's
    _graphs: dict[str, GraphModule] = field(default_factory=dict)

    @property
    def source(self) -> Any:
        """What is captured and compiled; None for what was compiled already."""
        if isinstance(self.given, CompiledModel):
            return None
        return getattr(self.given, "_orig_mod", self.given)  # what torch.compile wraps

    @property
    def module(self) -> torch.nn.Module | None:
        """The user's module that is run as it is; None for graphs and compiled models."""
        is_module = isinstance(self.given, torch.nn.Module)
        return self.given if is_module and not isinstance(self.given, GraphModule) else None

    def graph(self, inputs: Inputs) -> GraphModule:
        """Return the captured graph that takes these inputs.

        Raises CaptureError where there is none, ShapeError where a captured graph is given and does
        not take them.
        """
        inputs = in_dtype(inputs, self.dtype)
        for known in self._graphs.values():
            if known.info.signature is not None and fits(inputs, known.info.signature):
                return known
        shapes = self.dynamic_shapes if self.module is not None else None
        if len(self._graphs) > 1:  # the first one is for the example inputs
            self._graphs.popitem()
        key = inputs_text(inputs)
        self._graphs[key] = capture(self.source, inputs, dynamic_shapes=shapes)
        return self._graphs[key]

    def example(self, example_inputs: Any) -> tuple[Inputs, CallForm]:
        """Return the inputs to compare on, and the form of a call.

        Raises CaptureError where they do not fit, or none are known; OptionError for a loaded model
        without any.
        """
        if self.module is not None:
            inputs = bind_inputs(self.source, example_inputs)
            return inputs, CallForm.of(forward_signature(self.source), inputs)
        graph = self.given.graph if isinstance(self.given, CompiledModel) else capture(self.given)
        signature = self.given.signature if graph is None else graph.info.signature
        assert signature is not None
        if example_inputs is not None:
            inputs = as_inputs(example_inputs)
        elif graph is not None:
            inputs = examples_of(signature, graph.info.example_inputs)
        else:
            raise OptionError(f"'{self.name}' holds no example inputs; pass example_inputs=.")
        return inputs, CallForm.of(signature.parameters, inputs)


def variants_of(model: Any, dynamic_shapes: Any) -> list[Variant]:
    """Return the models to compare by their names: one, a list, or a dict of names.

    Raises OptionError for what is no model.
    """
    if isinstance(model, Mapping):
        named = dict(model)
    elif isinstance(model, (list, tuple)):
        named = dict(zip(numbered(list(map(_kind, model))), model, strict=True))
    else:
        named = {ITSELF: model}
    if not named:
        raise OptionError("There is nothing to compare: give a model, or a dict of models.")
    variants = [Variant(str(n), _model(n, one), dynamic_shapes) for n, one in named.items()]
    usual = _dtype(variants[0])
    for variant in variants:
        variant.dtype = _dtype(variant) if _dtype(variant) != usual else None
    if dynamic_shapes is not None and not any(variant.module is not None for variant in variants):
        raise OptionError(
            "dynamic_shapes= is for models that compare() captures; give it when you capture or "
            "compile these."
        )
    return variants


def _model(name: Any, given: Any) -> Any:
    """Return a variant in one of the forms that are compared."""
    if isinstance(given, DeferredModel):
        return CompiledModel(
            given.executable, given.signature, given.backend, given.graph, given.story,
            given.lower_seconds,
        )  # fmt: skip
    if isinstance(given, (torch.nn.Module, ExportedProgram, CompiledModel)):
        return given
    hint = " Give an instance." if isinstance(given, type) else ""
    raise OptionError(
        f"'{name}' is a {type(given).__name__}. What can be compared: an nn.Module, a GraphModule, "
        f"an ExportedProgram and a CompiledModel.{hint}"
    )


def compiled_name(compiled: CompiledModel) -> str:
    """Return the name of the model that was compiled; `loaded model` where a file lost it."""
    if compiled.story is not None:
        return compiled.story.model_name
    return compiled.graph.info.model_name if compiled.graph is not None else "loaded model"


def _kind(given: Any) -> str:
    return compiled_name(given) if isinstance(given, CompiledModel) else type(given).__name__


def _dtype(variant: Variant) -> torch.dtype | None:
    """Return the dtype of a module's first floating-point parameter."""
    parameters = variant.module.parameters() if variant.module is not None else ()
    return next((p.dtype for p in parameters if p.is_floating_point()), None)


def numbered(names: Sequence[str]) -> list[str]:
    """Return the names, those that occur twice with a number behind."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} {seen[name]}" if seen[name] > 1 else name)
    return found


def backends_of(backends: Any, variants: Sequence[Variant]) -> tuple[Backend, ...]:
    """Return the backends to compile for: those asked for.

    By default every one that is installed and does not wait to be asked for (`on_request`), for a
    single model, and none where several are given.
    Raises OptionError for one that there is not.
    """
    sources = [variant for variant in variants if variant.source is not None]
    if backends is None:
        if len(variants) > 1 or not sources:
            return ()
        known = sorted(classes("backends").items())
        usual = [name for name, cls in known if not getattr(cls, "on_request", False)]
        made = [resolve_backend(name) for name in usual]
        return tuple(one for one in made if one.missing() is None)
    chosen = tuple(resolve_backend(one) for one in as_list("backends", backends))
    if chosen and not sources:
        raise OptionError(
            "backends= has nothing to compile: all that was given is compiled already. Leave it "
            "out, or give the models."
        )
    return chosen


def as_list(name: str, value: Any) -> list[Any]:
    """Return a list argument; raise OptionError for a single string or number."""
    if isinstance(value, (list, tuple)):
        return list(value)
    raise OptionError(f"{name}= takes a list; write {name}=[{value!r}].")


# -- building them ---------------------------------------------------------------------------------


@dataclass
class Entry:
    """One row, and what it is measured on; None where that could not be built."""

    row: Row
    candidate: Candidate | None = None

    def fail(self, reason: str) -> None:
        """Take the candidate out of the comparison."""
        self.row.failure, self.candidate = reason, None


def line_up(
    variants: Sequence[Variant],
    inputs: Inputs,
    plan: Plan,
    folder: Path,
    progress: Callable[[str], None],
) -> list[Entry]:
    """Build every candidate, the baseline first; `folder` takes copies of loaded models.

    What cannot be built has the reason in its row. Raises OptionError where two would have one
    name, CaptureError where the only model cannot be captured.
    """
    alone = len(variants) == 1
    entries: list[Entry] = []
    for variant, backend, precision in _parts(variants, plan):
        parts = [] if alone and backend is not None else [variant.name]
        parts += [spec_of(backend)] if backend is not None else []
        parts += [precision] if precision is not None else []
        row = Row(" ".join(parts), variant.name, None, precision)
        if any(entry.row.name == row.name for entry in entries):
            raise OptionError(f"Two candidates are called '{row.name}'. Name each one once.")
        entries.append(Entry(row))
    for backend in plan.backends:
        _wake(backend)
    for entry, (variant, backend, precision) in zip(entries, _parts(variants, plan), strict=True):
        progress(f"build {entry.row.name}")
        if backend is None:
            _as_it_is(entry, variant, inputs, folder, alone=alone)
        else:
            _compiled(entry, variant, inputs, plan, backend, precision)
    return entries


def _wake(backend: Backend) -> None:
    """Let a backend import its engine, so that this is in nobody's build time."""
    try:
        compile(torch.nn.Linear(2, 2), torch.zeros(1, 2), backend=backend, verify="off")
    except Exception as error:  # the candidate itself will fail with better words
        log.debug("the backend %s does not compile a linear layer: %s", backend.name, error)


def _parts(
    variants: Sequence[Variant], plan: Plan
) -> Iterator[tuple[Variant, Backend | None, str | None]]:
    """Yield each variant as it is, then on each backend in each precision."""
    for variant in variants:
        yield variant, None, None
        if variant.source is not None:
            yield from ((variant, b, p) for b in plan.backends for p in plan.precisions)


def _as_it_is(
    entry: Entry, variant: Variant, inputs: Inputs, folder: Path, *, alone: bool
) -> None:
    """Take a variant as it is; `folder` takes a copy where it has no graph."""
    if isinstance(variant.given, CompiledModel):
        entry.row.backend = variant.given.backend.name
        place = Path(tempfile.mkdtemp(dir=folder))
        entry.candidate = CompiledCandidate.of(variant.given, place)
        return
    graph = None
    try:
        graph = variant.graph(inputs)
    except FxoptError as error:
        if alone or variant.module is None:
            raise
        entry.row.notes.append(f"not captured, so nothing is counted: {reason_of(error)}")
    if variant.module is None:
        assert graph is not None
        entry.row.backend = "eager"
        entry.candidate = CompiledCandidate(lower(graph, backend="eager"))
        return
    entry.candidate = ModelCandidate(variant.module, graph, variant.dtype)


def _compiled(
    entry: Entry,
    variant: Variant,
    inputs: Inputs,
    plan: Plan,
    backend: Backend,
    precision: str | None,
) -> None:
    entry.row.backend = spec_of(backend)
    set_already = getattr(backend, "threads", None) is not None
    chosen = backend if set_already else with_threads(backend, plan.threads)

    def build(given: Inputs, **options: Any) -> CompiledModel:
        with torch.enable_grad():  # as the user would call it
            compiled: CompiledModel = compile(
                variant.graph(given), backend=chosen, precision=precision,
                **{**plan.options, **options},
            )  # fmt: skip
        return compiled

    try:
        entry.candidate = CompiledCandidate(
            build(inputs), again=lambda given: build(given, verify="off")
        )
    except OptionError:
        raise
    except Exception as error:  # whatever a backend's engine raises
        log.debug("%s cannot be built", entry.row.name, exc_info=True)
        entry.fail(reason_of(error))


