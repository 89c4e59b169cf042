"""Write a new pass and its failing test: `python tools/new_pass.py fuse_x`.

A pass of rules, with examples of them; with `--nodes` one that works on nodes with a Rewriter.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERBS = (
    "expand", "fold", "fuse", "insert", "lower", "merge", "move", "prune", "remove", "replace",
    "round", "simplify", "sink", "sparsify",
)  # fmt: skip

DOC = '''"""Say in one sentence what this pass does.

Before                                   After
    y = relu(x)                              z = relu(x)
    z = relu(y)

Say why both sides compute the same; give the equation where there is any.

Left alone: say what looks like it and is not, and why.
"""
'''

RULES = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.pattern import Match
from fxopt.rules import RuleSet, apply_rules, rule


@rule(lambda x: torch.relu(torch.relu(x)))
def merge_relus(x: Any, match: Match) -> Any:
    """relu(relu(x)) = relu(x)"""
    if not x.is_floating:
        return "its input is not floating point"
    return match.shared or x.relu()


RULES = RuleSet(merge_relus)


@dataclass(frozen=True)
class {camel}:
    """Say the same sentence again: `fxopt passes` prints it."""

    name: ClassVar[str] = "{name}"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Apply the rules until none fires any more."""
        return apply_rules(graph, RULES)
'''

NODES = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class {camel}:
    """Say the same sentence again: `fxopt passes` prints it."""

    name: ClassVar[str] = "{name}"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Replace each relu of a relu by the inner one."""
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default):
            (inner,) = node.all_input_nodes
            if inner.target is not aten.relu.default:
                continue
            if len(inner.users) > 1:
                rewriter.miss(node, f"{{inner.name}} is used elsewhere too")
                continue
            rewriter.replace(node, inner)
        return rewriter.result()
'''

EXAMPLES = '''"""Where the rules of {name} fire, and where they hold back."""

from __future__ import annotations

import torch

from fxopt.testing import Example

EXAMPLES: dict[str, list[Example]] = {{
    "merge_relus": [
        Example(lambda x: x.relu().relu(), (3, 4)),
        Example(
            lambda x: x.relu().relu(), torch.arange(4), reason="its input is not floating point"
        ),
        Example(
            lambda x: (lambda y: (y.relu(), y.sin()))(x.relu()), (3, 4),
            reason="is used elsewhere too",
        ),
    ],
}}  # fmt: skip
'''

TEST = '''"""{camel}: what it rewrites, and what it leaves alone."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.passes.{stem} import {camel}
from fxopt.testing import check_pass


def test_rewrites_what_it_should() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU())
    check_pass(
        {camel}(), model, torch.randn(2, 4),
        before={{"relu": 2}}, after={{"relu": 1}}, rewrites=1, misses=[],
    )  # fmt: skip


def test_leaves_alone_what_it_must() -> None:
    """Every guard needs a model where it holds the pass back, with the reason in `misses`."""
    raise AssertionError("write a model that looks like it and is not")
'''


def new_pass(stem: str, root: Path = ROOT, *, nodes: bool = False) -> list[Path]:
    """Write the files and return their paths; raise ValueError for a bad or a taken name."""
    if not re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", stem):
        raise ValueError(f"'{stem}' is no name for a pass: write words joined by _, as in fuse_x.")
    if stem.split("_")[0] not in VERBS:
        raise ValueError(f"A pass begins with a verb: {', '.join(VERBS)}.")
    files = {
        root / "passes" / f"{stem}.py": DOC + (NODES if nodes else RULES),
        root / "tests" / "passes" / f"test_{stem}.py": TEST,
    }
    if not nodes:
        files[root / "tests" / "rules" / f"{stem}.py"] = EXAMPLES
    for path in files:
        if path.exists():
            raise ValueError(f"{path.relative_to(root)} is there already.")
    words = {
        "stem": stem,
        "name": stem.replace("_", "-"),
        "camel": "".join(word.capitalize() for word in stem.split("_")),
    }
    for path, template in files.items():
        path.write_text(template.format(**words), encoding="utf-8")
    return list(files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stem", help="the file's name, verb first: fuse_x, fold_x, remove_x …")
    parser.add_argument("--nodes", action="store_true", help="a pass without rules")
    options = parser.parse_args()
    try:
        written = new_pass(options.stem, nodes=options.nodes)
    except ValueError as error:
        sys.exit(str(error))
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")
    tests = f"tests/passes/test_{options.stem}.py{'' if options.nodes else ' tests/rules'}"
    page = "" if options.nodes else "; python tools/cookbook.py, which puts the rules into docs"
    print(f'Next: make test TESTS="{tests}"; its line in passes/__init__.py{page}')


if __name__ == "__main__":
    main()
