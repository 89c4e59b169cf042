"""`fxopt explain`: what a pass or a rule does to a model, where it holds back, and why."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from fxopt.cli.model import load_model
from fxopt.cli.options import (
    dynamic_option,
    example_inputs,
    expand,
    input_option,
    json_option,
    model_argument,
    quiet_option,
    trust_option,
)
from fxopt.cli.screen import Screen
from fxopt.cli.values import InputSpec, PassesType, dynamic_shapes
from fxopt.compile import default_passes, optimize
from fxopt.contract import RuleCount
from fxopt.diff import diff_text
from fxopt.explain import Explanation, explain
from fxopt.registry import resolve_pass, rule_of, rules_of
from fxopt.rules import Rule
from fxopt.story import Step

MOST_NODES, MOST_LINES = 8, 4  # that are named for one reason


@click.command("explain", short_help="Say what one pass or rule did, where it held back, and why.")
@model_argument
@click.argument("pass_name", metavar="PASS")
@click.option("--rule", help="Only this rule of the pass: where it fires, and why not elsewhere.")
@input_option
@dynamic_option
@click.option(
    "--after", "passes", type=PassesType(),
    help="Run these passes first (default: those before it in the default list; none for none).",
)  # fmt: skip
@trust_option
@json_option
@quiet_option
def explain_command(
    model: str,
    pass_name: str,
    rule: str | None,
    input: tuple[InputSpec, ...],
    dynamic: tuple[str, ...],
    passes: list[str] | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run PASS on the graph of MODEL; say what it rewrote, and where it held back and why.

    PASS may be a rule of your own, or one of a pass that is made of rules.

    \b
    fxopt explain torchvision.models:resnet18 fuse-conv-bn
    fxopt explain torchvision.models:swin_t simplify --rule merge_reshapes
    fxopt explain mine.py:make mine.py:merge_relus --after default
    """
    screen = Screen(as_json=as_json, quiet=quiet)
    with screen.job():
        one = resolve_pass(pass_name)
        rules = [rule_of(one, rule)] if rule is not None else list(rules_of(one))
        shapes = dynamic_shapes(dynamic)
        first = expand(passes) if passes is not None else _before(one)
        screen.progress(f"load {model}")
        loaded = load_model(model, trust=trust)
        graph = optimize(
            loaded, example_inputs(model, loaded, input), passes=first, dynamic_shapes=shapes,
            verify="off", progress=screen.progress,
        )  # fmt: skip
        after = optimize(graph, passes=[one], verify="off", progress=screen.progress)
        assert after.info.story is not None
        step = after.info.story.steps[0]
        rules = [one for one in rules if one.name in step.rules]
        explained = [explain(one, graph) for one in rules]
    names = [one.name for one in first or ()]
    if as_json:
        screen.document(_as_json(model, names, step, explained))
        return
    alone = rule is not None or isinstance(one, Rule)
    for part in _rule_text(one.name, step, rules[0], explained[0], names) if alone else (
        _pass_text(step, names), *([_table(step, explained), *_absent(explained)] if rules else [])
    ):  # fmt: skip
        screen.show(part)


def _before(one: Any) -> list[Any]:
    """Return the passes of the default list before this one, or before the one that has the rule.

    None where it is in no pass of the default list.
    """
    found: list[Any] = []
    for known in default_passes():
        if type(known) is type(one) and known.name == one.name:
            return found
        if isinstance(one, Rule) and one in rules_of(known):
            return found
        found.append(known)
    return []


# -- in words --------------------------------------------------------------------------------------


def _graph_text(names: list[str]) -> str:
    return f"on the graph after {', '.join(names)}" if names else "on the captured graph"


def _times(rewrites: int) -> str:
    return f"{rewrites or 'no'} rewrite{'s' if rewrites != 1 else ''}"


def _pass_text(step: Step, names: list[str]) -> Text:
    lines = [f"{step.name}: {_times(step.rewrites)}, {_graph_text(names)}"]
    for new, old in step.origins.items():
        lines.append(f"  {new} stands for {', '.join(old)}")
    lines += [f"  held back at {miss.node}: {miss.reason}" for miss in step.misses]
    if not step.rewrites and not step.misses:
        lines.append("  It found nothing that it applies to.")
    return Text("\n".join(lines))


