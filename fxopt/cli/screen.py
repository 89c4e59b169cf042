"""What a person or a program sees: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.status import Status
from rich.table import Table

from fxopt.errors import FxoptError, OptionError


class Failure(click.ClickException):
    """The message for stderr, with the exit code that fits the error."""

    def __init__(self, error: Exception, code: int) -> None:
        super().__init__(str(error))
        self.error, self.code = error, code

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """2 for a wrong name or option, else the code of a job that failed."""
        return 2 if isinstance(self.error, OptionError) else self.code


class Screen:
    """Shows one job. While it runs, whatever a model prints goes to stderr, too.

    A job that fails ends with `failure_code`; a wrong name or option with 2.
    """

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, failure_code: int = 1
    ) -> None:
        self.failure_code = failure_code
        self.as_json = as_json
        self.quiet = quiet
        self.stdout = sys.stdout
        self.stderr = Console(stderr=True, highlight=False)
        self._spinner: Status | None = None

    @contextlib.contextmanager
    def job(self) -> Iterator[None]:
        """Run the job inside: log to stderr, and turn an error of ours into an exit code.

        With --json an error is one JSON document on stdout as well.
        """
        handler: logging.Handler = RichHandler(
            console=self.stderr, show_time=False, show_level=False, show_path=False, markup=False
        )
        if not self.stderr.is_terminal:
            handler = logging.StreamHandler(sys.stderr)
        log = logging.getLogger("fxopt")
        level = log.level
        log.addHandler(handler)
        log.setLevel(logging.WARNING if self.quiet else logging.INFO)
        try:
            with contextlib.redirect_stdout(sys.stderr), self._status():
                yield
        except (FxoptError, click.UsageError) as error:
            if self.as_json:
                self.document({"error": {"type": type(error).__name__, "message": str(error)}})
            if isinstance(error, click.UsageError):
                raise
            raise Failure(error, self.failure_code) from error
        finally:
            log.removeHandler(handler)
            log.setLevel(level)

    @contextlib.contextmanager
    def _status(self) -> Iterator[None]:
        if self.quiet or not self.stderr.is_terminal:
            yield
            return
        with self.stderr.status("") as self._spinner:
            yield

    def progress(self, text: str) -> None:
        """Say what is being done now."""
        if self._spinner is not None:
            self._spinner.update(text)
        elif not self.quiet:
            click.echo(text, err=True)

    def show(self, renderable: Any) -> None:
        """Print a table, or lines of text that are never wrapped, on stdout."""
        is_table = isinstance(renderable, Table)
        console = Console(file=self.stdout, highlight=False)
        if not console.is_terminal:  # a table has the same width in every file
            console = Console(file=self.stdout, highlight=False, width=110)
        console.print(renderable, markup=False, soft_wrap=not is_table)

    def document(self, content: Any) -> None:
        """Print one JSON document on stdout."""
        click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str), file=self.stdout)
