"""How graphs, reports and compiled models show themselves in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fxopt.graph_module import GraphModule
from fxopt.picture.palette import LINE
from fxopt.picture.render import LARGEST, has_dot, render
from fxopt.picture.subject import Subject

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel

_CELL = f"padding: 2px 10px; border-bottom: 1px solid {LINE}44; text-align: "


def graph_svg(graph: GraphModule) -> str | None:
    """Return a graph as SVG, modules collapsed; None where `dot` cannot draw it.

    So a notebook shows the text form instead where `dot` is missing or the graph is too large.
    """
    if not has_dot() or "fxopt" not in graph.meta:
        return None
    source, boxes = Subject.of(graph).draw("auto", None)
    if boxes > LARGEST:
        return None
    picture = render(source, "svg", boxes).decode()
    return picture[picture.index("<svg") :]


def compiled_html(compiled: CompiledModel) -> str:
    """Return a compiled model as HTML: its report, and the picture of its graph."""
    parts = [f"<div><b>{html.escape(repr(compiled))}</b></div>"]
    if compiled.story is not None:
        parts = [compiled.report._repr_html_()]
    picture = graph_svg(compiled.graph) if compiled.graph is not None else None
    if picture is not None:
        fitted = picture.replace("<svg ", '<svg style="max-width: 100%; height: auto" ', 1)
        parts.append(f"<details open><summary>graph</summary>{fitted}</details>")
    return f"<div>{''.join(parts)}</div>"


def table_html(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], lines: Iterable[str]
) -> str:
    """Return a table, and lines below it, as HTML; everything in it is escaped."""
    head = _row("th", headings)
    body = "".join(_row("td", row) for row in rows)
    below = "<br>".join(html.escape(line).replace("  ", "&#160; ") for line in lines)
    return (
        f'<table><caption style="text-align: left">{html.escape(title)}</caption>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table>"
        f'<div style="opacity: 0.75; font-size: 90%">{below}</div>'
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    """Return one row; words stand in its first and last column, numbers between."""
    ends = (0, len(cells) - 1)
    inside = "".join(
        f'<{tag} style="{_CELL}{"left" if index in ends else "right"}">{html.escape(cell)}</{tag}>'
        for index, cell in enumerate(cells)
    )
    return f"<tr>{inside}</tr>"