def _rule_text(
    owner: str, step: Step, rule: Rule, explained: Explanation, names: list[str]
) -> Iterator[Text]:
    """Yield all that is known about one rule."""
    yield Text(f"{rule.name} ({_short(rule.source)})", style="bold")
    lines = [*rule.doc.splitlines(), *(f"pattern  {p}" for p in explained.pattern.split(" or "))]
    yield Text("\n".join(f"  {line}" for line in lines))
    yield Text(f"{_graph_text(names).capitalize()}:")
    yield Text("\n".join(f"  {line}" for line in _findings(explained)))
    count = step.rules[rule.name]
    if count.rewritten and owner != rule.name:
        yield Text(f"In the course of {owner} it makes {_times(count.rewritten)}.")


def _findings(explained: Explanation) -> Iterator[str]:
    """Yield the lines on where a rule fires, where it holds back, and where it came near."""
    if not explained.tried:
        yield "the operator at its root stands nowhere in the graph"
    if explained.matched:
        yield f"fires at {_some(explained.matched)}"
    reasons = dict.fromkeys(held.reason for held in explained.held_back)
    for reason in reasons:
        held = [one for one in explained.held_back if one.reason == reason]
        yield f"holds back: {reason}"
        lines = dict.fromkeys(one.where for one in held)
        for where in list(lines)[:MOST_LINES]:
            yield f"  at {_some(one.node for one in held if one.where == where)}{_short(where)}"
        if len(lines) > MOST_LINES:
            yield f"  and where {len(lines) - MOST_LINES} more lines of the model were"
    nearest = explained.nearest
    if nearest is not None and not explained.matched:
        calls = f"{' ← '.join(nearest.matched)} match{'es' if len(nearest.matched) == 1 else ''}"
        yield f"{'matches' if not reasons else 'elsewhere it matches'} nowhere"
        yield f"nearest at {nearest.node}{_short(nearest.where)}: {calls}, then {nearest.failure}"


def _some(nodes: Iterable[str]) -> str:
    named = list(nodes)
    more = len(named) - MOST_NODES
    return ", ".join(named[:MOST_NODES]) + (f" and {more} more" if more > 0 else "")


def _short(place: str) -> str:
    """Cut a file's path to what comes after the folder that Python finds it in."""
    for folder in sorted({str(Path(one).resolve()) for one in ("", *sys.path)}, key=len)[::-1]:
        place = place.replace(f"{folder}/", "")
    return place


def _table(step: Step, explained: list[Explanation]) -> Table:
    """Return what each rule did whose root operator is there, and why it did no more."""
    table = Table()
    for heading in ("rule", "tried", "matched", "rewritten"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    table.add_column("why no more", overflow="fold")
    for one in explained:
        count = step.rules[one.rule]
        if one.tried:
            numbers = (str(count.tried), str(count.matched), str(count.rewritten))
            table.add_row(one.rule, *numbers, _why(count, one))
    return table


def _why(count: RuleCount, explained: Explanation) -> Text:
    reasons = [held for held in explained.held_back if "gives no reason" not in held.reason]
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return Text(f"{reasons[0].node}: {reasons[0].reason}{more}")
    nearest = explained.nearest
    if explained.held_back and not count.rewritten:
        return Text("it does not apply where it matches", style="dim")
    if count.matched or nearest is None:
        return Text("")
    return Text(f"nearest at {nearest.node}: {nearest.failure}", style="dim")


def _absent(explained: list[Explanation]) -> list[str]:
    names = [one.rule for one in explained if not one.tried]
    return [f"no operator to begin at: {', '.join(names)}"] if names else []


# -- as data ---------------------------------------------------------------------------------------


def _as_json(
    model: str, names: list[str], step: Step, explained: list[Explanation]
) -> dict[str, Any]:
    return {
        "model": model,
        "pass": step.name,
        "after": names,
        "options": {key: repr(value) for key, value in step.options.items()},
        "rewrites": step.rewrites,
        "stands_for": {new: list(old) for new, old in step.origins.items()},
        "misses": [vars(miss) for miss in step.misses],
        "rules": {name: vars(count) for name, count in step.rules.items()},
        "explanations": {one.rule: asdict(one) for one in explained},
        "diff": diff_text(step.before, step.after),
    }
