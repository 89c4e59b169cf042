"""Whether fxopt itself became slower: counts beside those that are committed, and ratios.

    python tools/bench_smoke.py              judge; ends with 1 where something is worse
    python tools/bench_smoke.py --write      write the counts as they are now
    python tools/bench_smoke.py resnet18     judge (or write) this network alone

Seconds on a shared machine say little, so what is judged is counted: what a graph and its programs
are made of, and how many calls fxopt's functions make, file by file, and others beneath them, while
they compile it and around each run of its program. Kernels are chosen by rule, without oneDNN's own
library, so that every machine counts the same. What no count shows, a step that grows with the
square of the graph or a call that costs more than the program it runs, is judged by ratios of
times, with bounds so wide that a busy machine stays within them.

What became less is reported, and is kept by --write. What became more is wrong, or is written with
--write by who meant it.
"""

from __future__ import annotations

import argparse
import ast
import cProfile
import gc
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench import chain, dag
from subjects import subject

import fxopt
from fxopt.backends import Eager, Onnx
from fxopt.backends.eager import EagerExecutable
from fxopt.backends.eager.onednn import library
from fxopt.backends.eager.program import Program
from fxopt.files import atomic_path
from fxopt.graph_module import GraphModule
from fxopt.text import target_text
from fxopt.vision import import_torchvision

COUNTS = Path(__file__).with_name("bench_smoke.json")
NETWORKS = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "swin", "bert")
MORE = 1.05  # times the calls of a stage that are committed: the noise is below 1.001
MORE_OF_A_FILE = 1.25  # where that is a hundredth of the stage's calls at least
SIZES = (250, 2000)  # nodes of the synthetic graphs
GROWTH = 1.10  # calls per node of the large graph over those of the small one
SLOWER = 3.0  # processor time per node of the large graph over that of the small one
OVERHEAD = 3.0  # a call of a model of 64 small operators over one of its bare program

_ROOT = str(Path(fxopt.__file__).parent)
_OTHERS, _PROGRAM = "others", "<fxopt program>"
_INLINED = {"<listcomp>", "<dictcomp>", "<setcomp>"}  # no calls since Python 3.12
_MOVES = ("permute", "transpose", "contiguous", "clone", "laid_out")
Counts = dict[str, Any]


@dataclass
class Verdict:
    """What is worse than it was, and what is better, a sentence each."""

    worse: list[str] = field(default_factory=list)
    better: list[str] = field(default_factory=list)

    def __iadd__(self, other: Verdict) -> Verdict:
        self.worse += other.worse
        self.better += other.better
        return self


def main(arguments: list[str] | None = None) -> int:
    """Judge, or write, as the command line or `arguments` say; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--write", action="store_true", help="write the counts as they are now")
    parser.add_argument("--counts", type=Path, default=COUNTS, help="the file that holds them")
    options = parser.parse_args(arguments)
    for name in options.networks:
        if name not in NETWORKS:
            parser.error(f"'{name}' is none of {', '.join(NETWORKS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = options.networks or list(NETWORKS)
    known = read_counts(options.counts)
    if not options.write:
        for name in names:
            if name not in known:
                print(f"{options.counts} has no counts of {name}: write them with --write")
                return 2
    found, verdict = {}, Verdict()
    for name in names:
        print(f"counting {name}", flush=True)
        found[name] = network_counts(*network(name))
        if not options.write:
            verdict += judge(name, known[name], found[name])
    if options.write:
        write_counts(options.counts, {**known, **found})
        print(f"{options.counts} written")
        return 0
    if not options.networks:
        print("measuring growth and overhead", flush=True)
        verdict += judge_growth()
        verdict += judge_overhead()
    return tell(verdict, options.counts)


def tell(verdict: Verdict, counts: Path) -> int:
    """Print a verdict; return the exit code."""
    for line in verdict.better:
        print(f"better: {line}")
    for line in verdict.worse:
        print(f"WORSE: {line}")
    if verdict.worse:
        made = json.loads(counts.read_text())["made_with"] if counts.exists() else _versions()
        if made != _versions():
            print(f"The counts were written with {made}, and this is {_versions()}.")
        print("Mend what made it worse, or, where it is meant, write it with --write.")
        return 1
    if verdict.better:
        print("Write it with --write, so that it stays.")
    print("no worse than committed")
    return 0


# -- the file -----------------------------------------------------------------------------------


def read_counts(file: Path) -> dict[str, Counts]:
    """Return the counts of each network, none where there is no file."""
    if not file.exists():
        return {}
    networks: dict[str, Counts] = json.loads(file.read_text())["networks"]
    return networks


def write_counts(file: Path, networks: Mapping[str, Counts]) -> None:
    """Write the counts, one line for each table."""
    parts = []
    for name, counts in networks.items():
        tables = [f'  "{key}": {json.dumps(value)}' for key, value in counts.items()]
        parts.append(f' "{name}": {{\n' + ",\n".join(tables) + "\n }")
    text = f'{{"made_with": {json.dumps(_versions())},\n"networks": {{\n' + ",\n".join(parts)
    with atomic_path(file) as temporary:
        temporary.write_text(text + "\n}}\n")


def _versions() -> dict[str, str]:
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": torch.__version__.partition("+")[0]}


# -- counting -----------------------------------------------------------------------------------


def network(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a network in evaluation mode and its input; `swin` is one of two stages."""
    if name != "swin":
        return subject(name)
    vision = import_torchvision().models
    torch.manual_seed(0)
    model = vision.SwinTransformer([4, 4], 48, [2, 2], [3, 6], [7, 7])
    return model.eval(), torch.randn(1, 3, 112, 112)


