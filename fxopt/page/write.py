"""Puts the page together: template, styles, scripts, libraries and data in one HTML file."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.errors import FxoptError
from fxopt.files import write_atomic
from fxopt.graph_module import GraphModule
from fxopt.page.data import page_data
from fxopt.page.libraries import LIBRARIES, VENDOR

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel
    from fxopt.profile import Profile

VIEW = Path(__file__).parent / "view"


def write_page(
    what: GraphModule | CompiledModel, path: str | Path, *, profile: Profile | None = None
) -> None:
    """Write the interactive page of a graph or a compiled model to `path`, one HTML file.

    With `profile` (from `fxopt.profile`, of the same graph) it shows milliseconds and the roofline.
    Raises FxoptError where there is no graph, or where the libraries were never fetched.
    """
    write_atomic(Path(path), page_text(what, profile=profile))


def page_text(what: GraphModule | CompiledModel, *, profile: Profile | None = None) -> str:
    """Return the page as text; see `write_page`."""
    compiled = None if isinstance(what, GraphModule) else what
    graph = what if isinstance(what, GraphModule) else what.graph
    if graph is None:
        raise FxoptError("A model loaded from a file without a graph has nothing to show.")
    return _assemble(page_data(graph, compiled, profile))


def _assemble(data: dict[str, Any]) -> str:
    scripts = (VIEW / "scripts.txt").read_text(encoding="utf-8").split()
    parts = {
        "<!--TITLE-->": html.escape(f"{data['model']} · fxopt"),
        "/*STYLE*/": (VIEW / "style.css").read_text(encoding="utf-8"),
        "<!--LIBRARIES-->": _libraries(),
        "<!--DATA-->": f'<script type="application/json" id="data">{_json(data)}</script>',
        "<!--SCRIPTS-->": "\n".join(
            f"<script>{(VIEW / name).read_text(encoding='utf-8')}</script>" for name in scripts
        ),
        "<!--NOTICE-->": _notice(),
    }
    page = (VIEW / "page.html").read_text(encoding="utf-8")
    # one go over the template: a mark inside of what is put in stays what it is
    return re.sub("|".join(map(re.escape, parts)), lambda mark: parts[mark[0]], page)


def _json(data: dict[str, Any]) -> str:
    """Return JSON that no text in it can end the script element with."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _libraries() -> str:
    d3, elk, worker = map(_library, ("d3.min.js", "elk-api.js", "elk-worker.min.js"))
    return (
        f"<script>{d3}</script>\n<script>{elk}</script>\n"
        f'<script type="text/plain" id="elk-worker">{worker}</script>'
    )


def _notice() -> str:
    """Return the libraries' names and licences, which go wherever their code goes."""
    licences = [
        (one, name) for one in LIBRARIES for name in one.files if name.startswith("LICENSE")
    ]
    return "\n".join(
        f"<details><summary>{one.spec}, {one.licence}</summary>"
        f"<pre>{html.escape(_library(name))}</pre></details>"
        for one, name in licences
    )


def _library(name: str) -> str:
    try:
        text = (VENDOR / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FxoptError(
            "The page's libraries are not here, because this checkout of fxopt was not installed "
            "with pip. Fetch them once (this needs npm): python -m fxopt.page.libraries"
        ) from None
    return text.replace("</script", "<\\/script")
