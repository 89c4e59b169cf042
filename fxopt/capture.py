"""Capture: from a PyTorch model to one dialect graph, through torch.export."""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.graph_module import GraphInfo, GraphModule
from fxopt.inputs import (
    Inputs,
    as_inputs,
    check_ready,
    evaluation,
    forward_signature,
    infer_inputs,
    map_tensors,
)
from fxopt.provenance import user_frame
from fxopt.shapes import fake_of
from fxopt.signature import ConstantLeaf, Signature, Structure, TensorLeaf
from fxopt.translate import Translator

log = logging.getLogger("fxopt")


def capture(
    model: Any, example_inputs: Any = None, *, dynamic_shapes: Any = None
) -> GraphModule:
    """Capture `model` as one functional graph that computes what `model` does in evaluation mode.

    `example_inputs` is a tensor, a tuple of arguments, a dict of keyword arguments, or the pair
    (args, kwargs); where it is None, the inputs are inferred. `dynamic_shapes` maps a parameter's
    name to {dimension: name}, or {dimension: name} alone for every tensor, or is what
    torch.export.export takes. The model, its weights and its training flags stay untouched.

    Raises CaptureError, with the user's source line where there is one.
    """
    if isinstance(model, GraphModule):
        return model.copy()
    started = time.perf_counter()
    if isinstance(model, ExportedProgram):
        graph = _from_program(model, model.module(check_guards=False), _program_inputs(model))
    else:
        check_ready(model)
        inputs = bind_inputs(model, example_inputs)
        inputs, shapes = _dynamic(model, inputs, dynamic_shapes)
        program = _export(model, inputs, shapes)
        graph = _from_program(program, model, inputs)
    graph.info.capture_seconds = time.perf_counter() - started
    return graph


# -- before: inputs and dynamic shapes ----------------------------------------------------------------


def bind_inputs(model: torch.nn.Module, example_inputs: Any) -> Inputs:
    """Return the inputs that were given, or are inferred, in the order of the model's signature.

    Raises CaptureError where they do not fit the signature, or none are known.
    """
    inputs = as_inputs(example_inputs) if example_inputs is not None else infer_inputs(model)
    if inputs is None:
        raise CaptureError(
            "No example inputs were given, and none can be inferred from "
            f"{type(model).__name__}. Pass example_inputs=, for instance a tensor or a tuple."
        )
    signature = forward_signature(model)
    try:
        bound = signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise CaptureError(
            f"The example inputs do not fit {type(model).__name__}.forward{signature}: {error}. "
            "Pass a tuple of positional arguments, a dict of keyword arguments, or (args, kwargs)."
        ) from None
    for value in pytree.tree_leaves((bound.args, bound.kwargs)):
        if is_dataclass(value) and not isinstance(value, type):
            _register_dataclass(type(value))
    return Inputs(bound.args, bound.kwargs)


def _dynamic(model: torch.nn.Module, inputs: Inputs, dynamic_shapes: Any) -> tuple[Inputs, Any]:
    """Return inputs whose dynamic dimensions are at least 2, and shapes as torch.export wants them."""
    if dynamic_shapes is None:
        return inputs, None
    bound = forward_signature(model).bind(*inputs.args, **inputs.kwargs)
    arguments = bound.arguments
    if isinstance(dynamic_shapes, dict) and all(isinstance(key, int) for key in dynamic_shapes):
        everywhere = dict(dynamic_shapes)
        spec: Any = map_tensors(dict(arguments), lambda tensor: {
            axis: name for axis, name in everywhere.items() if axis < tensor.dim()
        })
    elif isinstance(dynamic_shapes, (tuple, list)):
        spec = dict(zip(arguments, dynamic_shapes, strict=False))
    else:
        spec = dict(dynamic_shapes)
    for name in spec:
        if name not in arguments:
            raise CaptureError(
                f"dynamic_shapes names '{name}', but the inputs are {', '.join(arguments)}."
            )
    sized = {name: _enlarge(value, spec.get(name)) for name, value in arguments.items()}
    bound.arguments.update(sized)
    shapes = {name: _dims(value, spec.get(name)) for name, value in sized.items()}
    return Inputs(bound.args, bound.kwargs), shapes


