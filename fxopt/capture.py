"""Capture: from a PyTorch model to one dialect graph, through torch.export."""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from contextvars import ContextVar
from copy import copy, deepcopy
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxopt.dynamic import Names, conditions, make_dynamic, names_of_sizes
from fxopt.errors import CaptureError
from fxopt.graph_module import GraphInfo, GraphModule
from fxopt.inputs import (
    Inputs,
    as_inputs,
    check_input,
    check_ready,
    evaluation,
    forward_signature,
    infer_inputs,
    map_tensors,
)
from fxopt.provenance import classes_by_path, source_line, user_frame
from fxopt.shapes import fake_of
from fxopt.signature import ConstantLeaf, Signature, Structure, TensorLeaf
from fxopt.training import absent_regularizers, switches_of
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
    started = time.perf_counter()
    if isinstance(model, (GraphModule, ExportedProgram)):
        graph = _captured_before(model, example_inputs, dynamic_shapes)
        if isinstance(model, GraphModule):
            return graph
    else:
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        check_ready(model)
        given = bind_inputs(model, example_inputs)
        inputs, shapes, names = _dynamic(model, given, dynamic_shapes)
        graph = _from_program(_export(model, inputs, shapes), model, inputs)
        assert graph.info.signature is not None
        graph.info.dimensions = names_of_sizes(names, graph.info.signature.leaves)
        if shapes is not None:
            _admit(graph, model, given)
    graph.info.capture_seconds = time.perf_counter() - started
    return graph


def _captured_before(
    model: GraphModule | ExportedProgram, example_inputs: Any, dynamic_shapes: Any
) -> GraphModule:
    """Return a graph of what was captured already, once the inputs are known to fit it."""
    if dynamic_shapes is not None:
        raise CaptureError(
            f"dynamic_shapes cannot change a {type(model).__name__}, which was captured already. "
            "Give them when you capture or export the model."
        )
    if isinstance(model, GraphModule):
        graph = model.copy()
    else:
        graph = _from_program(model, model.module(check_guards=False), _program_inputs(model))
    signature = graph.info.signature
    if example_inputs is not None and signature is not None:
        given = as_inputs(example_inputs)
        signature.check(signature.flatten(given.args, given.kwargs))
    return graph


