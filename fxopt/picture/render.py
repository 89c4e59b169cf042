"""Running Graphviz's program `dot`."""

from __future__ import annotations

import shutil
import subprocess

from fxopt.errors import FxoptError
from fxopt.picture.columns import PAGE_HEIGHT, PAGE_WIDTH

FORMATS = ("svg", "png", "pdf")
LARGEST = 2000  # boxes; `dot` takes some ten seconds for these, and minutes for twice as many
LEGIBLE = 120  # boxes that can still be read when they fill one page of paper
SECONDS = 120.0


def has_dot() -> bool:
    """Whether Graphviz's program is installed."""
    return shutil.which("dot") is not None


def check_dot(kind: str) -> None:
    """Raise FxoptError where a picture of this kind cannot be made here."""
    if not has_dot():
        raise FxoptError(
            f"Drawing a .{kind} needs Graphviz's program 'dot', which is not installed (on Debian: "
            "apt-get install graphviz; on macOS: brew install graphviz). A .html page needs "
            "nothing, nor does a .dot file."
        )


def render(source: str, kind: str, boxes: int) -> bytes:
    """Return a picture of DOT source in one of FORMATS; a small one as PDF fits a page of A4.

    Raises FxoptError where `dot` is not installed or fails, and for a picture with so many boxes,
    or arrows, that it would not end in a reasonable time.
    """
    if boxes > LARGEST:
        raise FxoptError(
            f"This picture has {boxes:,} boxes, and Graphviz takes minutes for more than "
            f"{LARGEST:,}. {_INSTEAD}"
        )
    check_dot(kind)
    command = ["dot", f"-T{kind}", *_options(kind, boxes)]
    try:
        done = subprocess.run(
            command, input=source.encode(), capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise FxoptError(
            f"Graphviz was not done with {boxes:,} boxes after {SECONDS:.0f} s. {_INSTEAD}"
        ) from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise FxoptError(f"Graphviz failed with exit code {done.returncode}: {words} {_INSTEAD}")
    return done.stdout


_INSTEAD = (
    "Collapse modules with depth='auto' or a number (--depth), or write a .html page, which shows "
    "graphs of any size; a .dot file can be laid out by other programs."
)


def _options(kind: str, boxes: int) -> list[str]:
    if kind == "pdf" and boxes <= LEGIBLE:
        return [f"-Gsize={PAGE_WIDTH},{PAGE_HEIGHT}", "-Gmargin=0.3"]
    return [f"-Gdpi={144 if boxes <= LEGIBLE else 96}"] if kind == "png" else []
