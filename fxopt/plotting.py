"""What all plots share: which files they are written to, with what library, and how."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from fxopt.errors import BackendUnavailable, OptionError
from fxopt.files import atomic_path

FORMATS = ("svg", "png", "pdf")


def plot_format(path: str | Path) -> str:
    """Return the format that a file's suffix names; asked before the work, too.

    Raises OptionError where it names none, BackendUnavailable where matplotlib is not installed.
    """
    kind = Path(path).suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise OptionError(
            f"Cannot plot into '{path}'. Give a file that ends in .{', .'.join(FORMATS)}."
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendUnavailable(
            "Plots are drawn by matplotlib, which is not installed: pip install 'fxopt[plot]'."
        )
    return kind


def save_plot(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure without a date, whole or not at all."""
    kind = plot_format(path)
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=150, metadata=undated)
