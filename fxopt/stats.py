"""How often each pass and each rule was tried, matched and rewrote, in what time, and which never.

    print(compiled.report.stats)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

from fxopt.contract import RuleCount
from fxopt.story import Step


class Stats:
    """The counts of passes and rules in one run: print them, or take them as JSON."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    @property
    def never_fired(self) -> dict[str, list[str]]:
        """The rules of each pass that rewrote nothing, in any of its runs."""
        fired: dict[str, dict[str, bool]] = {}
        for step in self.steps:
            known = fired.setdefault(step.name, {})
            for name, count in step.rules.items():
                known[name] = known.get(name, False) or count.rewritten > 0
        idle = {name: [rule for rule in known if not known[rule]] for name, known in fired.items()}
        return {name: rules for name, rules in idle.items() if rules}

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "passes": [
                {
                    "pass": step.name,
                    "rewrites": step.rewrites,
                    "seconds": step.seconds,
                    "rules": {name: vars(count) for name, count in step.rules.items()},
                }
                for step in self.steps
            ],
            "seconds": sum(step.seconds for step in self.steps),
            "never_fired": self.never_fired,
        }

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as captured:
            for part in self.__rich__().renderables:
                console.print(part, markup=False, soft_wrap=isinstance(part, str))
        return captured.get().rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group

        parts: list[Any] = [self._table(), *self._lines()]
        return Group(*parts)

    def _repr_html_(self) -> str:
        """Show the counts in a notebook."""
        from fxopt.picture.notebook import table_html

        rows = [cells for cells, _ in self._rows()]
        return table_html("", _HEADINGS, rows, self._lines())

    def _table(self) -> Any:
        from rich.table import Table

        table = Table()
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading == _HEADINGS[0] else "right")
        for cells, style in self._rows():
            table.add_row(*cells, style=style)
        return table

    def _rows(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield the cells of each row and its style: a pass, then its rules that matched."""
        for step in self.steps:
            words = "rolled back" if step.skipped else f"{step.rewrites:,}"
            yield (step.name, "", "", words, _ms(step.seconds)), "bold"
            matched = {name: count for name, count in step.rules.items() if count.matched}
            for name in sorted(matched, key=lambda name: (-matched[name].rewritten, name)):
                yield _cells(name, matched[name]), ""
            others = [count for count in step.rules.values() if not count.matched]
            if others:
                some = f"{len(others)} rule{'s' if len(others) > 1 else ''} without a match"
                yield _cells(some, _sum(others)), "dim"
        seconds = sum(step.seconds for step in self.steps)
        rewrites = sum(step.rewrites for step in self.steps)
        yield ("all passes", "", "", f"{rewrites:,}", _ms(seconds)), "bold"

    def _lines(self) -> list[str]:
        return [
            f"never fired in {name} ({len(rules)} of {len(self._rules_of(name))} rules): "
            + ", ".join(rules)
            for name, rules in self.never_fired.items()
        ]

    def _rules_of(self, name: str) -> set[str]:
        return {rule for step in self.steps if step.name == name for rule in step.rules}


_HEADINGS = ("pass, and its rules", "tried", "matched", "rewritten", "ms")


def _cells(name: str, count: RuleCount) -> tuple[str, ...]:
    return (
        f"  {name}", f"{count.tried:,}", f"{count.matched:,}", f"{count.rewritten:,}",
        _ms(count.seconds),
    )  # fmt: skip


def _sum(counts: Sequence[RuleCount]) -> RuleCount:
    return functools.reduce(RuleCount.plus, counts, RuleCount())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
