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
import torch
from torch import fx

from fxopt.backends.onnx.builder import Builder, Value
from fxopt.backends.onnx.describe import (
    all_rules,
    describe,
    has_shadow,
    number_dtype,
    refusal,
    shape_of,
)
from fxopt.backends.onnx.dtypes import ONNX_DTYPES, SHADOWS_ON_CPU, array_of, tensor_of
from fxopt.backends.onnx.registry import Rule
from fxopt.graph_module import GraphModule

# Effects without a result, which the runtime checks by itself or has no use for.
_DROPPED = {
    "_assert_scalar",
    "_assert_async",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}


class Emitter(Builder):
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
        super().__init__(opset, parent, scope)
        self.graph = graph
        self.on_cpu = on_cpu
        self.node: fx.Node = graph.output_node  # the node being emitted
        self.state: dict[str, Value] = parent.state if parent else {}  # mutated constants: inputs
        self.slices: dict[fx.Node, Any] = {}  # begun, and left to the slice that follows
        self._computed: dict[Any, Value] = dict(parent._computed) if parent else {}
        self._values: dict[fx.Node, Any] = {}
        self._shadowed: dict[Value, Value] = {}
        self._shadowing = False
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

    # -- building -------------------------------------------------------------------------------

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

    def number(self, x: Any, dtype: torch.dtype) -> Value:
        """Return a number (or symbolic number) as a value without dimensions."""
        if not isinstance(x, fx.Node):
            return self.constant(array_of(x, dtype))
        key = (x, dtype, "number")
        if key not in self._computed:
            value = self.op("Squeeze", self.raw(x), [0])
            self._computed[key] = self.cast(value, number_dtype(x.meta["val"]), dtype)
        return self._computed[key]

    def weight(
        self, node: fx.Node, how: str, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> Value:
        """Return a changed copy of a constant, made now and named after it."""
        return self.weights([node], how, change)

    def weights(
        self, nodes: Sequence[fx.Node], how: str, change: Callable[..., torch.Tensor]
    ) -> Value:
        """Return what is computed from constants, made now and named after the first."""
        tensors = [self.tensor(node) for node in nodes]
        given = [tensor.detach() for tensor in tensors if tensor is not None]
        assert len(given) == len(nodes)
        key = (*map(id, tensors), how)
        if key not in self.shared:
            with torch.no_grad():
                changed = change(*given).clone(memory_format=torch.contiguous_format)
            name = self.reserve(f"{nodes[0].target}.{how}")
            self.shared[key] = self.initializer(name, tensor_of(changed, name))
        made = self.shared[key]
        # integers made of floats have no shadow
        return self._shadow(made, given[0].dtype) if _is(made, given[0].dtype) else made

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
        key = (str(item.node.expr), "size")
        if key not in self._computed:
            node, axis = self._carrier(item)
            self.size_value(node, axis)
        return self._computed[key]

    def _carrier(self, size: Any) -> tuple[fx.Node, int]:
        """Return a node that has this symbolic size, and at which dimension."""
        for node in self._values:
            fake = node.meta.get("val")
            for axis, one in enumerate(fake.shape if isinstance(fake, torch.Tensor) else ()):
                if not isinstance(one, int) and one.node.expr == size.node.expr:
                    return node, axis
        raise refusal(self.node, f"the size {size} is not computed by any node of the graph")

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
        self.fresh.clear()
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
            self._shadowed[value] = self.convert(value, shadow)
        return self._shadowed[value]

    def _back(self, value: Value, fake: Any) -> Value:
        if isinstance(fake, torch.Tensor) and fake.dtype in SHADOWS_ON_CPU:
            return self.convert(value, fake.dtype)
        return value

    def _finish(self, node: fx.Node, result: Any) -> None:
        """Name what was built for `node`, and record the shapes of its results."""
        fresh = set(self.fresh)
        results = result if isinstance(result, list) else [result]
        fakes: Any = node.meta.get("val")
        several = isinstance(fakes, (list, tuple))
        for index, value in enumerate(results):
            if value is None or value.producer() not in fresh:
                continue
            fake = fakes[index] if several and index < len(fakes) else fakes
            if value.name is None:
                value.name = self.reserve(f"{node.name}_{index}" if several else node.name)
            if isinstance(fake, torch.Tensor):
                describe(value, fake)
        last = results[0].producer() if results and results[0] is not None else None
        path = node.meta.get("path")
        for made in self.fresh:
            if made.name is None:
                made.name = self.reserve(
                    node.name if made is last else f"{node.name}.{made.op_type}", kind="node"
                )
            for value in made.outputs:
                if value.name is None:
                    value.name = self.reserve(made.name)
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
        if key not in self.shared:
            if not isinstance(tensor, torch.Tensor) or tensor.dtype not in ONNX_DTYPES:
                raise refusal(node, f"ONNX has no constant of type {getattr(tensor, 'dtype', '?')}")
            unique = self.reserve(name)
            own = tensor.detach().clone(memory_format=torch.contiguous_format)
            self.shared[key] = self.initializer(unique, tensor_of(own, unique))
        return self.shared[key]


def _is(value: Value, dtype: torch.dtype) -> bool:
    return value.dtype == ONNX_DTYPES.get(dtype)
