"""The page as a file: whole, closed in itself, and harmless whatever a model is called."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.errors import FxoptError
from fxopt.page import page_text, write_page
from tests.models import ConvBnRelu

X = torch.randn(1, 3, 8, 8)


class Scripts(HTMLParser):
    """Collects the scripts of a page, and whatever it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.fetched: list[str] = []
        self._id: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script":
            self._id = given.get("id") or str(len(self.scripts))
            self.scripts[self._id] = ""
        if tag in ("link", "script", "img", "iframe"):
            self.fetched += [v for k, v in attrs if k in ("href", "src") and v is not None]

    def handle_data(self, data: str) -> None:
        if self._id is not None:
            self.scripts[self._id] += data

    def handle_endtag(self, tag: str) -> None:
        self._id = None


def test_a_page_holds_everything() -> None:
    page = Scripts(page_text(fxopt.optimize(ConvBnRelu(), X)))
    data = json.loads(page.scripts["data"])
    assert data["model"] == "ConvBnRelu"
    assert "elk" in page.scripts["elk-worker"] and not page.fetched
    assert not re.search(r"<!--[A-Z]+-->|/\*STYLE\*/", page_text(fxopt.capture(ConvBnRelu(), X)))


def test_the_licences_go_with_the_libraries() -> None:
    text = page_text(fxopt.capture(ConvBnRelu(), X))
    assert "Eclipse Public License" in text and "Mike Bostock" in text


def test_names_are_data_and_nothing_else() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"</script><script>alert(1)</script>": nn.ReLU()})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.parts.values():
                x = part(x)
            return x

    page = Scripts(page_text(fxopt.capture(Odd().eval(), X)))
    assert not any("alert(1)" in text for name, text in page.scripts.items() if name != "data")
    records = json.loads(page.scripts["data"])["records"]
    assert any("</script>" in record["path"] for record in records)


def test_a_mark_inside_of_the_data_is_left_as_it_is() -> None:
    graph = fxopt.capture(ConvBnRelu(), X)
    graph.info.model_name = "<!--SCRIPTS-->"
    page = Scripts(page_text(graph))
    assert json.loads(page.scripts["data"])["model"] == "<!--SCRIPTS-->"


def test_a_compiled_model_writes_its_page(tmp_path: Path) -> None:
    compiled = fxopt.compile(ConvBnRelu(), X, backend="onnx")
    compiled.visualize(tmp_path / "a.html")
    fxopt.visualize(compiled.graph, tmp_path / "b.html")
    for name in ("a.html", "b.html"):
        assert "fuse-conv-bn" in (tmp_path / name).read_text(encoding="utf-8")
    compiled.save(tmp_path / "a.onnx")
    with pytest.raises(FxoptError, match="without a graph"):
        write_page(fxopt.load(tmp_path / "a.onnx"), tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


def test_without_the_libraries_it_says_how_to_fetch_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.page.write.VENDOR", tmp_path)
    with pytest.raises(FxoptError, match=r"python -m fxopt\.page\.libraries"):
        page_text(fxopt.capture(ConvBnRelu(), X))


# -- fxopt view ------------------------------------------------------------------------------------


@pytest.fixture
def view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = ("tests.models:ConvBnRelu", "--input", "1x3x8x8")
    return lambda *options: CliRunner().invoke(main, ["view", *model, *options])


def test_the_command_writes_a_page(view: Any, tmp_path: Path) -> None:
    result = view()
    assert result.exit_code == 0 and "wrote graph.html" in result.stdout, result.output
    data = json.loads(Scripts((tmp_path / "graph.html").read_text()).scripts["data"])
    assert any("verified" in name for name, _ in data["facts"]) and data["roofline"] is None


def test_the_command_measures_where_asked(view: Any, tmp_path: Path) -> None:
    result = view("--profile", "--no-verify", "--passes", "fuse-conv-bn", "-o", "p.html")
    assert result.exit_code == 0, result.output
    data = json.loads(Scripts((tmp_path / "p.html").read_text()).scripts["data"])
    assert [step["name"] for step in data["steps"]] == ["capture", "fuse-conv-bn"]
    assert data["roofline"]["points"]


def test_the_command_refuses_what_cannot_be_written(view: Any) -> None:
    result = view("-o", "no/such/folder.html")
    assert result.exit_code == 1 and "there is no folder" in result.output
