"""How a run shows where it is: a bar in a terminal, else one line per epoch."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fxopt.finetuning.history import Epoch, number
from fxopt.finetuning.position import Budget, Position


class Display:
    """Writes to the terminal's error stream, so that output can be redirected."""

    def __init__(self, budget: Budget, *, shown: bool) -> None:
        self._budget = budget
        self._console = Console(stderr=True, quiet=not shown)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(), console=self._console, transient=True,
            disable=not (shown and self._console.is_terminal),
        )  # fmt: skip
        self._task = self._bar.add_task("fine-tuning", total=1.0, state="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, at: Position, loss: float) -> None:
        """Show a step."""
        text = f"{self._budget.text(at)}  loss {number(loss)}"
        self._bar.update(self._task, completed=self._budget.progress(at), state=text)

    def epoch(self, row: Epoch) -> None:
        """Write a line about an epoch."""
        parts = [f"epoch {row.epoch}", f"step {row.steps}"]
        parts += [] if row.loss is None else [f"loss {number(row.loss)}"]
        parts += [] if row.score is None else [f"score {number(row.score)}"]
        parts.append(f"{row.minutes:.1f} min")
        self._console.print("  ".join(parts), highlight=False)
