"""The script of a bisection: the smallest model that shows the error, and a check that fails.

Candidates are tried from the smallest on: the calls that the rewrite was about, then with those
around them, then with all of the modules around them, each with random values first and then with
the true ones; at last the whole graph, in a file beside the script. The first that fails in a
process of its own, too, is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.bisection.fragment import Fragment, fragment
from fxopt.bisection.localize import cut_off
from fxopt.bisection.module_code import ModuleCode, Unspellable
from fxopt.bisection.script import Script, Setting, graph_script, module_script
from fxopt.capture import capture
from fxopt.difference import relative_error
from fxopt.errors import ArtefactError, OptionError
from fxopt.files import write_atomic
from fxopt.imports import place_of
from fxopt.shapes import is_tensor
from fxopt.verify import bound_of, runner, seeded

if TYPE_CHECKING:
    from fxopt.bisection import Bisection

RINGS = 2  # how often a fragment grows by its neighbours, before it grows to its module
MOST_TRIALS = 60  # to leave calls out of a fragment that shows the error
MOST_CALLS = 200  # in a script; more are a file
SAYS = ("max |Δ| / max |reference| is", "The oracle says")  # a script that ran to its end
PATIENCE = 600.0  # seconds for the script's own process
NOT_RUN = "It was not run: it needs something that no other process can import, see its comment"


@dataclass(frozen=True)
class Reproduction:
    """The script that was written, or why there is none."""

    path: Path | None
    holds: str = ""  # how much of the model it holds, in words
    calls: int = 0
    files: tuple[Path, ...] = ()  # what it reads
    confirmed: bool = False  # it failed as it should, in a process of its own
    remark: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            **vars(self), "path": None if self.path is None else str(self.path),
            "files": [str(file) for file in self.files],
        }  # fmt: skip

    def __str__(self) -> str:
        if self.path is None:
            return f"No script: {self.remark}."
        with_files = f", with {', '.join(file.name for file in self.files)}" if self.files else ""
        proof = "It was run and fails as it should." if self.confirmed else f"{self.remark}."
        return f"Wrote {self.path}{with_files}: {self.holds}. {proof}"


def check_place(path: Path) -> None:
    """Raise OptionError where a script cannot be written; asked before the search begins."""
    if path.suffix != ".py":
        raise OptionError(f"Cannot write '{path}': a script is called *.py.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
        raise OptionError(f"Cannot write '{path}': {reason}.")


def reproduce(found: Bisection, path: Path) -> Reproduction:
    """Write the script; see `Bisection.write_script`."""
    check_place(path)
    return _Reproducer(found, path).run()


class _Reproducer:
    """Looks for the script of one bisection."""

    def __init__(self, found: Bisection, path: Path) -> None:
        self.found = found
        self.path = path
        self.judge = found.finding.judge
        self.verdict = found.finding.verdict
        self.least = _change(found) / 2 if self.judge.function is not None else 0.0
        self.obstacle = "no part of the model shows the error on its own"

    def run(self) -> Reproduction:
        """Write the first candidate that fails as it should."""
        for script in self._candidates():
            outcome = self._run_alone(script) if script.is_reachable else NOT_RUN
            if outcome != "right":
                return self._write(script, outcome)
        return Reproduction(None, remark=self.obstacle)

    # -- candidates ---------------------------------------------------------------------------

    def _candidates(self) -> Iterator[Script]:
        """Yield scripts that fail as they should in this process, from the smallest model on."""
        for setting in self._settings():
            for part in self._fragments(setting):
                script = self._smallest(setting, part)
                if script is not None:
                    yield script
                    break
        for setting in self._settings():
            yield from self._whole(setting)

    def _settings(self) -> Iterator[Setting]:
        """Yield what a script may do, the plainest first."""
        found, finding = self.found, self.found.finding
        node = () if found.node is None else (found.node,)
        if found.backend_is_wrong:
            wrong = finding.wrong
            assert wrong is not None
            made = found.site.made if found.site is not None else ()
            yield Setting(wrong, wrong, node or made, False, True)
        if finding.stage is not None:
            assert found.site is not None
            _, part, _ = found.site.part
            calls = found.site.core
            if finding.number is None and node:
                part, calls = finding.stage.before, node
            yield Setting(part, found.site.before, calls, True, found.backend_is_wrong)

    def _fragments(self, setting: Setting) -> Iterator[Fragment]:
        """Yield ever larger parts of the graph around the calls in question."""
        if not setting.calls:
            return
        part, known = fragment(setting.graph, setting.calls), 0
        for larger in self._growth(part):
            if known < len(larger.calls) <= MOST_CALLS:
                known = len(larger.calls)
                yield larger

    def _growth(self, part: Fragment) -> Iterator[Fragment]:
        """Yield a fragment, then with what is around it, then with one module around another."""
        parts = part.path.split(".")
        yield part
        for _ in range(RINGS):
            part = part.grown()
            yield part
        for depth in reversed(range(len(parts))):
            yield part.within(".".join(parts[:depth]))

    def _smallest(self, setting: Setting, part: Fragment) -> Script | None:
        """Return the script of a fragment that shows the error, less what it does not need."""
        for script in self._of_fragment(setting, part):
            if not self._fails_here(script):
                continue
            return self._reduced(setting, part, script)
        return None

    def _reduced(self, setting: Setting, part: Fragment, script: Script) -> Script:
        """Leave out what the error does not need: halves of the calls first, single ones last.

        Source: Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input" (2002).
        """
        trials, size = 0, len(part.calls) // 2
        while size and trials < MOST_TRIALS:
            for start in range(0, len(part.calls), size)[::-1]:
                smaller = part.without(part.calls[start : start + size])
                if not smaller.outputs or len(smaller.calls) >= len(part.calls):
                    continue
                trials += 1
                again = next(self._of_fragment(setting, smaller, (script.is_random,)), None)
                if again is not None and self._fails_here(again):
                    part, script = smaller, again
            size //= 2
        return script

    def _of_fragment(
        self, setting: Setting, part: Fragment, kinds: tuple[bool, ...] = (True, False)
    ) -> Iterator[Script]:
        """Yield the scripts that hold a fragment, with random values and with the true ones."""
        inside = setting.graph is not setting.whole
        for random in kinds:
            for flat in self.judge.oracle.inputs[: 1 if random else 3]:
                if inside and not random:
                    continue  # nobody outside sees the values inside of control flow
                try:
                    values = _values(part, None if inside else flat)
                    yield module_script(self.found, setting, ModuleCode(part, values, random))
                except (Unspellable, RuntimeError) as error:
                    self.obstacle = str(error)

    def _whole(self, setting: Setting) -> Iterator[Script]:
        inputs = self.judge.oracle.inputs[:3]
        if self.judge.function is not None and place_of(self.judge.function) is not None:
            yield graph_script(self.found, setting, inputs[0], ask=True)
        for flat in inputs:
            yield graph_script(self.found, setting, flat)

    # -- trials -------------------------------------------------------------------------------

    def _fails_here(self, script: Script) -> bool:
        """Run a script's body in this process; adopt the bound that its numbers warrant."""
        names = script.namespace()
        try:
            exec(compile(script.body, "<fxopt reproduction>", "exec"), names)
            error = names["measure"]()
        except Exception as raised:
            return self._is_expected(raised)
        if self.verdict.raised:
            return False
        script.bound = max(self._bound(names, error), self.least)
        return bool(error > script.bound)

    def _is_expected(self, raised: Exception) -> bool:
        """Whether what a script raised is what the pass or the backend raised before."""
        wanted = self.verdict.raised
        names = (type(raised).__name__, str(raised))
        return bool(wanted) and (wanted == names[0] or f"with {wanted}:" in names[1])

    def _bound(self, names: Mapping[str, Any], error: float) -> float:
        """Return the bound of verification for the script's own model."""
        graph = capture(names["Fragment"]().eval(), names["inputs"]())
        return bound_of(error, graph, graph.info.example_inputs, self.judge.oracle.tolerance)

    def _run_alone(self, script: Script) -> str:
        """Run a script in a process of its own.

        Returns nothing where it fails as it should, "right" where it does not fail, and otherwise
        what it says instead.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "reproduction.py"
            try:
                script.write_files(path)
            except ArtefactError as error:
                self.obstacle = str(error)
                return "right"
            write_atomic(path, script.text)
            done = _run(path)
        wanted = self.verdict.raised
        said = wanted in done.stderr if wanted else any(words in done.stdout for words in SAYS)
        if done.returncode == 1 and said:
            return ""
        if done.returncode == 0:
            self.obstacle = "in a process of its own, no part of the model shows the error"
            return "right"
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return f"In a process of its own it says: {last}"

    def _write(self, script: Script, remark: str) -> Reproduction:
        files = script.write_files(self.path)
        write_atomic(self.path, script.text)
        return Reproduction(self.path, script.holds, script.calls, files, not remark, remark)


def _change(found: Bisection) -> float:
    """Return by how much a rewrite changed the values that it replaced, in the model's own run.

    Where a user's function judges, any rewrite may change results a little, by intent; what a
    script shows must be comparable to what was refused.
    """
    site, flat = found.site, found.finding.judge.oracle.inputs[0]
    if site is None or site.part[0] or found.number is None:
        return 0.0
    pairs = [(a, b) for a, b in site.replaced if is_tensor(a) and is_tensor(b)]
    if not pairs:
        return 0.0
    before, after = (cut_off(graph, [pair[side] for pair in pairs])
                     for side, graph in enumerate((site.before, site.after)))  # fmt: skip
    expected, changed = (list(seeded(runner(graph), flat)) for graph in (before, after))
    return relative_error(changed, expected)


def _run(path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process that finds this fxopt."""
    ours = str(Path(__file__).parents[2])  # the folder that holds fxopt
    places = [ours, *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE, env=environment
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "", f"nothing for {PATIENCE:.0f} seconds")


def _values(part: Fragment, flat: tuple[Any, ...] | None) -> dict[fx.Node, Any]:
    """Return what a fragment's inputs and constants are, in a run of the graph on `flat`.

    Inside of control flow nothing can be recorded: random numbers of the right types stand for it.
    """
    values = {node: part.graph.value(node) for node in part.constants}
    if flat is None:
        return values | {node: _made_up(node.meta.get("val")) for node in part.inputs}
    if part.inputs:
        run = runner(cut_off(part.graph, part.inputs))
        values |= dict(zip(part.inputs, seeded(run, flat), strict=True))
    return values


def _made_up(value: Any) -> Any:
    """Return a value of a fake one's type."""
    if isinstance(value, torch.Tensor):
        shape = [_hint(size) for size in value.shape]
        if value.is_floating_point() or value.is_complex():
            return torch.randn(shape, dtype=value.dtype)
        return torch.ones(shape, dtype=value.dtype)
    return _hint(value)


def _hint(size: Any) -> Any:
    return size if isinstance(size, (int, float)) else size.node.hint
