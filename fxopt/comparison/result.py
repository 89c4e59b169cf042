"""What a comparison found: rows of numbers, and what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fxopt.comparison.race import Latency, Ratio
from fxopt.text import plain_text


@dataclass
class Row:
    """One candidate. What is None was not measured: `failure` or a note says why."""

    name: str
    variant: str  # which of the models that were given
    backend: str | None = None  # None for a model that PyTorch runs as it is
    precision: str | None = None
    failure: str | None = None  # why there is nothing to measure
    latency: Latency | None = None
    macs: int | None = None
    parameters: int | None = None
    nodes: int | None = None
    compile_seconds: float | None = None  # capture, passes and lowering, without verification
    file_bytes: int | None = None
    peak_bytes: int | None = None  # of memory, in a fresh process
    max_error: float | None = None  # max |Δ| against the baseline
    relative_error: float | None = None  # max |Δ| / max |reference|
    agreement: float | None = None  # how often the top class is the baseline's, 0 to 1
    accuracy: float | None = None  # how often it is the label
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Throughput:
    """The inputs per second of one candidate, for one batch size and number of threads."""

    name: str
    batch: int
    threads: int
    latency: Latency | None = None
    failure: str | None = None

    @property
    def per_second(self) -> float | None:
        """Inputs per second; None where it could not run."""
        return self.batch / self.latency.median * 1e3 if self.latency is not None else None


@dataclass(frozen=True)
class Comparison:
    """Candidates beside a baseline, the first row. Print it, plot it, or take it as JSON."""

    model_name: str
    inputs: str  # shapes and dtypes of the example inputs
    threads: int
    rows: Sequence[Row]
    throughput: Sequence[Throughput] = ()
    decisions: int = 0  # how many classes were compared on the data
    labels: int = 0
    notes: Sequence[str] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def baseline(self) -> Row:
        """What all others are compared with."""
        return self.rows[0]

    def __getitem__(self, name: str) -> Row:
        """Return the row of a name; raise KeyError with the names that there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row '{name}'; there are {', '.join(row.name for row in self.rows)}")

    def speedup(self, row: Row, over: Row | None = None) -> Ratio | None:
        """Return how many times as fast a row is as another (the baseline unless it is given)."""
        other = over if over is not None else self.baseline
        if row.latency is None or other.latency is None:
            return None
        return Ratio.of(row.latency, other.latency)

    @property
    def remarks(self) -> list[str]:
        """What the numbers mean, a sentence each; above all where fewer MACs gained nothing."""
        from fxopt.comparison.remarks import remarks

        return remarks(self)

    # -- showing it ---------------------------------------------------------------------------

    def __str__(self) -> str:
        return plain_text(self)

    __repr__ = __str__

    def __rich__(self) -> Any:
        from fxopt.comparison.table import rich_parts

        return rich_parts(self)

    def _repr_html_(self) -> str:
        from fxopt.comparison.table import html

        return html(self)

    def plot(self, path: str | Path) -> None:
        """Draw latencies, and errors or throughput beside them, into a .svg, .png or .pdf file.

        Raises OptionError for another suffix, FxoptError where matplotlib is not installed.
        """
        from fxopt.comparison.plot import plot

        plot(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data; a number that is not finite is None."""
        return {
            "model": self.model_name,
            "inputs": self.inputs,
            "threads": self.threads,
            "baseline": self.baseline.name,
            "rows": [self._row_json(row) for row in self.rows],
            "throughput": [
                {
                    "name": one.name, "batch": one.batch, "threads": one.threads,
                    "per_second": one.per_second, "failure": one.failure,
                    "latency_ms": _latency_json(one.latency),
                }
                for one in self.throughput
            ],
            "decisions": self.decisions,
            "labels": self.labels,
            "remarks": self.remarks,
            "notes": list(self.notes),
            "machine": dict(self.machine),
        }  # fmt: skip

    def _row_json(self, row: Row) -> dict[str, Any]:
        ratio = self.speedup(row) if row is not self.baseline else None
        document = {key: _plain(value) for key, value in vars(row).items() if key != "latency"}
        document["latency_ms"] = _latency_json(row.latency)
        document["speedup"] = (
            {key: _plain(value) for key, value in vars(ratio).items()} if ratio else None
        )
        return document


def _latency_json(latency: Latency | None) -> dict[str, Any] | None:
    if latency is None:
        return None
    return {
        "median": latency.median,
        "quartiles": list(latency.quartiles),
        "calls": len(latency.calls),
        "rounds": latency.medians,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, list) else value