def _enlarge(value: Any, spec: Any) -> Any:
    """Give each dynamic dimension of size 0 or 1 the size 2: torch.export would fix 0 and 1."""
    if isinstance(value, torch.Tensor) and isinstance(spec, dict):
        for axis, name in spec.items():
            if name is not None and value.shape[axis] < 2:
                rows = value if value.shape[axis] else value.new_zeros(
                    [1 if d == axis else size for d, size in enumerate(value.shape)]
                )
                value = torch.cat([rows, rows], dim=axis)
        return value
    if isinstance(value, torch.Tensor) and isinstance(spec, (tuple, list)):
        return _enlarge(value, dict(enumerate(spec)))
    if isinstance(value, dict) and isinstance(spec, dict):
        return {key: _enlarge(item, spec.get(key)) for key, item in value.items()}
    if isinstance(value, (tuple, list)) and isinstance(spec, (tuple, list)):
        return type(value)(_enlarge(v, s) for v, s in zip(value, spec, strict=True))
    return value


def _dims(value: Any, spec: Any) -> Any:
    """Return a spec with every name, True or Dim written as torch.export wants it."""
    if isinstance(value, torch.Tensor):
        entries = spec.items() if isinstance(spec, dict) else enumerate(spec or ())
        return {axis: _dim(entry) for axis, entry in entries if entry is not None} or None
    if isinstance(value, dict):
        return {key: _dims(item, (spec or {}).get(key)) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        specs = spec if isinstance(spec, (tuple, list)) else [None] * len(value)
        return type(value)(_dims(v, s) for v, s in zip(value, specs, strict=True))
    return _dim(spec) if spec is not None and isinstance(value, int) else None


def _dim(entry: Any) -> Any:
    return Dim.DYNAMIC if isinstance(entry, str) or entry is True else entry


# -- torch.export ---------------------------------------------------------------------------------------


def _export(model: torch.nn.Module, inputs: Inputs, shapes: Any) -> ExportedProgram:
    failures: list[tuple[str, Exception]] = []
    with evaluation(model) as was_training, _quiet():
        if was_training:
            log.info("the model is in training mode; captured in evaluation mode, left as it was")
        for strict in (False, True):
            try:
                return _export_once(model, inputs, shapes, strict)
            except Exception as error:
                failures.append(("strict" if strict else "non-strict", error))
        registered = _register_output_classes(model, inputs)
        if registered:
            return _export_once(model, inputs, shapes, False)
        raise _capture_error(model, inputs, failures) from failures[0][1]


def _export_once(
    model: torch.nn.Module, inputs: Inputs, shapes: Any, strict: bool
) -> ExportedProgram:
    return torch.export.export(
        model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=strict
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.export says about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _capture_error(
    model: torch.nn.Module, inputs: Inputs, failures: list[tuple[str, Exception]]
) -> CaptureError:
    """Say why: first whether the model itself accepts the inputs, then what export said."""
    try:
        with torch.no_grad():
            deepcopy(model)(*inputs.args, **inputs.kwargs)
    except Exception as error:
        where = user_frame(error.__traceback__)
        return CaptureError(
            f"{type(model).__name__} does not run on the example inputs: "
            f"{type(error).__name__}: {error}\n  at {where or 'an unknown line'}\n"
            "Check their number, shapes, dtypes and device."
        )
    reasons = "\n".join(
        f"  {kind}: {type(error).__name__}: {_first_lines(str(error))}\n"
        f"    at {user_frame(error.__traceback__) or 'an unknown line'}"
        for kind, error in failures
    )
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph. torch.export said:\n{reasons}\n"
        "Control flow that depends on values must become torch.where or torch.cond; or name the "
        "parts that can be captured: fxopt.compile(model, ..., submodules=['backbone'])."
    )


def _first_lines(text: str, count: int = 4) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:count])[:600]


def _register_output_classes(model: torch.nn.Module, inputs: Inputs) -> bool:
    """Register dataclasses among the model's outputs with torch.export; whether there were any."""
    try:
        with torch.no_grad():
            outputs = deepcopy(model)(*inputs.args, **inputs.kwargs)
    except Exception:
        return False  # the caller reports the same failure with its reason
    found = False
    pending = [outputs]
    while pending:
        for leaf in pytree.tree_leaves(pending.pop()):
            if is_dataclass(leaf) and not isinstance(leaf, type):
                found |= _register_dataclass(type(leaf))
                pending.append(list(vars(leaf).values()))
    return found


def _register_dataclass(kind: type) -> bool:
    if kind in pytree.SUPPORTED_NODES:
        return False
    torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    return True


# -- after: from the exported program to the graph -----------------------------------------------------


def _program_inputs(program: ExportedProgram) -> Inputs:
    example = program.example_inputs
    if example is None:
        raise CaptureError("The ExportedProgram holds no example inputs; export it with some.")
    return Inputs(tuple(example[0]), dict(example[1]))


def _from_program(program: ExportedProgram, model: torch.nn.Module, inputs: Inputs) -> GraphModule:
    translation = _Translation(program, model, inputs)
    return translation.graph_module()


