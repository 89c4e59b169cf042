"""Operators without an emitter: torch's own translation, else their decomposition.

torch keeps an ONNX function for each ATen operator it can translate. It is run on stand-ins of
the node's arguments, and what it records is spliced into the graph. Where there is none, the
operator is decomposed by torch into simpler ones, and those are emitted.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxopt.backends.onnx.describe import describe, refusal, results_of
from fxopt.backends.onnx.dtypes import ONNX_DTYPES
from fxopt.backends.onnx.emit import Emitter, Value
from fxopt.backends.onnx.registry import Rule, rules
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule
from fxopt.normalize import canonical
from fxopt.shapes import describe as fake_of

log = logging.getLogger("fxopt")
NEWEST_OF_TORCH = 23  # the newest opset that torch's translations are written for


def translate(e: Emitter, node: fx.Node) -> Any:
    """Return the value of a node without an emitter; raise LoweringError where nobody has one."""
    target = node.target
    if not isinstance(target, OpOverload):
        raise refusal(node, "there is no emitter for it")
    if _is_complex(node):
        raise refusal(
            node, "ONNX has no complex numbers", "Compute with real and imaginary parts instead."
        )
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise refusal(node, "it is random", "Make the noise an input of the model.")
    result = e.call(Rule(_by_torch, moves=False), node)
    if result is not None:
        e.note(f"torch's own translation was used for {target}.")
        return result
    result = _by_parts(e, node, target)
    if result is not None:
        e.note(f"{target} was decomposed by torch into simpler operators.")
        return result
    raise refusal(node, "neither fxopt nor torch has a translation of it")


def _is_complex(node: fx.Node) -> bool:
    fakes = [one.meta.get("val") for one in (node, *node.all_input_nodes)]
    return any(isinstance(fake, torch.Tensor) and fake.is_complex() for fake in fakes)


# -- torch's translation --------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _registry() -> Any:
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:  # no onnxscript, or a torch that keeps it elsewhere
        return None
    return ONNXRegistry.from_torchlib()


def _by_torch(e: Emitter, *_: Any, **__: Any) -> Any:
    node = e.node
    registry = _registry()
    if registry is None:
        return None
    from onnxscript import evaluator, values
    from torch.onnx._internal.exporter import _building, _dispatching

    function: Any = _dispatching.dispatch(node, registry)[0]
    if function is None:
        return None
    stand_ins: dict[Value, Value] = {}
    opset = values.Opset("", min(e.opset, NEWEST_OF_TORCH))
    args, kwargs = _arguments(e, node, opset, stand_ins)
    tracer: Any = _building.OpRecorder(opset, {})  # type: ignore[abstract]
    try:
        with evaluator.default_as(tracer):
            result = function(*args, **kwargs)
    except Exception as error:
        log.debug("torch's translation of %s failed: %s", node.target, error)
        return None
    if tracer.functions:
        return None
    for made in tracer.nodes:
        for index, value in enumerate(made.inputs):
            if value in stand_ins:
                made.replace_input_with(index, stand_ins[value])
        made.name = None
        for value in made.outputs:
            value.name = None
        e.adopt([made])
    if isinstance(result, Sequence):
        return [stand_ins.get(value, value) for value in result]
    return stand_ins.get(result, result)


def _arguments(
    e: Emitter, node: fx.Node, opset: Any, stand_ins: dict[Value, Value]
) -> tuple[list[Any], dict[str, Any]]:
    """Return a node's arguments as torch's translations take them."""

    def convert(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return _stand_in(e, argument, opset, stand_ins)
        if isinstance(argument, (list, tuple)):
            return [convert(item) for item in argument]
        if isinstance(argument, torch.dtype):
            return int(ONNX_DTYPES[e.shadow_of(argument)])
        if isinstance(argument, (torch.device, torch.memory_format, torch.layout)):
            return str(argument)
        return argument

    named = {name: convert(value) for name, value in node.kwargs.items()}
    if "dtype" in named and named["dtype"] is None:
        named["dtype"] = -1
    return [convert(argument) for argument in node.args], named


def _stand_in(e: Emitter, node: fx.Node, opset: Any, stand_ins: dict[Value, Value]) -> Any:
    """Return a typed value that also does arithmetic, which torch's translations rely on."""
    from torch.onnx._internal.exporter import _tensors

    fake = node.meta["val"]
    if isinstance(fake, (list, tuple)):
        pairs = list(zip(e.values(node), fake, strict=True))
    elif isinstance(fake, torch.Tensor):
        pairs = [(e.value(node), fake)]
    else:
        pairs = [(e.number(node, torch.int64), torch.empty([], dtype=torch.int64))]
    made = []
    for source, one in pairs:
        value = _tensors.SymbolicTensor(opset, name=source.name)
        describe(value, one, e.shadow_of(one.dtype))
        stand_ins[value] = source
        made.append(value)
    return made if isinstance(fake, (list, tuple)) else made[0]


