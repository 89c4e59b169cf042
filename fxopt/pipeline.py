"""The pipeline: a list of passes, each run under contract, recorded, and verified."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from fxopt import dialect
from fxopt.contract import Effect, Pass, PassResult
from fxopt.errors import FxoptError, PreconditionError, VerifyError
from fxopt.graph_module import GraphModule
from fxopt.oracle import Oracle
from fxopt.registry import options_of
from fxopt.story import Recorder, Step, Story

log = logging.getLogger("fxopt")
Progress = Callable[[str], None]
VERIFY = ("final", "each", "off")
ON_ERROR = ("raise", "skip")


def run_passes(
    graph: GraphModule,
    passes: Sequence[Pass],
    oracle: Oracle,
    *,
    on_error: str = "raise",
    progress: Progress | None = None,
) -> Story:
    """Run `passes` on `graph`, in place, and return the story.

    Each pass: its preconditions are checked, it runs, the dialect is checked, a Step is recorded.
    Exact passes are verified by the oracle: after each ("each"), or after the last ("final"), and
    then, on failure, the passes are run again on a copy to find the guilty one. A lossy pass starts
    a new reference: what follows it must compute what it made.

    Raises PreconditionError, VerifyError, or FxoptError around what a pass raised, unless
    `on_error="skip"`, which undoes that pass and goes on.
    """
    run = _Run(graph, oracle, on_error, progress or (lambda text: None))
    for one in passes:
        run.apply(one)
    run.settle()
    run.story.renamed = _renamed(graph)
    graph.info.story = run.story
    return run.story


class _Run:
    """One run of the pipeline over one graph."""

    def __init__(
        self, graph: GraphModule, oracle: Oracle, on_error: str, progress: Progress
    ) -> None:
        self.graph = graph
        self.oracle = oracle
        self.skip = on_error == "skip"
        self.progress = progress
        self.recorder = Recorder()
        self.story = Story(
            graph.info.model_name,
            self.recorder.snapshot(graph),
            graph.info.capture_seconds,
            graph.info.regularizers,
        )
        self._segment: list[Pass] = []  # the exact passes since the last verification
        self._segment_steps = 0
        self._start: GraphModule = oracle.original  # the graph before them
        self._verified = False

    def _begin_segment(self) -> None:
        """Remember the graph as it is: what the passes from here on must not change."""
        self._segment = []
        self._segment_steps = len(self.story.steps)
        self._verified = True

    def apply(self, one: Pass) -> None:
        """Run one pass, record its step, and verify it if every pass is to be verified."""
        self.progress(one.name)
        lossy = one.effect is Effect.LOSSY
        if lossy:
            self.settle()
        elif self.oracle.mode == "final" and self._verified and not self._segment:
            self._start = self.graph.copy()
        undo = self.graph.copy() if self.skip or self.oracle.mode == "each" else None
        before = self.story.final
        started = time.perf_counter()
        try:
            result = run_pass(one, self.graph)
            seconds = time.perf_counter() - started
            dialect.check(self.graph, changed={*result.created, *result.changed})
        except Exception as error:
            if undo is None or not self.skip:
                raise _in_pass(one, error, self.story) from error
            self._roll_back(one, undo, str(error), time.perf_counter() - started)
            return
        after = self.recorder.snapshot(self.graph)
        self.story.steps.append(_step(one, before, after, seconds, result))
        if lossy:
            self.oracle = self.oracle.since(self.graph)
            self._begin_segment()
            self._verified = self.oracle.accept is None  # which has not seen what it made
        elif self.oracle.mode == "each" and result.modified:
            self._verify_one(one, undo)
        else:
            self._segment.append(one)
            self._verified &= not result.modified

    def settle(self) -> None:
        """Verify the passes since the last verification; on failure, find the guilty one."""
        if self.oracle.mode != "final" or self._verified:
            return
        self.progress("verify")
        verdict = self.oracle.judge(self.graph)
        self.story.verifications.append(verdict)
        if verdict.passed:
            self._begin_segment()
            return
        if not self._segment:  # nothing ran since a lossy pass: only the user can refuse that
            name = self.story.steps[-1].name
            raise VerifyError(f"Your own acceptance refused what the pass '{name}' made.")
        guilty, message = _find_guilty(self._start, self._segment, self.oracle)
        if not self.skip:
            raise VerifyError(message)
        log.warning("%s It was skipped.", message)
        redo = self._segment
        self._restore(self._start.copy())
        del self.story.steps[self._segment_steps :]
        self._begin_segment()
        self._verified = False
        reason = f"verification failed: error {verdict.error:.2g} > {verdict.bound:.2g}"
        for one in redo:
            if one is guilty:
                self._record_skip(one, reason, 0.0)
            else:
                self.apply(one)
        self.settle()

    def _verify_one(self, one: Pass, undo: GraphModule | None) -> None:
        verdict = self.oracle.judge(self.graph, f"after {one.name}")
        self.story.verifications.append(verdict)
        if verdict.passed:
            return
        assert undo is not None
        _, message = _find_guilty(undo, [one], self.oracle)
        if not self.skip:
            raise VerifyError(message)
        log.warning("%s It was skipped.", message)
        seconds = self.story.steps.pop().seconds
        reason = f"verification failed: error {verdict.error:.2g} > {verdict.bound:.2g}"
        self._roll_back(one, undo, reason, seconds)

    def _roll_back(self, one: Pass, undo: GraphModule, reason: str, seconds: float) -> None:
        log.warning("%s was rolled back: %s", one.name, reason)
        self._restore(undo)
        self._record_skip(one, reason, seconds)

    def _record_skip(self, one: Pass, reason: str, seconds: float) -> None:
        state = self.recorder.snapshot(self.graph)
        self.story.steps.append(
            replace(_step(one, state, state, seconds, PassResult()), skipped=reason)
        )

    def _restore(self, saved: GraphModule) -> None:
        """Make the graph what `saved` is."""
        self.graph.become(saved)


def _find_guilty(start: GraphModule, passes: Sequence[Pass], oracle: Oracle) -> tuple[Pass, str]:
    """Run `passes` again on copies of `start`; return the first that breaks it, and the words."""
    from fxopt.bisection import find_guilty  # which runs passes through this module

    return find_guilty(start, passes, oracle)


def legalize(graph: GraphModule, passes: Iterable[Pass]) -> None:
    """Run a backend's own passes on its own graph, which must be legal after each."""
    for one in passes:
        result = run_pass(one, graph)
        dialect.check(graph, changed={*result.created, *result.changed})


