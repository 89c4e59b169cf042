"""What one node of a graph costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx

from fxopt.cost.call import Call, Size
from fxopt.cost.control import bodies, trips
from fxopt.cost.formula import formula_of, work_of
from fxopt.cost.memory import moved_bytes
from fxopt.graph_module import GraphModule


@dataclass(frozen=True)
class Cost:
    """What something costs; every figure is an int, or a sympy expression in symbolic sizes."""

    macs: Size = 0  # multiply-accumulates: products of contractions
    flops: Size = 0  # operations: two per multiply-accumulate, one per any other
    params: Size = 0  # elements of the parameters that it uses
    read: Size = 0  # bytes
    written: Size = 0  # bytes

    @property
    def bytes_moved(self) -> Size:
        """Bytes read and written: the memory access cost."""
        return self.read + self.written

    @property
    def intensity(self) -> Any:
        """Arithmetic intensity: FLOPs per byte moved; 0 where nothing moves."""
        return self.flops / self.bytes_moved if self.bytes_moved != 0 else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def map(self, change: Callable[[Size], Size]) -> Cost:
        """Return the cost with every figure changed."""
        return Cost(*(change(getattr(self, f.name)) for f in fields(Cost)))

    def times(self, count: Size) -> Cost:
        """Return the cost of doing it `count` times, with the same parameters."""
        return Cost(
            self.macs * count, self.flops * count, self.params, self.read * count,
            self.written * count,
        )  # fmt: skip


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of costs; parameters that two of them share count twice."""
    return sum(costs, Cost())


def cost_of(node: fx.Node | Any, *, symbolic: bool = False) -> Cost:
    """Return the cost of one node, from shapes alone.

    `node` is an fx node or the record of one in a story. With `symbolic=True` figures are sympy
    expressions where sizes are symbolic; else a symbolic size counts as its example. Inputs,
    constants and outputs cost nothing: what uses a constant has its parameters and reads it.
    """
    if node.op != "call_function":
        return Cost()
    call = Call(node, symbolic=symbolic)
    inner = bodies(call)
    if inner:
        return _control_flow(call, inner)
    work = work_of(call)
    read, written = moved_bytes(call)
    return Cost(work.macs, work.flops, _parameters(call), read, written)


def macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of a call: one for each product of a contraction.

    Convolutions, linears, matrix products, attention and recurrent layers count; element-wise work
    does not. A symbolic size counts as its example value.
    """
    if node.op != "call_function":
        return 0
    call = Call(node)
    return int(_control_flow(call, inner).macs if (inner := bodies(call)) else work_of(call).macs)


def is_counted(node: fx.Node | Any) -> bool:
    """Whether a formula is known for the node's operator; where none is, its FLOPs are 0."""
    if node.op != "call_function":
        return True
    return formula_of(node.target) is not None or bool(bodies(Call(node)))


def parameters_of(node: fx.Node | Any) -> dict[str, Size]:
    """Return the number of elements of each parameter that a node uses, by the constant's name."""
    if node.op != "call_function":
        return {}
    found: dict[str, Size] = {}
    call = Call(node)
    for used in call.inputs:
        if used.op == "get_attr" and _is_parameter(used, call):
            found[str(used.target)] = math.prod(call.sizes(used))
    for body in bodies(call):
        for inner in body.graph.nodes:
            inside = parameters_of(inner)
            found.update({f"{id(body)}.{name}": count for name, count in inside.items()})
    return found


def _parameters(call: Call) -> Size:
    return sum(parameters_of(call.node).values())


def _is_parameter(node: fx.Node, call: Call) -> bool:
    """Whether a constant is a parameter, not a buffer.

    Of a constant that a pass has erased since, its use must tell: running statistics and integers
    are buffers.
    """
    value, owner = node.meta.get("val"), node.graph.owning_module
    if not isinstance(value, torch.Tensor):
        return False
    name = str(node.target)
    if isinstance(owner, GraphModule) and owner.has_constant(name):
        return isinstance(owner.constant(name), torch.nn.Parameter)
    statistics = (call["running_mean"], call["running_var"])
    return value.is_floating_point() and all(node is not one for one in statistics)


def _control_flow(call: Call, inner: list[Any]) -> Cost:
    """Return the cost of the bodies: of a `cond` the branch with more FLOPs, else of all."""
    costs = [total(cost_of(n, symbolic=call.symbolic) for n in b.graph.nodes) for b in inner]
    if call.name == "cond":
        plain = [sum(cost_of(n).flops for n in body.graph.nodes) for body in inner]
        chosen = costs[max(range(len(plain)), key=plain.__getitem__)]
    else:
        chosen = total(costs)
    scaled = chosen.times(trips(call))
    return Cost(scaled.macs, scaled.flops, _parameters(call), scaled.read, scaled.written)
