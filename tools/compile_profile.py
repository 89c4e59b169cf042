"""Where compiling takes its time: processor seconds of each stage, beside those of torch.export.

    python tools/compile_profile.py [MODEL …]           the tables, in Markdown
    python tools/compile_profile.py --json FILE         the figures as well
    python tools/compile_profile.py --functions 20 …    the functions that take the most of our part

Models are named as in tools/subjects.py; without any, those that tools/engine_race.py races. Each
is compiled to eager in a process of its own where no timings of kernels are known, and again in a
new one where they are. A small network is compiled there first, which imports everything. All are
processor seconds of one thread, which other programs on the machine change little.

    torch.export    what capture waits for
    capture         the translation into the dialect, and all else around torch.export
    optimize        the default passes, with the check and the record after each
    verify          the model, the captured and the optimized graph, run and compared
    cold            lowering where no timings are known: kernels are timed
    warm            lowering where they are
    verify eager    the lowered model, run and compared
    first call      of a model that was lowered once more, and was not called yet
    again           all of ours (without torch.export and verification) in the same process, least
                    of `--rounds` compilations: what an operator costs once is paid
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine_race import MODELS
from subjects import subject

import fxopt
from fxopt.files import atomic_path
from fxopt.timings import machine

COLUMNS = (
    "nodes", "torch.export", "capture", "optimize", "verify", "cold", "warm", "verify eager",
    "first call", "again",
)  # fmt: skip
_STAGES = {"torch.export", "capture", "verify", "lower to eager", "verify eager"}  # or passes


@dataclass
class Compilation:
    """Processor seconds of the stages of compiling one model, and of each pass."""

    model: str
    nodes: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)

    def row(self) -> list[str]:
        """Return the cells of the table, in the order of COLUMNS, after the name."""
        return [str(self.nodes), *(f"{self.stages[name]:.3f}" for name in COLUMNS[1:])]


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line, or `arguments`, asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3, help="more compilations; at least 1")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--functions", type=int, metavar="N", help="profile instead, and list N")
    parser.add_argument("--here", metavar="MODEL", help="compile in this process, print JSON")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least one more compilation is measured")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models = options.models or list(MODELS)
    if options.here is not None:
        print(json.dumps(compilations(*subject(options.here), options.rounds)))
    elif options.functions is not None:
        for name in models:
            print(f"{name}\n{hot_functions(*subject(name), options.functions)}")
    else:
        found: list[Compilation] = []
        for name in models:
            found.append(measure(name, options.rounds))
            if options.json is not None:
                with atomic_path(options.json) as temporary:
                    temporary.write_text(json.dumps([asdict(one) for one in found], indent=1))
        print("\n".join(page(found)))


# -- measuring ----------------------------------------------------------------------------------


def measure(name: str, rounds: int) -> Compilation:
    """Compile a model in two new processes, the second with the timings that the first found."""
    with fresh_timings():
        cold, warm = _in_new_process(name, rounds), _in_new_process(name, rounds)
    first = warm["first"]
    passes = {key: value for key, value in first.items() if key not in _STAGES}
    ours = (
        sum(value for key, value in warm["again"].items() if not key.startswith("verify"))
        - 2 * warm["again"]["torch.export"]  # which is a part of capture, too
    )
    stages = {
        "torch.export": first["torch.export"],
        "capture": first["capture"] - first["torch.export"],
        "optimize": sum(passes.values()),
        "verify": first.get("verify", 0.0),
        "cold": cold["first"]["lower to eager"],
        "warm": first["lower to eager"],
        "verify eager": first["verify eager"],
        "first call": warm["call"],
        "again": ours,
    }
    return Compilation(name, warm["nodes"], stages, passes)


def _in_new_process(name: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--here", name, "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compilations(model: torch.nn.Module, x: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Compile a model, then `rounds` times more; return seconds of stages, passes, the first call.

    "again" holds the stages of the shortest of those further compilations.
    """
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    fxopt.compile(small, torch.randn(1, 3, 9, 9))(torch.randn(1, 3, 9, 9))
    first = _seconds(model, x)
    graph = fxopt.capture(model, x)
    lowered = fxopt.lower(fxopt.optimize(graph, verify="off"))
    started = time.process_time()
    lowered(x)
    call = time.process_time() - started
    again = min((_seconds(model, x) for _ in range(rounds)), key=lambda run: sum(run.values()))
    return {"nodes": len(graph.graph.nodes), "first": first, "again": again, "call": call}


