"""Building ONNX nodes, constants and names; what the emitter of a graph stands on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from fxopt.backends.onnx.describe import attribute
from fxopt.backends.onnx.dtypes import ONNX_DTYPES, tensor_of
from fxopt.errors import LoweringError

Value = ir.Value


class Builder:
    """Collects the ONNX nodes of one graph; graphs inside of it share its constants and names."""

    def __init__(self, opset: int, parent: Builder | None = None, scope: str = "") -> None:
        self.opset = opset
        self.scope = scope  # what the names inside of a sub-graph begin with
        self.nodes: list[ir.Node] = []
        self.fresh: list[ir.Node] = []  # those made for the graph node being emitted
        self.notes: dict[str, None] = parent.notes if parent else {}
        self.initializers: dict[str, Value] = parent.initializers if parent else {}
        self.shared: dict[Any, Value] = parent.shared if parent else {}  # constants made once
        self.kept: list[Any] = parent.kept if parent else []  # whose identities are keys above
        self._taken: set[str] = parent._taken if parent else set()

    def note(self, sentence: str) -> None:
        """Record something that the report should say about this lowering."""
        self.notes[sentence] = None

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
        self.fresh.append(node)
        return node.outputs

    def adopt(self, nodes: Sequence[ir.Node]) -> None:
        """Append ONNX nodes that were made elsewhere for the node being emitted."""
        self.nodes.extend(nodes)
        self.fresh.extend(nodes)

    def value(self, x: Any) -> Value:
        """Return what may stand as an input: a value, or a list of integers."""
        if isinstance(x, Value):
            return x
        return self.constant(np.asarray(x, dtype=np.int64))

    def cast(self, value: Value, source: torch.dtype, target: torch.dtype) -> Value:
        """Convert a value of dtype `source` to dtype `target`."""
        return value if source == target else self.convert(value, target)

    def constant(self, given: np.ndarray[Any, Any] | torch.Tensor) -> Value:
        """Return a small constant; equal ones are one."""
        array = tensor_of(given, "").numpy() if isinstance(given, torch.Tensor) else given
        key = (array.dtype.str, str(array.dtype), array.shape, array.tobytes())
        found = self.shared.get(key)
        if found is None:
            name = self.reserve(f"constant_{len(self.shared)}")
            found = self.shared[key] = self.initializer(name, ir.Tensor(array, name=name))
        return found

    def initializer(self, name: str, tensor: Any) -> Value:
        """Add a constant to the model."""
        value = Value(
            name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.initializers[name] = value
        return value

    def convert(self, value: Value, dtype: torch.dtype) -> Value:
        """Append a Cast."""
        if dtype not in ONNX_DTYPES:
            raise LoweringError(f"ONNX has no type {dtype}. Use a float type, or backend='eager'.")
        return self.op("Cast", value, to=int(ONNX_DTYPES[dtype]))

    def reserve(self, name: str, kind: str = "") -> str:
        """Return `name`, or a variant of it that no other value (or node) in the file bears."""
        name = self.scope + name if not name.startswith(self.scope) else name
        candidate, count = name, 1
        while kind + candidate in self._taken:
            candidate, count = f"{name}.{count}", count + 1
        self._taken.add(kind + candidate)
        return candidate

    def name_all(self) -> None:
        """Name what has no name yet."""
        for made in self.nodes:
            if made.name is None:
                made.name = self.reserve(made.op_type, kind="node")
            for value in made.outputs:
                if value.name is None:
                    value.name = self.reserve(made.name)
