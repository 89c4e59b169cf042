"""What a backend is: it lowers one flat graph to something that runs and can be saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch

from fxopt.contract import Pass
from fxopt.graph_module import GraphModule


@runtime_checkable
class Executable(Protocol):
    """A lowered graph. It owns its constants: nobody else's writes reach them.

    `state` says of one whose graph is not at hand what calls change: empty where nothing does.
    A backend that leaves the work to another one sets `lowered_by` of the executable to that, and
    `lowered_from` to the graph where that computes something else, within a bound of the user's.
    """

    notes: tuple[str, ...]  # what the report should say about this lowering, a sentence each

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs, in the order of the graph's placeholders."""
        ...

    def save(self, path: Path, manifest: str) -> None:
        """Write one artefact that holds `manifest`; atomic: the old file stays whole on failure."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    suffix: ClassVar[str]  # of its artefacts, with the dot

    @property
    def legalize(self) -> tuple[Pass, ...]:
        """This backend's own passes, run on a private copy after the user's."""
        ...

    def missing(self) -> str | None:
        """Return None where the engine is installed, else what to install, in words."""
        ...

    def lower(self, graph: GraphModule) -> Executable:
        """Lower a graph; raise LoweringError, naming the node, for what it cannot express."""
        ...

    def load(self, path: Path) -> tuple[Executable, str]:
        """Return what runs an artefact, and its manifest. Never runs code from the file."""
        ...
