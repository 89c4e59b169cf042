"""`fxopt.visualize`: the one way to a picture in a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fxopt.errors import OptionError
from fxopt.files import write_atomic
from fxopt.picture.render import FORMATS, check_dot, render
from fxopt.picture.subject import Subject
from fxopt.story import Snapshot, Story

if TYPE_CHECKING:
    from fxopt.picture.subject import Drawable

SUFFIXES = ("dot", "gv", *FORMATS, "html")


def visualize(
    what: Drawable,
    path: str | Path,
    *,
    depth: int | str | None = "auto",
    step: str | int | None = None,
) -> None:
    """Write a picture of a graph, a compiled model, a story or a snapshot.

    `path` ends in .dot, in .svg, .png or .pdf, which need Graphviz's program `dot`, or in .html,
    which is the interactive page. `depth` says which modules are open: "auto" as many as a page
    shows legibly, a number of levels, or None for all. With `step` (a pass's name, a number from 0
    on, or "all" for the captured and the final graph) the graph before and after it stand side by
    side, with what differs in colour. The page holds every depth and every step.

    Raises OptionError for another suffix, depth or step, and FxoptError where `dot` is not
    installed, and for a picture that is too large for it.
    """
    target = Path(path)
    kind = check_drawable(target)
    if kind == "html":
        _write_page(what, target)
        return
    source, boxes = Subject.of(what).draw(depth, step)
    write_atomic(target, source if kind in ("dot", "gv") else render(source, kind, boxes))


def check_drawable(path: Path) -> str:
    """Return a file's kind, one of SUFFIXES, if it can be drawn here.

    Raises OptionError for another suffix, FxoptError where it needs `dot` and that is missing.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in SUFFIXES:
        raise OptionError(
            f"Cannot draw into '{path}'. Give a file that ends in .{', .'.join(SUFFIXES)}."
        )
    if kind in FORMATS:
        check_dot(kind)
    return kind


def _write_page(what: Drawable, target: Path) -> None:
    from fxopt.page import write_page

    if isinstance(what, (Story, Snapshot)):
        raise OptionError(
            f"The page '{target}' needs a graph or a compiled model, not a {type(what).__name__}. "
            "A .svg, .png, .pdf or .dot file can be made of it."
        )
    write_page(what, target)


def dot(
    what: Drawable, *, depth: int | str | None = "auto", step: str | int | None = None
) -> str:
    """Return a picture in the DOT language; see `visualize`."""
    return Subject.of(what).draw(depth, step)[0]


def svg(
    what: Drawable, *, depth: int | str | None = "auto", step: str | int | None = None
) -> str:
    """Return a picture as SVG; see `visualize`."""
    source, boxes = Subject.of(what).draw(depth, step)
    return render(source, "svg", boxes).decode()
