"""A sensitivity analysis as a table, for terminals and for Markdown."""

from __future__ import annotations

from typing import Any

from fxopt.sensitivity.result import Sensitivity

_WORST = "red"


def headings(found: Sensitivity) -> list[str]:
    """Return the names of the columns."""
    return ["pruned", "channels", *(f"−{ratio:.4g}" for ratio in found.measured)]


def cells(found: Sensitivity) -> list[list[str]]:
    """Return a row of text per family: its name, its channels, and what is left per ratio."""
    return [
        [
            row.name + (f" +{len(row.layers) - 1}" if len(row.layers) > 1 else ""),
            f"{row.channels:,}",
            *(f"{value + 0.0:.4g}" for value in row.values),  # so that −0 is 0
        ]
        for row in found.rows
    ]


def title(found: Sensitivity) -> str:
    """Return what the table shows."""
    unpruned = f"{found.model_name}: {found.baseline + 0.0:.4g} unpruned"
    return f"{unpruned}; one layer at a time, by {found.importance}"


def rich_table(found: Sensitivity) -> Any:
    """Return the table under its title; the family that costs most at a ratio is marked."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for place, heading in enumerate(headings(found)):
        justify: Any = "right" if place else "left"
        table.add_column(heading, justify=justify, no_wrap=place > 0, overflow="fold")
    worst = [min(values) for values in zip(*(row.values for row in found.rows), strict=True)]
    for row, texts in zip(found.rows, cells(found), strict=True):
        marks = [
            _WORST if value == least and value < found.baseline else ""
            for value, least in zip(row.values, worst, strict=True)
        ]
        table.add_row(*(Text(t, style=s) for t, s in zip(texts, ["", "", *marks], strict=True)))
    return Group(Text(title(found), style="bold"), table)


def markdown(found: Sensitivity) -> str:
    """Return the table as Markdown."""
    columns = headings(found)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells(found)]
    rows = (" | ".join(text.replace("|", "\\|") for text in line) for line in lines)
    return "\n".join([title(found), "", *(f"| {row} |" for row in rows), ""])
