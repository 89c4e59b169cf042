"""Write docs/rules.md, the cookbook: every rule with its equation, a picture, and its guards.

    python tools/cookbook.py

A rule's picture is its first example in tests/rules, captured before and after. What it leaves
alone are the reasons that the other examples are told.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import fxopt  # noqa: E402
from fxopt.graph_module import GraphModule  # noqa: E402
from fxopt.registry import classes, rules_of  # noqa: E402
from fxopt.rules import Rule, apply_rules  # noqa: E402
from fxopt.testing import Example  # noqa: E402
from fxopt.text import node_text, type_text  # noqa: E402

PAGE = ROOT / "docs" / "rules.md"
WIDTH = 104  # what is wider is not set side by side

HEAD = """\
# Rules

<!-- python tools/cookbook.py writes this page from the rules and their examples in tests/rules -->

Every rule of the library: its equation, the graph of an example before and after it, and what it
leaves alone. Each example is tested: numbers and gradients agree, in double, single and half
precision, and with a symbolic size. [Write one of your own](writing-rules.md) in ten minutes.

A rule fires on every spelling of its pattern, not only on that of the picture. All of them leave
alone what has an effect, and a value inside the pattern that something else needs, where that would
cost work. `fxopt explain MODEL PASS --rule NAME` says where one fires in a model of yours, and why
not elsewhere.

"""
CONDITIONS = {
    "constant": "is a weight or another constant",
    "fixed": "is a number, or a constant that no new weights change",
    "number": "is a number",
    "tensor": "is a tensor",
    "floating": "is floating point",
    "used_once": "has no other user",
}


def page() -> str:
    """Return the page."""
    found = sorted((_place(cls), name, cls) for name, cls in classes("passes").items())
    passes = [(name, cls) for _, name, cls in found if rules_of(cls)]
    lines = ["| pass | default | rules |", "|---|---:|---|"]
    for name, cls in passes:
        links = ", ".join(f"[{family}](#{family})" for family in _families(cls))
        lines.append(f"| [{name}](#{name}) | {_place(cls, '–')} | {links} |")
    told = "The number is the place in the default pipeline; – is what runs when asked for."
    lines += ["", told, ""]
    for name, cls in passes:
        lines += _pass(name, cls)
    return HEAD + "\n".join(lines).rstrip() + "\n"


def _place(cls: type, otherwise: str = "99") -> str:
    """Return the place in the default pipeline, in two digits where it is there."""
    places = [i for i, one in enumerate(fxopt.default_passes(), 1) if type(one) is cls]
    return f"{places[0]}".rjust(2) if places else otherwise


def _pass(name: str, cls: type) -> Iterator[str]:
    module = sys.modules[cls.__module__]
    stem = module.__name__.rpartition(".")[2]
    known = importlib.import_module(f"tests.rules.{stem}").EXAMPLES
    yield f"## {name}"
    yield ""
    yield (inspect.getdoc(module) or "").split("\n\n")[0]
    yield f"In [passes/{stem}.py](../passes/{stem}.py)."
    yield ""
    for family, members in _families(cls).items():
        rule = members[0]
        if not known.get(rule.name):
            sys.exit(f"tests/rules/{stem}.py has no example of {rule.name}.")
        yield f"### {family}"
        yield ""
        if rule.fixed:
            own = (f"`{one.name.removeprefix(family)[1:-1]}`" for one in members)
            yield f"One for each of {', '.join(own)}."
            yield ""
        yield from _rule(rule, known[rule.name])


def _families(cls: type) -> dict[str, list[Rule]]:
    """Return the rules of a pass, those of a family together under its name."""
    found: dict[str, list[Rule]] = {}
    for rule in rules_of(cls):
        found.setdefault(rule.name.partition("[")[0], []).append(rule)
    return found


def _rule(rule: Rule, examples: list[Example]) -> Iterator[str]:
    equation, *rest = rule.doc.split("\n\n")
    yield f"**{_joined(equation)}**"
    yield from (f"\n{_joined(part)}" for part in rest)
    yield ""
    yield "```text"
    yield from _picture(rule, next((e for e in examples if e.reason is None), examples[0]))
    yield "```"
    yield ""
    asked = ((name, CONDITIONS.get(one.__name__)) for name, one in rule.conditions.items())
    guards = [f"- `{name}` {words}" for name, words in asked if words is not None]
    reasons = dict.fromkeys(filter(None, (_reason(rule, one) for one in examples)))
    guards += [f"- left alone: {_joined(reason)}" for reason in reasons]
    yield from [*guards, ""] if guards else []


def _joined(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|").replace("*", "\\*")


# -- pictures --------------------------------------------------------------------------------------


def _picture(rule: Rule, example: Example) -> Iterator[str]:
    """Yield the lines of an example's graph, before the rule and after it."""
    graph = _captured(example)
    given = [_given(node) for node in graph.graph.nodes if node.op in ("placeholder", "get_attr")]
    constants = set(graph.constants())
    before = list(_lines(graph))
    yield from (", ".join(given), "")
    if not apply_rules(graph, (rule,)).modified:
        yield from before
        return
    made = [_given(n) for n in graph.graph.find_nodes(op="get_attr") if n.target not in constants]
    after = [*(f"new constant {one}" for one in made), *_lines(graph)]
    wide = max(map(len, before)) + 4
    if wide + max(map(len, after)) > WIDTH:
        yield from ("before", *(f"    {line}" for line in before))
        yield from ("after", *(f"    {line}" for line in after))
        return
    columns = itertools.zip_longest(["before", *before], ["after", *after], fillvalue="")
    yield from (f"{left.ljust(wide)}{right}".rstrip() for left, right in columns)


def _captured(example: Example, dtype: torch.dtype = torch.float32) -> GraphModule:
    """Capture an example; its inputs are called like the parameters of its function."""
    graph = fxopt.capture(example.model(dtype), example.draw(1, dtype))
    names = inspect.signature(example.function).parameters
    for node, name in zip(graph.placeholders, names, strict=False):
        node._rename(name)
    return graph


def _given(node: torch.fx.Node) -> str:
    name = f"'{node.target}'" if node.op == "get_attr" else f"%{node.name}"
    return f"{name}: {type_text(node.meta['val'])}"


def _lines(graph: GraphModule) -> Iterable[str]:
    nodes = [n for n in graph.graph.nodes if n.op in ("call_function", "output")]
    return (node_text(node, inline=True) for node in nodes)


def _reason(rule: Rule, example: Example) -> str | None:
    """Return why a rule holds back in an example, as it says itself."""
    if example.reason is None:
        return None
    graph = _captured(example, torch.float64)  # as the tests do
    held = fxopt.explain(rule, graph).held_back
    if not held or "gives no reason" in held[0].reason:
        return None
    other = " is used elsewhere too"
    return f"a value inside{other}" if held[0].reason.endswith(other) else held[0].reason


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
