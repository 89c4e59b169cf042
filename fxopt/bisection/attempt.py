"""One run of one pass on a copy of a graph, stopped after so many rewrites, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fxopt import dialect
from fxopt.contract import Pass
from fxopt.errors import FxoptError, PreconditionError
from fxopt.graph_module import GraphModule
from fxopt.pipeline import run_pass
from fxopt.provenance import user_frame
from fxopt.rewrite import OutOfFuel, fuel
from fxopt.text import graph_text

Kind = Literal["differs", "fails", "spoils", "not lowered", "refused"]


@dataclass(frozen=True)
class Verdict:
    """Whether a graph is right, with the reason in words.

    `kind` says what is wrong: its results, a pass that raises (`raised` is the exception's name) or
    that writes to what is shared, the lowering, or a function's judgement.
    """

    right: bool
    reason: str
    kind: Kind
    error: float | None = None  # max |Δ| / max |reference|, where it was compared
    bound: float | None = None
    raised: str = ""


@dataclass(frozen=True)
class Attempt:
    """One run of a pass on a copy of a graph, with limited or unlimited fuel."""

    graph: GraphModule
    spent: int  # the rewrites made
    rule: str | None  # of the last rewrite
    failure: Verdict | None  # where the pass raised, or left a graph that is not legal


def attempt(one: Pass, before: GraphModule, limit: int | None = None) -> Attempt:
    """Run a pass on a copy of a graph, with at most `limit` rewrites, and check what it made."""
    graph, failure = before.copy(), None
    with fuel(limit) as tank:
        try:
            run_pass(one, graph)
        except PreconditionError:
            raise
        except OutOfFuel:
            failure = None  # it asked again and again; what it was allowed to do is done
        except Exception as error:
            failure = _raised(error, tank.spent)
    if failure is None:
        try:
            dialect.check(graph)
        except FxoptError as error:
            failure = Verdict(False, str(error), "fails", raised=type(error).__name__)
    return Attempt(graph, tank.spent, tank.rule, failure)


def _raised(error: Exception, spent: int) -> Verdict:
    where = user_frame(error.__traceback__)
    at = f", at {where}" if where else ""
    after = f" after {count_text(spent, 'rewrite')}" if spent else ""
    name = type(error).__name__
    return Verdict(False, f"it fails{after} with {name}: {error}{at}", "fails", raised=name)


def parts_of(graph: GraphModule) -> list[tuple[str, GraphModule]]:
    """Return the sub-graphs of control flow by the names of their constants, then the graph."""
    found = []
    for node in graph.graph.find_nodes(op="get_attr"):
        value = graph.value(node)
        if isinstance(value, GraphModule):
            prefix = str(node.target)
            found += [(f"{prefix}.{name}".rstrip("."), part) for name, part in parts_of(value)]
    return [*found, ("", graph)]


def whole_text(graph: GraphModule) -> str:
    """Return a graph and its sub-graphs as text."""
    return "\n".join(graph_text(part) for _, part in parts_of(graph))


def difference_of_runs(first: Attempt, second: Attempt) -> str:
    """Say how two runs of one pass on one graph differ; nothing where they do not."""
    if first.spent != second.spent:
        counts = f"{first.spent} and {second.spent} rewrites"
        return f"It is not deterministic: run twice, it made {counts}"
    if whole_text(first.graph) != whole_text(second.graph):
        return "It is not deterministic: run twice, it made different rewrites"
    return ""


def count_text(number: int, what: str) -> str:
    """Return a number of things: `1 rewrite`, `2 rewrites`."""
    return f"{number} {what}{'' if number == 1 else 's'}"
