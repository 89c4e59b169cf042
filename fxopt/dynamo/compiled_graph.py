"""One graph of torch.compile, compiled for the weights and sizes that it meets."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.capture import inside_torch_compile
from fxopt.compile import compile
from fxopt.compiled import CompiledModel
from fxopt.dynamo.autocast import AS_MODELS_DO, autocast_here, enter_autocast, exit_autocast
from fxopt.dynamo.inputs import dynamic_dimensions, is_number, is_weight, sizes_of
from fxopt.dynamo.options import Options
from fxopt.dynamo.outputs import outputs_of
from fxopt.errors import CaptureError, FxoptError, ShapeError
from fxopt.inputs import Inputs

log = logging.getLogger("fxopt")


@dataclass(frozen=True)
class _Weight:
    """A tensor that a graph was compiled for, and what tells that it was changed since."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Weight:
        return cls(weakref.ref(tensor), tensor._version, tensor.data_ptr())

    def is_unchanged(self, given: torch.Tensor | None) -> bool:
        return (
            given is not None
            and self.tensor() is given
            and given._version == self.version
            and given.data_ptr() == self.address
        )


@dataclass(frozen=True)
class _Variant:
    """A graph compiled for certain weights, and maybe for certain sizes only."""

    model: CompiledModel
    inputs: tuple[int, ...]  # the positions of what the model is called with
    weights: Mapping[int, _Weight]  # what it was compiled for, by position
    numbers: Mapping[int, float]  # the same of Python's floats, which come as tensors

    def changed(self, given: Sequence[Any]) -> set[int]:
        """Return the positions of weights that are not those compiled for."""
        return {i for i, weight in self.weights.items() if not weight.is_unchanged(given[i])}

    def fits(self, given: Sequence[Any]) -> bool:
        return all(weight.is_unchanged(given[i]) for i, weight in self.weights.items())

    def accepts(self, given: Sequence[Any]) -> bool:
        """Whether the numbers and the sizes of the inputs are those compiled for."""
        if any(given[i].item() != number for i, number in self.numbers.items()):
            return False
        try:
            self.model.signature.check([given[i] for i in self.inputs])
        except ShapeError:
            return False
        return True

    def is_of_use(self) -> bool:
        """Whether its weights are still alive, and as they were."""
        return all(weight.is_unchanged(weight.tensor()) for weight in self.weights.values())


