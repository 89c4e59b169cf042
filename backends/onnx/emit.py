"""From a dialect graph to an ONNX graph: the walk over its nodes, and what emitters build with.

Every node is emitted by the function registered for its operator (`registry.emits`), straight from
its arguments and its recorded shape and dtype; nothing is traced or run. ONNX values of a
node bear the node's name, constants keep theirs, and equal small constants are shared.

A symbolic size is an int64 value of shape [1] here, which is what shapes are concatenated from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxopt.backends.onnx.describe import (
    all_rules,
    attribute,
    describe,
    has_shadow,
    refusal,
    shape_of,
)
from fxopt.backends.onnx.dtypes import ONNX_DTYPES, SHADOWS_ON_CPU, array_of, tensor_of
from fxopt.backends.onnx.registry import Rule
from fxopt.graph_module import GraphModule

Value = ir.Value

# Effects without a result, which the runtime checks by itself or has no use for.
_DROPPED = {
    "_assert_scalar",
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}


class Emitter:
    """Builds the ONNX graph of one dialect graph; emitters get it as their first argument."""

    def __init__(
        self,
        graph: GraphModule,
        opset: int,
        *,
        on_cpu: bool = True,
        parent: Emitter | None = None,
        scope: str = "",
    ) -> None:
        self.graph = graph
        self.opset = opset
        self.on_cpu = on_cpu
        self.parent = parent
        self.scope = scope
        self.node: fx.Node = graph.output_node  # the node being emitted
        self.nodes: list[ir.Node] = []
        self.notes: dict[str, None] = parent.notes if parent else {}
        self.initializers: dict[str, Value] = parent.initializers if parent else {}
        self.state: dict[str, Value] = parent.state if parent else {}  # mutated constants: inputs
        self.functions: dict[Any, ir.Function] = parent.functions if parent else {}
        self._shared: dict[Any, Value] = parent._shared if parent else {}
        self._taken: set[str] = parent._taken if parent else set()
        self._computed: dict[Any, Value] = dict(parent._computed) if parent else {}
        self._values: dict[fx.Node, Any] = {}
        self._shadowed: dict[Value, Value] = {}
        self._shadowing = False
        self._fresh: list[ir.Node] = []
        self._readers: dict[int, list[fx.Node]] | None = None

    # -- what an emitter asks about its arguments -----------------------------------------------

    def dtype(self, node: Any) -> torch.dtype:
        """Return the dtype in which a node's value reaches this emitter."""
        return self.shadow_of(node.meta["val"].dtype)

    def shadow_of(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that stands for `dtype` within this emitter."""
        return SHADOWS_ON_CPU.get(dtype, dtype) if self._shadowing else dtype

    @property
    def out_dtype(self) -> torch.dtype:
        """The dtype that this emitter shall produce (of its first result)."""
        value = self.node.meta["val"]
        return self.shadow_of((value[0] if isinstance(value, (list, tuple)) else value).dtype)

    @property
    def called(self) -> str:
        """The operator being emitted, such as "max.dim"."""
        return str(self.node.target).removeprefix("aten.")

    @property
    def out_shape(self) -> list[Any]:
        """The sizes of this emitter's result: integers, or SymInts."""
        return shape_of(self.node)

    def tensor(self, node: Any) -> torch.Tensor | None:
        """Return a constant's tensor, or None for a node that is not a constant (or is state)."""
        if isinstance(node, fx.Node) and node.op == "get_attr" and node.target not in self.state:
            value = self.graph.value(node)
            return value if isinstance(value, torch.Tensor) else None
        return None

    def used(self, index: int) -> bool:
        """Whether anything uses result number `index` of the node being emitted."""
        return any(user.args[1] == index and user.users for user in self.node.users)

    def readers(self, tensor: torch.Tensor) -> list[fx.Node]:
        """Return the nodes that stand for a constant: more than one where it is tied."""
        if self._readers is None:
            self._readers = {}
            for node in self.graph.graph.find_nodes(op="get_attr"):
                self._readers.setdefault(id(self.graph.value(node)), []).append(node)
        return self._readers.get(id(tensor), [])

    def fail(self, reason: str, remedy: str = "") -> NoReturn:
        """Raise the LoweringError that says what cannot be expressed, where, and what to do."""
        raise refusal(self.node, reason, remedy)

    def note(self, sentence: str) -> None:
        """Record something that the report should say about this lowering."""
        self.notes[sentence] = None

    # -- building -------------------------------------------------------------------------------

    def op(self, op_type: str, *inputs: Any, domain: str = "", **attributes: Any) -> Value:
        """Append an ONNX node of one output.

        Inputs are fx nodes, ONNX values, None (left out) or lists of integers; attributes that are
        None are left out.
        """
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: Any, outputs: int, domain: str = "", **attributes: Any
    ) -> Sequence[Value]:
        """Append an ONNX node of several outputs; see `op`."""
        values = [None if x is None else self.value(x) for x in inputs]
        while values and values[-1] is None:
            values.pop()
        node = ir.Node(
            domain,
            op_type,
            values,
            [attribute(name, given) for name, given in attributes.items() if given is not None],
            num_outputs=outputs,
        )
        self.nodes.append(node)
        self._fresh.append(node)
        return node.outputs

    def adopt(self, nodes: Sequence[ir.Node]) -> None:
        """Append ONNX nodes that were made elsewhere for the node being emitted."""
        self.nodes.extend(nodes)
        self._fresh.extend(nodes)

    def value(self, x: Any) -> Value:
        """Return the ONNX value of an fx node, a list of integers or sizes, or a value itself."""
        if isinstance(x, Value):
            return x
        if isinstance(x, (list, tuple)):
            return self.sizes(x)
        if not isinstance(x, fx.Node):
            raise TypeError(f"{x!r} is no ONNX value; a number needs Emitter.number(x, dtype).")
        fake = x.meta.get("val")
        value = self.raw(x)
        return self._shadow(value, fake.dtype) if isinstance(fake, torch.Tensor) else value

    def values(self, x: Any) -> list[Any]:
        """Return the ONNX values of a node whose result is a list."""
        found = self._values[x]
        assert isinstance(found, list)
        return found

    def operand(self, x: Any, dtype: torch.dtype) -> Value:
        """Return a tensor or number as an ONNX value of `dtype`."""
        if isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor):
            return self.cast(self.value(x), self.dtype(x), dtype)
        return self.number(x, dtype)

    def cast(self, value: Value, source: torch.dtype, target: torch.dtype) -> Value:
        """Convert a value of dtype `source` to dtype `target`."""
        return value if source == target else self._cast(value, target)

    def number(self, x: Any, dtype: torch.dtype) -> Value:
        """Return a number (or symbolic number) as a value without dimensions."""
        if not isinstance(x, fx.Node):
            return self.constant(array_of(x, dtype))
        key = (x, dtype, "number")
        if key not in self._computed:
            value = self.op("Squeeze", self.raw(x), [0])
            source = (
                torch.float64
                if isinstance(x.meta["val"], (float, torch.SymFloat))
                else (
                    torch.bool if isinstance(x.meta["val"], (bool, torch.SymBool)) else torch.int64
                )
            )
            self._computed[key] = self.cast(value, source, dtype)
        return self._computed[key]

    def constant(self, given: np.ndarray[Any, Any] | torch.Tensor) -> Value:
        """Return a small constant; equal ones are one."""
        array = tensor_of(given, "").numpy() if isinstance(given, torch.Tensor) else given
        key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
        found = self._shared.get(key)
        if found is None:
            name = self._unique(f"constant_{len(self._shared)}")
            found = self._shared[key] = self._initializer(name, ir.Tensor(array, name=name))
        return found

    def weight(
        self, node: fx.Node, how: str, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> Value:
        """Return a changed copy of a constant, made now and named after it."""
        tensor = self.tensor(node)
        assert tensor is not None
        key = (id(tensor), how)
        if key not in self._shared:
            with torch.no_grad():
                changed = change(tensor.detach()).clone(memory_format=torch.contiguous_format)
            name = self._unique(f"{node.target}.{how}")
            self._shared[key] = self._initializer(name, tensor_of(changed, name))
        return self._shadow(self._shared[key], tensor.dtype)

    # -- shapes ---------------------------------------------------------------------------------

    def size(self, x: Any, axis: int) -> Any:
        """Return one size of a tensor: an integer, or a value of shape [1]."""
        size = shape_of(x)[axis]
        return size if isinstance(size, int) else self.size_value(x, axis)

    def size_value(self, x: Any, axis: int) -> Value:
        """Return one size of a tensor as a value of shape [1]."""
        size = shape_of(x)[axis]
        if isinstance(size, int):
            return self.sizes([size])
        key = (str(size.node.expr), "size")
        if key not in self._computed:
            self._computed[key] = self.op("Shape", self.raw(x), start=axis, end=axis + 1)
        return self._computed[key]

    def number_of_size(self, x: Any, axis: int) -> Value:
        """Return one size of a tensor as a value without dimensions."""
        return self.op("Squeeze", self.size_value(x, axis), [0])

    def shape_list(self, x: Any) -> list[Any]:
        """Return the sizes of a tensor: integers, and values of shape [1]."""
        return [self.size(x, axis) for axis in range(len(shape_of(x)))]

    def sizes(self, items: Sequence[Any]) -> Value:
        """Return a list of integers, symbolic nodes and [1]-values as one int64 value."""
        if all(isinstance(item, int) for item in items):
            return self.constant(np.asarray(items, dtype=np.int64))
        parts: list[Any] = []
        for item in items:
            if not isinstance(item, int):
                parts.append(self._size_part(item))
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(item)
            else:
                parts.append([item])
        values = [self.sizes(part) if isinstance(part, list) else part for part in parts]
        if len(values) == 1:
            return values[0]
        key = ("sizes", tuple(values))
        if key not in self._computed:
            self._computed[key] = self.op("Concat", *values, axis=0)
        return self._computed[key]

    def _size_part(self, item: Any) -> Value:
        if isinstance(item, Value):
            return item
        if isinstance(item, fx.Node):
            value = self.raw(item)
            if isinstance(item.meta.get("val"), torch.Tensor):  # a size given as a tensor
                value = self.op("Reshape", self.operand(item, torch.int64), [1])
            return value
        if isinstance(item, torch.SymInt):
            key = (str(item.node.expr), "size")
            if key in self._computed:
                return self._computed[key]
            for node in self.graph.placeholders:
                if isinstance(node.meta.get("val"), torch.Tensor):
                    for axis, size in enumerate(node.meta["val"].shape):
                        if not isinstance(size, int) and size.node.expr == item.node.expr:
                            return self.size_value(node, axis)
        self.fail(f"the size {item} is not computed by any node of the graph")

    # -- the walk -------------------------------------------------------------------------------

    def bind(self, node: fx.Node, value: Any) -> None:
        """Say what an fx node's ONNX value is."""
        self._values[node] = value

    def emit(self, node: fx.Node) -> None:
        """Emit one call_function node."""
        self.node = node
        target = node.target
        if getattr(getattr(target, "_schema", None), "name", "").removeprefix("aten::") in _DROPPED:
            return
        rule = all_rules().get(target)
        self._fresh = []
        if rule is None:
            from fxopt.backends.onnx.fallback import translate

            result = translate(self, node)
        else:
            result = self.call(rule, node)
        self._values[node] = result
        self._finish(node, result)

    def call(self, rule: Rule, node: fx.Node) -> Any:
        """Let a rule emit a node, in dtypes that the runtime's kernels know."""
        if rule.moves or not self.on_cpu or not has_shadow(node):
            return rule.emit(self, *node.args, **node.kwargs)
        self._shadowing = True
        self.note(
            "bfloat16 operators compute in float32 between casts, since ONNX Runtime's CPU "
            "provider has no bfloat16 kernels."
        )
        try:
            result = rule.emit(self, *node.args, **node.kwargs)
        finally:
            self._shadowing = False
        value = node.meta["val"]
        if result is None or isinstance(result, Value):
            return result if result is None else self._back(result, value)
        return [
            None if one is None else self._back(one, fake)
            for one, fake in zip(result, value, strict=True)
        ]

    def _shadow(self, value: Value, dtype: torch.dtype) -> Value:
        shadow = SHADOWS_ON_CPU.get(dtype) if self._shadowing else None
        if shadow is None:
            return value
        if value not in self._shadowed:
            self._shadowed[value] = self._cast(value, shadow)
        return self._shadowed[value]

    def _back(self, value: Value, fake: Any) -> Value:
        if isinstance(fake, torch.Tensor) and fake.dtype in SHADOWS_ON_CPU:
            return self._cast(value, fake.dtype)
        return value

    def _finish(self, node: fx.Node, result: Any) -> None:
        """Name what was built for `node`, and record the shapes of its results."""
        fresh = set(self._fresh)
        results = result if isinstance(result, list) else [result]
        fakes = node.meta.get("val")
        several = isinstance(fakes, (list, tuple))
        for index, value in enumerate(results):
            if value is None or value.producer() not in fresh:
                continue
            fake = fakes[index] if several and index < len(fakes) else fakes
            if value.name is None:
                value.name = self._unique(f"{node.name}_{index}" if several else node.name)
            if isinstance(fake, torch.Tensor):
                describe(value, fake)
        last = results[0].producer() if results and results[0] is not None else None
        path = node.meta.get("path")
        for made in self._fresh:
            if made.name is None:
                made.name = self._unique(
                    node.name if made is last else f"{node.name}.{made.op_type}", kind="node"
                )
            for value in made.outputs:
                if value.name is None:
                    value.name = self._unique(made.name)
            if path:
                made.metadata_props["fxopt.path"] = str(path)

    def raw(self, node: fx.Node) -> Value:
        """Return the ONNX value of an fx node, in its own dtype."""
        found = self._values.get(node)
        if found is None:
            if node.op != "get_attr":
                raise refusal(node, "its value is used, but it has none in ONNX")
            found = self._values[node] = self.constant_node(node)
        assert isinstance(found, Value), f"{node} is a list"
        return found

    def constant_node(self, node: fx.Node) -> Value:
        """Return the initializer of a get_attr node."""
        name = str(node.target)
        if name in self.state:
            return self.state[name]
        tensor = self.graph.value(node)
        key = (id(tensor), "itself")
        if key not in self._shared:
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in ONNX_DTYPES:
                raise refusal(node, f"ONNX has no constant of type {getattr(tensor, 'dtype', '?')}")
            unique = self._unique(self.scope + name)
            own = tensor.detach().clone(memory_format=torch.contiguous_format)
            self._shared[key] = self._initializer(unique, tensor_of(own, unique))
        return self._shared[key]

    def _initializer(self, name: str, tensor: Any) -> Value:
        value = Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers[name] = value
        return value

    def _cast(self, value: Value, dtype: torch.dtype) -> Value:
        if dtype not in ONNX_DTYPES:
            self.fail(f"ONNX has no type {dtype}")
        return self.op("Cast", value, to=int(ONNX_DTYPES[dtype]))

    def reserve(self, name: str) -> str:
        """Return `name`, or a variant of it that nothing else in the file bears."""
        return self._unique(name)

    def _unique(self, name: str, kind: str = "") -> str:
        name = self.scope + name if not name.startswith(self.scope) else name
        candidate, count = name, 1
        while kind + candidate in self._taken:
            candidate, count = f"{name}.{count}", count + 1
        self._taken.add(kind + candidate)
        return candidate
