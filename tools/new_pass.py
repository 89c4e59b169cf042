"""Write a new pass and its failing test: `python tools/new_pass.py fuse_x`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERBS = ("fold", "fuse", "insert", "merge", "prune", "remove", "replace", "simplify")

PASS = '''"""Say in one sentence what this pass does.

Before                                   After
    y = relu(x)                              z = relu(x)
    z = relu(y)

Say why both sides compute the same; give the equation where there is any.

Left alone: say what looks like it and is not, and why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.graph_module import GraphModule
from fxopt.rules import apply_rules, rule


@rule(lambda x: torch.relu(torch.relu(x)))
def merge_relus(x: Any) -> Any:
    """relu(relu(x)) = relu(x)"""
    if not x.is_floating:
        return "its input is not floating point"
    return torch.relu(x)


RULES = (merge_relus,)


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


def new_pass(stem: str, root: Path = ROOT) -> list[Path]:
    """Write both files and return their paths; raise ValueError for a bad or a taken name."""
    if not re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", stem):
        raise ValueError(f"'{stem}' is no name for a pass: write words joined by _, as in fuse_x.")
    if stem.split("_")[0] not in VERBS:
        raise ValueError(f"A pass begins with a verb: {', '.join(VERBS)}.")
    files = {
        root / "passes" / f"{stem}.py": PASS,
        root / "tests" / "passes" / f"test_{stem}.py": TEST,
    }
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stem", help="the file's name, verb first: fuse_x, fold_x, remove_x …")
    try:
        written = new_pass(parser.parse_args().stem)
    except ValueError as error:
        sys.exit(str(error))
    for path in written:
        print(f"wrote {path.relative_to(ROOT)}")
    stem = written[0].stem
    print(f"Next: make test TESTS=tests/passes/test_{stem}.py; then its line in passes/__init__.py")


if __name__ == "__main__":
    main()
