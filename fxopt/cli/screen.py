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

from fxopt.errors import FxoptError, OptionError


class Failure(click.ClickException):
    """The message for stderr, with the exit code that fits the error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.exit_code = 2 if isinstance(error, (OptionError, click.UsageError)) else 1


class Screen:
    """Shows one job. While it runs, whatever a model prints goes to stderr, too."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.stdout = sys.stdout
        self.stderr = Console(stderr=True, highlight=False)

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
                kind = "UsageError" if isinstance(error, click.UsageError) else type(error).__name__
                message = error.format_message() if isinstance(error, click.UsageError) else str(error)
                self.document({"error": {"type": kind, "message": message}})
            if isinstance(error, click.UsageError):
                raise
            raise Failure(error) from error
        finally:
            log.removeHandler(handler)
            log.setLevel(level)

    @contextlib.contextmanager
    def _status(self) -> Iterator[None]:
        self._spinner = None
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
        """Print something rich, or text, on stdout: in colour for a terminal, plain otherwise."""
        console = Console(file=self.stdout, highlight=False, soft_wrap=isinstance(renderable, str))
        if not console.is_terminal:
            console = Console(
                file=self.stdout, highlight=False, width=110, soft_wrap=isinstance(renderable, str)
            )
        console.print(renderable, markup=False)

    def document(self, content: Any) -> None:
        """Print one JSON document on stdout."""
        click.echo(json.dumps(content, indent=2, ensure_ascii=False, default=str), file=self.stdout)
