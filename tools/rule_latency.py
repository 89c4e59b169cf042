"""What each rule is worth: the latency of a network without it and with it, in one race."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from subjects import subject

import fxopt
from fxopt.comparison.race import Ratio, race
from fxopt.contract import Pass
from fxopt.errors import LoweringError
from fxopt.pipeline import run_pass
from fxopt.registry import resolve_backend
from fxopt.rules import disabled

HEAD = "| model | backend | rule | rewrites | without | with | ratio | |\n" + "|---" * 8 + "|"


def measure_rules(models: list[str], backends: list[str], rounds: int, threads: int) -> None:
    """Print, for each rule and pass that changed a network, the latency without and with it.

    The backend's own passes are among them. The ratio is how many times as fast the network is with
    the rule, and the interval that holds its true median with 95 % confidence. A rule slows a
    network where the whole interval lies below 0.98; what seems slower is raced a second time,
    alone. A rule is left out of the table where the network is the same without it, because others
    do its work.
    """
    print(HEAD)
    slower = 0
    for model in models:
        for backend in backends:
            for row in _measured(_Subject(model, backend, threads), rounds):
                slower += row.ratio.is_slower
                print(row, flush=True)
            gc.collect()
    print(f"\n{slower} slower beyond noise")


@dataclass(frozen=True)
class _Row:
    model: str
    backend: str
    rule: str
    rewrites: int
    without: float  # milliseconds
    complete: float
    ratio: Ratio

    def __str__(self) -> str:
        ratio = self.ratio
        verdict = "faster" if ratio.is_faster else "slower" if ratio.is_slower else "="
        return (
            f"| {self.model} | {self.backend} | {self.rule} | {self.rewrites} "
            f"| {self.without:.2f} ms | {self.complete:.2f} ms "
            f"| {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) | {verdict} |"
        )


def _measured(network: _Subject, rounds: int) -> Iterator[_Row]:
    complete, fired = network.compiled(), network.fired()
    whole = network.text(complete)
    others: dict[str, Any] = {}
    for name in fired:
        with contextlib.suppress(LoweringError):  # the backend cannot do without it
            others[name] = network.compiled(name)
    for name in [name for name, one in others.items() if network.text(one, name) == whole]:
        del others[name]
    for name, row in _raced(network, complete, others, fired, rounds).items():
        if row.ratio.is_slower:
            row = _raced(network, complete, {name: others[name]}, fired, 2 * rounds)[name]
        yield row


def _raced(
    network: _Subject, complete: Any, others: dict[str, Any], fired: dict[str, int], rounds: int
) -> dict[str, _Row]:
    calls = {
        name: lambda one=one: one(network.x) for name, one in {"": complete, **others}.items()
    }
    with torch.no_grad():
        latencies = race(calls, rounds=rounds).latencies
    with_it = latencies[""]
    return {
        name: _Row(
            network.model, network.backend, name, fired[name], latencies[name].median,
            with_it.median, Ratio.of(with_it, latencies[name]),
        )
        for name in others
    }  # fmt: skip


class _Subject:
    """A network, captured once, to be compiled without one rule or another."""

    def __init__(self, name: str, backend: str, threads: int) -> None:
        self.model, self.backend = name, backend
        model, self.x = subject(name)
        self._captured = fxopt.capture(model, self.x)
        options = {"threads": threads} if backend == "onnx" else {}
        self._backend = resolve_backend(backend, options)

    def compiled(self, without: str | None = None) -> Any:
        """Compile without a rule or pass, of the default list or of the backend."""
        graph = self._optimized(without)
        backend: Any = _Without(self._backend, without)
        return fxopt.lower(graph, backend=backend)

    def _optimized(self, without: str | None) -> fxopt.GraphModule:
        passes = [one for one in fxopt.default_passes() if one.name != without]
        with disabled(without) if without else contextlib.nullcontext():
            return fxopt.optimize(self._captured, passes=passes, verify="off")

    def fired(self) -> dict[str, int]:
        """Return the rules that rewrote something, and the passes without rules that did."""
        graph = self._optimized(None)
        found: dict[str, int] = {}
        for step in graph.story.steps:
            _count(found, step.name, step)
        private = graph.copy()
        for one in self._backend.legalize:
            _count(found, one.name, run_pass(one, private))
        return {name: count for name, count in found.items() if count}

    def text(self, compiled: Any, without: str | None = None) -> str:
        """Return the graph that is lowered, as text without names that differ by chance."""
        private = compiled.graph.copy()
        for one in _Without(self._backend, without).legalize:
            run_pass(one, private)
        place = {node: str(index) for index, node in enumerate(private.graph.nodes)}
        return "\n".join(
            f"{node.target if node.op == 'call_function' else node.op} "
            f"{torch.fx.node.map_arg((node.args, node.kwargs), place.__getitem__)} "
            f"{tuple(node.meta['val'].shape) if hasattr(node.meta.get('val'), 'shape') else ''}"
            for node in private.graph.nodes
        )


def _count(found: dict[str, int], name: str, outcome: Any) -> None:
    counts = {rule: count.rewritten for rule, count in (outcome.rules or {}).items()}
    for key, count in (counts or {name: outcome.rewrites}).items():
        found[key] = found.get(key, 0) + count


class _Without:
    """A backend without one of its own passes."""

    def __init__(self, backend: Any, left_out: str | None) -> None:
        self._backend = backend
        self.legalize: tuple[Pass, ...] = tuple(
            one for one in backend.legalize if one.name != left_out
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)
