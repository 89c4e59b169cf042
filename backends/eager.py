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


class EagerExecutable:
    """A graph with constants of its own, run under no_grad."""

    notes: tuple[str, ...] = ()

    def __init__(self, graph: GraphModule) -> None:
        self.graph = copy.deepcopy(graph)

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs."""
        with torch.no_grad():
            return self.graph.run(*flat)

    def save(self, path: Path, manifest: str) -> None:
        """Write a `.fxopt` file: the graph itself, which loading lowers again."""
        write_artefact(path, self.graph, manifest)


@dataclass(frozen=True)
class Eager:
    """Run in PyTorch."""

    name: ClassVar[str] = "eager"
    suffix: ClassVar[str] = ".fxopt"
    legalize: ClassVar[tuple[Pass, ...]] = ()

    def missing(self) -> str | None:
        """PyTorch is always there."""
        return None

    def lower(self, graph: GraphModule) -> EagerExecutable:
        """Keep the graph as it is."""
        return EagerExecutable(graph)

    def load(self, path: Path) -> tuple[EagerExecutable, str]:
        """Read a `.fxopt` file; see `fxopt.artefact` for what is checked."""
        graph, manifest = read_artefact(path)
        return EagerExecutable(graph), manifest