def network_counts(model: torch.nn.Module, x: torch.Tensor) -> Counts:
    """Count what a model's graph and programs are made of, and the calls that making them takes.

    Each stage runs twice, and is counted the second time: what an operator costs once depends on
    what was compiled before. torch.export runs once; its calls are not counted.
    """
    with without_onednn():
        graph, capturing = _twice(_capturing(model, x))
        optimized, optimizing = _twice(lambda: fxopt.optimize(graph, verify="off"))
        eager, to_eager = _twice(lambda: fxopt.lower(optimized, backend=Eager(measure=False)))
        onnx, to_onnx = _twice(lambda: fxopt.lower(optimized, backend=Onnx()))
        eager(x)  # the first call takes a turn
        _, calling = _twice(lambda: eager(x))
    operators, program = program_counts(eager.executable.program)
    return {
        "captured nodes": _by_target(graph),
        "optimized nodes": _by_target(optimized),
        "eager operators": operators,
        "eager program": program,
        "onnx nodes": onnx.executable.op_counts(),
        "calls to capture": by_file(capturing),
        "calls to optimize": by_file(optimizing),
        "calls to lower to eager": by_file(to_eager),
        "calls to lower to onnx": by_file(to_onnx),
        "calls around the program": by_file(calling),
    }


@contextmanager
def without_onednn() -> Iterator[None]:
    """Leave oneDNN's own library out, whether it is installed or not."""
    try:
        with patch.dict(os.environ, {"FXOPT_ONEDNN": ""}):
            library.cache_clear()
            yield
    finally:
        library.cache_clear()


def _capturing(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], GraphModule]:
    """Return a capture of which torch.export runs once."""
    programs: list[Any] = []
    export = torch.export.export

    def once(*args: Any, **kwargs: Any) -> Any:
        if not programs:
            programs.append(export(*args, **kwargs))
        return programs[0]

    def run() -> GraphModule:
        with patch.object(torch.export, "export", once):
            return fxopt.capture(model, x)

    return run


def _by_target(graph: GraphModule) -> dict[str, int]:
    """Count the nodes of a graph by operator, sorted."""
    nodes = graph.graph.nodes
    names = [target_text(n.target) if n.op == "call_function" else str(n.op) for n in nodes]
    return dict(sorted(Counter(names).items()))


def program_counts(program: Program) -> tuple[dict[str, int], dict[str, int]]:
    """Count the calls of an eager program by operator, and what becomes of memory in it.

    "into new memory": calls that do not write over a value, views among them. "moves": values that
    are brought into another layout, or seen in one.
    """
    calls = [node for node in ast.walk(ast.parse(program.source)) if isinstance(node, ast.Call)]
    counts: Counter[str] = Counter()
    over = moves = 0
    for call in calls:
        if isinstance(call.func, ast.Attribute):  # x.contiguous(), x.clone()
            name = call.func.attr
        else:
            assert isinstance(call.func, ast.Name)
            bound = call.func.id
            target = program.operators.get(bound)
            name = bound.rpartition("_in_place")[0] or bound.rstrip("_0123456789")
            if target is not None:
                name = target_text(target)
            over += "_in_place_" in bound
        counts[name] += 1
        moves += any(move in name for move in _MOVES)
    table = {"calls": len(calls), "into new memory": len(calls) - over, "moves": moves}
    return dict(sorted(counts.items())), table


