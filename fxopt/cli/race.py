"""The compiled model beside the model itself, for `fxopt compile --benchmark`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.comparison.candidate import Candidate, CompiledCandidate, ModelCandidate
from fxopt.comparison.lineup import Variant
from fxopt.comparison.race import Ratio, race
from fxopt.comparison.untouched import untouched
from fxopt.compile import lower
from fxopt.compiled import CompiledModel
from fxopt.errors import FxoptError
from fxopt.inputs import Inputs
from fxopt.serving.benchmark import percentile


@dataclass(frozen=True)
class Speed:
    """Latencies of the compiled model and of the model itself, in milliseconds.

    Medians, but for the one that 99 calls of 100 stay below.
    """

    backend: str
    compiled_ms: float
    compiled_p99_ms: float
    eager_ms: float
    speedup: float  # the median over interleaved rounds
    rounds: int
    threads: int

    def __str__(self) -> str:
        return (
            f"speed: {self.compiled_ms:.2f} ms on {self.backend} (p99 {self.compiled_p99_ms:.2f}), "
            f"{self.eager_ms:.2f} ms for the model itself in PyTorch: {self.speedup:.2f} times as "
            f"fast (medians of {self.rounds} interleaved rounds, {self.threads} threads)"
        )


def speed_of(model: Any, inputs: Inputs | None, compiled: CompiledModel) -> Speed:
    """Measure both by turns; the model and what it was compiled to stay as they are.

    Raises FxoptError where one of them fails.
    """
    variant = Variant("model", model)
    given, _ = variant.example(inputs)
    with ExitStack() as stack:
        itself: Candidate
        if variant.module is not None:
            itself = ModelCandidate(variant.module, compiled.graph)
            stack.enter_context(untouched(itself.model, itself.written))
        else:
            itself = CompiledCandidate(lower(variant.graph(given)))
        candidates = {"itself": itself, "compiled": CompiledCandidate.of(compiled, Path())}
        outcome = race({name: one.call(given) for name, one in candidates.items()}, seconds=10.0)
    for name, reason in outcome.failures.items():
        raise FxoptError(f"The benchmark failed, {name}: {reason}")
    ours, theirs = outcome.latencies["compiled"], outcome.latencies["itself"]
    ratio = Ratio.of(ours, theirs)
    return Speed(
        compiled.backend.name, ours.median, percentile(ours.calls, 99), theirs.median, ratio.median,
        min(len(ours.rounds), len(theirs.rounds)), torch.get_num_threads(),
    )  # fmt: skip
