"""Eight spellings of one computation, and matches that touch, in two pattern engines.

    python tools/spellings.py

Both get one pattern, `F.relu(F.conv2d(x, w, b) * 2 + 1)`, and models that say the same in other
words: torch.fx's `replace_pattern` on what `symbolic_trace` gives, fxopt on what it captures. Then
`neg(neg(x)) = x` meets chains in which matches touch and overlap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.subgraph_rewriter import replace_pattern

import fxopt
from fxopt.testing import relative_error

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def written(x: Any, w: Any, b: Any) -> Any:
    """Compute what the pattern says."""
    return F.relu(F.conv2d(x, w, b) * 2 + 1)


def marked(x: Any, w: Any, b: Any) -> Any:
    """Compute the same, with a mark by which a replacement is recognised: |y| = y where y ≥ 0."""
    return torch.abs(F.relu(F.conv2d(x, w, b) * 2 + 1))


SPELLINGS: dict[str, Callable[[Any, nn.Conv2d], Any]] = {
    "a module": lambda x, c: F.relu(c(x) * 2 + 1),
    "commuted": lambda x, c: F.relu(1 + 2 * F.conv2d(x, c.weight, c.bias)),
    "methods": lambda x, c: F.conv2d(x, c.weight, c.bias).mul(2).add(1).relu(),
    "functions": lambda x, c: torch.relu(
        torch.add(torch.mul(torch.conv2d(x, c.weight, c.bias), 2), 1)
    ),
    "keywords": lambda x, c: F.relu(input=F.conv2d(input=x, weight=c.weight, bias=c.bias) * 2 + 1),
    "defaults": lambda x, c: F.relu(
        torch.add(F.conv2d(x, c.weight, c.bias, 1, 0, 1, 1) * 2, 1, alpha=1), inplace=False
    ),
    "in place": lambda x, c: F.relu_((F.conv2d(x, c.weight, c.bias) * 2.0).add_(1.0)),
    "a tensor": lambda x, c: nn.ReLU()(F.conv2d(x, c.weight, c.bias) * torch.tensor(2.0) + 1),
}
CHAINS: dict[str, Callable[[Any], Any]] = {
    "back to back": lambda x: torch.neg(torch.neg(torch.neg(torch.neg(x)))) + 1,
    "overlapping": lambda x: torch.neg(torch.neg(torch.neg(x))) + 1,
    "used elsewhere": lambda x: (lambda y: torch.neg(y) + y)(torch.neg(x)),
}


class Model(nn.Module):
    """A function as a model, with a convolution beside it."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x, *self.parts)


@fxopt.rule(written)
def mark(x: Any, w: Any, b: Any, match: Any) -> Any:
    """relu(2 · conv(x) + 1) = |relu(2 · conv(x) + 1)|"""
    done = any(user.target is torch.ops.aten.abs.default for user in match.root.users)
    return None if done else marked(x, w, b)


@fxopt.rule(lambda x: torch.neg(torch.neg(x)))
def remove_negations(x: Any) -> Any:
    """−(−x) = x"""
    return x


def by_torch_fx(model: nn.Module, pattern: Any, replacement: Any) -> str:
    """Say what replace_pattern makes of a model."""
    try:
        traced = fx.symbolic_trace(model)
        found = replace_pattern(traced, pattern, replacement)
        traced.graph.lint()
        right = relative_error(traced(X), model(X)) < 1e-5
    except Exception as error:
        return f"fails: {str(error).splitlines()[0][:50]}"
    return f"{len(found)} replaced" + ("" if right else ", wrong")


def by_fxopt(model: nn.Module, rule: fxopt.Rule) -> str:
    """Say what our rule makes of a model; the graph is checked, and its numbers verified."""
    graph = fxopt.optimize(model, X, passes=["remove-no-ops", rule], verify="each")
    return f"{graph.story.steps[-1].rewrites} replaced"


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{'':16}{'torch.fx':54}fxopt")
    for name, function in SPELLINGS.items():
        model = Model(function, nn.Conv2d(3, 4, 3)).eval()
        print(f"{name:16}{by_torch_fx(model, written, marked):54}{by_fxopt(model, mark)}")
    for name, function in CHAINS.items():
        model = Model(function)
        theirs = by_torch_fx(model, lambda x: torch.neg(torch.neg(x)), lambda x: x)
        print(f"{name:16}{theirs:54}{by_fxopt(model, remove_negations)}")


if __name__ == "__main__":
    main()
