"""Models to serve, and an executable that waits to be let go."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import nn

import fxopt
from fxopt import CompiledModel

PATIENCE = 120.0  # seconds after which a test is stuck


class Words(nn.Module):
    """Rows of word numbers, and a vector for each row; a number of 50 or more is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.mix = nn.Linear(8, 4)
        self.eval()

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        words = self.table(ids).mean(1)
        return {"scores": self.mix(words + x), "words": words}


class Counts(nn.Module):
    """Adds up what it is given: each call sees the calls before."""

    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total += x.sum()
        return self.total + x * 0


def words(backend: str = "eager") -> CompiledModel:
    """Return `Words` for any number of rows and words, lowered and never run yet."""
    return fxopt.lower(_words_graph(), backend=backend)


@functools.cache
def _words_graph() -> fxopt.GraphModule:
    example = (torch.randint(0, 50, (3, 5)), torch.randn(3, 8))
    shapes = {"ids": {0: "batch", 1: "words"}, "x": {0: "batch"}}
    return fxopt.optimize(Words(), example, dynamic_shapes=shapes)


def rows(layer: nn.Module, *shape: int, backend: str = "eager") -> CompiledModel:
    """Compile a model for any number of rows of a shape."""
    return fxopt.compile(
        layer.eval(), torch.randn(3, *shape), backend=backend, dynamic_shapes={0: "batch"}
    )


class Held:
    """Stands before the executable of a model; each run waits until it is let go."""

    def __init__(self, compiled: CompiledModel) -> None:
        self.compiled = compiled
        self._inner = compiled.executable
        self.notes = ()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.batches: list[int] = []  # the rows of each run
        compiled.executable = compiled._free = self  # as if it had run before

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run once the gate is open."""
        self.batches.append(flat[0].shape[0])
        self.entered.release()
        assert self.gate.wait(PATIENCE)
        return self._inner.run(*flat)

    def wait_until_one_runs(self) -> None:
        """Return once a worker is inside."""
        assert self.entered.acquire(timeout=PATIENCE)

    def save(self, path: Any, manifest: str) -> None:
        """Never asked for here."""
        raise NotImplementedError
