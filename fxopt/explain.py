"""Why a rule fired or not: the best partial match, the first place where it broke, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.matching import Attempt
from fxopt.pattern import pattern_text
from fxopt.rewrite import Rewriter
from fxopt.rules import Rule, RuleSet


@dataclass(frozen=True)
class HeldBack:
    """A place where the pattern matches, and the rule did not rewrite; `reason` says why."""

    node: str
    reason: str
    where: str = ""  # the user's source line


@dataclass(frozen=True)
class Nearest:
    """The place where a pattern came farthest: what matched, and what did not."""

    node: str
    matched: tuple[str, ...]  # nodes, from the root on
    failure: str
    where: str = ""

    def __str__(self) -> str:
        calls = f"{len(self.matched)} call{'s match' if len(self.matched) != 1 else ' matches'}"
        place = f"{calls} ({' ← '.join(self.matched)}), then " if self.matched else ""
        return f"Nearest at {self.node}{self.where}: {place}{self.failure}."


@dataclass(frozen=True)
class Explanation:
    """Why a rule fired or not; `str()` of it says so."""

    rule: str
    pattern: str
    matched: tuple[str, ...]  # nodes at which it would rewrite
    held_back: tuple[HeldBack, ...]
    nearest: Nearest | None
    tried: int

    def __str__(self) -> str:
        lines = []
        if self.matched:
            lines.append(f"{self.rule} matches at {', '.join(self.matched)}.")
        else:
            lines.append(f"{self.rule} matches nowhere.")
        for one in self.held_back[:_SHOWN]:
            lines.append(f"At {one.node}{one.where} it held back: {one.reason}.")
        if len(self.held_back) > _SHOWN:
            lines.append(f"It held back at {len(self.held_back) - _SHOWN} more places.")
        if not self.matched and not self.held_back:
            lines.append(str(self.nearest) if self.nearest else self._absent)
        return " ".join(lines)

    @property
    def _absent(self) -> str:
        return f"Its root operator does not stand in the graph; the pattern is {self.pattern}."


_SHOWN = 5


def explain(one: Rule | Iterable[Rule], graph: GraphModule) -> Explanation | list[Explanation]:
    """Say where a rule matches and, where it does not rewrite, why; a list for several rules.

    The graph is not changed. Every rule is asked about the graph as it is, not as the others
    leave it.
    """
    if isinstance(one, Rule):
        return _explain(one, graph)
    return [_explain(each, graph) for each in RuleSet(one)]


def _explain(one: Rule, graph: GraphModule) -> Explanation:
    twin = graph.copy()
    matched: list[str] = []
    held: list[HeldBack] = []
    nearest, tried = Nearest("", (), ""), 0
    for node in [n for n in twin.graph.nodes if _may_be_root(one, n)]:
        tried += 1
        attempt = Attempt()
        found = one.match(node, attempt)
        if found is None:
            if not nearest.node or attempt.covered >= len(nearest.matched):
                nearest = Nearest(
                    node.name, tuple(n.name for n in attempt.nodes), attempt.failure, _where(node)
                )  # fmt: skip
            continue
        rewriter = Rewriter(twin)
        with rewriter.on_behalf_of(one.name):
            result = one.rewrite(found, rewriter)
            rewriter.discard()
        if isinstance(result, dict):
            matched.append(node.name)
        else:
            reason = result or "the rule does not apply here, and gives no reason"
            held.append(HeldBack(node.name, reason, _where(node)))
    held.sort(key=lambda h: h.reason.startswith("the rule does not apply"))
    return Explanation(
        one.name, " or ".join(map(pattern_text, one.patterns)), tuple(matched), tuple(held),
        nearest if nearest.node else None, tried,
    )  # fmt: skip


def _may_be_root(one: Rule, node: fx.Node) -> bool:
    return node.op == "call_function" and (one.targets is None or node.target in one.targets)


def _where(node: fx.Node) -> str:
    """Return the user's file and line, without the code that stands there."""
    place = str(node.meta.get("source", "")).split(": ")[0]
    return f" ({place})" if place else ""


