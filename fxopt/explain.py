"""Why a rule fired or not: the best partial match, the first place where it broke, in words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import fx

from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.matching import Attempt
from fxopt.pattern import pattern_text
from fxopt.registry import resolve_pass, rules_of
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


@dataclass(frozen=True, repr=False)
class Explanation:
    """Why a rule fired or not; it prints as the words that say so."""

    rule: str
    pattern: str
    matched: tuple[str, ...]  # nodes at which it would rewrite
    held_back: tuple[HeldBack, ...]
    nearest: Nearest | None
    tried: int

    def __str__(self) -> str:
        lines = []
        if self.matched:
            more = len(self.matched) - _NAMED
            nodes = ", ".join(self.matched[:_NAMED]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"{self.rule} matches at {nodes}.")
        else:
            lines.append(f"{self.rule} matches nowhere.")
        for one in self.held_back[:_SHOWN]:
            lines.append(f"At {one.node}{one.where} it held back: {one.reason}.")
        if len(self.held_back) > _SHOWN:
            lines.append(f"It held back at {len(self.held_back) - _SHOWN} more places.")
        if not self.matched and not self.held_back:
            lines.append(str(self.nearest) if self.nearest else self._absent)
        return " ".join(lines)

    __repr__ = __str__

    @property
    def _absent(self) -> str:
        return f"Its root operator does not stand in the graph; the pattern is {self.pattern}."


_SHOWN, _NAMED = 5, 8


class Explanations(list[Explanation]):
    """One explanation for each of several rules; they print as one line each."""

    def __str__(self) -> str:
        lines = [str(one) for one in self if one.tried]
        absent = [one.rule for one in self if not one.tried]
        if absent:
            lines.append(f"The root operators of these stand nowhere: {', '.join(absent)}.")
        return "\n".join(lines)

    __repr__ = __str__


@overload
def explain(one: Rule, graph: Any) -> Explanation: ...
@overload
def explain(one: Any, graph: Any) -> Explanation | Explanations: ...
def explain(one: Any, graph: Any) -> Explanation | Explanations:
    """Say where a rule matches and, where it does not rewrite, why; for several rules, each.

    `one` is a rule, a set of rules, a pass that is made of rules, or the name of any of these:
    "simplify", "simplify[merge_pads]", "mine.py:merge_relus". `graph` is a captured or optimized
    graph, with the bodies of its control flow, or a compiled model. It is not changed. Every rule
    is asked about the graph as it is, not as the others leave it. Raises OptionError for anything
    else.
    """
    if isinstance(one, GraphModule) or isinstance(getattr(one, "graph", None), GraphModule):
        one, graph = graph, one
    parts = _parts(graph)
    rules = _rules(one)
    if isinstance(rules, Rule):
        return _explain_all(rules, parts)
    return Explanations(_explain_all(each, parts) for each in rules)


def _parts(graph: Any) -> list[GraphModule]:
    """Return the graph that is meant, and the bodies of its control flow."""
    found = graph if isinstance(graph, GraphModule) else getattr(graph, "graph", None)
    if isinstance(found, GraphModule):
        return [found, *found.subgraphs()]
    hint = " Capture the model first: fxopt.explain(rule, fxopt.capture(model, inputs))."
    what = f"a {type(graph).__name__}" if isinstance(graph, torch.nn.Module) else repr(graph)
    raise OptionError(f"explain(rule, graph) asks about a graph, not {what}.{hint}")


def _rules(one: Any) -> Rule | RuleSet:
    """Return the rule or rules that are meant."""
    if not isinstance(one, str) and isinstance(one, Iterable) and not isinstance(one, Rule):
        return RuleSet(one)
    found = resolve_pass(one)
    if isinstance(found, Rule):
        return found
    rules = rules_of(found)
    if not rules:
        raise OptionError(
            f"'{found.name}' is not made of rules, so there is none to explain. What it did and "
            f"left alone stands in the story: fxopt.optimize(…, passes=['{found.name}']).story."
        )
    return rules


def _explain_all(one: Rule, parts: list[GraphModule]) -> Explanation:
    """Explain a rule on several graphs, as one."""
    several = [_explain(one, part) for part in parts]
    nearest = [each.nearest for each in several if each.nearest is not None]
    return Explanation(
        one.name, several[0].pattern,
        tuple(name for each in several for name in each.matched),
        tuple(held for each in several for held in each.held_back),
        max(nearest, key=lambda each: len(each.matched), default=None),
        sum(each.tried for each in several),
    )  # fmt: skip


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
    place = str(node.meta.get("source") or "").split(": ")[0]
    return f" ({place})" if place else ""


