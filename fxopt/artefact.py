"""fxopt's own artefact, `model.fxopt`."""

from __future__ import annotations

from pathlib import Path

from fxopt.graph_module import GraphModule


def write_artefact(path: Path, graph: GraphModule, manifest: str) -> None:
    raise NotImplementedError


def read_artefact(path: Path) -> tuple[GraphModule, str]:
    raise NotImplementedError


def graph_to_bytes(graph: GraphModule) -> bytes:
    raise NotImplementedError


def graph_from_bytes(content: bytes) -> GraphModule:
    raise NotImplementedError