# -- before: inputs and dynamic shapes ---------------------------------------------------------


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
    _register_dataclasses(dict(bound.arguments))
    for path, leaf in pytree.tree_flatten_with_path(dict(bound.arguments))[0]:
        check_input(_path_text(path), leaf)
    seen: set[int] = set()

    def distinct(tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor that is given twice: export would take the two arguments for one."""
        known = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if known else tensor

    return Inputs(*map_tensors((bound.args, bound.kwargs), distinct))


def _path_text(path: Any) -> str:
    """Return the path of a leaf in a dict of arguments as a user would write it: `x.mask[0]`."""
    head, *rest = path
    return f"{head.key}{pytree.keystr(tuple(rest))}"


def _dynamic(model: torch.nn.Module, inputs: Inputs, given: Any) -> tuple[Inputs, Any, Names]:
    if given is None:
        return inputs, None, {}
    bound = forward_signature(model).bind(*inputs.args, **inputs.kwargs)
    arguments, shapes, names = make_dynamic(bound.signature, bound.arguments, given)
    bound.arguments.update(arguments)
    return Inputs(bound.args, bound.kwargs), shapes, names


def _admit(graph: GraphModule, model: torch.nn.Module, given: Inputs) -> None:
    """Let sizes of 0 and 1 in that the user's examples have, if the graph computes what they give.

    The model may ask `if batch == 1`, and a graph knows one answer. Often both come to the same.
    """
    signature = graph.info.signature
    assert signature is not None
    flat = signature.flatten(given.args, given.kwargs)
    wider = signature.admitting(flat)
    if wider is signature:
        return
    with torch.no_grad(), evaluation(model), _quiet():
        try:
            expected = pytree.tree_leaves(_try(model, given))
            results = graph.copy().run(*map_tensors(flat, torch.clone))
            found = pytree.tree_leaves(wider.output.unflatten(results))
        except Exception as error:
            log.debug("the graph stays closed to sizes 0 and 1: %s", error)
            return
    if len(found) == len(expected) and all(map(_agree, found, expected)):
        graph.info.signature = wider


def _agree(found: Any, expected: Any) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return bool(found == expected)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (found.is_floating_point() or found.is_complex()):
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


# -- torch.export ------------------------------------------------------------------------------


_may_be_strict: ContextVar[bool] = ContextVar("may_be_strict", default=True)


@contextmanager
def inside_torch_compile() -> Iterator[None]:
    """Keep to non-strict export: the strict one resets TorchDynamo, whose code is running."""
    token = _may_be_strict.set(False)
    try:
        yield
    finally:
        _may_be_strict.reset(token)


def _export(model: torch.nn.Module, inputs: Inputs, shapes: Any) -> ExportedProgram:
    if any(module.training for module in model.modules()):
        log.info("the model is in training mode; captured in evaluation mode, left as it was")
    # Sizes that may be 0 or 1 leave guards only with the first of these, so it comes first.
    oblivious_too = (True, False) if shapes is not None else (False,)
    strict_too = (False, True) if _may_be_strict.get() else (False,)
    modes = [(oblivious, strict) for oblivious in oblivious_too for strict in strict_too]
    failures: list[tuple[str, Exception]] = []
    with evaluation(model), attributes_kept(model), _quiet():
        for oblivious, strict in modes:
            try:
                return _export_once(model, inputs, shapes, strict, oblivious)
            except Exception as error:
                failures.append(("strict" if strict else "non-strict", error))
        if _register_output_classes(model, inputs):
            try:
                return _export_once(model, inputs, shapes, False, bool(shapes))
            except Exception as error:
                failures.insert(0, ("non-strict", error))
        raise _capture_error(model, inputs, failures[:2]) from failures[0][1]


def _export_once(
    model: torch.nn.Module, inputs: Inputs, shapes: Any, strict: bool, oblivious: bool
) -> ExportedProgram:
    from torch._dynamo.convert_frame import compile_lock
    from torch.fx.experimental import _config

    config: Any = _config
    quiet = redirect_stderr(_WithoutGraphs(sys.stderr))
    # what all threads share: settings, and the annotations of whatever is being traced
    with compile_lock, config.patch(backed_size_oblivious=oblivious), quiet:
        # export marks the tensors it is given; the caller's own stay unmarked
        args, kwargs = map_tensors((inputs.args, inputs.kwargs), _alias)
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _WithoutGraphs(io.TextIOBase):
    """A stream that leaves out the half-made graphs which torch.export prints when it fails."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._skipped = False

    def write(self, text: str) -> int:
        operators = "def forward(self, " in text and "torch.ops." in text
        graph = operators or "class GraphModule(" in text
        if not graph and not (self._skipped and text == "\n"):
            self._stream.write(text)
        self._skipped = graph
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


@contextmanager
def attributes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put back the very objects that the modules' attributes were: export leaves copies.

    What a dict, list or set among them holds is put back, too (a model that caches a tensor in one
    would be left with a fake), and so are the values of tensors in plain attributes.
    """
    kept = [(module, dict(vars(module))) for module in model.modules()]
    tensors = [
        (leaf, leaf._version, leaf.clone())
        for leaf in pytree.tree_leaves([_plain_attributes(kept_) for _, kept_ in kept])
        if isinstance(leaf, torch.Tensor)
    ]
    held = [
        (value, copy(value))
        for _, attributes in kept
        for value in attributes.values()
        if type(value) in (dict, list, set)
    ]
    try:
        yield
    finally:
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)
        for value, content in held:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        with torch.no_grad():
            for tensor, version, content in tensors:
                if tensor._version != version:
                    tensor.copy_(content)


def _plain_attributes(attributes: dict[str, Any]) -> list[Any]:
    """Return the attributes of a module that are neither its parameters, buffers nor parts."""
    own = ("_parameters", "_buffers", "_modules")
    return [value for name, value in attributes.items() if name not in own]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says about itself while it exports."""
    known = logging.root.manager.loggerDict
    loggers = [logging.getLogger(name) for name in list(known) if name.split(".")[0] == "torch"]
    were_disabled = [logger.disabled for logger in loggers]
    top = logging.getLogger("torch")  # for loggers that are made meanwhile
    level = top.level
    top.setLevel(logging.CRITICAL + 1)
    for logger in loggers:
        logger.disabled = True  # each setLevel would empty the caches of all loggers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was_disabled in zip(loggers, were_disabled, strict=True):
            logger.disabled = was_disabled
        top.setLevel(level)


def _try(model: torch.nn.Module, inputs: Inputs) -> Any:
    """Run a copy of the model on copies of the inputs."""
    args, kwargs = map_tensors((inputs.args, inputs.kwargs), torch.clone)
    with torch.no_grad():
        return deepcopy(model)(*args, **kwargs)


def _capture_error(
    model: torch.nn.Module, inputs: Inputs, failures: list[tuple[str, Exception]]
) -> CaptureError:
    """Say why: first whether the model itself accepts the inputs, then what export said."""
    name = type(model).__name__
    if any(isinstance(error, RecursionError) for _, error in failures):
        return CaptureError(
            f"{name} is nested deeper than Python's recursion limit allows. Raise it with "
            "sys.setrecursionlimit, or flatten the model."
        )
    try:
        _try(model, inputs)
    except Exception as error:
        where = user_frame(error.__traceback__)
        return CaptureError(
            f"{name} does not run on the example inputs: {type(error).__name__}: {error}\n"
            + (f"  at {where}\n" if where else "")
            + "Check their number, shapes, dtypes and device."
        )
    violated = [line for _, error in failures for line in _violations(str(error))]
    if violated:
        return CaptureError(
            f"{name} cannot be captured with these dynamic_shapes:\n"
            + "".join(f"  {line}\n" for line in dict.fromkeys(violated))
            + "Leave such a dimension out, or give it the range or relation that the model needs."
        )
    places = [
        user_frame(error.__traceback__) or source_line(str(error)) for _, error in failures
    ]
    where = next((place for place in places if place), None)
    reasons = "".join(
        f"  {kind}: {type(error).__name__}: {_first_lines(str(error))}\n"
        for kind, error in failures
    )
    return CaptureError(
        f"{name} cannot be captured as one graph"
        + (f", because of\n  {where}\n" if where else ".\n")
        + f"torch.export said:\n{reasons}"
        "Control flow that depends on values must become torch.where or torch.cond; or name the "
        "parts that can be captured: fxopt.compile(model, ..., submodules=['backbone'])."
    )


_BOILERPLATE = (
    "The error above occurred when calling",
    "For more information",
    "For more details about this graph break",
    "Developer debug context",
    "Hint:",
    "consider using data-dependent friendly",
    "Caused by:",
)


def _first_lines(text: str, count: int = 4) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    short = " ".join(lines[:count])
    for part in _BOILERPLATE:
        short = short.partition(part)[0]
    return short.strip()[:600]


def _violations(text: str) -> list[str]:
    """Return what torch.export says about dynamic dimensions that the model does not allow."""
    if "Constraints violated" not in text and "user-specified" not in text:
        return []
    lines = [line.strip()[2:] for line in text.splitlines() if line.strip().startswith("- ")]
    short = [
        line.partition(" If you're using")[0].replace("Dim.DYNAMIC(min=None, max=None)", "dynamic")
        for line in lines
    ]
    size = re.compile(r"L\['(\w+)'\]((?:\[[^\]]*\])*)\.size\(\)\[(\d+)\]")
    return [size.sub(r"\1\2.shape[\3]", line) for line in short]


def _register_output_classes(model: torch.nn.Module, inputs: Inputs) -> bool:
    """Register dataclasses among the model's outputs with torch.export; whether there were any."""
    try:
        outputs = _try(model, inputs)
    except Exception:
        return False  # the caller reports the same failure with its reason
    return _register_dataclasses(outputs)


def _register_dataclasses(value: Any) -> bool:
    """Register the classes of all dataclasses in a nested value; whether there were new ones."""
    new = [leaf for leaf in pytree.tree_leaves(value) if _register_dataclass(leaf)]
    if new:
        _register_dataclasses(value)  # they may hold others
    return bool(new)


def _register_dataclass(value: Any) -> bool:
    """Register the class of a dataclass instance with torch.export; whether it was new."""
    kind = type(value)
    if not is_dataclass(kind) or kind in pytree.SUPPORTED_NODES:
        return False
    name = f"{kind.__module__}.{kind.__qualname__}"
    torch.export.register_dataclass(kind, serialized_type_name=name)
    return True


# -- after: from the exported program to the graph ---------------------------------------------


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
        self.translator = Translator(program.graph_module, self.mode, switches_of(model))
        self.constants: dict[str, tuple[torch.Tensor, bool]] = {}
        self._shared: dict[int, fx.Node] = {}
        self._ties: dict[str, tuple[str, ...]] = {}
        self._names = _names_by_tensor(model)
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
                tensor.requires_grad_(False)  # state, though it be a parameter
            graph.set_constant(name, tensor, persistent=persistent)
        for name, subgraph in self.translator.subgraphs.items():
            graph.set_constant(name, subgraph)
        values = pytree.tree_leaves((self.inputs.args, self.inputs.kwargs))
        graph.meta["fxopt"] = GraphInfo(
            signature=signature,
            fake_mode=self.mode,
            example_inputs=tuple(
                value for value, leaf in zip(values, signature.leaves, strict=True)
                if isinstance(leaf, TensorLeaf)
            ),
            model_name=type(self.model).__name__,
            modules=classes_by_path(self._nodes),
            mutated=mutated,
            sources=frozenset(self.constants),
            state=frozenset(
                name for name, (tensor, persistent) in self.constants.items()
                if persistent or isinstance(tensor, torch.nn.Parameter)
            ),
            ties=self._ties,
            unused=self._unused(),
        )
        graph.graph = self.translator.graph
        graph.info.regularizers = absent_regularizers(self.model, graph)
        return graph

    def _input(self, node: fx.Node) -> fx.Node | None:
        """Return the placeholder of one user input, or None for a Python constant."""
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, torch.SymInt)):
            return None
        new = self.translator.graph.placeholder(node.name)
        new.target = new.name  # where the name is taken: `torch`, say, in the generated code
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
        names = self._names.get(id(tensor), (name,))
        if id(tensor) in self._shared:
            self.translator.bind(node, self._shared[id(tensor)])
            return
        name = _free_name(names[0])
        if names != (name,):
            self._ties[name] = names
        own = tensor.data  # not detach(), which would share the version counter, too
        if spec.kind is InputKind.PARAMETER:
            own = torch.nn.Parameter(own, requires_grad=tensor.requires_grad)
        self.constants[name] = (own, spec.kind is InputKind.BUFFER and spec.persistent is not False)
        new = self.translator.graph.create_node(
            "get_attr", name, name=name.replace(".", "_")
        )
        new.meta["val"] = fake_of(tensor, self.mode)
        self._shared[id(tensor)] = new
        self.translator.bind(node, new)

    def _unused(self) -> frozenset[str]:
        """Return the names of the model's state that the graph does not need."""
        used = {alias for name in self.constants for alias in self._ties.get(name, (name,))}
        return frozenset(name for name in self.program.state_dict if name not in used)

    def _outputs(self) -> tuple[tuple[Any, ...], Structure]:
        """Return the flat outputs, and how the model's own output is made from them."""
        specs = self.program.graph_signature.output_specs
        values = self.program.graph.output_node().args[0]
        flat: list[Any] = []
        leaves: list[int | ConstantLeaf] = []
        numbers: list[tuple[int, str]] = []
        for value, spec in zip(values, specs, strict=True):
            if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION):
                raise CaptureError(
                    "This ExportedProgram was decomposed, and its writes turned into outputs. Pass "
                    "the program that torch.export.export returned."
                )
            if spec.kind is not OutputKind.USER_OUTPUT:
                raise CaptureError(f"Outputs of kind {spec.kind.name} are not supported.")
            if isinstance(value, fx.Node):
                node = self.translator.read(value)
                kind = _number(node.meta.get("val"))
                numbers += [(len(flat), kind)] if kind else []
                leaves.append(len(flat))
                flat.append(node)
            else:
                leaves.append(ConstantLeaf(f"output {len(leaves)}", value))
        spec_out = self.program.call_spec.out_spec
        assert spec_out is not None
        return tuple(flat), Structure(spec_out, tuple(leaves), tuple(numbers))

    def _signature(self, user: list[fx.Node | None], output: Structure) -> Signature:
        parameters = inspect.signature(self.model.forward)
        bound = parameters.bind(*self.inputs.args, **self.inputs.kwargs)
        arguments = dict(bound.arguments)
        paths, spec = pytree.tree_flatten_with_path(arguments)
        leaves: list[TensorLeaf | ConstantLeaf] = []
        for (path, value), node in zip(paths, user, strict=True):
            leaves.append(_leaf(_path_text(path), value, node))
        guards, small = conditions(self.mode, leaves)
        ranges = {
            str(symbol): (0 if symbol in small else int(bounds.lower), _upper(bounds.upper))
            for symbol, bounds in self.program.range_constraints.items()
            if bounds.lower.is_Integer  # others are values that the graph computes, not sizes
        }
        return Signature(parameters, tuple(arguments), spec, tuple(leaves), output, ranges, guards)


