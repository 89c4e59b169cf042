"""Which of several ways to compute something is the fastest here, measured once and remembered.

Which kernel wins depends on the processor, the shapes and the number of threads, and no formula
tells. So the ways are timed in turns, on inputs of the right shapes, and the answer is kept in a
small database in the user's cache folder: the next model with the same layer asks nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_SECONDS = 0.03  # for one question
_ROUNDS = (3, 15)  # at least, at most
_HOPELESS = 1.4  # times as slow as the best after the first rounds: not timed any further
_AS_GOOD = 1.10  # a way named earlier, which makes fewer calls, wins up to here

Way = Callable[[], Any]


@dataclass
class Timings:
    """Answers which way is the fastest, for one number of threads.

    `file` is the database; None remembers nothing beyond this object. `asked` and `measured` count
    questions, `note` says why the database cannot be used, if so.
    """

    threads: int
    file: Path | None
    asked: int = 0
    measured: int = 0
    seconds: float = 0.0
    note: str | None = None
    _answers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, threads: int) -> Timings:
        """Return those that this user's cache folder keeps."""
        try:
            return cls(threads, cache_folder() / "timings.sqlite")
        except RuntimeError:  # a user without a home
            return cls(threads, None, note="timings are not kept: there is no home folder")

    def known(self, question: str) -> str | None:
        """Return the answer to a question that was measured before, on a machine like this one."""
        if not self.asked:
            self._answers |= dict(self._query("SELECT question, way FROM timings"))
        self.asked += 1
        return self._answers.get(self._key(question))

    def fastest(self, question: str, ways: Mapping[str, Way]) -> str:
        """Time the ways in turns, and return the name of the fastest; remember it."""
        started = time.perf_counter()
        with threads(self.threads):
            answer = _race(ways)
        self.measured += 1
        self.seconds += time.perf_counter() - started
        self.remember(question, answer)
        return answer

    def remember(self, question: str, answer: str) -> None:
        """Keep an answer that was found out in another way."""
        key = self._key(question)
        self._answers[key] = answer
        self._query("INSERT OR REPLACE INTO timings VALUES (?, ?)", key, answer)

    def _key(self, question: str) -> str:
        text = "\n".join((machine(), f"{self.threads} threads", question))
        return hashlib.sha256(text.encode()).hexdigest()

    def _query(self, statement: str, *values: str) -> list[Any]:
        """Ask the database, or do without it: another process may hold it, a disk be full."""
        if self.file is None or self.note is not None:
            return []
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(self.file, timeout=1)) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS timings (question TEXT PRIMARY KEY, way TEXT)"
                )
                return database.execute(statement, values).fetchall()
        except (sqlite3.Error, OSError) as error:
            self.note = f"timings are not kept: '{self.file}' cannot be used ({error})"
            return []


_inside = 0  # how many threads are inside of `threads`
_outside = 0  # the number of threads that PyTorch uses when nobody is
_counting = threading.Lock()


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use this many threads inside, in the thread that enters.

    PyTorch has a number per thread, and one for threads that are born: that follows the last who
    entered, until all have left.
    """
    global _inside, _outside
    with _counting:
        if _inside == 0:
            _outside = torch.get_num_threads()
        _inside += 1
        before = _outside
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        with _counting:
            _inside -= 1


@functools.cache
def machine() -> str:
    """Return what timings depend on: the processor, and the kernels that are installed."""
    name = platform.processor() or platform.machine()
    flags = ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        rows = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in rows.items()}
        name = fields.get("model name", name) + fields.get("model", "")
        flags = fields.get("flags", fields.get("Features", ""))
    capability = torch.backends.cpu.get_cpu_capability()
    return "\n".join((name, flags, capability, torch.__version__, str(os.cpu_count())))


def cache_folder() -> Path:
    """Return the folder for what may be lost: `FXOPT_CACHE`, else one in the user's cache.

    Raises RuntimeError for a user without a home folder.
    """
    given = os.environ.get("FXOPT_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fxopt"



def _race(ways: Mapping[str, Way]) -> str:
    """Time the ways in turns; the lowest median wins, the first of those as good as equal."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # makes kernels, fills caches
    finish = time.perf_counter() + _SECONDS
    low, high = _ROUNDS
    for turn in range(high):
        for name in times:
            started = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - started)
        if turn + 1 >= low:
            middle = {name: statistics.median(values) for name, values in times.items()}
            best = min(middle.values())
            times = {name: times[name] for name in times if middle[name] <= best * _HOPELESS}
            if len(times) == 1 or time.perf_counter() > finish:
                break
    medians = {name: statistics.median(values) for name, values in times.items()}
    return next(name for name in times if medians[name] <= min(medians.values()) * _AS_GOOD)
