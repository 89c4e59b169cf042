"""fxopt.bisect: which pass, and which rewrite of it, makes a model's result wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import fx

from fxopt.backend import Backend
from fxopt.bisection.attempt import Verdict, count_text
from fxopt.bisection.judge import Judge
from fxopt.bisection.localize import wrong_after_pass, wrong_on_backend
from fxopt.bisection.reproduction import Reproduction, check_place, reproduce
from fxopt.bisection.search import Finding, Search
from fxopt.bisection.site import Site
from fxopt.compile import Settings, prepare, unwrapped
from fxopt.contract import Effect, Pass
from fxopt.errors import FxoptError, OptionError, VerifyError
from fxopt.graph_module import GraphModule
from fxopt.oracle import Oracle, captured_wrong
from fxopt.registry import check_available, options_of, resolve_backend, spec_of
from fxopt.text import node_text

Blamed = Literal["nothing", "capture", "backend", "oracle", "pass"]
MOST_LINES, FEW_LINES = 40, 8  # that are printed of what a rewrite, or a whole pass, changed


def bisect(
    model_or_graph: Any,
    example_inputs: Any = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    oracle: Callable[[Any], Any] | None = None,
    threshold: float | None = None,
    backend: str | Backend | None = None,
    tolerance: float | None = None,
    precision: str | None = None,
    dynamic_shapes: Any = None,
    verify_inputs: Any = None,
    script: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Bisection:
    """Find the pass, and the one rewrite within it, after which the model's result is wrong.

    A result is wrong where it differs from the model's own by more than the bound of verification
    (`tolerance`, or what the dtype and the model warrant). With `backend`, the result is the one
    of the graph lowered to it. With `oracle`, that function decides: it gets the graph (with a
    backend the compiled model), called like the model, and returns True for right and False for
    wrong, or a metric that is right from `threshold` on. A lossy pass changes results by intent,
    so only an oracle judges it; otherwise what it made is the reference for what comes after it.

    With `script`, a stand-alone script that reproduces what was found is written to that path.
    The other arguments are those of `fxopt.compile`. Neither the model nor the passes change.

    Raises CaptureError, PreconditionError, BackendUnavailable, and OptionError, also
    where the script cannot be written.
    """
    started = time.perf_counter()
    if not (oracle is None or callable(oracle)):
        raise OptionError(f"oracle must be a function of the graph, not {oracle!r}.")
    if threshold is not None and oracle is None:
        raise OptionError("threshold= is for the metric that oracle= returns; pass oracle=.")
    if not (threshold is None or isinstance(threshold, (int, float))):
        raise OptionError(f"threshold must be a number, not {threshold!r}.")
    settings = Settings.of(
        passes, dynamic_shapes=dynamic_shapes, precision=precision, verify_inputs=verify_inputs,
        tolerance=tolerance, progress=progress,
    )  # fmt: skip
    if script is not None:
        check_place(Path(script))
    chosen = None if backend is None else resolve_backend(backend)
    if chosen is not None:
        check_available(chosen)
    graph, reference = prepare(unwrapped(model_or_graph), example_inputs, settings)
    judge = Judge(reference, chosen, oracle, threshold)
    finding = Search(graph, settings.passes, judge, settings.progress).find()
    found = _bisection(graph, settings.passes, finding)
    if script is not None and found.blame in ("pass", "backend"):
        settings.progress(f"look for the smallest model that shows it, for {script}")
        found = replace(found, script=found.write_script(script))
    return replace(found, seconds=time.perf_counter() - started)


def find_guilty(start: GraphModule, passes: Sequence[Pass], oracle: Oracle) -> tuple[Pass, str]:
    """Return the pass that breaks `start`, and the words; for the pipeline's verification.

    Raises VerifyError where no pass does: where capture is to blame, or chance.
    """
    found = _bisection(start, passes, Search(start, passes, Judge(oracle)).find())
    if found.blame == "nothing":
        raise VerifyError(
            "The optimized graph differs from the original, but not when the passes are run "
            "again: one of them is not deterministic. Run with verify='each'."
        )
    if found.guilty is None or found.site is None:
        raise VerifyError(found.summary)
    lines = found.site.diff.splitlines()
    return found.guilty, "\n".join([
        f"Pass '{found.guilty.name}' changed what the model computes: {found.reason}.",
        found.where,
        *(f"  {line}" for line in lines[:20]),
        *([f"  … and {len(lines) - 20} more lines"] if len(lines) > 20 else []),
        "This is a bug of the pass. Leave it out of passes=, or go on without it with "
        "on_error='skip'. fxopt.bisect(...) writes a script that reproduces it.",
    ])  # fmt: skip


@dataclass(frozen=True, repr=False)
class Bisection:
    """What `bisect` found: print it, take it as JSON, or let it write a script.

    `blame` is "pass", "nothing", or what is wrong before any pass: "capture", "backend" or
    "oracle". `runs` counts the graphs that were judged. `note` says whether a backend is wrong
    itself, and `node` which call it lowers wrongly; or, where the rewrites of a pass cannot be told
    from each other, the call up to which the graph is needed to see it go wrong.
    """

    model_name: str
    passes: tuple[Pass, ...]
    blame: Blamed
    finding: Finding
    runs: int
    note: str = ""
    node: fx.Node | None = None
    backend_is_wrong: bool = False
    seconds: float = 0.0
    script: Reproduction | None = None

    @property
    def guilty(self) -> Pass | None:
        """The pass that makes the result wrong."""
        return self.finding.stage.one if self.finding.stage is not None else None

    @property
    def number(self) -> int | None:
        """The wrong rewrite's number among the `total` of its pass; None where it is unknown."""
        return self.finding.number

    @property
    def total(self) -> int:
        """How many rewrites the guilty pass makes."""
        return self.finding.total

    @property
    def rule(self) -> str | None:
        """The rule that made the rewrite, in a pass that is made of rules."""
        return self.finding.rule

    @property
    def reason(self) -> str:
        """What is wrong, in words."""
        return self.finding.verdict.reason

    @property
    def error(self) -> float | None:
        """max |Δ| / max |reference|; None where a function judged."""
        return self.finding.verdict.error

    @property
    def bound(self) -> float | None:
        """The bound on `error`."""
        return self.finding.verdict.bound

    @property
    def obstacle(self) -> str:
        """Why the search ended at the pass; empty where it found the rewrite."""
        return self.finding.obstacle

    @cached_property
    def site(self) -> Site | None:
        """What the rewrite changed; or the pass, where its rewrites cannot be told apart."""
        if self.finding.right is None or self.finding.wrong is None:
            return None
        return Site(self.finding.right, self.finding.wrong)

    @property
    def fragment(self) -> str:
        """The lines of the graph's text that the rewrite changed, as a diff."""
        return self.site.diff if self.site is not None else ""

    @property
    def where(self) -> str:
        """Which rewrite is wrong, in a sentence; with the user's line, where it is known."""
        assert self.site is not None
        if self.number is None:
            return f"{self.obstacle}."
        path, source = self.site.place["path"], self.site.place["source"]
        by = f", by the rule {self.rule}" if self.rule else ""
        at = f", in {path}" if path else ""
        line = f"\n  from {source}" if source else ""
        return f"The first wrong rewrite is number {self.number} of {self.total}{by}{at}.{line}"

    @property
    def summary(self) -> str:
        """The result in one sentence."""
        if self.blame == "nothing":
            passes = f"{len(self.passes)} pass{'' if len(self.passes) == 1 else 'es'}"
            ran = f"{count_text(self.finding.rewrites, 'rewrite')} in {passes}"
            return f"Nothing is wrong after {ran}: {self.reason}.{self._lossy()}"
        if self.blame == "capture":
            return captured_wrong(self.reason)
        if self.blame == "backend":
            return f"The backend is wrong before any pass: {self.reason}."
        if self.blame == "oracle":
            return (
                "Your own acceptance refuses the graph even before the first pass, though it "
                f"computes what the model does: {self.reason}."
            )
        assert self.guilty is not None
        wrong = "makes the result wrong" if self.finding.verdict.kind != "fails" else "is wrong"
        return f"The pass '{spec_of(self.guilty)}' {wrong}: {self.reason}."

    def write_script(self, path: str | Path) -> Reproduction:
        """Write a stand-alone script that fails as long as the error is there.

        It holds the smallest part of the model that shows it; what else it needs is written beside
        it. Raises OptionError where the path cannot be written, and FxoptError where nothing is
        wrong.
        """
        if self.blame == "nothing":
            raise FxoptError(f"There is nothing to reproduce. {self.summary}")
        if self.blame in ("capture", "oracle"):
            raise FxoptError(f"No script can stand for the model itself. {self.summary}")
        return reproduce(self, Path(path))

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        site, finding = self.site, self.finding
        known = {} if site is None else {
            "created": list(site.created), "erased": list(site.erased),
            "changed": list(site.changed), **site.place, "fragment": site.diff.splitlines(),
        }  # fmt: skip
        guilty = None if self.guilty is None else {
            "pass": self.guilty.name,
            "options": {key: repr(value) for key, value in options_of(self.guilty).items()},
            "spec": spec_of(self.guilty),
            "rewrite": self.number, "rewrites": self.total, "rule": self.rule,
            "earlier_rewrites": finding.earlier, "obstacle": self.obstacle or None, **known,
        }  # fmt: skip
        return {
            "model": self.model_name,
            "blame": self.blame,
            "summary": self.summary,
            "reason": self.reason,
            "error": self.error,
            "bound": self.bound,
            "guilty": guilty,
            "note": self.note or None,
            "node": self.node.name if self.node is not None else None,
            "passes": [spec_of(one) for one in self.passes],
            "rewrites": finding.rewrites,
            "runs": self.runs,
            "seconds": self.seconds,
            "script": None if self.script is None else self.script.to_json(),
        }

    def __repr__(self) -> str:
        return f"<Bisection of {self.model_name}: {self.summary}>"

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self._lines())

    def __rich__(self) -> Any:
        from rich.text import Text

        return Text("\n").join(Text(line, style=style) for line, style in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Yield the lines that a person sees, each with its style."""
        yield self.summary, "bold"
        if self.site is not None:
            yield self.where, ""
            if self.number is not None and self.total < self.finding.rewrites:
                overall = self.finding.earlier + self.number
                yield f"Over all passes it is number {overall} of {self.finding.rewrites}.", ""
        if self.note:
            yield f"{self.note}{'.' if self.node is None else ':'}", ""
        if self.node is not None:
            yield f"  {node_text(self.node, inline=True)}", ""
        lines = self.fragment.splitlines()
        most = MOST_LINES if self.number is not None else FEW_LINES
        for line in lines[:most]:
            yield f"  {line}", {"+": "green", "-": "red", "@": "dim"}.get(line[:1], "")
        if len(lines) > most:
            yield f"  … and {len(lines) - most} more lines", "dim"
        judged = count_text(self.runs, "graph")
        yield f"{judged} judged in {self.seconds:.1f} s.", "dim"
        if self.script is not None:
            yield str(self.script), ""

    def _lossy(self) -> str:
        names = [one.name for one in self.passes if one.effect is Effect.LOSSY]
        if not names or not self.finding.judge.follows_lossy:
            return ""
        return (
            f" What '{names[0]}' changes, it changes by intent, so only what comes after it was "
            "compared. To judge it, give a metric: oracle= and threshold=."
        )


def _bisection(start: GraphModule, passes: Sequence[Pass], finding: Finding) -> Bisection:
    """Say who is to blame; where a graph is wrong before any pass, or on a backend, ask further."""
    found = Bisection(start.info.model_name, tuple(passes), "nothing", finding, finding.runs)
    if finding.blame == "pass":
        return _in_detail(replace(found, blame="pass"))
    if finding.blame == "nothing":
        return found
    judge, verdict = finding.judge, finding.verdict
    blame: Blamed = "oracle"
    plain = judge.compare(start)
    if not plain.right:
        blame, verdict = "oracle" if plain.kind == "refused" else "capture", plain
    elif judge.backend is not None:
        lowered = judge.compare_lowered(start)
        blame, verdict = ("oracle", verdict) if lowered.right else ("backend", lowered)
    found = replace(found, blame=blame, finding=replace(finding, verdict=verdict, wrong=start))
    if blame != "backend":
        return found
    return replace(found, node=_node(judge, start, verdict), backend_is_wrong=True)


def _in_detail(found: Bisection) -> Bisection:
    """Say at which call an error begins that has no one rewrite, or that only a backend shows."""
    finding = found.finding
    judge, wrong = finding.judge, finding.wrong
    can_cut = judge.function is None and finding.verdict.kind != "spoils"
    if finding.number is None and finding.stage is not None and can_cut:
        stage = finding.stage
        node = wrong_after_pass(stage.before, stage.one, judge.oracle, finding.verdict)
        note = "" if node is None else "The shortest beginning of the graph that shows it ends with"
        return replace(found, note=note, node=node)
    if judge.backend is None or wrong is None or finding.verdict.kind == "fails":
        return found
    if not judge.compare(wrong).right:
        note = "The graph is wrong in PyTorch, too: the rewrite is to blame, not the backend"
        return replace(found, note=note, runs=found.runs + 1)
    return replace(
        found,
        note=f"PyTorch runs the same graph rightly: '{judge.backend.name}' is to blame, for",
        node=_node(judge, wrong, finding.verdict),
        backend_is_wrong=True,
        runs=found.runs + 1,
    )


def _node(judge: Judge, graph: GraphModule, verdict: Verdict) -> fx.Node | None:
    """Return the call that the backend computes wrongly, where that can be told."""
    if judge.backend is None or verdict.kind != "differs":
        return None
    return wrong_on_backend(graph, judge.backend, judge.oracle)
