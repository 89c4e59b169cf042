"""A graph as one flat Python function: the calls, and nothing else.

What a call costs beside its kernel is Python's and the dispatcher's. So operators are bound to the
built-in functions behind them, constants and lists of numbers to names, and arguments that are
defaults are left out. A value is dropped after its last use. What follows from constants alone,
such as a weight in an engine's own layout, is computed once, when the program is made. An operator
that has a form that works in place gets it where nobody reads the old value any more (see `reuse`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.backends.eager.layout import contiguous_strides, laid_out
from fxopt.backends.eager.onednn import operators
from fxopt.backends.eager.reuse import Memory, Overwrite, overwrites
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.memory import reads_layout
from fxopt.normalize import node_name
from fxopt.shapes import is_tensor, same_shape

Function = Callable[..., tuple[Any, ...]]

_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.floordiv: "//",
    operator.mod: "%", operator.truediv: "/", operator.pow: "**", operator.eq: "==",
    operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
}  # fmt: skip


class Program:
    """A flat function, its source, what the names in it stand for, and which are operators."""

    def __init__(self, source: str, names: dict[str, Any], operators: dict[str, Any]) -> None:
        self.source = source
        self.names = names
        self.operators = operators
        namespace = dict(names)
        exec(compile(source, "<fxopt program>", "exec"), namespace)
        self.function: Function = namespace["program"]


def program_of(graph: GraphModule) -> Program:
    """Return the program of a graph; its constants are the graph's own, not copies."""
    nodes = list(graph.graph.nodes)
    return write_program(graph, graph.placeholders, nodes, nodes[-1].args[0])


def write_program(
    graph: GraphModule,
    inputs: Sequence[fx.Node],
    nodes: Iterable[fx.Node],
    outputs: Sequence[Any],
    *,
    as_captured: bool = True,
) -> Program:
    """Return the program that computes `outputs` from `inputs` with calls among `nodes`.

    Outputs have the memory layout that the model gives them, unless `as_captured` is False.
    """
    return _Writer(graph, inputs, list(nodes), outputs, as_captured).write()


class _Writer:
    """Writes one program. A value has the name of its node."""

    def __init__(
        self,
        graph: GraphModule,
        inputs: Sequence[fx.Node],
        nodes: list[fx.Node],
        outputs: Sequence[Any],
        as_captured: bool,
    ) -> None:
        self.graph = graph
        self.inputs = inputs
        self.outputs = list(outputs)
        self.as_captured = as_captured
        self.names: dict[str, Any] = {}
        self.operators: dict[str, Any] = {}
        self.known = _constant_values(graph, nodes)
        self.calls = [
            node for node in nodes if node.op == "call_function" and node not in self.known
        ]
        self.memory = Memory(self.inputs, self.calls)
        self._taken = {node.name for node in nodes}
        self._bound: dict[Any, str] = {}

    def write(self) -> Program:
        """Write the whole function."""
        last = _last_uses(self.inputs, self.calls, self.outputs)
        over = overwrites(self.memory, self.calls, self.outputs)
        read = {*self.outputs, *(value for node in self.calls for value in node.all_input_nodes)}
        lines = []
        for node in self.calls:
            call = self._call(node, over.get(node))
            dead = [value.name for value in last.get(node, ())]
            kept = f"{node.name} = " if node in read else ""
            lines.append(f"{kept}{call}")
            if dead:
                lines.append(f"{' = '.join(dead)} = None")
        returned = "".join(f"{self._returned(value)}, " for value in self.outputs)
        parameters = ", ".join(node.name for node in self.inputs)
        body = "\n    ".join([*lines, f"return ({returned})"])
        return Program(f"def program({parameters}):\n    {body}\n", self.names, self.operators)

    def _returned(self, value: Any) -> str:
        """Return the expression of an output; a caller may write to it, but not to a constant."""
        if is_tensor(value) and self.memory.of_constant(value):
            return f"{self._text(value)}.clone()"
        return self._as_captured(value) if self.as_captured else self._text(value)

    def _as_captured(self, value: Any) -> str:
        """Return a value in the memory layout that it has in the model, which a reader counts on.

        A kernel may have chosen another one, such as channels last. An input is as it was given.
        """
        text = self._text(value)
        if not is_tensor(value) or value in self.known or self.memory.of_input(value):
            return text
        strides = value.meta["val"].stride()
        if same_shape(strides, contiguous_strides(value.meta["val"].shape)):
            return f"{text}.contiguous()"
        if all(isinstance(step, int) and step > 0 for step in strides):
            return f"{self._bind(laid_out, 'laid_out', laid_out)}({text}, {self._text(strides)})"
        return text

    def _call(self, node: fx.Node, overwrite: Overwrite | None) -> str:
        """Return the expression of a call."""
        target, args = (node.target, node.args) if overwrite is None else overwrite[:2]
        if target is operator.getitem:
            return f"{self._text(args[0])}[{self._text(args[1])}]"
        if target in _INFIX:
            return f"{self._text(args[0])} {_INFIX[target]} {self._text(args[1])}"
        if target in operators.PREPARATIONS:
            return self._prepared_call(target, args)
        written = self._as_captured if _reads_layout(node) else self._text
        given = [written(value) for value in _positional(target, args)]
        given += [f"{name}={self._text(value)}" for name, value in _keywords(target, node.kwargs)]
        function = target._op if isinstance(target, OpOverload) else target
        hint = node_name(target) + ("_in_place" if overwrite is not None else "")
        name = self._bind(function, hint, target)
        self.operators[name] = target
        return f"{name}({', '.join(given)})"

    def _prepared_call(self, target: OpOverload, args: Sequence[Any]) -> str:
        """Return the expression of a call whose constants are packed now, once for all calls."""
        preparation = operators.PREPARATIONS[target]
        tensors, constants = args[: preparation.tensors], args[preparation.tensors :]
        key = (target, repr(constants))
        if key not in self._bound:
            values = fx.map_arg(tuple(constants), self.known.__getitem__)
            self._bind(preparation.make(*values), node_name(target), key)
        name = self._bound[key]
        self.operators[name] = target
        return f"{name}({', '.join(map(self._text, tensors))})"

    def _text(self, value: Any) -> str:
        """Return how an argument is written: as a literal, or as the name of what is bound."""
        if isinstance(value, fx.Node):
            if value in self.known:
                return self._bind(self.known[value], value.name, value)
            return value.name
        if isinstance(value, (list, tuple)) and any(_nodes_in(value)):
            inner = "".join(f"{self._text(one)}, " for one in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._text(part) for part in parts)})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, float) and math.isfinite(value):
            return repr(value)
        return self._bind(value, "value", (type(value), repr(value)))

    def _bind(self, value: Any, hint: str, key: Any) -> str:
        """Return the name of an object; equal objects share one."""
        if key not in self._bound:
            name = f"{hint}_{len(self._bound)}_"
            while name in self._taken:
                name += "_"
            self._bound[key] = name
            self.names[name] = value
        return self._bound[key]


