"""fxopt.compare: candidates side by side, in speed, size, memory and what they compute."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.backend import Backend
from fxopt.comparison.agreement import Agreement, Logits, agree, first_outputs
from fxopt.comparison.arguments import CallForm, examples_of, inputs_text
from fxopt.comparison.candidate import Candidate, CompiledCandidate, ModelCandidate
from fxopt.comparison.failure import reason_of
from fxopt.comparison.lineup import (
    ITSELF,
    Entry,
    Plan,
    as_list,
    backends_of,
    compiled_name,
    line_up,
    variants_of,
)
from fxopt.comparison.memory import peak_memory
from fxopt.comparison.race import race
from fxopt.comparison.result import Comparison, Row
from fxopt.comparison.throughput import threads_text, throughputs
from fxopt.comparison.untouched import untouched
from fxopt.compile import PRECISIONS, Settings
from fxopt.contract import Pass
from fxopt.devices import waiter
from fxopt.errors import FxoptError, OptionError, check_choice
from fxopt.inputs import Inputs


def compare(
    model: Any,
    example_inputs: Any = None,
    *,
    backends: Sequence[str | Backend] | None = None,
    precision: Sequence[str | None] = (None,),
    passes: Sequence[str | Pass] | None = None,
    dynamic_shapes: Any = None,
    data: Iterable[Any] | None = None,
    logits: Logits | None = None,
    batches: Sequence[int] = (),
    threads: Sequence[int] = (),
    rounds: int | None = None,
    memory: bool = True,
    verify: Any = "final",
    tolerance: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Measure a model in PyTorch beside what it compiles to, or several models beside the first.

    `model`: one model, or a dict of names to models (variants): `nn.Module`, `GraphModule`,
    `ExportedProgram` or `CompiledModel`. The first row, the baseline, is the (first) model itself.
    Each variant is then compiled for every backend of `backends` (by default all that are installed
    for one model, none for several) in every dtype of `precision` (None is the model's own). A
    candidate that cannot be built is a row that says why.

    Latency comes from interleaved rounds (`rounds`; by default as many as fit into some seconds);
    every candidate uses torch's number of threads. `batches` and `threads` add a table of
    throughput: the first dimension is the batch, and each size is compiled for, unless
    `dynamic_shapes` makes one artefact take all. `data` yields the inputs of one call, or pairs of
    those and labels, one at a time: top-1 agreement with the baseline, and accuracy. `logits` takes
    an output to the class scores, classes last; by default the first floating-point output.
    `memory=False` leaves out peak memory, which starts a process per row.

    See `fxopt.compile` for the other arguments. The model, its state, torch's threads and random
    numbers stay as they are. Raises OptionError, and CaptureError for the baseline.
    """
    say = progress or (lambda text: None)
    checked = Settings.of(passes, verify=verify, tolerance=tolerance)
    variants = variants_of(model, dynamic_shapes)
    plan = Plan(
        backends_of(backends, variants),
        _precisions(precision),
        {"passes": list(checked.passes), "verify": verify, "tolerance": tolerance},
        torch.get_num_threads(),
    )
    batches, threads = _positive("batches", batches), _positive("threads", threads)
    if rounds is not None:
        _positive("rounds", [rounds])
    inputs, form = variants[0].example(example_inputs)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fxopt-compare-")))
        stack.enter_context(_random_numbers_kept())
        entries = line_up(variants, inputs, plan, folder, say)
        for entry in entries:
            if isinstance(entry.candidate, ModelCandidate):
                stack.enter_context(untouched(entry.candidate.model, entry.candidate.written))
        found = _compare_outputs(entries, inputs)
        if data is not None:
            say("data")
            _compare_classes(entries, found, data, form, logits)
        _measure_latency(entries, inputs, rounds, say)
        for entry in entries:
            if entry.candidate is not None:
                _fill(entry.row, entry.candidate, found[entry.row.name])
                _measure_sizes(entry, inputs, plan.threads, memory, folder, say)
        rates = []
        if batches or threads:
            rates = throughputs(
                _running(entries), inputs, batches, threads, _waiter(inputs), say
            )
    first = found[entries[0].row.name]
    return Comparison(
        model_name=_model_name(entries[0], variants[0].name),
        inputs=inputs_text(inputs),
        threads=plan.threads,
        rows=[entry.row for entry in entries],
        throughput=rates,
        decisions=first.decisions,
        labels=first.labels,
        notes=_notes(entries, found, inputs, plan.threads),
        machine=_machine(),
    )


# -- the steps -------------------------------------------------------------------------------------


def _running(entries: Sequence[Entry]) -> dict[str, Candidate]:
    return {e.row.name: e.candidate for e in entries if e.candidate is not None}


def _compare_outputs(entries: Sequence[Entry], inputs: Inputs) -> dict[str, Agreement]:
    """Run everybody once; take out who fails. Raises FxoptError where the baseline does."""
    try:
        found, failures = first_outputs(_running(entries), inputs)
    except FxoptError:
        raise
    except Exception as error:
        raise FxoptError(
            f"The baseline '{entries[0].row.name}' does not run on the example inputs, "
            f"{inputs_text(inputs)}: {reason_of(error)}"
        ) from error
    for entry in entries:
        if entry.row.name in failures:
            entry.fail(failures[entry.row.name])
    return found


