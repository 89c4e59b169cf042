"""The graph as AOTInductor takes it: tensors in, tensors out, nothing written to.

Before                                   After
    placeholder n (an integer)               placeholder of shape (n, 0), and its size
    copy_(buffer, y) at the end              buffer comes in as an input, y goes out as an output
    an output that is a size                 an output that is a tensor without dimensions

The sizes are symbols of a shape environment of its own: what Inductor learns about them must not
reach the graph that the user keeps.

Left alone, with a LoweringError: state that is written in other ways (batch norm in training), and
tensors that are not on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

from fxopt.backends.inductor.memory import lies_in_constants
from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule

aten = torch.ops.aten


@dataclass(frozen=True)
class Slot:
    """A tensor that a call changes: which output is its new value.

    It is the graph's input `input`; where that is None, it is a state with an `initial` value.
    """

    output: int
    input: int | None
    initial: torch.Tensor | None


@dataclass(frozen=True)
class FlatGraph:
    """A plain fx graph, the inputs it is made for, and how a call is brought to it.

    Its inputs are those of the graph, then the states; its outputs are those of the graph, of
    which there are `results`, then the new values of the slots.
    """

    module: fx.GraphModule
    inputs: tuple[Any, ...]  # fake tensors
    integers: tuple[int, ...]  # positions of inputs that stand for an integer
    slots: tuple[Slot, ...]
    results: int
    constant: tuple[int, ...]  # outputs that may lie in the memory of a constant
    sizes: FreshSizes


def flatten(graph: GraphModule) -> FlatGraph:
    """Return what AOTInductor compiles; raise LoweringError for what it has no form of."""
    return _Flattening(graph).result()


class _Flattening:
    """One graph on its way to a plain one."""

    def __init__(self, graph: GraphModule) -> None:
        self.source = graph
        self.target = fx.Graph()
        self.twins: dict[fx.Node, fx.Node] = {}
        self.sizes = FreshSizes(graph)
        self.inputs: list[Any] = []
        self.integers: list[int] = []

    def result(self) -> FlatGraph:
        copies = [n for n in self.source.graph.nodes if n.target is aten.copy_.default]
        self._check(copies)
        placeholders = self.source.placeholders
        for node in placeholders:
            self.twins[node] = self._input(node)
        for copy in copies:
            if copy.args[0].op == "get_attr":
                self.twins[copy.args[0]] = self._tensor_input(copy.args[0])
        root = torch.nn.Module()
        for node in self.source.graph.nodes:
            if node.target is aten.copy_.default:
                self.twins[node] = self.twins[node.args[1]]
            elif node.op == "call_function" or (node.op == "get_attr" and node not in self.twins):
                self.twins[node] = _copy(node, self.source, self.target, root, self.twins)
        outputs: Any = self.source.output_node.args[0]
        returned = [*outputs, *(copy.args[1] for copy in copies)]
        self.target.output(tuple(self._output(node) for node in returned))
        return FlatGraph(
            module=fx.GraphModule(root, self.target),
            inputs=tuple(self.inputs),
            integers=tuple(self.integers),
            slots=tuple(
                self._slot(copy.args[0], placeholders, len(outputs) + index)
                for index, copy in enumerate(copies)
            ),
            results=len(outputs),
            constant=tuple(i for i, node in enumerate(outputs) if lies_in_constants(node)),
            sizes=self.sizes,
        )

    def _check(self, copies: list[fx.Node]) -> None:
        for node in self.source.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                raise LoweringError(
                    f"Node '{node.name}' is on {value.device}, and this backend compiles for the "
                    "CPU. Move the model and its inputs there, or use backend='eager'."
                )
        written = {str(copy.args[0].target) for copy in copies}  # type: ignore[union-attr]
        hidden = self.source.info.mutated - written
        if hidden:
            raise LoweringError(
                f"The graph changes {', '.join(sorted(hidden))} inside an operator (a batch norm "
                "in training mode does that), which Inductor's inference code cannot. Call "
                ".eval() on the graph, or use backend='eager'."
            )

    def _input(self, node: fx.Node) -> fx.Node:
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return self._tensor_input(node)
        self.integers.append(len(self.inputs))
        with self.sizes.mode:
            fake = torch.empty((self.sizes.size(value), 0))
        carrier = self._placeholder(node.name, fake)
        return self.target.call_function(aten.sym_size.int, (carrier, 0))

    def _tensor_input(self, node: fx.Node) -> fx.Node:
        value = node.meta["val"]
        shape = [self.sizes.size(size) for size in value.shape]
        with self.sizes.mode:
            fake = torch.empty(shape, dtype=value.dtype)
            if is_channels_last(value):
                fake = fake.contiguous(memory_format=channels_last(fake))
        return self._placeholder(node.name, fake)

    def _placeholder(self, name: str, fake: Any) -> fx.Node:
        node = self.target.placeholder(name)
        node.meta["val"] = fake
        self.inputs.append(fake)
        return node

    def _output(self, node: fx.Node) -> fx.Node:
        value, twin = node.meta.get("val"), self.twins[node]
        if isinstance(value, torch.Tensor):
            return twin
        kind = {torch.SymBool: torch.bool, bool: torch.bool, torch.SymFloat: torch.float64}
        dtype = kind.get(type(value), torch.int64)
        return self.target.call_function(aten.scalar_tensor.default, (twin,), {"dtype": dtype})

    def _slot(self, written: fx.Node, placeholders: list[fx.Node], output: int) -> Slot:
        if written.op == "placeholder":
            return Slot(output, placeholders.index(written), None)
        return Slot(output, None, self.source.value(written).detach().clone())


def _plain(graph: GraphModule) -> fx.GraphModule:
    """Return the sub-graph of a control-flow operator as a plain module."""
    target, root = fx.Graph(), torch.nn.Module()
    twins: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        twins[node] = _copy(node, graph, target, root, twins)
    return fx.GraphModule(root, target)


def _copy(
    node: fx.Node,
    source: GraphModule,
    target: fx.Graph,
    root: torch.nn.Module,
    twins: dict[fx.Node, fx.Node],
) -> fx.Node:
    """Copy a node of `source`, and bring its constant along."""
    twin = target.node_copy(node, twins.__getitem__)
    twin.meta.clear()  # the fake tensors there belong to another mode
    if node.op == "get_attr":
        twin.target = twin.name  # a constant's own path may be no Python
        value = source.value(node)
        if isinstance(value, GraphModule):
            root.add_module(twin.name, _plain(value))
        else:
            root.register_buffer(twin.name, value.detach())
    return twin


class FreshSizes:
    """The symbolic sizes of a graph, made anew in a shape environment of their own."""

    def __init__(self, graph: GraphModule) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self._old: Any = graph.info.fake_mode.shape_env
        self._symbols: dict[Any, Any] = {}
        self._hints: dict[Any, int] = {}

    def size(self, size: Any) -> Any:
        """Return the twin of a size; a plain integer stays one."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self._symbols:
                self._symbols[symbol] = self._create(symbol)
        new = expression.xreplace(self._symbols)
        return self.env.create_symintnode(new, hint=int(new.xreplace(self._hints)))

    def _create(self, symbol: Any) -> Any:
        from torch._dynamo.source import ConstantSource

        if free_unbacked_symbols(symbol):
            raise LoweringError(f"The size {symbol} of an input depends on the values of another.")
        hint = int(self._old.backed_var_to_val[symbol])
        new = self.env.create_symbol(
            hint, ConstantSource(str(symbol)), DimDynamic.DYNAMIC,
            positive=True if symbol.is_positive else None, do_not_specialize_zero_one=True,
        )  # fmt: skip
        bounds = self._old.var_to_range.get(symbol)
        if bounds is not None:
            self.env.var_to_range[new] = bounds & self.env.var_to_range[new]
        self._hints[new] = hint
        return new

    def fixed(self) -> list[str]:
        """Return the sizes that compiling has fixed, which none of the code's checks would tell."""
        return [
            f"{old} = {self.env.replacements[new]}"
            for old, new in self._symbols.items()
            if new in self.env.replacements
        ]


def is_channels_last(fake: torch.Tensor) -> bool:
    """Whether a tensor lies in memory with its channels last, and not also with its width last.

    This asks the example's sizes: a question to symbolic ones would leave a guard in their graph.
    """
    if fake.dim() not in (4, 5):
        return False
    shape, stride = ([_example(size) for size in sizes] for sizes in (fake.shape, fake.stride()))
    example = torch.empty_strided(shape, stride, device="meta")
    last = channels_last(example)
    return not example.is_contiguous() and example.is_contiguous(memory_format=last)


def _example(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def channels_last(tensor: torch.Tensor) -> torch.memory_format:
    """Return the memory format for images, or for volumes."""
    return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
