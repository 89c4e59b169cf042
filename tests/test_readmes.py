"""What the documents show runs: every Python block, and every `fxopt` command."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from fxopt.cli import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path
    for path in (
        ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "passes/README.md",
        ROOT / "backends/README.md", *sorted((ROOT / "docs").glob("*.md")),
    )
    if path.is_file()
]  # fmt: skip
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#]+)[^)]*\)")

each_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], text[: match.start()].count("\n") + 2)
        for match in BLOCK.finditer(text)
    ]


def commands(block: Block) -> list[str]:
    """The `fxopt` commands of a shell block; a backslash continues a line."""
    if block.language not in ("sh", "console", "bash"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    plain = [line.removeprefix("$ ") for line in lines]
    return [line for line in plain if line.startswith("fxopt ")]


def file_of(block: Block) -> Path | None:
    """The file that a reader puts a block into: its first line names it, `# mine.py`."""
    named = re.fullmatch(r"# (\w+\.py)", block.text.partition("\n")[0])
    return None if named is None else Path(named[1])


def printed(text: str) -> str:
    """What a block prints, whatever its lines break at and wherever a source file lies."""
    return " ".join(re.sub(r"\((?:[^\s()]*/)?(\w+\.py):\d+\)", r"(\1)", text).split())


@each_document
def test_what_it_shows_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One namespace and one folder per document, from top to bottom, as a reader would.

    A block of text right behind a Python block that prints is what that one prints.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = ModuleType(f"shown_in_{path.parent.name}_{path.stem}".lower())
    monkeypatch.setitem(sys.modules, module.__name__, module)
    said, end = "", 0
    for block in blocks(path):
        if block.language == "text" and said and block.line - end <= 3:
            assert printed(block.text) == printed(said), f"{path.name}:{block.line}"
        said, end = "", block.line + block.text.count("\n")
        if block.language == "python":
            capsys.readouterr()
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(path), "exec"), vars(module))
            said = capsys.readouterr().out
            file = file_of(block)
            if file is not None:
                known = file.read_text() if file.exists() else ""
                file.write_text(known + block.text)
        for command in commands(block):
            result = CliRunner().invoke(main, shlex.split(command, comments=True)[1:])
            assert result.exit_code == 0, f"{path.name}:{block.line}: {command}\n{result.output}"


@each_document
def test_its_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
