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
from fxopt.registry import classes, registered, resolve_pass, rules_of
from fxopt.rules import Rule, RuleSet


@click.command("passes", short_help="List the passes, their effects, options and rules.")
@click.argument("pass_name", metavar="[PASS]", required=False)
@json_option
def passes_command(pass_name: str | None, as_json: bool) -> None:
    """List the passes: what each does, its options, its place in the default pipeline.

    With PASS, list the rules that it is made of, each with its equation.
    """
    screen = Screen(as_json=as_json)
    with screen.job():
        if pass_name is None:
            rows = _pass_rows()
        else:
            rows = _rule_rows(resolve_pass(pass_name))
    if as_json:
        screen.document(rows)
    elif pass_name is not None:
        _show_rules(screen, pass_name, rows)
    else:
        _show_passes(screen, rows)


def _pass_rows() -> list[dict[str, Any]]:
    order = {one.name: place for place, one in enumerate(default_passes(), start=1)}
    known = sorted(registered("passes").items())
    rows = [_pass_row(name, one, order.get(name)) for name, one in known]
    return sorted(rows, key=lambda row: (row["default"] is None, row["default"] or 0))


def _show_passes(screen: Screen, rows: list[dict[str, Any]]) -> None:
    table = _table("pass", "default", "effect", "rules", "options", "what it does")
    for row in rows:
        place = str(row["default"]) if row["default"] else "–"
        count = str(len(row["rules"]) or "")
        text = Text(row["doc"])
        table.add_row(row["name"], place, row["effect"], count, _options_text(row), text)
    screen.show(table)
    screen.show("default: the place in the default pipeline; – for what runs only when asked for.")


def _rule_rows(one: Any) -> list[dict[str, Any]]:
    return [{"rule": r.name, "doc": r.doc, "source": r.source} for r in rules_of(one)]


def _show_rules(screen: Screen, name: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        screen.show(f"{name} is not made of rules.")
        return
    table = _table("rule", "what it does")
    for row in rows:
        table.add_row(row["rule"], Text(row["doc"].split("\n\n")[0]))
    screen.show(table)


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
        table.add_column(heading, overflow="fold", no_wrap=heading in ("pass", "rule", "backend"))
    return table


def _pass_row(name: str, one: Any, place: int | None) -> dict[str, Any]:
    """Return what is said about a pass: its class, or a rule or set of rules that is one."""
    return {
        "name": name,
        "default": place,
        "effect": one.effect.value,
        "rules": [rule.name for rule in rules_of(one)],
        "options": _options(one) if isinstance(one, type) else {},
        "doc": _first_line(one),
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


def _first_line(one: Any) -> str:
    if isinstance(one, RuleSet):
        return "; ".join(rule.doc.split("\n")[0] or rule.name for rule in one)
    doc = one.doc if isinstance(one, Rule) else inspect.getdoc(one)
    return (doc or "").split("\n\n")[0].replace("\n", " ")
