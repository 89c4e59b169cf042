"""The eager backend: the graph runs in PyTorch, operator by operator."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fxopt.artefact import read_artefact, write_artefact
from fxopt.contract import Pass
from fxopt.graph_module import GraphModule
from fxopt.passes.expand_attention import ExpandAttention
from fxopt.passes.merge_parallel_layers import MergeParallelLayers


class EagerExecutable:
    """A graph with constants of its own, run under no_grad."""

    notes: tuple[str, ...] = ()

    def __init__(self, graph: GraphModule, *, own: bool = False) -> None:
        self.graph = graph if own else copy.deepcopy(graph)
        self._memory = {_memory(tensor) for tensor in self.graph.constants().values()}

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs; a constant among the outputs is a copy, which may be written to."""
        with torch.no_grad():
            outputs = self.graph.run(*flat)
            return tuple(out.clone() if _memory(out) in self._memory else out for out in outputs)

    def save(self, path: Path, manifest: str) -> None:
        """Write a `.fxopt` file: the graph itself, which loading lowers again."""
        write_artefact(path, self.graph, manifest)


@dataclass(frozen=True)
class Eager:
    """Run in PyTorch."""

    name: ClassVar[str] = "eager"
    suffix: ClassVar[str] = ".fxopt"
    legalize: ClassVar[tuple[Pass, ...]] = (
        # attention that PyTorch has no fused kernel for is slower as one operator than as products
        ExpandAttention(keep_fast=True),
        MergeParallelLayers(),  # starts fewer kernels; a split copies nothing
    )

    def missing(self) -> str | None:
        """PyTorch is always there."""
        return None

    def lower(self, graph: GraphModule) -> EagerExecutable:
        """Keep the graph as it is."""
        return EagerExecutable(graph)

    def load(self, path: Path) -> tuple[EagerExecutable, str]:
        """Read a `.fxopt` file; see `fxopt.artefact` for what is checked."""
        graph, manifest = read_artefact(path)
        return EagerExecutable(graph, own=True), manifest


def _memory(value: Any) -> int:
    """Return the address of a tensor's memory; 0 for what has none."""
    is_dense = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return value.untyped_storage().data_ptr() if is_dense else 0