# -- decomposition --------------------------------------------------------------------------------


def _by_parts(e: Emitter, node: fx.Node, target: OpOverload) -> Any:
    """Emit the operators of torch's decomposition in the node's place."""
    given = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if _is_tensor(leaf)]
    given = list(dict.fromkeys(given))
    if not _is_static(node) or not all(_is_static(one) for one in given):
        return None
    traced = _trace(node, target, given)
    if traced is None:
        return None
    graph = _canonical(traced)
    e.kept.append(graph)
    inner = Emitter(graph, e.opset, on_cpu=e.on_cpu, parent=e, scope=f"{e.scope}{node.name}.")
    for placeholder, argument in zip(graph.placeholders, given, strict=True):
        inner.bind(placeholder, e.raw(argument))
    try:
        for one in [n for n in graph.graph.nodes if n.op == "call_function"]:
            one.meta.update({k: node.meta[k] for k in ("path", "source") if k in node.meta})
            if one.target is target:
                return None
            inner.emit(one)
    except LoweringError as error:
        log.debug("a part of %s cannot be emitted: %s", target, error)
        return None
    e.adopt(inner.nodes)
    results = [None if one is None else inner.raw(one) for one in results_of(graph)]
    return results if isinstance(node.meta["val"], (list, tuple)) else results[0]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor)


def _is_static(node: fx.Node) -> bool:
    fakes = [f for f in pytree.tree_leaves(node.meta.get("val")) if isinstance(f, torch.Tensor)]
    return bool(fakes) and all(isinstance(size, int) for fake in fakes for size in fake.shape)


def _trace(node: fx.Node, target: OpOverload, given: list[fx.Node]) -> fx.GraphModule | None:
    from torch._decomp import core_aten_decompositions
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    table = {op: how for op, how in core_aten_decompositions().items() if op not in rules()}

    def call(*tensors: torch.Tensor) -> Any:
        at = dict(zip(given, tensors, strict=True))
        args = fx.map_arg(node.args, at.__getitem__)
        return target(*args, **fx.map_arg(dict(node.kwargs), at.__getitem__))

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [_like(one.meta["val"]) for one in given]
        try:
            traced = make_fx(call, decomposition_table=table)(*fakes)
            if _writes(traced):
                functional = torch.func.functionalize(traced, remove="mutations")
                traced = make_fx(functional)(*fakes)
            return None if _writes(traced) else traced
        except Exception as error:
            log.debug("decomposing %s failed: %s", target, error)
            return None


def _writes(traced: fx.GraphModule) -> bool:
    """Whether a traced graph still writes to tensors."""
    schemas = [getattr(node.target, "_schema", None) for node in traced.graph.nodes]
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _like(fake: torch.Tensor) -> torch.Tensor:
    return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)


def _canonical(traced: fx.GraphModule) -> GraphModule:
    """Return a traced graph in the dialect's spelling."""
    graph = fx.Graph()
    twins: dict[fx.Node, Any] = {}
    module = GraphModule(torch.nn.Module(), fx.Graph())
    for node in traced.graph.nodes:
        if node.op == "call_function":
            args: Any = fx.map_arg(node.args, twins.__getitem__)
            kwargs: Any = fx.map_arg(node.kwargs, twins.__getitem__)
            call = canonical(node.target, args, kwargs, fake_of)
            if call.target is None:
                twins[node] = call.args[0]
                continue
            twins[node] = graph.call_function(call.target, call.args, call.kwargs)
        else:
            twins[node] = graph.node_copy(node, twins.__getitem__)
            if node.op == "get_attr":
                value = getattr(traced, str(node.target))
                module.set_constant(str(node.target), value)
                twins[node].meta["val"] = value
        if "val" in node.meta:
            twins[node].meta["val"] = node.meta["val"]
    fx.GraphModule.graph.fset(module, graph)  # type: ignore[attr-defined]
    return module
