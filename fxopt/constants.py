"""Constants of a graph: which are known for good, and which training or new weights may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import is_tensor


class Constants:
    """What is known of the constants that a graph has now."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph

    def holds(self, node: Any) -> bool:
        """Whether a node is a constant tensor that the graph itself does not change."""
        known = isinstance(node, fx.Node) and node.op == "get_attr" and is_tensor(node)
        return known and node.target not in self.graph.info.mutated

    def fixes(self, node: Any) -> bool:
        """Whether a node is a constant that neither training nor new weights change."""
        return self.holds(node) and self.graph.fixed_tensor(str(node.target)) is not None

    def value(self, node: fx.Node) -> torch.Tensor:
        """Return the value of a constant."""
        return self.graph.value(node).detach()

    def number(self, x: Any) -> float | None:
        """Return a plain number, or the only element of a constant that nothing changes."""
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            return float(x)
        if not self.fixes(x) or x.meta["val"].dtype.is_complex or self.value(x).numel() != 1:
            return None
        return float(self.value(x))


def fold(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """Replace a call that depends on constants only by its value, and return that.

    The value is computed again, from new weights, in the same way.
    """
    needed = cone(node)
    constants = [used for used in needed if used.op == "get_attr"]
    calls = [used for used in needed if used.op == "call_function"]
    value = rewriter.constant(
        _program(calls, constants),
        constants,
        name=_name(node, constants),
        before=node,
        origin=[node, *calls[:-1]],
    )
    rewriter.replace(node, value)
    return value


def cone(node: fx.Node) -> list[fx.Node]:
    """Return everything that `node` depends on, and itself, in an order that can be computed."""
    done: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        top = pending[-1]
        missing = [used for used in top.all_input_nodes if used not in done]
        if missing:
            pending.extend(missing)
        else:
            done[pending.pop()] = None
    return list(done)


def _program(calls: Sequence[fx.Node], constants: Sequence[fx.Node]) -> Callable[..., torch.Tensor]:
    """Return a function from the values of `constants` to the value of the last call."""
    steps = [(call, call.target, call.args, call.kwargs) for call in calls]
    names = list(constants)

    def compute(*values: torch.Tensor) -> torch.Tensor:
        known: dict[fx.Node, Any] = dict(zip(names, values, strict=True))
        result: Any = None
        for call, target, args, kwargs in steps:
            result = known[call] = target(  # type: ignore[operator]
                *fx.map_arg(args, known.__getitem__), **fx.map_arg(kwargs, known.__getitem__)
            )
        assert isinstance(result, torch.Tensor)
        return result

    return compute


def _name(node: fx.Node, constants: Sequence[fx.Node]) -> str:
    """Name a value after the one constant it was computed from, else after its node."""
    names = {str(used.target) for used in constants}
    return f"{names.pop()}_folded" if len(names) == 1 else f"{node.name}_value"