Calls = Counter[tuple[str, str]]  # made by (file, function)


def _twice(run: Callable[[], Any]) -> tuple[Any, Calls]:
    """Run something, then count the calls that functions make when it runs again."""
    run()
    return counted(run)


def counted(run: Callable[[], Any]) -> tuple[Any, Calls]:
    """Return a result, and how many calls (also of built-in functions) each function made."""
    profile = cProfile.Profile()
    gc.disable()
    try:
        result = profile.runcall(run)
    finally:
        gc.enable()
    made: Calls = Counter()
    for entry in profile.getstats():
        place = _place(entry.code)
        for callee in entry.calls or ():
            if getattr(callee.code, "co_name", "") not in _INLINED:
                made[place] += callee.callcount
    made.pop((_PROGRAM, ""), None)
    return result, made


def _place(code: Any) -> tuple[str, str]:
    """Return the file and function of code, which is a built-in function's name, or a code object.

    What runs beneath fxopt, in torch and Python itself, is one place, and the program none.
    """
    if isinstance(code, str) or not code.co_filename.startswith(_ROOT):
        return (_PROGRAM if getattr(code, "co_filename", "") == _PROGRAM else _OTHERS, "")
    return Path(code.co_filename).relative_to(_ROOT).as_posix(), code.co_qualname


def by_file(calls: Calls) -> dict[str, int]:
    """Add up calls by the file that makes them, sorted."""
    files: Counter[str] = Counter()
    for (file, _), count in calls.items():
        files[file] += count
    return dict(sorted(files.items()))


# -- judging counts -----------------------------------------------------------------------------


def judge(name: str, known: Counts, found: Counts) -> Verdict:
    """Compare the counts of a network with those that are committed."""
    verdict = Verdict()
    for table in sorted(known.keys() | found.keys()):
        before, after = known.get(table, {}), found.get(table, {})
        if table == "calls around the program":
            verdict += _judge_exactly(f"{name}: {table}", before, after)
        elif table.startswith("calls "):
            verdict += _judge_calls(f"{name}: {table}", before, after)
        elif table == "eager program":
            for key in sorted(before.keys() | after.keys()):
                one, other = before.get(key, 0), after.get(key, 0)
                verdict += _judge_exactly(f"{name}: {table}", {key: one}, {key: other})
        else:
            verdict += _judge_exactly(f"{name}: {table}", before, after)
    return verdict


def _judge_exactly(what: str, before: Mapping[str, int], after: Mapping[str, int]) -> Verdict:
    """Judge a table by its sum; one that changed and has the same sum is worse until written."""
    if before == after:
        return Verdict()
    names = sorted(before.keys() | after.keys())
    changes = [
        f"{name} {before.get(name, 0)} → {after.get(name, 0)}"
        for name in names
        if before.get(name, 0) != after.get(name, 0)
    ]
    one, other = sum(before.values()), sum(after.values())
    line = f"{what}: {one} → {other} ({', '.join(changes)})"
    return Verdict(better=[line]) if other < one else Verdict(worse=[line])


def _judge_calls(what: str, before: Mapping[str, int], after: Mapping[str, int]) -> Verdict:
    """Judge the calls that a stage makes: in all, by fxopt's own functions, and file by file."""
    verdict = Verdict()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    most = sorted(grown, key=lambda name: -abs(grown[name]))[:3]
    places = ", ".join(f"{name} {grown[name]:+,}" for name in most)
    one, other = sum(before.values()), sum(after.values())
    own, own_now = one - before.get(_OTHERS, 0), other - after.get(_OTHERS, 0)
    line = f"{what}: {one:,} → {other:,}, {other / max(one, 1) - 1:+.1%} (most: {places})"
    if other > one * MORE:
        return Verdict(worse=[line])
    if own_now > own * MORE:
        own_line = f"{own:,} → {own_now:,}, {own_now / max(own, 1) - 1:+.1%}"
        return Verdict(worse=[f"{what}, by fxopt's own functions: {own_line} (most: {places})"])
    for name, more in grown.items():
        known = before.get(name, 0)
        if name != _OTHERS and more > own / 100 and after[name] > known * MORE_OF_A_FILE:
            verdict.worse.append(f"{what}, in {name}: {known:,} → {after[name]:,}")
    if other * MORE < one and not verdict.worse:
        verdict.better.append(line)
    return verdict