def _names_by_tensor(model: torch.nn.Module) -> dict[int, tuple[str, ...]]:
    """Return all names of each parameter and buffer, by its identity; tied ones have several."""
    found: dict[int, tuple[str, ...]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        found[id(tensor)] = (*found.get(id(tensor), ()), name)
    return found


_TAKEN = frozenset(dir(GraphModule)) | {"meta", "training"}


def _free_name(name: str) -> str:
    """Return a constant's name, changed where it begins like an attribute of the graph module.

    A model may well have a layer called `value` or `graph`; its weights are then `value_.weight`.
    """
    first, dot, rest = name.partition(".")
    return f"{first}_{dot}{rest}" if first in _TAKEN else name


def _mutated(graph: fx.Graph, written: set[fx.Node]) -> frozenset[str]:
    """Return the constants that running the graph changes: state, and statistics in training."""
    for node in graph.nodes:
        if node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
            if node.args[5] is True:
                written = written | {n for n in node.args[3:5] if isinstance(n, fx.Node)}
    return frozenset(str(node.target) for node in written if node.op == "get_attr")


def _number(value: Any) -> str | None:
    """Return the type of a symbolic Python number, or None for a tensor."""
    if isinstance(value, torch.Tensor):
        return None
    if isinstance(value, (bool, torch.SymBool)):
        return "bool"
    return "float" if isinstance(value, (float, torch.SymFloat)) else "int"


def _leaf(name: str, value: Any, node: fx.Node | None) -> TensorLeaf | ConstantLeaf:
    if node is None:
        return ConstantLeaf(name, value)
    fake = node.meta["val"]
    if isinstance(fake, torch.SymInt):
        return TensorLeaf(name, (), None, None, fake.node.expr)
    shape = tuple(s if isinstance(s, int) else s.node.expr for s in fake.shape)
    return TensorLeaf(name, shape, fake.dtype, fake.device)


def _upper(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer and bound < 2**31 else None


def _fake_mode(nodes: list[fx.Node]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for node in nodes:
        if isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()
