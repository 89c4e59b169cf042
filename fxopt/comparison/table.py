"""A comparison as tables, for terminals and for notebooks."""

from __future__ import annotations

import html as markup
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.comparison.result import Comparison, Row
from fxopt.comparison.throughput import threads_text
from fxopt.text import quantity_text

NOTHING = "–"


@dataclass(frozen=True)
class Cells:
    """A table as text: its headings, and rows as long as those."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def main_cells(comparison: Comparison) -> Cells:
    """Return the rows of a comparison; columns that nobody has a value for are left out."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("", lambda row: row.name),
        ("ms", lambda row: milliseconds(row.latency.median) if row.latency else NOTHING),
        ("spread", lambda row: milliseconds(row.latency.spread) if row.latency else NOTHING),
        ("speed", lambda row: speed(comparison, row)),
        ("MACs", lambda row: _count(row.macs)),
        ("params", lambda row: _count(row.parameters)),
        ("nodes", lambda row: _integer(row.nodes)),
        ("build\ns", lambda row: _fixed(row.compile_seconds, 2)),
        ("file\nMB", lambda row: _megabytes(row.file_bytes)),
        ("RAM\nMB", lambda row: _megabytes(row.peak_bytes)),
        ("max\n|Δ|", lambda row: _error(comparison, row, row.max_error)),
        ("rel.\n|Δ|", lambda row: _error(comparison, row, row.relative_error)),
        ("top-1\nsame", lambda row: _agreement(comparison, row)),
        ("top-1\nright", lambda row: _percent(row.accuracy)),
    ]
    filled = [
        (heading, cells)
        for heading, cells in (
            (heading, [text(row) for row in comparison.rows]) for heading, text in columns
        )
        if any(cell != NOTHING for cell in cells)
    ]
    rows = zip(*(cells for _, cells in filled), strict=True)
    title = f"{comparison.model_name} on {comparison.inputs}, {threads_text(comparison.threads)}"
    return Cells(title, tuple(heading for heading, _ in filled), tuple(rows))


def throughput_cells(comparison: Comparison) -> Cells | None:
    """Return inputs per second: a row per candidate and threads, a column per batch size."""
    measured = comparison.throughput
    if not measured:
        return None
    batches = sorted({one.batch for one in measured})
    threads = sorted({one.threads for one in measured})
    found = {(one.name, one.threads, one.batch): one.per_second for one in measured}
    rows = [
        (name, str(count), *(_rate(found.get((name, count, batch))) for batch in batches))
        for count in threads
        for name in dict.fromkeys(one.name for one in measured)
    ]
    headings = ("", "threads", *(f"batch {batch}" for batch in batches))
    if len(threads) > 1:
        return Cells("inputs per second", headings, tuple(rows))
    title = f"inputs per second, {threads_text(threads[0])}"
    return Cells(title, ("", *headings[2:]), tuple((row[0], *row[2:]) for row in rows))


def lines_below(comparison: Comparison) -> list[str]:
    """Return what stands below the tables: how it was measured, what failed, what it means."""
    latency = comparison.baseline.latency
    lines = []
    if latency is not None:
        lines.append(
            f"ms: median of {_rounds(comparison)} interleaved rounds; spread: between the "
            "quartiles; ≈: not told apart from 1×"
        )
    if any(row.peak_bytes is not None for row in comparison.rows):
        lines.append(
            "build: capture, passes and lowering; RAM: by how much a fresh process grows, at most, "
            "that loads and runs it"
        )
    if comparison.decisions:
        labels = f", {comparison.labels:,} of them with a label" if comparison.labels else ""
        lines.append(f"top-1: on {comparison.decisions:,} decisions{labels}")
    lines += [f"{row.name}: not measured: {row.failure}" for row in comparison.rows if row.failure]
    lines += [f"{row.name}: {note}" for row in comparison.rows for note in row.notes]
    failed: dict[tuple[str, str], list[str]] = {}
    for one in comparison.throughput:
        if one.failure is not None:
            failed.setdefault((one.name, one.failure), []).append(str(one.batch))
    lines += [f"{n}: batch {', '.join(dict.fromkeys(b))}: {f}" for (n, f), b in failed.items()]
    return [*lines, *comparison.notes]