def _reads_layout(node: fx.Node) -> bool:
    """Whether what a call computes, or whether it runs, depends on its arguments' strides."""
    if isinstance(node.target, OpOverload) and node.target.namespace in ("mkldnn", "fxopt"):
        return False
    return reads_layout(node)


def _constant_values(graph: GraphModule, nodes: Iterable[fx.Node]) -> dict[fx.Node, Any]:
    """Return the values of constants, and of what follows from them alone, such as a packing."""
    known: dict[fx.Node, Any] = {}
    needed = _in_front_of(nodes)
    for node in needed:
        if node.op == "get_attr":
            known[node] = graph.value(node)
        elif node.op == "call_function" and _is_fixed(graph, node, known):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known


def _in_front_of(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Return nodes in order, each after the constants that it reads."""
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for value in node.all_input_nodes:
            if value.op == "get_attr":
                found[value] = None
        found[node] = None
    return list(found)


def _is_fixed(graph: GraphModule, node: fx.Node, known: Collection[fx.Node]) -> bool:
    """Whether a call follows from constants that the graph itself does not change."""
    read = node.all_input_nodes
    return (
        bool(read)
        and is_pure(node)
        and all(one in known for one in read)
        and not any(str(one.target) in graph.info.mutated for one in read if one.op == "get_attr")
    )


def _positional(target: Any, args: Sequence[Any]) -> Sequence[Any]:
    """Return positional arguments, without the defaults at their end."""
    args = list(args)
    if isinstance(target, OpOverload):
        rows = [one for one in target._schema.arguments if not one.kwarg_only]
        while args and _is_default(args[-1], rows[len(args) - 1]):
            args.pop()
    return args


def _keywords(target: Any, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keyword arguments that differ from their defaults."""
    rows = target._schema.arguments if isinstance(target, OpOverload) else ()
    by_name = {row.name: row for row in rows}
    for name, value in kwargs.items():
        if name not in by_name or not _is_default(value, by_name[name]):
            yield name, value


def _is_default(value: Any, row: Any) -> bool:
    if not row.has_default_value() or any(_nodes_in(value)):
        return False
    return type(value) is type(row.default_value) and bool(value == row.default_value)


def _last_uses(
    inputs: Iterable[fx.Node], calls: Iterable[fx.Node], outputs: Iterable[Any]
) -> dict[fx.Node, list[fx.Node]]:
    """Return, by call, the values that nothing reads after it, and that somebody read."""
    last: dict[fx.Node, fx.Node] = {}
    own = set(inputs)
    for node in calls:
        own.add(node)
        for value in node.all_input_nodes:
            if value in own:
                last[value] = node
    for value in outputs:
        last.pop(value, None)
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, user in last.items():
        found.setdefault(user, []).append(value)
    return found


def _nodes_in(value: Any) -> Iterator[bool]:
    """Yield True for each node inside of an argument."""
    if isinstance(value, fx.Node):
        yield True
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _nodes_in(one)
    elif isinstance(value, slice):
        yield from _nodes_in((value.start, value.stop, value.step))
