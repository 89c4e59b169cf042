"""Lowering: the walk that turns a whole graph into a checked ONNX model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from fxopt.backends.onnx.describe import describe, dimensions, refusal, results_of
from fxopt.backends.onnx.dtypes import ONNX_DTYPES, tensor_of
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.executable import (
    STATE_KEY,
    OnnxExecutable,
    RuntimeOptions,
    StateSlot,
    split_weights,
    state_text,
)
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule

if TYPE_CHECKING:
    from fxopt.backends.onnx import Onnx

aten = torch.ops.aten
IR_VERSION = 10  # what goes with opset 20 to 22, and what runtimes since 2024 read


def lower(graph: GraphModule, options: Onnx) -> OnnxExecutable:
    """Lower a graph to an ONNX model; raise LoweringError, naming the node, where it cannot be."""
    emitter = Emitter(graph, options.opset, on_cpu=options.providers[0] == "CPUExecutionProvider")
    writes = [n for n in graph.graph.nodes if n.target is aten.copy_.default]
    if writes and options.state == "refuse":
        raise refusal(
            writes[0],
            f"the model changes '{writes[0].args[0].target}' at each run, and an ONNX model keeps "
            "no state",
            "Pass state='io', which makes it an extra input and output, or remove the update.",
        )
    inputs = [_input(emitter, node) for node in graph.placeholders]
    inputs += _state_inputs(emitter, graph, writes)
    for node in graph.graph.nodes:
        if node.op == "call_function" and node not in writes:
            emitter.emit(node)
    outputs, slots = _outputs(emitter, graph, writes)
    model = _model(emitter, graph, inputs, outputs, options.opset)
    if slots:
        model.metadata_props[STATE_KEY] = state_text(slots)
    _name_dimensions(model, graph.info.dimensions)
    check(model)
    runtime = RuntimeOptions(options.threads, tuple(options.providers), options.optimization)
    return OnnxExecutable(model, runtime, tuple(emitter.notes), slots, options.external_data)


def _name_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    """Call symbolic sizes what the user called them, also where one stands in an expression."""
    if not names:
        return
    symbols = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
    for value in _values(model.graph):
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                value.shape[axis] = symbols.sub(lambda found: names[found[0]], size.value)


def _values(graph: ir.Graph) -> Iterator[Value]:
    """Yield the inputs and results of a graph and of the graphs inside of it."""
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from attribute.as_graph().inputs


def _input(emitter: Emitter, node: fx.Node) -> Value:
    """Make the graph input of a placeholder; a symbolic number comes in as a scalar."""
    value = Value(name=emitter.reserve(node.name))
    fake = node.meta["val"]
    if isinstance(fake, torch.Tensor):
        if fake.dtype not in ONNX_DTYPES:
            raise refusal(node, f"ONNX has no type {fake.dtype}")
        describe(value, fake)
        emitter.bind(node, value)
    else:
        dtype = (
            ir.DataType.DOUBLE if isinstance(fake, (float, torch.SymFloat)) else ir.DataType.INT64
        )
        value.shape, value.type = ir.Shape([]), ir.TensorType(dtype)
        if node.users:
            emitter.bind(node, emitter.op("Reshape", value, [1]))
    return value


def _state_inputs(emitter: Emitter, graph: GraphModule, writes: list[fx.Node]) -> list[Value]:
    """Make an input of each constant that the graph changes; its value is the input's default."""
    inputs = []
    for write in writes:
        target = write.args[0]
        assert isinstance(target, fx.Node)
        if target.op == "get_attr" and target.target not in emitter.state:
            name = str(target.target)
            tensor = graph.value(target).detach().clone()
            value = Value(name=emitter.reserve(name), const_value=tensor_of(tensor, name))
            describe(value, tensor)
            emitter.state[name] = value
            inputs.append(value)
    return inputs


def _outputs(
    emitter: Emitter, graph: GraphModule, writes: list[fx.Node]
) -> tuple[list[Value], list[StateSlot]]:
    """Return the graph's outputs, then the new values of its state."""
    emitter.node = graph.output_node
    outputs: list[Value] = []
    for index, node in enumerate(results_of(graph)):
        if not isinstance(node, fx.Node):
            raise refusal(graph.output_node, f"output {index} is the constant {node!r}")
        value = emitter.value(node.args[1] if node in writes else node)
        outputs.append(_output(emitter, node, value, outputs))
    slots = []
    for write in writes:
        target, new = write.args[:2]
        assert isinstance(target, fx.Node) and isinstance(new, fx.Node)
        value = emitter.operand(new, target.meta["val"].dtype)
        if tuple(new.meta["val"].shape) != tuple(target.meta["val"].shape):
            value = emitter.op("Expand", value, emitter.op("Shape", target))
        name = str(emitter.value(target).name)
        outputs.append(_output(emitter, target, value, outputs, f"{name}.new"))
        slots.append(StateSlot(name, str(outputs[-1].name), target.op == "get_attr"))
    return outputs, slots


def _output(
    emitter: Emitter, node: fx.Node, value: Value, taken: list[Value], name: str | None = None
) -> Value:
    """Return what stands for an output: a value that some node makes, for this output alone."""
    scalar = not isinstance(node.meta["val"], torch.Tensor)  # symbolic sizes have shape [1] within
    if scalar:
        value = emitter.op("Squeeze", value, [0])
    elif value.producer() is None or value in taken or name is not None:
        value = emitter.op("Identity", value)
    if value.name is None:
        value.name = emitter.reserve(name or f"{node.name}.out")
        producer = value.producer()
        if producer is not None and producer.name is None:
            producer.name = value.name
    if scalar:
        value.shape, value.type = ir.Shape([]), ir.TensorType(ir.DataType.INT64)
    else:
        describe(value, node.meta["val"])
    return value


def _model(
    emitter: Emitter, graph: GraphModule, inputs: list[Value], outputs: list[Value], opset: int
) -> ir.Model:
    _drop_unused(emitter, outputs)
    emitter.name_all()
    used = [value for value in emitter.initializers.values() if value.uses()]
    initializers = [*used, *emitter.state.values()]
    opsets = {"": opset}
    for domain in sorted({made.domain for made in emitter.nodes if made.domain}):
        opsets[domain] = 1
    built = ir.Graph(
        inputs,
        outputs,
        nodes=emitter.nodes,
        initializers=initializers,
        opset_imports=opsets,
        name=graph.info.model_name,
    )
    return ir.Model(
        built,
        ir_version=IR_VERSION if opset < 23 else 11,
        producer_name="fxopt",
    )


def _drop_unused(emitter: Emitter, outputs: list[Value]) -> None:
    """Drop what nobody reads: views of weights whose integers were taken from the weight itself."""
    kept = []
    for made in reversed(emitter.nodes):
        if any(v.uses() or v.is_graph_output() or v in outputs for v in made.outputs):
            kept.append(made)
        else:
            for index in range(len(made.inputs)):
                made.replace_input_with(index, None)
    emitter.nodes[:] = reversed(kept)


def check(model: ir.Model) -> None:
    """Check the model against ONNX's rules, types and shapes; large constants stand as inputs."""
    import onnx

    proto, weights = split_weights(model)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in weights]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    for name, tensor in weights.items():
        shape: list[Any] = dimensions(list(tensor.shape))
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), shape))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise LoweringError(
            f"The emitted ONNX model breaks ONNX's own rules: {error} This is a bug of the onnx "
            "backend; until it is fixed, use backend='eager'."
        ) from error
