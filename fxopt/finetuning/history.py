"""What a run of training did: one row per epoch, and the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from rich.table import Table

from fxopt.text import plain_text

Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Epoch:
    """One row: `loss` is the mean over the epoch, `lr` the rate after it, `score` by `evaluate`.

    Row 0 is the model as it was given. The minutes are of training, since the start.
    """

    epoch: int
    steps: int
    loss: float | None
    score: float | None
    lr: float
    minutes: float
    cpu_minutes: float


@dataclass(frozen=True)
class FineTuned(Generic[Model]):
    """What `finetune` returns. Print it for the table.

    `model` is in evaluation mode; with `evaluate` it has the weights of the `best` row.
    """

    model: Model
    history: tuple[Epoch, ...]
    best: Epoch
    stopped: str  # "budget" or "patience"

    @property
    def score(self) -> float | None:
        """What `evaluate` said about `model`; None without it."""
        return self.best.score

    def table(self) -> Table:
        """Return the history as a table of rich."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("epoch", "steps", "loss", "score", "lr", "minutes", "CPU minutes", ""):
            table.add_column(name, justify="left" if name == "" else "right")
        for row in self.history:
            mark = "best" if row.score is not None and row is self.best else ""
            table.add_row(
                str(row.epoch), str(row.steps), number(row.loss), number(row.score),
                f"{row.lr:.2g}", f"{row.minutes:.2f}", f"{row.cpu_minutes:.2f}", mark,
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        return plain_text(self.table(), width=100)

    __repr__ = __str__


def number(value: float | None) -> str:
    """Return a loss or a score for people."""
    return "" if value is None else f"{value:.4g}"