def run_pass(one: Pass, graph: GraphModule) -> PassResult:
    """Run a pass on the sub-graphs of control flow, then on the graph itself.

    Raises PreconditionError where the graph is not what the pass needs.
    """
    _check_preconditions(one, graph)
    result = PassResult()
    for part in (*graph.subgraphs(), graph):
        done = one.run(part)
        if not isinstance(done, PassResult):
            raise FxoptError(
                f"run() returned {done!r}, and a pass returns a PassResult: end it with "
                "`return rewriter.result()`"
            )
        result = result.plus(done)
    return result


def _check_preconditions(one: Pass, graph: GraphModule) -> None:
    for condition in one.requires:
        reason = condition.check(graph)
        if reason is not None:
            raise PreconditionError(f"'{one.name}' needs {condition.name}: {reason}")


def _in_pass(one: Pass, error: Exception, story: Story) -> Exception:
    """Wrap what a pass raised, with the passes that ran before it."""
    before = ", ".join(step.name for step in story.steps) or "none"
    if isinstance(error, FxoptError):
        return type(error)(f"{error} (in pass '{one.name}'; passes before it: {before})")
    return FxoptError(
        f"Pass '{one.name}' failed with {type(error).__name__}: {error}. Passes before it: "
        f"{before}. Leave it out of passes=, or go on without it with on_error='skip'."
    )


def _step(one: Pass, before: Any, after: Any, seconds: float, result: PassResult) -> Step:
    return Step(
        name=one.name,
        options=options_of(one),
        effect=one.effect,
        before=before,
        after=after,
        seconds=seconds,
        rewrites=result.rewrites,
        misses=result.misses,
        created=result.created,
        erased=result.erased,
        changed=result.changed,
        origins=result.origins,
        rules=result.rules,
        details=result.details,
    )


def _renamed(graph: GraphModule) -> dict[str, tuple[str, ...]]:
    """Map each captured constant to those that now hold what was computed from it."""
    reaches: dict[str, set[str]] = {}
    live = set(graph.constants())
    for recipe in reversed(graph.info.recipes):
        targets = reaches.get(recipe.name, set()) | ({recipe.name} & live)
        for source in recipe.sources:
            reaches.setdefault(source, set()).update(targets)
    return {
        name: tuple(sorted(reaches[name])) for name in sorted(graph.info.sources) if name in reaches
    }
