"""What a sensitivity analysis found, and the ratios that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.errors import OptionError
from fxopt.text import plain_text


@dataclass(frozen=True)
class Row:
    """One family of channels: per ratio, how many channels went, and what that was worth."""

    name: str
    layers: tuple[str, ...]
    channels: int
    removed: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """What a model is worth with one family of channels pruned; the rows are in graph order.

    Print it, plot it, or take it as JSON or Markdown; `ratios` turns it into what to prune.
    """

    model_name: str
    importance: str
    baseline: float
    measured: tuple[float, ...]  # the ratios, smallest first
    rows: Sequence[Row]

    def __getitem__(self, name: str) -> Row:
        """Return the row of a family; raise KeyError with the names that there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row '{name}'; there are {', '.join(row.name for row in self.rows)}")

    def ratios(self, drop: float = 0.01, *, relative: bool = False) -> dict[str, float]:
        """Return, per family, the largest ratio that costs at most `drop`, 0 where none does.

        It, and all measured ratios below it, must be worth at least the baseline − drop (with
        `relative`: the baseline − drop · |baseline|). The result goes into
        `PruneChannels(overrides=…)`. Families that are pruned together cost more than each alone:
        `drop` is a scale, not a promise.

        Raises OptionError where `drop` is no number from 0 on.
        """
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not drop >= 0:
            raise OptionError(f"drop must be a number, at least 0, not {drop!r}.")
        least = self.baseline - drop * (abs(self.baseline) if relative else 1.0)
        return {row.name: self._largest(row, least) for row in self.rows}

    def _largest(self, row: Row, least: float) -> float:
        found = 0.0
        for ratio, value in zip(self.measured, row.values, strict=True):
            if not value >= least:
                break
            found = ratio
        return found

    # -- showing it ---------------------------------------------------------------------------

    def __str__(self) -> str:
        return plain_text(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from fxopt.sensitivity.table import rich_table

        return rich_table(self)

    def to_markdown(self) -> str:
        """Return the table as Markdown."""
        from fxopt.sensitivity.table import markdown

        return markdown(self)

    def plot(self, path: str | Path) -> None:
        """Draw what each family is worth per ratio into a .svg, .png or .pdf file.

        Raises OptionError for another suffix, FxoptError where matplotlib is not installed.
        """
        from fxopt.sensitivity.plot import plot

        plot(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data; a number that is not finite is None."""
        return {
            "model": self.model_name,
            "importance": self.importance,
            "baseline": _plain(self.baseline),
            "ratios": list(self.measured),
            "rows": [
                {
                    "name": row.name,
                    "layers": list(row.layers),
                    "channels": row.channels,
                    "removed": list(row.removed),
                    "values": [_plain(value) for value in row.values],
                }
                for row in self.rows
            ],
        }


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
