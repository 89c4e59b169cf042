"""What an artefact says about itself: versions, signature, passes; as JSON text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fxopt.backend import Backend
from fxopt.signature import Signature
from fxopt.story import Story


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read."""

    signature: Signature


def write_manifest(signature: Signature, backend: Backend, story: Story | None) -> str:
    """Return the manifest of a compiled model."""
    raise NotImplementedError


def read_manifest(text: str, source: Path) -> Manifest:
    """Read a manifest; raise ArtefactError where it is damaged or newer than this version."""
    raise NotImplementedError
