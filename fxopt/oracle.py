"""How a result is verified: against what, on which inputs, and within what bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fxopt.errors import VerifyError
from fxopt.graph_module import GraphModule
from fxopt.story import Verification
from fxopt.verify import Run, compare, runner


@dataclass(frozen=True)
class Oracle:
    """How results are judged: against what, on which flat inputs, within what bound."""

    mode: str  # "final", "each" or "off"
    reference: Run
    original: GraphModule
    inputs: Sequence[tuple[Any, ...]]
    tolerance: float | None = None
    accept: Callable[[Any], Any] | None = None  # the user's own acceptance

    def judge(self, graph: GraphModule, what: str = "optimized graph") -> Verification:
        """Compare a graph with the reference, and ask the user's own acceptance."""
        verdict = compare(
            what, runner(graph), self.reference, self.original, self.inputs, self.tolerance
        )
        if verdict.passed and self.accept is not None and self.accept(graph.copy()) is False:
            return replace(verdict, error=float("inf"), what=f"{what}, by your own acceptance")
        return verdict

    def since(self, graph: GraphModule) -> Oracle:
        """Return an oracle that judges what comes after a lossy pass."""
        original = graph.copy()
        return replace(self, reference=runner(original), original=original)


def check_captured(graph: GraphModule, oracle: Oracle) -> None:
    """Raise VerifyError where a graph differs from the reference before any pass has run on it."""
    verdict = oracle.judge(graph, "captured graph")
    if not verdict.passed:
        raise VerifyError(captured_wrong(
            f"max |Δ| / max |reference| is {verdict.error:.3g}, and the bound is "
            f"{verdict.bound:.3g} ({verdict.what})"
        ))  # fmt: skip


def captured_wrong(reason: str) -> str:
    """Say that capture is to blame."""
    return (
        f"The captured graph does not compute what the model does, before any pass: {reason}. This "
        "is a bug of capture, unless the model is random or depends on earlier calls; then pass "
        "verify='off' or a tolerance."
    )
