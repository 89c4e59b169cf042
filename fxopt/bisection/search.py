"""The search for the first wrong rewrite: by bisection over the passes, then over one's rewrites.

Whoever judges says whether a graph is right. Before the first pass it is, after the last it is not;
so somewhere between stands a rewrite that a right graph goes into and a wrong one comes out of.
Bisection finds one such rewrite among n in log₂ n judgements. Where later rewrites hide or repair
what an earlier one broke there may be several: any one that it finds is real.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fxopt.bisection.attempt import (
    Attempt,
    Verdict,
    attempt,
    difference_of_runs,
    parts_of,
    whole_text,
)
from fxopt.bisection.judge import Judge
from fxopt.contract import Effect, Pass
from fxopt.graph_module import GraphModule

Blame = Literal["nothing", "start", "pass"]
TOGETHER = "Its rewrites cannot be told from each other"


@dataclass(frozen=True)
class Stage:
    """A pass that changed something, or failed, in its place among the others."""

    one: Pass
    before: GraphModule
    after: Attempt
    obstacle: str = ""  # why its rewrites cannot be told apart


@dataclass
class Segment:
    """Passes that are judged alike: those between two lossy ones."""

    start: GraphModule
    judge: Judge
    earlier: int = 0  # the rewrites before it
    start_is_right: bool = False
    stages: list[Stage] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """What a search found. `right` and `wrong` are the graphs before and after what is wrong.

    `number` is the wrong rewrite's among the `total` of its pass; None where it cannot be told, and
    then `obstacle` says why in a sentence.
    """

    blame: Blame
    verdict: Verdict
    judge: Judge
    runs: int  # how many graphs were judged
    rewrites: int  # of all passes together, as far as they ran
    stage: Stage | None = None
    right: GraphModule | None = None
    wrong: GraphModule | None = None
    number: int | None = None
    total: int = 0
    earlier: int = 0  # the rewrites of the passes before
    rule: str | None = None
    obstacle: str = ""


class Search:
    """One search over a list of passes, from one graph that stays as it is."""

    def __init__(
        self,
        start: GraphModule,
        passes: Sequence[Pass],
        judge: Judge,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.start = start
        self.passes = list(passes)
        self.judge = judge
        self.progress = progress or (lambda text: None)
        self.runs = 0
        self.rewrites = 0

    def find(self) -> Finding:
        """Return the first wrong rewrite, or that there is none.

        Raises PreconditionError where a graph is not what a pass needs.
        """
        stages = self._follow(self.passes)
        self.rewrites = sum(stage.after.spent for stage in stages)
        last = Verdict(True, "there is nothing to judge", "differs")
        for segment in self._segments(stages):
            found = self._in_segment(segment)
            if isinstance(found, Finding):
                return found
            last = found
        return self._finding("nothing", last, self.judge)

    # -- the passes -----------------------------------------------------------------------------

    def _follow(self, passes: Sequence[Pass]) -> list[Stage]:
        """Run the passes one after another, each on a copy; keep those that changed something."""
        graph = copy.deepcopy(self.start)  # a pass that writes to a weight must not reach the model
        sums = _checksums(graph)
        stages: list[Stage] = []
        for index, one in enumerate(passes):
            self.progress(one.name)
            done = attempt(one, graph)
            again = _checksums(graph)
            written = [name for name in sums if again[name] != sums[name]]
            if written:
                return self._spoilt(passes[: index + 1], done, written[0])
            before, sums = sums, _checksums(done.graph, dict(again.values()))
            changed = done.spent or sums != before or whole_text(done.graph) != whole_text(graph)
            if changed or done.failure is not None:
                stages.append(Stage(one, graph, done))
                graph = done.graph
            if done.failure is not None:
                break
        return stages

    def _spoilt(self, passes: Sequence[Pass], done: Attempt, name: str) -> list[Stage]:
        """Follow the passes again, up to the last, which writes to what all graphs share."""
        stages = self._follow(passes[:-1])
        before = stages[-1].after.graph if stages else copy.deepcopy(self.start)
        reason = (
            f"it writes to the constant '{name}' itself, which the model and other graphs share; a "
            "pass registers a new one instead, with rewriter.constant(...)"
        )
        failed = replace(done, failure=Verdict(False, reason, "spoils"))
        obstacle = f"{TOGETHER}: each run would spoil more"
        return [*stages, Stage(passes[-1], before, failed, obstacle)]

    def _segments(self, stages: Iterable[Stage]) -> Iterator[Segment]:
        """Cut the passes where a lossy one starts a new reference."""
        segment, earlier = Segment(self.start, self.judge), 0
        for stage in stages:
            after = stage.after
            earlier += after.spent
            lossy = stage.one.effect is Effect.LOSSY and self.judge.follows_lossy
            if lossy and after.failure is None:
                yield segment
                segment = Segment(after.graph, self.judge.since(after.graph), earlier, True)
            else:
                segment.stages.append(stage)
        if segment.stages or not segment.start_is_right:
            yield segment

    def _in_segment(self, segment: Segment) -> Finding | Verdict:
        """Return what is wrong in a segment, or that its end is right."""
        stages = segment.stages
        end = self._judge_after(segment, len(stages))
        if end.right:
            return end
        if not segment.start_is_right:
            start = self._judge_after(segment, 0) if stages else end
            if not start.right:
                return self._finding("start", start, segment.judge)
        low, high, wrong = 0, len(stages), end
        while high - low > 1:
            middle = (low + high) // 2
            verdict = self._judge_after(segment, middle)
            if verdict.right:
                low = middle
            else:
                high, wrong = middle, verdict
        earlier = segment.earlier + sum(stage.after.spent for stage in stages[:low])
        return self._narrowed(stages[low], segment.judge, wrong, earlier)

    def _judge_after(self, segment: Segment, count: int) -> Verdict:
        """Judge the graph behind the first `count` passes of a segment."""
        if count == 0:
            return self._ask(segment.judge, segment.start)
        after = segment.stages[count - 1].after
        return after.failure or self._ask(segment.judge, after.graph)

    # -- the rewrites of one pass ---------------------------------------------------------------

    def _narrowed(self, stage: Stage, judge: Judge, verdict: Verdict, earlier: int) -> Finding:
        """Find the wrong rewrite of a pass before which the graph is right, and behind it wrong."""
        self.progress(f"the rewrites of {stage.one.name}")
        rewrites = Rewrites(stage, verdict, lambda graph: self._ask(judge, graph))
        obstacle = rewrites.narrow()
        return replace(
            self._finding("pass", rewrites.verdict, judge), stage=stage, right=rewrites.right.graph,
            wrong=rewrites.wrong.graph, number=None if obstacle else rewrites.high,
            total=stage.after.spent, earlier=earlier, obstacle=obstacle,
            rule=None if obstacle else rewrites.wrong.rule,
        )  # fmt: skip

    def _ask(self, judge: Judge, graph: GraphModule) -> Verdict:
        self.runs += 1
        return judge(graph)

    def _finding(self, blame: Blame, verdict: Verdict, judge: Judge) -> Finding:
        return Finding(blame, verdict, judge, self.runs, self.rewrites)


class Rewrites:
    """The rewrites of one pass: after `low` of them the graph is right, after `high` wrong."""

    def __init__(
        self, stage: Stage, verdict: Verdict, ask: Callable[[GraphModule], Verdict]
    ) -> None:
        self.stage = stage
        self.low, self.right = 0, Attempt(stage.before, 0, None, None)
        self.high, self.wrong = stage.after.spent, stage.after
        self.verdict = verdict  # on the wrong graph
        self._ask = ask

    def narrow(self) -> str:
        """Bring `low` and `high` next to each other; return what keeps them apart, if anything."""
        return self.stage.obstacle or self._unstoppable() or self._search() or self._confirm()

    def _unstoppable(self) -> str:
        """Say why this pass cannot be stopped between two of its rewrites, if so."""
        before = whole_text(self.stage.before)
        if self.high == 0:
            if whole_text(self.wrong.graph) == before and self.wrong.failure is not None:
                return "It fails before its first rewrite"
            return "It changes the graph without a Rewriter, so no rewrite can be told from another"
        none = self._run(0)
        failure, usual = none.failure, self.wrong.failure
        if failure is not None and usual is not None and failure.raised == usual.raised:
            return f"{TOGETHER}: it fails in the same way where it may make none"
        if failure is not None:
            return f"{TOGETHER}: where it may make none, {failure.reason}"
        if whole_text(none.graph) != before and not self._ask(none.graph).right:
            return f"{TOGETHER}: it changes the graph without its Rewriter, too"
        return difference_of_runs(self.wrong, self._run(None))

    def _search(self) -> str:
        while self.high - self.low > 1:
            middle = (self.low + self.high) // 2
            found = self._run(middle)
            if found.failure is not None and self.stage.after.failure is None:
                return (
                    f"The wrong rewrite is between number {self.low + 1} and {self.high}; stopped "
                    f"after {middle}, {found.failure.reason}"
                )
            verdict = self._judge(found)
            if verdict.right:
                self.low, self.right = middle, found
            else:
                self.high, self.wrong, self.verdict = middle, found, verdict
        return ""

    def _confirm(self) -> str:
        """Do both runs again: neither the pass nor the judge may have been lucky."""
        right, wrong = self._run(self.low), self._run(self.high)
        verdict = self._judge(wrong)
        if not self._judge(right).right or verdict.right:
            return (
                difference_of_runs(self.right, right) or difference_of_runs(self.wrong, wrong)
                or "The same graph was judged right once, and wrong once"
            )  # fmt: skip
        self.right, self.wrong, self.verdict = right, wrong, verdict
        return ""

    def _run(self, rewrites: int | None) -> Attempt:
        return attempt(self.stage.one, self.stage.before, rewrites)

    def _judge(self, found: Attempt) -> Verdict:
        return found.failure or self._ask(found.graph)


Memory = tuple[int, int]  # address and bytes


def _checksums(
    graph: GraphModule, known: Mapping[Memory, int] | None = None
) -> dict[str, tuple[Memory, int]]:
    """Return a checksum of every constant's bytes; those in memory that is `known` are not read."""
    found = {}
    for prefix, part in parts_of(graph):
        for name, tensor in part.constants().items():
            place = (tensor.data_ptr(), tensor.numel() * tensor.element_size())
            crc = known.get(place) if known is not None else None
            found[f"{prefix}.{name}".lstrip(".")] = place, _crc(tensor) if crc is None else crc
    return found


def _crc(tensor: torch.Tensor) -> int:
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data)
