"""The eager backend: the graph runs in PyTorch, as a flat program of the fastest kernels it has."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt.artefact import read_artefact, write_artefact
from fxopt.backends.eager.cpu import cpu_passes
from fxopt.backends.eager.cpu.lower_quantized_layers import note_on_bytes
from fxopt.backends.eager.onednn import operators
from fxopt.backends.eager.program import program_of
from fxopt.contract import Pass
from fxopt.errors import check_option, is_count
from fxopt.graph_module import GraphModule
from fxopt.passes.expand_attention import ExpandAttention
from fxopt.passes.merge_parallel_layers import MergeParallelLayers
from fxopt.pipeline import legalize
from fxopt.timings import Timings, threads

_require = partial(check_option, "Eager")


class EagerExecutable:
    """A graph with constants of its own, and the program that computes it, without gradients.

    `graph` is what is saved: it runs on any machine, and is lowered again where it is loaded.
    """

    def __init__(
        self,
        graph: GraphModule,
        *,
        own: bool = False,
        threads: int | None = None,
        measure: bool = True,
        cuda_graphs: bool | None = None,
    ) -> None:
        self.graph = graph if own else copy.deepcopy(graph)
        self.threads = threads
        self.measure = measure
        self.cuda_graphs = cuda_graphs
        timings = Timings.here(threads or torch.get_num_threads()) if measure else None
        lowered = self.graph.copy()
        for name in self.graph.info.mutated:  # state: what the program writes is what is saved
            lowered.set_constant(name, self.graph.constant(name))
        legalize(lowered, cpu_passes(timings))
        on_cuda = cuda_graphs is True or _computes_on_cuda(lowered)
        if on_cuda:
            from fxopt.backends.eager.cuda import cuda_function, cuda_passes

            legalize(lowered, cuda_passes(timings))
        self.program = program_of(lowered)
        self.notes = _notes(timings) + note_on_bytes(graph, lowered)
        self._function = self.program.function
        self._reads_memory = any(
            target in operators.PREPARATIONS for target in self.program.operators.values()
        )
        if on_cuda:
            self._function, note = cuda_function(self._function, lowered, cuda_graphs)
            self.notes += (note,)

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs; a constant among the outputs is a copy, which may be written to.

        Inputs that are no plain tensors, and calls that are traced, go through the graph itself.
        """
        function = self._function
        if self._reads_memory and not operators.can_read(flat):
            function = self.graph.run
        with torch.no_grad():
            if self.threads is None and not torch.is_autocast_enabled("cpu"):
                return function(*flat)
            count = torch.get_num_threads() if self.threads is None else self.threads
            # dtypes are those of the graph, and what writes in place cannot change its own
            with threads(count), torch._C._DisableAutocast():
                return function(*flat)

    def __reduce__(self) -> Any:
        return _remade, (self.graph, self.threads, self.measure, self.cuda_graphs)

    def save(self, path: Path, manifest: str) -> None:
        """Write a `.fxopt` file: the graph itself, which loading lowers again."""
        write_artefact(path, self.graph, manifest)


@dataclass(frozen=True)
class Eager:
    """Run in PyTorch."""

    threads: int | None = None  # as torch.set_num_threads says, unless given
    measure: bool = True  # choose among kernels by timing them here; else by rule
    cuda_graphs: bool | None = None  # replay calls on CUDA; None: where that is right

    name: ClassVar[str] = "eager"
    suffix: ClassVar[str] = ".fxopt"
    legalize: ClassVar[tuple[Pass, ...]] = (
        # attention that PyTorch has no fused kernel for is slower as one operator than as products
        ExpandAttention(keep_fast=True),
        MergeParallelLayers(),  # starts fewer kernels; a split copies nothing
    )

    def __post_init__(self) -> None:
        _require(
            self.threads is None or is_count(self.threads), "threads", self.threads,
            "a whole number above 0, or None for PyTorch's number",
        )  # fmt: skip
        _require(type(self.measure) is bool, "measure", self.measure, "True or False")
        _require(
            self.cuda_graphs is None or type(self.cuda_graphs) is bool, "cuda_graphs",
            self.cuda_graphs, "True, False, or None for where they are possible",
        )  # fmt: skip

    def missing(self) -> str | None:
        """PyTorch is always there."""
        return None

    def lower(self, graph: GraphModule) -> EagerExecutable:
        """Choose the kernels of every node, and write the program."""
        return EagerExecutable(
            graph, threads=self.threads, measure=self.measure, cuda_graphs=self.cuda_graphs
        )

    def load(self, path: Path) -> tuple[EagerExecutable, str]:
        """Read a `.fxopt` file; see `fxopt.artefact` for what is checked."""
        graph, manifest = read_artefact(path)
        return _remade(graph, self.threads, self.measure, self.cuda_graphs), manifest


def _remade(
    graph: GraphModule, threads: int | None, measure: bool, cuda_graphs: bool | None
) -> EagerExecutable:
    """Make an executable from what a file, a pickle or a deepcopy holds."""
    return EagerExecutable(
        graph, own=True, threads=threads, measure=measure, cuda_graphs=cuda_graphs
    )


def _computes_on_cuda(graph: GraphModule) -> bool:
    """Whether any value lies on CUDA."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return any(isinstance(one, torch.Tensor) and one.device.type == "cuda" for one in values)


def _notes(timings: Timings | None) -> tuple[str, ...]:
    """Return what the report says about how kernels were chosen."""
    if timings is None:
        return ("eager: kernels were chosen by rule, not by timing them.",)
    found = [
        f"eager: {timings.asked} kernels chosen by timing, {timings.measured} of them now, "
        f"in {timings.seconds:.1f} s."
    ]
    if timings.note is not None:
        found.append(f"eager: {timings.note}.")
    return tuple(found) if timings.asked else ()