@contextmanager
def fresh_timings() -> Iterator[None]:
    """Let nothing be known of how fast kernels are, and keep nothing that is found out."""
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(os.environ, {"FXOPT_CACHE": folder}),
    ):
        yield


def _seconds(model: torch.nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Return the processor seconds of each stage and pass of one compilation."""
    clock = _Clock()
    export = clock.timed("torch.export", torch.export.export)
    with patch.object(torch.export, "export", export):
        fxopt.compile(model, x, progress=clock.begin)
    clock.begin("")
    return dict(clock.seconds)


class _Clock:
    """Adds up the processor seconds from one stage's beginning to the next one's."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stage = ""
        self._started = 0.0

    def begin(self, stage: str) -> None:
        """End the stage that runs, and begin another."""
        now = time.process_time()
        if self._stage:
            self.seconds[self._stage] += now - self._started
        self._stage, self._started = stage, now

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose seconds are added up beside those of the stage it is in."""

        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += time.process_time() - started

        return run


# -- the functions that take it -----------------------------------------------------------------


def hot_functions(model: torch.nn.Module, x: torch.Tensor, count: int) -> str:
    """Profile compilation without torch.export, warm; list what takes the most, callees included.

    Only functions of fxopt are listed, and of others those that fxopt calls itself.
    """
    with fresh_timings():
        fxopt.compile(model, x)
        program: list[Any] = []
        export = torch.export.export

        def once(*args: Any, **kwargs: Any) -> Any:
            if not program:
                program.append(export(*args, **kwargs))
            return program[0]

        with patch.object(torch.export, "export", once):
            fxopt.capture(model, x)
            profile = cProfile.Profile(time.process_time)
            profile.runcall(fxopt.compile, model, x)
    ours = str(Path(fxopt.__file__).parent)
    rows = []
    stats: Mapping[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    total = max(cumulative for _, _, _, cumulative, _ in stats.values())
    for (file, line, name), (_, calls, own, cumulative, callers) in stats.items():
        if file.startswith(ours) or any(caller[0].startswith(ours) for caller in callers):
            place = Path(file).relative_to(ours) if file.startswith(ours) else Path(file).name
            rows.append((cumulative, own, calls, f"{place}:{line} {name}"))
    lines = [f"{total:.3f} s in all, of which", f"{'with callees':>12} {'own':>7} {'calls':>9}"]
    for cumulative, own, calls, place in sorted(rows, reverse=True)[:count]:
        lines.append(f"{cumulative / total:12.1%} {own / total:7.1%} {calls:9,} {place}")
    return "\n".join(lines)


# -- the tables ---------------------------------------------------------------------------------


def page(found: list[Compilation]) -> list[str]:
    """Return the tables, in Markdown: stages by model, and the passes of all together."""
    lines = [f"{machine().splitlines()[0]}, torch {torch.__version__}, one thread", ""]
    lines += ["| model | " + " | ".join(COLUMNS) + " |", "|---" + "|--:" * len(COLUMNS) + "|"]
    lines += [f"| {one.model} | " + " | ".join(one.row()) + " |" for one in found]
    seconds: defaultdict[str, float] = defaultdict(float)
    for one in found:
        for name, value in one.passes.items():
            seconds[name] += value
    total = sum(seconds.values())
    lines += ["", "| pass | seconds | share |", "|---|--:|--:|"]
    for name, value in sorted(seconds.items(), key=lambda item: -item[1])[:10]:
        lines.append(f"| {name} | {value:.3f} | {value / total:.0%} |")
    return lines


if __name__ == "__main__":
    main()
