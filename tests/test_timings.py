"""Timings: the fastest way wins, and is remembered; nothing breaks where they cannot be kept."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from pathlib import Path

import pytest
import torch

from fxopt import timings as module
from fxopt.timings import Timings, cache_folder, machine


def test_the_fastest_wins_and_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "timings.sqlite"
    calls = []
    ways = {
        "slow": lambda: time.sleep(0.005),
        "fast": lambda: calls.append(1),
        "as fast": lambda: calls.append(2),
    }
    first = Timings(1, file)
    assert first.known("which?") is None
    assert first.fastest("which?", {**ways, "as fast": lambda: time.sleep(0.002)}) == "fast"
    assert first.known("which?") == "fast" and first.known("another?") is None
    assert Timings(1, file).known("which?") == "fast"
    assert Timings(2, file).known("which?") is None  # another number of threads
    assert (first.asked, first.measured) == (3, 1) and first.note is None


def test_of_equals_the_first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    assert Timings(1, None).fastest("?", {"a": lambda: None, "b": lambda: None}) == "a"


def test_another_machine_is_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(1, tmp_path / "t").fastest("?", {"a": lambda: None})
    assert Timings(1, tmp_path / "t").known("?") == "a"
    monkeypatch.setattr(module, "machine", lambda: "another")
    assert Timings(1, tmp_path / "t").known("?") is None


def test_a_database_that_cannot_be_used_is_said_and_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    broken = tmp_path / "broken.sqlite"
    broken.write_text("no database " * 100)
    for file in (tmp_path / "file" / "timings.sqlite", broken, tmp_path):
        timings = Timings(1, file)
        assert timings.known("?") is None
        assert timings.note is not None and str(file) in timings.note
        assert timings.fastest("?", {"a": lambda: None}) == "a"
        assert timings.known("?") == "a"  # kept in memory
    assert broken.read_text().startswith("no database")


def _write(file: Path, name: str) -> None:
    timings = Timings(1, file)
    for index in range(20):
        timings.fastest(f"{name} {index}", {"a": lambda: None})
    assert timings.note is None, timings.note


def test_processes_share_a_database(tmp_path: Path) -> None:
    file = tmp_path / "timings.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(file, str(n))) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with sqlite3.connect(file) as database:
        assert database.execute("SELECT COUNT(*) FROM timings").fetchone() == (60,)


def test_threads_are_as_before(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen = []
    Timings(before + 1, None).fastest("?", {"a": lambda: seen.append(torch.get_num_threads())})
    assert set(seen) == {before + 1} and torch.get_num_threads() == before


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("FXOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/fxopt")


def test_a_machine_has_a_name() -> None:
    assert torch.__version__ in machine() and machine() == machine()
