"""How often each pass and each rule was tried, matched and rewrote, in what time, and which never.

    print(compiled.report.stats)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fxopt.contract import RuleCount
from fxopt.story import Step


class Stats:
    """The counts of passes and rules in one run: print them, or take them as JSON."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    @property
    def never_fired(self) -> dict[str, list[str]]:
        """The rules of each pass that rewrote nothing, in any of its runs.

        Without those called keep_…, which never rewrite: they say why something is left alone.
        """
        return self._idle(lambda rule: not _only_explains(rule))

    @property
    def only_explained(self) -> dict[str, list[str]]:
        """The rules of each pass called keep_…, which say why something is left alone."""
        return self._idle(_only_explains)

    def _idle(self, wanted: Callable[[str], bool]) -> dict[str, list[str]]:
        fired: dict[str, dict[str, bool]] = {}
        for step in self.steps:
            known = fired.setdefault(step.name, {})
            for name, count in step.rules.items():
                known[name] = known.get(name, False) or count.rewritten > 0
        idle = {
            name: [rule for rule in known if not known[rule] and wanted(rule)]
            for name, known in fired.items()
        }
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
            "only_explained": self.only_explained,
        }

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as captured:
            for part in self.__rich__().renderables:
                console.print(part, markup=False)
        return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(self._table(), *([self._idle_table()] if self._idle_rows() else []))

    def _repr_html_(self) -> str:
        """Show the counts in a notebook."""
        from fxopt.picture.notebook import table_html

        rows = [cells for cells, _ in self._rows()]
        lines = [f"{where} {words}" for where, words in self._idle_rows()]
        return table_html("", _HEADINGS, rows, lines)

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

    def _idle_table(self) -> Any:
        """Return what never fired as a table, which wraps where a line is too long."""
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for where, words in self._idle_rows():
            table.add_row(where, words)
        return table

    def _idle_rows(self) -> list[tuple[str, str]]:
        rows = []
        for name, rules in self.never_fired.items():
            count = f"{len(rules)} of {len(self._rules_of(name))}"
            rows.append((f"never fired in {name}", f"{count}: {_families(rules)}"))
        for name, rules in self.only_explained.items():
            rows.append((f"only explain in {name}", f"{len(rules)}: {_families(rules)}"))
        return rows

    def _rules_of(self, name: str) -> set[str]:
        several = {rule for step in self.steps if step.name == name for rule in step.rules}
        return {rule for rule in several if not _only_explains(rule)}


_HEADINGS = ("pass, and its rules", "tried", "matched", "rewritten", "ms")


def _only_explains(rule: str) -> bool:
    return rule.startswith("keep_")


def _families(rules: Sequence[str]) -> str:
    """Write names, those of a family together: `merge[a, b], other`."""
    members: dict[str, list[str]] = {}
    for rule in rules:
        family, bracket, member = rule.partition("[")
        members.setdefault(family, []).extend([member.removesuffix("]")] if bracket else [])
    return ", ".join(f"{k}[{', '.join(v)}]" if v else k for k, v in members.items())


def _cells(name: str, count: RuleCount) -> tuple[str, ...]:
    return (
        f"  {name}", f"{count.tried:,}", f"{count.matched:,}", f"{count.rewritten:,}",
        _ms(count.seconds),
    )  # fmt: skip


def _sum(counts: Sequence[RuleCount]) -> RuleCount:
    return functools.reduce(RuleCount.plus, counts, RuleCount())


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
