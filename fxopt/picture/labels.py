"""What stands in a box and beside an arrow, in Graphviz's HTML-like labels."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fxopt.picture.palette import QUIET_TEXT
from fxopt.text import quantity_text

WIDTH = 34  # characters of a line of arguments
LEGEND_CELLS = 5  # in a row
_DULL = {"momentum", "cudnn_enabled", "cudnn_enable", "layout", "device", "pin_memory"}


def call_label(data: Mapping[str, Any], constants: Iterable[tuple[str, str]], where: str) -> str:
    """Return the label of a call: its operator and place, its constants, its arguments."""
    return _label(_operator(data["target"]), where, [*_constants(constants), *_arguments(data)])


def input_label(name: str, data: Mapping[str, Any]) -> str:
    """Return the label of an input: its name and type."""
    return _label(name, "", [type_label(data)])


def module_label(name: str, kind: str, part: str, sizes: Sequence[int], note: str = "") -> str:
    """Return the label of a collapsed module: what it is, and how much of it there is."""
    return _label(name, " ".join(filter(None, (kind, part))), [sizes_text(sizes), note])


def sizes_text(sizes: Sequence[int]) -> str:
    """Return numbers of calls, parameters and multiply-accumulates; of the latter two, if any."""
    calls, parameters, macs = sizes
    words = [f"{calls} node{'s' if calls != 1 else ''}"]
    words += [f"{quantity_text(parameters)} params"] if parameters else []
    words += [f"{quantity_text(macs)} MACs"] if macs else []
    return " · ".join(words)


def title_label(title: str, subtitle: str, legend: Sequence[tuple[str, str]]) -> str:
    """Return the heading of a picture; `legend` holds words and the colours that they explain."""
    span = math.ceil(len(legend) / math.ceil(len(legend) / LEGEND_CELLS)) if legend else 1
    rows = [legend[start : start + span] for start in range(0, len(legend), span)]
    cells = "".join(
        "<TR>" + "".join(f'<TD BGCOLOR="{c}">{_quiet(word)}</TD>' for word, c in row) + "</TR>"
        for row in rows
    )
    heading = f'<TR><TD COLSPAN="{span}"><B>{_escape(title)}</B><BR/>{_quiet(subtitle)}</TD></TR>'
    return f'<<TABLE BORDER="0" CELLSPACING="3" CELLPADDING="3">{heading}{cells}</TABLE>>'


def cluster_label(name: str, kind: str) -> str:
    """Return the label of an open module."""
    return _label(name, kind, [])


def type_label(data: Mapping[str, Any]) -> str:
    """Return the type of a value: `1×64×56×56`, with the dtype where it is not f32."""
    if "shape" not in data:
        text = str(data["type"])
        return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
    shape = "×".join(map(str, data["shape"])) or "scalar"
    return shape if data["dtype"] == "f32" else f"{data['dtype']} {shape}"


def _operator(target: str) -> str:
    """Return an operator's name without its overload."""
    return target.split(".")[0]


def _constants(constants: Iterable[tuple[str, str]]) -> list[str]:
    """Return lines such as `weight 64×3×7×7`; arguments of one type share a line."""
    by_type: dict[str, list[str]] = {}
    for argument, kind in constants:
        by_type.setdefault(kind, []).append(argument)
    return [
        line
        for kind, names in by_type.items()
        for line in textwrap.wrap(f"{', '.join(names)} {kind}", WIDTH, break_long_words=False)
    ]


def _arguments(data: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, value in data["arguments"].items():
        if name in _DULL or value == "False":
            continue
        parts.append(name if value == "True" else f"{name} {value}")
    return _wrapped(parts)


def _wrapped(parts: Sequence[str]) -> list[str]:
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 2 <= WIDTH:
            lines[-1] += f", {part}"
        else:
            lines.append(textwrap.shorten(part, 2 * WIDTH, placeholder=" …"))
    return lines


def _label(title: str, subtitle: str, lines: Iterable[str]) -> str:
    """Return `<…>`: the title bold, the rest small and quiet."""
    head = f"<B>{_escape(title)}</B>"
    if subtitle:
        head += f" {_quiet(subtitle)}"
    return "<" + "<BR/>".join([head, *map(_quiet, filter(None, lines))]) + ">"


def _quiet(text: str) -> str:
    return f'<FONT POINT-SIZE="9" COLOR="{QUIET_TEXT}">{_escape(text)}</FONT>'


def _escape(text: str) -> str:
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return html.escape(printable).replace("\\", "\\\\") or " "