# -- judging ratios -----------------------------------------------------------------------------


def judge_growth() -> Verdict:
    """Compare what a node costs in a large graph with what it costs in a small one."""
    verdict = Verdict()
    for kind, build in (("chain", chain), ("dag", dag)):
        work = {
            "optimize": lambda size, build=build: _optimizing(build(size)),
            "lower to eager": lambda size, build=build: _lowering(build(size)),
        }
        for stage, prepare in work.items():
            verdict += judge_stage(f"{stage}, a {kind}", prepare)
    return verdict


def judge_stage(what: str, prepare: Callable[[int], Callable[[], Any]]) -> Verdict:
    """Judge how the calls and the processor time of something grow with the nodes of a graph.

    `prepare` gets a number of nodes, and returns what is to be measured.
    """
    verdict = Verdict()
    small, large = SIZES
    prepare(small)()  # what an operator costs once
    few, many = (counted(prepare(size))[1] for size in SIZES)
    ratio = (many.total() / large) / (few.total() / small)
    if ratio > GROWTH:
        grown = {place: many[place] / large - few[place] / small for place in many}
        worst = sorted(grown, key=lambda place: -grown[place])[:3]
        places = ", ".join(f"{file} {name}" for file, name in worst)
        verdict.worse.append(
            f"{what}: calls per node grow {ratio:.2f}× from {small} to {large} nodes, and "
            f"{GROWTH}× is the bound (most: {places})"
        )
    slower = least(lambda: _seconds(prepare(large)) / large / (_seconds(prepare(small)) / small),
                   SLOWER)  # fmt: skip
    if slower > SLOWER:
        verdict.worse.append(
            f"{what}: time per node grows {slower:.1f}× from {small} to {large} nodes, and "
            f"{SLOWER}× is the bound"
        )
    return verdict


def least(measure: Callable[[], float], bound: float, attempts: int = 5) -> float:
    """Measure until a ratio is within its bound; other programs only make it larger."""
    found = measure()
    for _ in range(attempts - 1):
        if found <= bound:
            break
        found = min(found, measure())
    return found


def _seconds(run: Callable[[], Any]) -> float:
    gc.disable()
    started = time.process_time()
    try:
        run()
        return time.process_time() - started
    finally:
        gc.enable()


def _optimizing(graph: GraphModule) -> Callable[[], Any]:
    return lambda: fxopt.optimize(graph, verify="off")


def _lowering(graph: GraphModule) -> Callable[[], Any]:
    def run() -> None:
        with without_onednn():
            EagerExecutable(graph, own=True, measure=False)

    return run


def judge_overhead() -> Verdict:
    """Compare a call of a compiled model with one of its bare program, by turns."""
    model = torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(64)]).eval()
    x = torch.randn(4)
    with without_onednn():
        compiled = fxopt.compile(model, x, backend=Eager(measure=False))
    ratio = least(lambda: overhead(compiled, x), OVERHEAD)
    if ratio <= OVERHEAD:
        return Verdict()
    return Verdict([
        f"a call of a model takes {ratio:.1f}× as long as its program, and {OVERHEAD}× is the bound"
    ])  # fmt: skip


def overhead(compiled: Any, x: torch.Tensor, rounds: int = 7, calls: int = 30) -> float:
    """Return how many times as long a call takes as one of the bare program: a median."""
    function = compiled.executable.program.function
    ratios = []
    with torch.no_grad():
        for _ in range(rounds):
            times = []
            for one in (function, compiled):
                started = time.process_time()
                for _ in range(calls):
                    one(x)
                times.append(time.process_time() - started)
            ratios.append(times[1] / times[0])
    return statistics.median(ratios)


if __name__ == "__main__":
    sys.exit(main())
