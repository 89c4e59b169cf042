"""Chance: what any other importance has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fxopt.channels.groups import Family
from fxopt.graph_module import GraphModule
from fxopt.pruning.importance.normalization import Normalized


@dataclass(frozen=True)
class Random(Normalized):
    """Uniform random scores, the same for the same `seed` and the same name of a family."""

    normalize: str | None = field(default=None, kw_only=True)
    seed: int = 0

    name: ClassVar[str] = "random"

    def measure(self, graph: GraphModule, families: Sequence[Family]) -> list[torch.Tensor]:
        """Return uniform random numbers between 0 and 1."""
        return [self._draw(family) for family in families]

    def _draw(self, family: Family) -> torch.Tensor:
        text = f"{self.seed} {family.name}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(family.channels, generator=generator, dtype=torch.float64)
