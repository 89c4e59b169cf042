"""Inputs per second for several batch sizes and numbers of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from fxopt.comparison.arguments import batch_of, resized
from fxopt.comparison.candidate import Candidate
from fxopt.comparison.failure import reason_of
from fxopt.comparison.race import race
from fxopt.comparison.result import Throughput
from fxopt.inputs import Inputs

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 7, 6.0  # for each batch size and number of threads


def throughputs(
    candidates: Mapping[str, Candidate],
    inputs: Inputs,
    batches: Sequence[int],
    threads: Sequence[int],
    synchronize: Callable[[], object],
    progress: Callable[[str], None],
) -> list[Throughput]:
    """Race all candidates for every batch size and number of threads.

    Without one of both, it is the example's batch size, or torch's own setting.
    """
    found = []
    for batch in batches or [batch_of(inputs)]:
        given = resized(inputs, batch)
        for count in threads or [torch.get_num_threads()]:
            progress(f"throughput: batch {batch}, {threads_text(count)}")
            with torch_threads(count):
                found += _measure(candidates, given, batch, count, synchronize)
    return found


def _measure(
    candidates: Mapping[str, Candidate],
    inputs: Inputs,
    batch: int,
    threads: int,
    synchronize: Callable[[], object],
) -> list[Throughput]:
    calls, failures = {}, {}
    for name, candidate in candidates.items():
        try:
            calls[name] = candidate.call(inputs, threads)
        except Exception as error:  # whatever a backend's engine raises
            failures[name] = reason_of(error)
    outcome = race(
        calls, least=LEAST_ROUNDS, most=MOST_ROUNDS, seconds=SECONDS, synchronize=synchronize
    )
    failures |= outcome.failures
    return [
        Throughput(name, batch, threads, outcome.latencies.get(name), failures.get(name))
        for name in candidates
    ]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_text(count: int) -> str:
    """Return `1 thread` or `2 threads`."""
    return f"{count} thread{'s' if count != 1 else ''}"