def _compare_classes(
    entries: Sequence[Entry],
    found: dict[str, Agreement],
    data: Iterable[Any],
    form: CallForm,
    logits: Logits | None,
) -> None:
    if not isinstance(data, Iterable):
        raise OptionError(
            f"data= is a {type(data).__name__}, and must be something to iterate over: a list, a "
            "DataLoader or a generator."
        )
    failures = agree(_running(entries), found, data, form, logits)
    for entry in entries:
        if entry.row.name in failures:
            entry.row.notes.append(f"no agreement: {failures[entry.row.name]}")
    if not found[entries[0].row.name].decisions:
        raise OptionError("data= yields nothing: a generator may have been used up before.")


def _measure_latency(
    entries: Sequence[Entry], inputs: Inputs, rounds: int | None, say: Callable[[str], None]
) -> None:
    """Race everybody on the example inputs; take out who fails."""
    say("latency")
    calls = {name: one.call(inputs) for name, one in _running(entries).items()}
    outcome = race(calls, rounds=rounds, synchronize=_waiter(inputs))
    baseline = entries[0].row.name
    if baseline in outcome.failures:
        raise FxoptError(
            f"The baseline '{baseline}' fails when it runs again: {outcome.failures[baseline]}"
        )
    for entry in entries:
        if entry.row.name in outcome.failures:
            entry.fail(outcome.failures[entry.row.name])
        entry.row.latency = outcome.latencies.get(entry.row.name)


def _fill(row: Row, candidate: Candidate, agreement: Agreement) -> None:
    counts = candidate.counts
    if counts is not None:
        row.macs, row.parameters, row.nodes = counts.macs, counts.parameters, counts.nodes
    row.compile_seconds = candidate.compile_seconds
    row.max_error, row.relative_error = agreement.max_error, agreement.relative_error
    row.agreement, row.accuracy = agreement.agreement, agreement.accuracy
    if agreement.other_integers:
        row.notes.append("integer outputs differ")


def _measure_sizes(
    entry: Entry, inputs: Inputs, threads: int, memory: bool, folder: Path,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Measure the file, and the memory; where that cannot be done, a note says why."""
    row, candidate = entry.row, entry.candidate
    assert candidate is not None
    with tempfile.TemporaryDirectory(dir=folder) as place:
        try:
            artefact = candidate.save(Path(place))
        except Exception as error:  # a full disk, a backend's own
            row.notes.append(f"no file, and no memory: {reason_of(error)}")
            return
        row.file_bytes = artefact.bytes
        if not memory:
            return
        say(f"memory: {row.name}")
        try:
            row.peak_bytes = peak_memory(artefact, candidate.arguments(inputs), threads)
        except Exception as error:  # as above
            row.notes.append(f"no memory: {reason_of(error)}")


# -- arguments -------------------------------------------------------------------------------------


def _precisions(precision: Any) -> tuple[str | None, ...]:
    given = as_list("precision", precision)
    for one in given:
        if one is not None:
            check_choice("precision", one, PRECISIONS)
    if not given:
        raise OptionError("precision= is empty; [None] is the model's own.")
    return tuple(given)


def _positive(name: str, values: Any) -> list[int]:
    given = as_list(name, values)
    for one in given:
        if type(one) is not int or one < 1:
            raise OptionError(f"{name} must be positive integers, not {one!r}.")
    return given


# -- around it -------------------------------------------------------------------------------------


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _waiter(inputs: Inputs) -> Callable[[], None]:
    return waiter(pytree.tree_leaves((inputs.args, inputs.kwargs)))


def _model_name(first: Entry, variant: str) -> str:
    if variant != ITSELF:
        return variant
    if isinstance(first.candidate, CompiledCandidate):
        return compiled_name(first.candidate.compiled)
    assert isinstance(first.candidate, ModelCandidate)
    return type(first.candidate.model).__name__


def _notes(
    entries: Sequence[Entry], found: dict[str, Agreement], inputs: Inputs, threads: int
) -> list[str]:
    """Say what the numbers of the rows do not have in common."""
    notes = []
    if found[entries[0].row.name].all_zero and len(entries) > 1:
        notes.append("All outputs of the baseline are zero here, so the errors say nothing.")
    for entry in entries:
        if not isinstance(entry.candidate, CompiledCandidate):
            continue
        own = getattr(entry.candidate.compiled.backend, "threads", threads)
        if own != threads:
            count = threads_text(own) if own is not None else "a number of threads of its own"
            notes.append(f"{entry.row.name} uses {count}, torch uses {threads}.")
    graph = getattr(entries[0].candidate, "graph", None)
    if graph is not None:
        counted = inputs_text(examples_of(graph.info.signature, graph.info.example_inputs))
        if counted != inputs_text(inputs):
            notes.append(f"MACs are counted for {counted}: sizes that vary have an example.")
    return notes


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