def _rounds(comparison: Comparison) -> str:
    """Return in how many rounds the candidates took part: `30`, or `7 to 30`."""
    counts = sorted({len(row.latency.rounds) for row in comparison.rows if row.latency})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


# -- for terminals ---------------------------------------------------------------------------------


def rich_parts(comparison: Comparison) -> Any:
    """Return everything as one renderable of rich."""
    from rich.console import Group
    from rich.text import Text

    main, rates = main_cells(comparison), throughput_cells(comparison)
    parts: list[Any] = [Text(main.title, style="bold"), _rich_table(main)]
    if rates is not None:
        parts += [Text(f"\n{rates.title}", style="bold"), _rich_table(rates)]
    parts += [Text("")]
    parts += [Text(line, style="dim") for line in lines_below(comparison)]
    remarks = comparison.remarks
    if remarks:
        parts.append(Text(""))
        parts += [Text(f"• {remark}") for remark in remarks]
    return Group(*parts)


def _rich_table(cells: Cells) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for place, heading in enumerate(cells.headings):
        if place == 0:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for row in cells.rows:
        table.add_row(*map(Text, row))  # a name is no markup
    return table


# -- for notebooks ---------------------------------------------------------------------------------


def html(comparison: Comparison) -> str:
    """Return everything as HTML without styles of its own."""
    parts = [_html_table(main_cells(comparison))]
    rates = throughput_cells(comparison)
    if rates is not None:
        parts.append(_html_table(rates))
    parts.append("<br>".join(markup.escape(line) for line in lines_below(comparison)))
    remarks = "".join(f"<li>{markup.escape(one)}</li>" for one in comparison.remarks)
    return "".join([*parts, f"<ul>{remarks}</ul>"])


def _html_table(cells: Cells) -> str:
    def line(kind: str, texts: Sequence[str]) -> str:
        escaped = [markup.escape(text).replace("\n", " ") for text in texts]
        return "<tr>" + "".join(f"<{kind}>{text}</{kind}>" for text in escaped) + "</tr>"

    rows = "".join(line("td", row) for row in cells.rows)
    caption = f"<caption>{markup.escape(cells.title)}</caption>"
    return f"<table>{caption}{line('th', cells.headings)}{rows}</table>"


# -- numbers ---------------------------------------------------------------------------------------


def speed(comparison: Comparison, row: Row) -> str:
    """Return a row's speed beside the baseline's: `1.94×`, `≈1.01×` where chance may explain it."""
    ratio = comparison.speedup(row)
    if ratio is None:
        return NOTHING
    if row is comparison.baseline:
        return "1×"
    certain = ratio.is_faster or ratio.is_slower
    return f"{'' if certain else '≈'}{ratio.median:.2f}×"


def _error(comparison: Comparison, row: Row, error: float | None) -> str:
    if error is None or row is comparison.baseline:
        return NOTHING
    return "0" if error == 0 else "∞" if math.isinf(error) else f"{error:.1e}"


def milliseconds(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _rate(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _count(value: int | None) -> str:
    return NOTHING if value is None else quantity_text(value)


def _integer(value: int | None) -> str:
    return f"{value:,}" if value is not None else NOTHING


def _fixed(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None else NOTHING


def _megabytes(value: int | None) -> str:
    """Return megabytes of 10⁶ bytes."""
    if value is None:
        return NOTHING
    if value >= 100e6:
        return f"{value / 1e6:,.0f}"
    return f"{value / 1e6:.1f}" if value >= 1e6 else f"{value / 1e6:.3f}"


def _agreement(comparison: Comparison, row: Row) -> str:
    return NOTHING if row is comparison.baseline else _percent(row.agreement)


def _percent(value: float | None) -> str:
    """Return a percentage; what is not all of it is never rounded up to that."""
    if value is None:
        return NOTHING
    text = f"{value * 100:.1f}%"
    return "99.9%" if text == "100.0%" and value < 1 else text.replace("100.0%", "100%")
