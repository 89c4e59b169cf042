"""Control flow: a branch on data becomes ONNX's If, a loop its Loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxopt.backends.onnx.describe import describe, results_of
from fxopt.backends.onnx.dtypes import ONNX_DTYPES
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import emits


@emits(getattr(torch.ops.higher_order, "cond", None))
def _cond(
    e: Emitter, condition: Any, yes: Any, no: Any, operands: Sequence[Any] = ()
) -> list[Value]:
    count = len(e.node.meta["val"])
    branches: dict[str, Any] = {
        "then_branch": _branch(e, yes, [e.value(x) for x in operands], "then"),
        "else_branch": _branch(e, no, [e.value(x) for x in operands], "else"),
    }
    if not isinstance(condition, fx.Node):
        e.fail("its condition is a constant", "Remove the branch from the model.")
    # one element of any shape becomes a number
    flag = (
        e.op("Reshape", e.operand(condition, torch.bool), e.sizes([]))
        if (isinstance(condition.meta["val"], torch.Tensor))
        else e.number(condition, torch.bool)
    )
    return list(e.ops("If", flag, outputs=count, **branches))


def _inner(e: Emitter, graph: Any, name: str, values: Sequence[Value]) -> Emitter:
    inner = Emitter(
        e.graph.value(graph),
        e.opset,
        on_cpu=e.on_cpu,
        parent=e,
        scope=f"{e.scope}{e.node.name}.{name}.",
    )
    for node, value in zip(inner.graph.placeholders, values, strict=True):
        inner.bind(node, value)
    for node in inner.graph.graph.nodes:
        if node.op == "call_function":
            inner.emit(node)
    return inner


def _results(inner: Emitter) -> list[Value]:
    """Return the values of a sub-graph's outputs, each made inside of it."""
    made = set(inner.nodes)
    outputs: list[Value] = []
    for node in results_of(inner.graph):
        inner.node = inner.graph.output_node
        value = inner.value(node)
        if value.producer() not in made or value in outputs:
            value = inner.op("Identity", value)
        describe(value, node.meta["val"])
        outputs.append(value)
    return outputs


def _named(inner: Emitter, name: str, inputs: list[Value], outputs: list[Value]) -> ir.Graph:
    inner.name_all()
    return ir.Graph(inputs, outputs, nodes=inner.nodes, name=name)


def _branch(e: Emitter, graph: Any, operands: list[Value], name: str) -> ir.Graph:
    inner = _inner(e, graph, name, operands)
    outputs = _results(inner)
    for value in outputs:  # the branches' shapes may differ where the result's is symbolic
        value.shape = None if value.shape is None or not value.shape.is_static() else value.shape
    return _named(inner, f"{e.node.name}.{name}", [], outputs)


@emits(getattr(torch.ops.higher_order, "while_loop", None))
def _while_loop(
    e: Emitter, test: Any, body: Any, carried: Sequence[Any], extra: Sequence[Any] = ()
) -> list[Value]:
    """Loop carries the condition of the next turn: the test runs before, and ends each turn."""
    if not all(isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor) for x in carried):
        e.fail("a loop that carries numbers; make them tensors")
    begin = [e.value(x) for x in carried]
    outer = [e.value(x) for x in extra]
    first = _inner(e, test, "test", [*begin, *outer])
    e.adopt(first.nodes)
    flag = first.value(results_of(first.graph)[0])
    scope = f"{e.node.name}.body"
    turn = Value(
        name=e.reserve(f"{scope}.turn"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64)
    )
    going = Value(
        name=e.reserve(f"{scope}.going"), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL)
    )
    inputs = [turn, going]
    for index, node in enumerate(carried):
        value = Value(name=e.reserve(f"{scope}.carried_{index}"))
        value.type = ir.TensorType(ONNX_DTYPES[node.meta["val"].dtype])
        inputs.append(value)
    inner = _inner(e, body, "body", [*inputs[2:], *outer])
    results = _results(inner)
    again = _again(e, inner, test, results, outer)
    for value in results:
        value.shape = None
    inner_graph = _named(inner, scope, inputs, [again, *results])
    return list(e.ops("Loop", None, flag, *begin, outputs=len(begin), body=inner_graph))


def _again(
    e: Emitter, inner: Emitter, test: Any, results: list[Value], outer: list[Value]
) -> Value:
    nested = Emitter(
        e.graph.value(test), e.opset, on_cpu=e.on_cpu, parent=inner, scope=f"{inner.scope}again."
    )
    for node, value in zip(nested.graph.placeholders, [*results, *outer], strict=True):
        nested.bind(node, value)
    for node in nested.graph.graph.nodes:
        if node.op == "call_function":
            nested.emit(node)
    inner.nodes.extend(nested.nodes)
    flag = nested.value(results_of(nested.graph)[0])
    return flag if flag.producer() in set(nested.nodes) else inner.op("Identity", flag)
