"""What each rule is worth: the latency of a network without it and with it, in one race."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from subjects import subject

import fxopt
from fxopt.comparison.race import Latency, Ratio, race
from fxopt.rules import disabled


def measure_rules(models: list[str], backends: list[str], rounds: int, threads: int) -> None:
    """Print, for each rule and pass that changed a network, the latency without and with it.

    The ratio is how many times as fast the network is with the rule, and the interval that holds
    its true median with 95 % confidence. A rule slows a network where the whole interval lies
    below 0.98.
    """
    print("| model | backend | rule | rewrites | without | with | ratio | |")
    print("|---|---|---|---|---|---|---|---|")
    slower = 0
    for model in models:
        for backend in backends:
            for name, rewrites, without, complete in _race(model, backend, rounds, threads):
                ratio = Ratio.of(complete, without)
                verdict = "faster" if ratio.is_faster else "slower" if ratio.is_slower else "="
                slower += ratio.is_slower
                print(
                    f"| {model} | {backend} | {name} | {rewrites} | {without.median:.2f} ms "
                    f"| {complete.median:.2f} ms | {ratio.median:.2f} "
                    f"({ratio.low:.2f} to {ratio.high:.2f}) | {verdict} |",
                    flush=True,
                )
    print(f"\n{slower} slower beyond noise")


def _race(
    name: str, backend: str, rounds: int, threads: int
) -> Iterator[tuple[str, int, Latency, Latency]]:
    model, x = subject(name)
    options = {"threads": threads} if backend == "onnx" else {}
    passes = list(fxopt.default_passes())

    def compiled(left_out: str | None = None) -> Any:
        kept = [one for one in passes if one.name != left_out]
        without = disabled(left_out) if left_out else contextlib.nullcontext()
        with without:
            return fxopt.compile(model, x, backend=backend, passes=kept, verify="off", **options)

    complete = compiled()
    fired = _fired(complete)
    runners = {"": complete, **{subject: compiled(subject) for subject in fired}}
    with torch.no_grad():
        outcome = race({key: lambda one=one: one(x) for key, one in runners.items()}, rounds=rounds)
    for subject_name, rewrites in fired.items():
        yield subject_name, rewrites, outcome.latencies[subject_name], outcome.latencies[""]


def _fired(compiled: Any) -> dict[str, int]:
    """Return the rules that rewrote something, and the passes without rules that did."""
    found: dict[str, int] = {}
    for step in compiled.story.steps:
        if step.rules:
            counts = {rule: count.rewritten for rule, count in step.rules.items()}
        else:
            counts = {step.name: step.rewrites}
        for name, count in counts.items():
            if count:
                found[name] = found.get(name, 0) + count
    return found
