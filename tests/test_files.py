"""Saving never leaves half a file, nor a lost one, whatever goes wrong."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import ArtefactError
from fxopt.files import write_atomic

SUFFIXES = (".fxopt", ".pt")


def compiled(suffix: str, width: int = 4) -> Any:
    backend = {".fxopt": "eager", ".pt": "torchscript"}[suffix]
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU()).eval()
    return fxopt.compile(model, torch.randn(2, 4), backend=backend, verify="off")


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_the_old_file(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"model{suffix}"
    model = compiled(suffix)
    model.save(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(ArtefactError, match=r"No space left on device.*choose another"):
                model.save(path)
        assert path.read_bytes() == before and listing(tmp_path) == [path.name]


def test_a_disk_that_fills_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.fxopt"
    model = compiled(".fxopt")
    model.save(path)
    before = path.read_bytes()
    import fxopt.container as container

    def chunks(tensors: Any) -> Any:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(container, "tensor_chunks", chunks)
    with pytest.raises(ArtefactError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before and listing(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_is_missing_or_a_folder_as_target_is_named(
    suffix: str, tmp_path: Path
) -> None:
    model = compiled(suffix)
    with pytest.raises(ArtefactError, match="nowhere"):
        model.save(tmp_path / "nowhere" / f"model{suffix}")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(ArtefactError, match="it is a folder"):
        model.save(folder)
    assert listing(tmp_path) == [folder.name] and listing(folder) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_cannot_be_written_is_named(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    def refuse(*_: Any, **__: Any) -> None:  # root may write anywhere, so permissions do not do
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(ArtefactError, match="Permission denied"):
        compiled(suffix).save(path)
    assert path.read_bytes() == b"old" and listing(tmp_path) == [path.name]


def test_any_other_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.fxopt"
    path.write_bytes(b"old")
    model = compiled(".fxopt")
    model.graph.info.model_name = object()  # has no JSON form
    with pytest.raises(TypeError):
        fxopt.lower(model.graph).save(path)
    assert path.read_bytes() == b"old" and listing(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_two_savers_at_once_leave_one_whole_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    models = [compiled(suffix, width) for width in (3, 300)]
    failures: list[BaseException] = []

    def save(model: Any) -> None:
        try:
            for _ in range(5):
                model.save(path)
        except BaseException as error:
            failures.append(error)

    _together([lambda model=model: save(model) for model in models])  # type: ignore[misc]
    assert not failures
    x = torch.randn(2, 4)
    result = fxopt.load(path)(x)
    assert any(result.shape == m(x).shape and torch.equal(result, m(x)) for m in models)
    assert listing(tmp_path) == [path.name]


def _together(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_killed_saver_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path, ready = tmp_path / "model.fxopt", tmp_path / "ready"
    write_atomic(path, b"old")
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from fxopt.files import atomic_path
        with atomic_path(sys.argv[1]) as temporary:
            temporary.write_bytes(b"half")
            Path(sys.argv[2]).touch()
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script, str(path), str(ready)])
    deadline = time.monotonic() + 50
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert ready.exists() and path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    path = tmp_path / "model.fxopt"
    old = os.umask(0o027)
    try:
        write_atomic(path, "text")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_missing_or_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no file"):
        fxopt.load(tmp_path / "model.fxopt")
    odd = tmp_path / "model.bin"
    odd.write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"unknown suffix.*\.fxopt"):
        fxopt.load(odd)
