"""`fxopt passes` and `fxopt backends`: what there is."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from fxopt.cli.options import json_option
from fxopt.cli.screen import Screen
from fxopt.compile import default_passes
from fxopt.registry import classes


@click.command("passes", short_help="List the passes, their effects and options.")
@json_option
def passes_command(as_json: bool) -> None:
    """List the passes: what each does, its options, its place in the default pipeline."""
    screen = Screen(as_json=as_json)
    with screen.job():
        known = classes("passes")
        order = {one.name: place for place, one in enumerate(default_passes(), start=1)}
        rows = [_pass_row(name, cls, order.get(name)) for name, cls in sorted(known.items())]
        rows.sort(key=lambda row: (row["default"] is None, row["default"] or 0))
    if as_json:
        screen.document(rows)
        return
    table = _table("pass", "default", "effect", "options", "what it does")
    for row in rows:
        place = str(row["default"]) if row["default"] else "–"
        table.add_row(row["name"], place, row["effect"], _options_text(row), Text(row["doc"]))
    screen.show(table)
    screen.show("default: the place in the default pipeline; – for what runs only when asked for.")


@click.command("backends", short_help="List the backends and what each needs.")
@json_option
def backends_command(as_json: bool) -> None:
    """List the backends: which can be used here, what the others need, and their options."""
    screen = Screen(as_json=as_json)
    with screen.job():
        rows = [_backend_row(name, cls) for name, cls in sorted(classes("backends").items())]
    if as_json:
        screen.document(rows)
        return
    table = _table("backend", "file", "here", "options", "what it does")
    for row in rows:
        here = "ready" if row["missing"] is None else row["missing"]
        table.add_row(row["name"], row["suffix"], Text(here), _options_text(row), Text(row["doc"]))
    screen.show(table)


def _table(*headings: str) -> Table:
    table = Table(show_lines=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in ("pass", "backend"))
    return table


def _pass_row(name: str, cls: Any, place: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "default": place,
        "effect": cls.effect.value,
        "options": _options(cls),
        "doc": _first_line(cls),
    }


def _backend_row(name: str, cls: Any) -> dict[str, Any]:
    return {
        "name": name,
        "suffix": cls.suffix,
        "missing": cls().missing(),
        "options": _options(cls),
        "doc": _first_line(cls),
    }


def _options(cls: Any) -> dict[str, str | None]:
    """Return each option's default, as it is written; None for one that must be given."""
    found: dict[str, str | None] = {}
    for field in fields(cls):
        if field.default is not MISSING:
            found[field.name] = repr(field.default)
        elif field.default_factory is not MISSING:
            found[field.name] = repr(field.default_factory())
        else:
            found[field.name] = None
    return found


def _options_text(row: dict[str, Any]) -> Text:
    return Text("\n".join(k if v is None else f"{k}={v}" for k, v in row["options"].items()))


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
