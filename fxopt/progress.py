"""The bar on stderr that says how far a measurement is, and how long it will take."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Tick = Callable[[str], None]


@contextlib.contextmanager
def bar(title: str, total: int | None, *, shown: bool) -> Iterator[Tick]:
    """Show how many of `total` steps are done; yields what names, and begins, the next one.

    Where nobody knows how many there are, `total` is None.
    """
    columns = (
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not shown or total == 0) as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def tick(text: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, description=text)
            begun += 1

        yield tick
        progress.update(task, completed=begun, total=begun, description="")