class _Translation:
    """One exported program on its way to a graph module."""

    def __init__(self, program: ExportedProgram, model: torch.nn.Module, inputs: Inputs) -> None:
        self.program = program
        self.model = model
        self.inputs = inputs
        nodes = list(program.graph.nodes)
        self.mode = _fake_mode(nodes)
        self.translator = Translator(program.graph_module, self.mode, _switches(model))
        self.constants: dict[str, tuple[torch.Tensor, bool]] = {}
        self._shared: dict[int, fx.Node] = {}
        self._ties: dict[str, list[str]] = {}
        self._nodes = nodes

    def graph_module(self) -> GraphModule:
        placeholders = [n for n in self._nodes if n.op == "placeholder"]
        specs = self.program.graph_signature.input_specs
        user = []
        for node, spec in zip(placeholders, specs, strict=True):  # user inputs first
            if spec.kind is InputKind.USER_INPUT:
                user.append(self._input(node))
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT and node.users:
                self._constant(node, spec)
        self.translator.translate(n for n in self._nodes if n.op != "placeholder")
        outputs, structure = self._outputs()
        signature = self._signature(user, structure)
        written = self.translator.write_back()
        self.translator.graph.output(outputs)
        mutated = _mutated(self.translator.graph, written)
        graph = GraphModule(torch.nn.Module(), fx.Graph(), type(self.model).__name__)
        for name, (tensor, persistent) in self.constants.items():
            if name in mutated:  # the graph writes to it: never to the model's own
                tensor.data = tensor.data.clone()
            graph.set_constant(name, tensor, persistent=persistent)
        for name, subgraph in self.translator.subgraphs.items():
            graph.set_constant(name, subgraph)
        values = pytree.tree_leaves((self.inputs.args, self.inputs.kwargs))
        graph.meta["fxopt"] = GraphInfo(
            signature=signature,
            fake_mode=self.mode,
            example_inputs=tuple(
                v for v, leaf in zip(values, signature.leaves, strict=True) if isinstance(leaf, TensorLeaf)
            ),
            model_name=type(self.model).__name__,
            mutated=mutated,
            sources=frozenset(self.constants),
            state=frozenset(
                name for name, (tensor, persistent) in self.constants.items()
                if persistent or isinstance(tensor, torch.nn.Parameter)
            ),
            ties={name: tuple(names) for name, names in self._ties.items()},
        )
        graph.graph = self.translator.graph
        graph.info.regularizers = _absent_regularizers(self.model, graph)
        return graph

    def _input(self, node: fx.Node) -> fx.Node | None:
        """Return the placeholder of one user input, or None for a Python constant."""
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, torch.SymInt)):
            return None
        new = self.translator.graph.placeholder(node.name)
        new.meta["val"] = value
        self.translator.bind(node, new)
        return new

    def _constant(self, node: fx.Node, spec: Any) -> None:
        """Make a get_attr node over a tensor of our own that shares the model's storage."""
        if spec.kind is InputKind.CUSTOM_OBJ or spec.kind is InputKind.TOKEN:
            raise CaptureError(
                f"'{spec.target}' is a script object or a token, and only tensors can be part of a "
                "graph. Keep it outside the captured module, with submodules=."
            )
        name = str(spec.target)
        tensor = self.program.state_dict.get(name)
        if tensor is None:
            tensor = self.program.constants[name]
        if id(tensor) in self._shared:
            first = self._shared[id(tensor)]
            self._ties.setdefault(str(first.target), [str(first.target)]).append(name)
            self.translator.bind(node, first)
            return
        own = tensor.detach()
        if spec.kind is InputKind.PARAMETER:
            own = torch.nn.Parameter(own, requires_grad=tensor.requires_grad)
        self.constants[name] = (own, spec.kind is InputKind.BUFFER and spec.persistent is not False)
        new = self.translator.graph.create_node(
            "get_attr", name, name=name.replace(".", "_")
        )
        new.meta["val"] = fake_of(tensor, self.mode)
        self._shared[id(tensor)] = new
        self.translator.bind(node, new)

    def _outputs(self) -> tuple[tuple[Any, ...], Structure]:
        """Return the flat outputs, and how the model's own output is made from them."""
        specs = self.program.graph_signature.output_specs
        values = self.program.graph.output_node().args[0]
        flat: list[Any] = []
        leaves: list[int | ConstantLeaf] = []
        integers: set[int] = set()
        for value, spec in zip(values, specs, strict=True):  # type: ignore[arg-type]
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                raise CaptureError(
                    "This ExportedProgram was decomposed, and its writes turned into outputs. Pass "
                    "the program that torch.export.export returned."
                )
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise CaptureError(f"Outputs of kind {spec.kind.name} are not supported.")
            if isinstance(value, fx.Node):
                node = self.translator.read(value)
                if not isinstance(node.meta.get("val"), torch.Tensor):
                    integers.add(len(flat))
                leaves.append(len(flat))
                flat.append(node)
            else:
                leaves.append(ConstantLeaf(f"output {len(leaves)}", value))
        spec_out = self.program.call_spec.out_spec
        assert spec_out is not None
        return tuple(flat), Structure(spec_out, tuple(leaves), frozenset(integers))

    def _signature(self, user: list[fx.Node | None], output: Structure) -> Signature:
        parameters = inspect.signature(self.model.forward)
        bound = parameters.bind(*self.inputs.args, **self.inputs.kwargs)
        arguments = dict(bound.arguments)
        paths, spec = pytree.tree_flatten_with_path(arguments)
        leaves: list[TensorLeaf | ConstantLeaf] = []
        for (path, value), node in zip(paths, user, strict=True):
            name = pytree.keystr(path).replace("['", ".").replace("']", "").removeprefix(".")
            leaves.append(_leaf(name, value, node))
        ranges = {
            str(symbol): (_lower(bounds.lower), _upper(bounds.upper))
            for symbol, bounds in self.program.range_constraints.items()
        }
        return Signature(parameters, tuple(arguments), spec, tuple(leaves), output, ranges)