class CompiledGraph:
    """One graph of torch.compile as it is called: with weights, sizes and inputs, all flat."""

    def __init__(
        self, graph: fx.GraphModule, options: Options, example_inputs: Sequence[Any]
    ) -> None:
        self._graph = graph
        self._options = options
        self._nodes = list(graph.graph.find_nodes(op="placeholder"))
        self._sizes = sizes_of(self._nodes)
        self._dynamic = {node.name: dynamic_dimensions(node) for node in self._nodes}
        self._outputs = outputs_of(graph, self._nodes)
        self._variants: tuple[_Variant, ...] = ()
        self._compilations = 0
        self._is_left = False  # to PyTorch
        self._numbers = {i for i, node in enumerate(self._nodes) if is_number(node)}
        self._weights: set[int] = {
            i for i, (node, value) in enumerate(zip(self._nodes, example_inputs, strict=True))
            if is_weight(node, value) and i not in self._numbers
        }  # fmt: skip
        self._autocast = autocast_here(example_inputs)

    def prepare(self, example_inputs: Sequence[Any]) -> None:
        """Compile for the weights and inputs of the first call."""
        with _apart():
            self._compile(example_inputs)

    def __call__(self, *given: Any) -> Any:
        """Run for weights, sizes and inputs as torch.compile gives them: all flat, in order."""
        variant = None if self._is_left else self._variant(given)
        if variant is None:
            return self._graph.forward(*given)
        model = variant.model
        with torch._C._DisableAutocast():  # the graph holds the casts
            results = model.executable.run(*[given[i] for i in variant.inputs])
        values = model.signature.output.unflatten(results)
        return [
            output.restored(value, given)
            for output, value in zip(self._outputs, values, strict=True)
        ]

    def _variant(self, given: Sequence[Any]) -> _Variant | None:
        """Return what was compiled for these weights and sizes, compiling it where nothing was."""
        found = self._known(given)
        if found is None:
            with _apart():
                found = self._known(given) or self._compile(given)  # another thread may have
        return found

    def _known(self, given: Sequence[Any]) -> _Variant | None:
        for variant in self._variants:
            if variant.fits(given) and variant.accepts(given):
                return variant
        return None

    def _compile(self, given: Sequence[Any]) -> _Variant | None:
        """Compile for these weights; None where PyTorch is to run the graph from now on."""
        if self._is_left or self._compilations >= self._options.variants:
            self._leave(
                f"was compiled {self._compilations} times, for other weights or sizes. To compile "
                "it more often, give options={'variants': …}"
            )
            return None
        if self._compilations:
            log.info("compiling again: the weights, or sizes, are not those compiled for")
        self._compilations += 1
        self._free_state(given)
        try:
            variant = self._compiled(given)
        except (FxoptError, RuntimeError) as error:
            if not self._options.fallback:
                raise
            self._leave(f"cannot be compiled: {error}")
            return None
        self._variants = (*(one for one in self._variants if one.is_of_use()), variant)
        return variant

    def _leave(self, reason: str) -> None:
        if not self._is_left:
            log.warning("a graph of torch.compile %s. PyTorch runs it as it is.", reason)
        self._is_left, self._variants = True, ()

    def _free_state(self, given: Sequence[Any]) -> None:
        """Make inputs of those buffers that change between calls while the parameters do not."""
        for variant in self._variants:
            changed = variant.changed(given)
            if not any(isinstance(given[i], torch.nn.Parameter) for i in changed):
                self._weights -= changed

    def _compiled(self, given: Sequence[Any]) -> _Variant:
        weights = {i: _Weight.of(given[i]) for i in sorted(self._weights)}
        numbers = {i: given[i].item() for i in self._numbers}
        apart = {*weights, *numbers, *self._sizes}
        inputs = tuple(i for i in range(len(self._nodes)) if i not in apart)
        names = [self._nodes[i].name for i in inputs]
        shapes = {name: self._dynamic[name] for name in names if self._dynamic[name]}
        if any(variant.fits(given) for variant in self._variants):
            shapes = {}  # a graph for all sizes is there, and does not take these
        module = self._module(given, inputs, numbers)
        arguments = [_normal(given[i]) for i in inputs]
        try:
            model = self._model(module, arguments, shapes)
        except CaptureError:
            if not shapes:
                raise
            model = self._model(module, arguments, {})  # the graph fixes a size
        written = _written(model)
        state = {i for i in weights if self._nodes[i].name in written}
        if state:  # the model must find it changed
            self._weights -= state
            return self._compiled(given)
        for output in self._outputs:
            output.check(written)
        return _Variant(model, inputs, weights, numbers)

    def _model(
        self, module: fx.GraphModule, arguments: Sequence[Any], shapes: Mapping[str, Any]
    ) -> CompiledModel:
        found: CompiledModel = compile(
            module, Inputs(tuple(arguments), {}), dynamic_shapes=dict(shapes) or None,
            **self._options.compile,
        )  # fmt: skip
        return found

    def _module(
        self, given: Sequence[Any], inputs: Sequence[int], numbers: Mapping[int, float]
    ) -> fx.GraphModule:
        """Return the graph as a module that holds weights and numbers, called with inputs alone."""
        target = fx.Graph()
        twins: dict[fx.Node, Any] = {}
        constants: dict[str, Any] = {}
        for index in inputs:
            node = self._nodes[index]
            twins[node] = target.placeholder(node.name)
        for index in sorted(self._weights):
            node = self._nodes[index]
            constants[node.name] = given[index]
            twins[node] = target.get_attr(node.name)
        for index, (holder, axis) in self._sizes.items():
            twins[self._nodes[index]] = target.call_method("size", (twins[holder], axis))
        for index, number in numbers.items():
            twins |= dict.fromkeys(self._nodes[index].users, number)  # each asks for its item()
        entered = [target.call_function(enter_autocast, how) for how in self._autocast]
        for node in self._graph.graph.nodes:
            if node.op == "get_attr":
                constants[str(node.target)] = _attribute(self._graph, str(node.target))
            if node.op == "output":
                for autocast in reversed(entered):
                    target.call_function(exit_autocast, (autocast,))
            if node.op != "placeholder" and node not in twins:
                twin = twins[node] = target.node_copy(node, lambda one: twins[one])
                twin.target = AS_MODELS_DO.get(twin.target, twin.target)
        module = fx.GraphModule(constants, target, "torch_compile_graph")
        module.eval()  # a flag without meaning: dropout and its like are calls here
        return module


def _written(model: CompiledModel) -> set[str]:
    """Return the names of the inputs and constants that a graph writes to."""
    assert model.graph is not None
    copies = model.graph.find(torch.ops.aten.copy_.default)
    return {str(copy.args[0].target) for copy in copies} | model.graph.info.mutated  # type: ignore[union-attr]


@contextmanager
def _apart() -> Iterator[None]:
    """Step out of what torch.compile is doing, and keep other threads from compiling.

    torch.compile's own lock is the one to take: it is held when a graph is handed over.
    """
    from torch._dynamo.convert_frame import compile_lock

    with (
        compile_lock,
        inside_torch_compile(),
        torch._guards.tracing(None),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C._DisableAutocast(),  # the graph that is compiled enters it by itself
    ):
        yield


def _normal(value: Any) -> Any:
    """Return a tensor of inference mode as one that can be captured; anything else as it is."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
