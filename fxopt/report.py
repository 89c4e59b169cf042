"""What was done, for people: the report of a story, and the recipe that does it again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fxopt.registry import is_reachable, spec_of
from fxopt.stats import Stats
from fxopt.story import Step, Story

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel


@dataclass(frozen=True)
class Recipe:
    """The settings that a report was made with, as a `--recipe` file takes them."""

    settings: dict[str, Any]

    @classmethod
    def of(cls, *, passes: Sequence[Any], **settings: Any) -> Recipe:
        """Collect settings; those that are at their defaults are left out."""
        defaults = {"verify": "final", "on_error": "raise"}
        kept = {k: v for k, v in settings.items() if v is not None and defaults.get(k) != v}
        plain = {k: v for k, v in kept.items() if _is_plain(v)}
        lacking = {
            "to_add": sorted(set(kept) - set(plain)),
            "to_define": [spec_of(one) for one in passes if not is_reachable(one)],
        }
        lacking = {key: names for key, names in lacking.items() if names}
        return cls({"passes": [spec_of(one) for one in passes], **plain, **lacking})

    def toml(self) -> str:
        """Return the recipe as a TOML file; what a file cannot hold is named in a comment."""
        told = {k: v for k, v in self.settings.items() if k not in ("to_add", "to_define")}
        lines = [f"{k} = {_toml(v)}\n" for k, v in told.items()]
        for name in self.settings.get("to_add", ()):
            lines.append(f"# {name}= was an object that a file cannot hold: pass it again\n")
        for name in self.settings.get("to_define", ()):
            lines.append(f"# {name} stands where no other process finds it: put it into a file\n")
        return "".join(lines)


def _is_plain(value: Any) -> bool:
    """Whether a value can be written into a file and read back as the same."""
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool))


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False)


class Report:
    """A story as a table: print it, or take it as JSON."""

    def __init__(self, story: Story, compiled: CompiledModel | None = None) -> None:
        self.story = story
        self.compiled = compiled

    @property
    def recipe(self) -> Recipe:
        """The settings that reproduce this result."""
        settings = dict(self.story.recipe)
        if self.compiled is not None:
            settings = {"backend": spec_of(self.compiled.backend), **settings}
        return Recipe(settings)

    @property
    def stats(self) -> Stats:
        """How often each pass and rule was tried, matched and rewrote, in what time."""
        return Stats(self.story.steps)

    def to_json(self) -> dict[str, Any]:
        """Return everything the report says as plain data."""
        story = self.story
        return {
            "model": story.model_name,
            "capture_seconds": story.capture_seconds,
            "captured": vars(story.captured.counts),
            "final": vars(story.final.counts),
            "steps": [_step_json(step) for step in story.steps],
            "verifications": [
                {**vars(v), "passed": v.passed} for v in story.verifications
            ],
            "absent_regularizers": list(story.regularizers),
            "renamed": {name: list(new) for name, new in story.renamed.items()},
            "notes": self.notes,
            "recipe": self.recipe.settings,
        }

    @property
    def notes(self) -> list[str]:
        """What the backend says about its lowering."""
        return list(self.compiled.executable.notes) if self.compiled is not None else []

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as captured:
            for part in self.__rich__().renderables:
                console.print(part, markup=False, soft_wrap=isinstance(part, str))
        return captured.get().rstrip()

    def _repr_html_(self) -> str:
        """Show the report in a notebook."""
        from fxopt.picture.notebook import table_html

        table = self._table()
        headings = [str(column.header) for column in table.columns]
        rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
        return table_html(str(table.title), headings, list(rows), self._lines())

    def __rich__(self) -> Any:
        from rich.console import Group

        parts: list[Any] = [self._table(), *self._lines()]
        return Group(*parts)

    def _table(self) -> Any:
        from rich.table import Table

        story = self.story
        table = Table(title=f"{story.model_name}: what each pass did", title_justify="left")
        for heading, justify in (
            ("pass", "left"), ("rewrites", "right"), ("nodes", "right"), ("parameters", "right"),
            ("MACs", "right"), ("ms", "right"), ("held back", "left"),
        ):  # fmt: skip
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        counts = story.captured.counts
        table.add_row(
            "capture", "", f"{counts.nodes:,}", f"{counts.parameters:,}", f"{counts.macs:,}",
            f"{story.capture_seconds * 1e3:.0f}", "",
        )  # fmt: skip
        for step in story.steps:
            table.add_row(*_row(step))
        return table

    def _lines(self) -> list[str]:
        story = self.story
        lines = [str(step.details) for step in story.steps if step.details is not None]
        lines += [
            f"verified: {v.what}: max |Δ| / max |reference| = {v.error:.2g} "
            f"(bound {v.bound:.2g}, {v.seconds:.2f} s){'' if v.passed else '  FAILED'}"
            for v in story.verifications
        ]
        if not story.verifications:
            lines.append("not verified")
        for reason, count in _reasons(story.steps)[:8]:
            lines.append(f"held back {count}×: {reason}")
        if story.regularizers:
            lines.append(f"absent from this graph in training: {', '.join(story.regularizers[:6])}")
        lines += self.notes
        if self.recipe.settings:
            lines.append("recipe that reproduces this (a file for --recipe):")
            lines += [f"  {line}" for line in self.recipe.toml().splitlines()]
        return lines


def _row(step: Step) -> tuple[str, ...]:
    counts = step.after.counts
    held = f"rolled back: {step.skipped}" if step.skipped else str(len(step.misses) or "")
    return (
        step.name, str(step.rewrites), f"{counts.nodes:,}", f"{counts.parameters:,}",
        f"{counts.macs:,}", f"{step.seconds * 1e3:.1f}", held,
    )  # fmt: skip


def _reasons(steps: Sequence[Step]) -> list[tuple[str, int]]:
    found = Counter(f"{step.name}: {miss.reason}" for step in steps for miss in step.misses)
    return found.most_common()


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "pass": step.name,
        "options": {key: repr(value) for key, value in step.options.items()},
        "effect": step.effect.value,
        "seconds": step.seconds,
        "rewrites": step.rewrites,
        "skipped": step.skipped,
        "after": vars(step.after.counts),
        "misses": [vars(miss) for miss in step.misses],
        "created": list(step.created),
        "erased": list(step.erased),
        "rules": {name: vars(count) for name, count in step.rules.items()},
        "details": None if step.details is None else str(step.details),
    }
