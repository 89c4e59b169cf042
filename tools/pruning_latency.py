"""What pruning is worth in time: latencies beside multiplications; see tools/pruning_page.py.

Each network is pruned to the same multiplications with widths as they fall (round_to=1) and with
multiples of 8, and compiled. All of one backend then run in one race, in interleaved rounds, beside
the original compiled alike. Widths are what time depends on, so networks with random weights do.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from prune_accuracy import PRUNING
from subjects import subject

import fxopt
from fxopt.comparison.race import Latency, Ratio, race
from fxopt.cost import macs
from fxopt.errors import FxoptError, unknown_name
from fxopt.pruning.importance import Taylor

MODELS = ("cifar-resnet56", "cifar-vgg16", "resnet50", "mobilenet_v2", "vit_b_16")
FEWER = {"cifar-resnet56": (2.0, 2.13), "cifar-vgg16": (2.0, 4.0)}  # times; others: half the MACs
ROUND_TO = (1, 8)
CIFAR_BATCH = 8  # of one small image, calling would cost more than computing
SCORED = 1000  # clean images that the channels of the CIFAR networks are scored on


def latencies(models: list[str], backends: list[str], rounds: int, threads: int) -> str:
    """Print a row per network, share and rounding as they are measured; return the section."""
    rows = []
    for name in models or MODELS:
        for row in measured(name, backends, rounds, threads):
            print(row.cells(backends), flush=True)
            rows.append(row)
        gc.collect()
    return section(rows, backends, rounds)


# -- one network -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruned:
    """One pruned graph: what was asked for, and how many times fewer it has of what."""

    graph: fxopt.GraphModule
    asked: float
    round_to: int
    macs: float
    parameters: float

    @property
    def name(self) -> str:
        """The name that tells it from the others of its network."""
        return f"{self.asked:g}×, multiples of {self.round_to}"


@dataclass(frozen=True)
class Row:
    """One pruned network, and by backend the latency of the original and its own."""

    model: str
    shape: str
    pruned: Pruned
    times: dict[str, tuple[Latency, Latency]]

    def cells(self, backends: list[str]) -> str:
        """Return the row of the table."""
        one = self.pruned
        latencies = " | ".join(self._cell(backend) for backend in backends)
        return (
            f"| {self.model} | {self.shape} | {one.asked:g}× | {one.round_to} | {one.macs:.2f}× "
            f"| {one.parameters:.2f}× | {latencies} |"
        )

    def _cell(self, backend: str) -> str:
        before, after = self.times[backend]
        ratio = Ratio.of(after, before)
        return (
            f"{ratio.median:.2f}× ({ratio.low:.2f} to {ratio.high:.2f}), "
            f"{before.median:.2f} → {after.median:.2f} ms"
        )


def measured(name: str, backends: list[str], rounds: int, threads: int) -> Iterator[Row]:
    """Yield the rows of a network."""
    graph, x, options = network(name)
    several = [
        pruned_to(graph, fewer, round_to, options)
        for fewer in FEWER.get(name, (2.0,))
        for round_to in ROUND_TO
    ]
    found = {backend: _raced(graph, several, x, backend, rounds, threads) for backend in backends}
    for one in several:
        times = {
            backend: (latencies[""], latencies[one.name]) for backend, latencies in found.items()
        }
        yield Row(name, "×".join(map(str, x.shape)), one, times)


def network(name: str) -> tuple[fxopt.GraphModule, torch.Tensor, dict[str, Any]]:
    """Return the captured network, an input, and the options that it is pruned with.

    The trained networks for CIFAR-10 lose channels where a first-order Taylor score over the whole
    network says so, as in tools/prune_accuracy.py; those with random weights the same share of
    every layer.
    """
    kind, _, short = name.partition("-")
    if kind != "cifar":
        model, x = subject(name)
        return fxopt.capture(model, x), x, {}
    if short not in cifar.NETWORKS:
        raise unknown_name("network", name, [f"cifar-{one}" for one in cifar.NETWORKS])
    torch.manual_seed(0)
    model, x = cifar.NETWORKS[short](), torch.rand(CIFAR_BATCH, 3, 32, 32)
    images = cifar.clean_set().first(SCORED)
    taylor = Taylor(data=list(images.batches(CIFAR_BATCH)), loss=F.cross_entropy)
    options = {"scope": "global", "importance": taylor, **PRUNING[short]}
    return fxopt.capture(model, x), x, options


def pruned_to(
    graph: fxopt.GraphModule, fewer: float, round_to: int, options: dict[str, Any]
) -> Pruned:
    """Prune a graph to so many times fewer multiplications."""
    options = {**options, "of": "macs", "round_to": round_to}
    small = fxopt.prune(graph, ratio=1 - 1 / fewer, **options)
    return Pruned(
        small, fewer, round_to, _macs(graph) / _macs(small), _parameters(graph) / _parameters(small)
    )


def _macs(graph: fxopt.GraphModule) -> int:
    return int(sum(macs(node) for node in graph.graph.nodes if node.op == "call_function"))


def _parameters(graph: fxopt.GraphModule) -> int:
    return sum(one.numel() for one in graph.parameters())


def _raced(
    graph: fxopt.GraphModule, several: list[Pruned], x: torch.Tensor, backend: str, rounds: int,
    threads: int,
) -> dict[str, Latency]:  # fmt: skip
    """Return the latencies of the original, named "", and of what was pruned."""
    graphs = {"": graph, **{one.name: one.graph for one in several}}
    options = {"threads": threads} if backend == "onnx" else {}
    compiled = {
        name: fxopt.lower(fxopt.optimize(one), backend=backend, **options)
        for name, one in graphs.items()
    }
    calls = {name: lambda one=one: one(x) for name, one in compiled.items()}
    with torch.no_grad():
        outcome = race(calls, rounds=rounds)
    for name, reason in outcome.failures.items():
        raise FxoptError(f"{name or 'the original'} does not run on {backend}: {reason}")
    return outcome.latencies


# -- the section -----------------------------------------------------------------------------------


def section(rows: list[Row], backends: list[str], rounds: int) -> str:
    """Return the table with what was measured, as a section of Markdown."""
    columns = ["model", "input", "asked", "round_to", "MACs", "parameters", *backends]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    table = "\n".join([head, *(row.cells(backends) for row in rows)])
    return f"""## Time

Original and pruned are compiled alike and run in {rounds} interleaved rounds, all of one network
and backend in one race.

- *asked*, *MACs* and *parameters*: how many times fewer there are. Widths are whole numbers, and
  with `round_to=8` multiples of 8, so that what there is may differ from what was asked for.
- *{"*, *".join(backends)}*: how many times as fast, the median of the rounds and the interval that
  holds the true median with 95 %; then both latencies. With a figure as large as that of the MACs,
  time falls as the work does.
- Networks named `cifar-…` are trained, and lose the channels of the least first-order Taylor score,
  ResNet-56 wherever they are, VGG-16 the same share of each layer; no block goes as a whole here.
  The others have random weights, and every layer loses the same share.

{table}
"""