def _mutated(graph: fx.Graph, written: set[fx.Node]) -> frozenset[str]:
    """Return the constants that running the graph changes: state, and statistics in training mode."""
    for node in graph.nodes:
        if node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
            if node.args[5] is True:
                written = written | {n for n in node.args[3:5] if isinstance(n, fx.Node)}
    return frozenset(str(node.target) for node in written if node.op == "get_attr")


def _leaf(name: str, value: Any, node: fx.Node | None) -> TensorLeaf | ConstantLeaf:
    if node is None:
        return ConstantLeaf(name, value)
    fake = node.meta["val"]
    if isinstance(fake, torch.SymInt):
        return TensorLeaf(name, (), None, None, fake.node.expr)
    shape = tuple(s if isinstance(s, int) else s.node.expr for s in fake.shape)
    return TensorLeaf(name, shape, fake.dtype, fake.device)


def _lower(bound: Any) -> int:
    """A lower bound of 2 is how torch.export says "anything": sizes 0 and 1 run, too."""
    return int(bound) if int(bound) > 2 else 0


def _upper(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer and bound < 2**31 else None


def _fake_mode(nodes: list[fx.Node]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for node in nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


# -- training -------------------------------------------------------------------------------------------


def _switches(model: torch.nn.Module) -> Callable[[str, str | None], bool]:
    """Return a test: does the node of this module path and source line switch with `train()`?

    A batch norm or dropout layer switches when `model.train()` would switch it; a functional call
    in the user's own module switches where its line mentions `training`.
    """
    modules = dict(model.named_modules())
    frozen = _frozen_in_training(model, modules)

    def switches(path: str, source: str | None) -> bool:
        module = modules.get(path)
        if module is None or path in frozen:
            return False
        layer = isinstance(module, (torch.nn.modules.batchnorm._NormBase, torch.nn.modules.dropout._DropoutNd))
        layer = layer or isinstance(module, (torch.nn.RNNBase, torch.nn.RReLU))
        own_line = bool(source) and "training" in str(source) and "training=False" not in str(source)
        return layer or own_line

    return switches


def _frozen_in_training(model: torch.nn.Module, modules: dict[str, torch.nn.Module]) -> set[str]:
    """Return the modules that an overridden `train` keeps in evaluation mode."""
    plain = torch.nn.Module.train
    if all(type(module).train is plain for module in modules.values()):
        return set()
    tensors = {id(t): t for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values())}
    try:
        twin = deepcopy(model, dict(tensors)).train(True)
    except Exception as error:
        log.warning("train() of the model is overridden and cannot be tried on a copy: %s", error)
        return set()
    return {path for path, module in twin.named_modules() if not module.training}


def _absent_regularizers(model: torch.nn.Module, graph: GraphModule) -> tuple[str, ...]:
    """Return the dropout-like modules that left no node to switch on in training."""
    present = {node.meta.get("path") for node in graph.graph.nodes if "switch" in node.meta}
    found = []
    for path, module in model.named_modules():
        kind = type(module).__name__.lower()
        rate = next(
            (getattr(module, a) for a in ("p", "drop_prob", "dropout") if hasattr(module, a)), None
        )
        if isinstance(rate, float) and rate > 0 and path not in present:
            if "drop" in kind or "stochastic" in kind or isinstance(module, torch.nn.MultiheadAttention):
                found.append(path)
    return tuple(found)
