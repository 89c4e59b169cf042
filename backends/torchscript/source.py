"""TorchScript source for a graph: one line per node, operators called by their full names."""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.errors import LoweringError
from fxopt.graph_module import GraphModule
from fxopt.quantization.operator import fake_quantize

aten = torch.ops.aten


class Source:
    """The TorchScript source of a graph, and the module that holds its constants."""

    def __init__(self, graph: GraphModule) -> None:
        # A class of its own: TorchScript gives all modules of one class and shape one code.
        self.holder = type("Graph", (torch.nn.Module,), {"__module__": __name__})()
        self._graph = graph
        self._names: dict[fx.Node, str] = {}
        self._nodes: list[fx.Node | None] = []  # of each line of the source
        self._lines: list[str] = []
        inputs = [self._input(node) for node in graph.placeholders]
        self._write(None, f"def forward({', '.join(['self', *inputs])}):")
        for node in graph.graph.nodes:
            self._node(node)

    @property
    def text(self) -> str:
        """The whole source."""
        return "\n".join(self._lines) + "\n"

    def compile(self) -> Any:
        """Return a script module; raise LoweringError, naming the node that it refuses."""
        module = torch.jit.script(self.holder)
        try:
            module.define(self.text)  # finds `torch` and `math` in this file
        except RuntimeError as error:
            raise self._error(error) from error
        return module.eval()

    def _error(self, error: RuntimeError) -> LoweringError:
        lines = [int(number) for number in re.findall(r'File "<string>", line (\d+)', str(error))]
        node = self._nodes[lines[0] - 1] if lines and lines[0] <= len(self._nodes) else None
        reason = str(error).strip().split("\n")[0]
        return _refused(node if node is not None else self._graph.output_node, reason)

    def _input(self, node: fx.Node) -> str:
        name = self._name(node)
        value = node.meta["val"]
        kind = "Tensor" if isinstance(value, torch.Tensor) else _number_type(node)
        return f"{name}: {kind}"

    def _name(self, node: fx.Node) -> str:
        return self._names.setdefault(node, f"v{len(self._names)}")

    def _write(self, node: fx.Node | None, line: str) -> None:
        self._lines.append(line)
        self._nodes.append(node)

    def _node(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._constant(node)
        elif node.op == "output":
            outputs = ", ".join(map(self._name, node.args[0]))  # type: ignore[arg-type]
            self._write(node, f"    return ({outputs},)" if outputs else "    return None")
        elif node.op == "call_function":
            text = self._call(node)
            is_check = node.meta.get("val") is None
            self._write(node, f"    {text}" if is_check else f"    {self._name(node)} = {text}")

    def _constant(self, node: fx.Node) -> None:
        value = self._graph.value(node)
        if not isinstance(value, torch.Tensor):
            raise _refused(next(iter(node.users)), "it is control flow")
        name = f"c{len(self._names)}"
        self.holder.register_buffer(name, value.detach().clone())
        self._write(node, f"    {self._name(node)} = self.{name}")

    def _call(self, node: fx.Node) -> str:
        target: Any = node.target
        if target is aten.copy_.default:
            raise _refused(node, "it writes the model's state back")
        if target in _SPECIAL:
            return _SPECIAL[target](node, *[self._text(node, a, None, None) for a in node.args])
        if target is operator.getitem:
            return f"{self._name(node.args[0])}[{node.args[1]!r}]"  # type: ignore[arg-type]
        if not isinstance(target, OpOverload):
            raise _refused(node, "TorchScript has no form of it")
        arguments = []
        positional = [a for a in target._schema.arguments if not a.kwarg_only]
        for argument, value in zip(positional, node.args, strict=False):
            arguments.append(self._text(node, value, argument.type, target))
        types = {a.name: a.type for a in target._schema.arguments}
        for name, value in node.kwargs.items():
            arguments.append(f"{name}={self._text(node, value, types[name], target)}")
        return f"torch.ops.{target._schema.name.replace('::', '.')}({', '.join(arguments)})"

    def _text(self, node: fx.Node, value: Any, kind: Any, target: Any) -> str:
        """Return an argument as source; `kind` is its type in the operator's schema."""
        wanted = "" if kind is None else str(kind.annotation_str)
        if isinstance(value, fx.Node):
            return self._name(value)
        if isinstance(value, (list, tuple)):
            inner = _element_type(kind)
            text = ", ".join(self._text(node, item, inner, target) for item in value)
            is_typed = wanted and "number" not in wanted
            return f"torch.jit.annotate({wanted}, [{text}])" if is_typed else f"[{text}]"
        is_number = isinstance(value, (bool, int, float, complex))
        if is_number and target and _needs_tensor(target, wanted, isinstance(value, bool)):
            return _number_as_tensor(node, value)
        if is_number and wanted in ("float", "Optional[float]"):
            value = float(value)
        return _literal(node, value)


def _literal(node: fx.Node, value: Any) -> str:
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"float('{value}')"
    if isinstance(value, complex):
        return f"complex({_literal(node, value.real)}, {_literal(node, value.imag)})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({json.dumps(str(value))})"
    if isinstance(value, str):
        return json.dumps(value)
    if value is None or isinstance(value, int):
        return repr(value)
    raise _refused(node, f"TorchScript has no form of the argument {value!r}")


def _needs_tensor(target: OpOverload, wanted: str, is_bool: bool) -> bool:
    """Whether a number must be written as a tensor.

    So where no form of the operator takes a number, and for a bool, which would count as integer.
    """
    schemas = torch._C._jit_get_schemas_for_operator(target._schema.name)
    forms = {schema.overload_name for schema in schemas}
    if "Tensor" in wanted:
        return is_bool or not any("Scalar" in form for form in forms)
    return is_bool and "Scalar" in target._overloadname and "Tensor" in forms


def _number_as_tensor(node: fx.Node, value: Any) -> str:
    """Return a tensor of rank 0, which promotes other tensors as the number itself would."""
    wide = any(
        isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].dtype is torch.float64
        for n in node.all_input_nodes
    )
    dtype = {bool: torch.bool, int: torch.int64}.get(type(value))
    dtype = dtype or (torch.float64 if wide else torch.get_default_dtype())
    return f"torch.scalar_tensor({_literal(node, value)}, dtype={dtype})"


def _element_type(kind: Any) -> Any:
    while kind is not None and hasattr(kind, "getElementType"):
        inner = kind.getElementType()
        if kind.kind() == "ListType":
            return inner
        kind = inner
    return None


def _number_type(node: fx.Node) -> str:
    value = node.meta.get("val")
    for name, kinds in (
        ("bool", (bool, torch.SymBool)), ("int", (int, torch.SymInt)),
        ("float", (float, torch.SymFloat)),
    ):  # fmt: skip
        if isinstance(value, kinds):
            return name
    raise _refused(node, f"TorchScript has no form of a {type(value).__name__}")


def _refused(node: fx.Node, reason: str) -> LoweringError:
    around = (node, *node.all_input_nodes, *node.users)
    where = next((n.meta["source"] for n in around if n.meta.get("source")), "an unknown line")
    return LoweringError(
        f"The backend 'torchscript' cannot express '{node.name}' = {node.target} (from {where}): "
        f"{reason}. Use backend='eager', or backend='onnx'."
    )


# -- symbolic sizes and checks --------------------------------------------------------------------


def _as_number(node: fx.Node, text: str) -> str:
    return f"{_number_type(node)}({text})"


_INFIX: Mapping[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.floordiv: "//", operator.mod: "%", operator.pow: "**", operator.eq: "==",
    operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=",
    operator.and_: "and", operator.or_: "or",
}  # fmt: skip


def _infix(mark: str) -> Callable[..., str]:
    return lambda node, a, b: _as_number(node, f"{a} {mark} {b}")


def _fake_quantize(node: fx.Node, x: str, scale: str, zero: str, qmin: str, qmax: str) -> str:
    """clamp(round(x / s), qmin − z, qmax − z) · s, halves in float32; libtorch has no such call"""
    dtype = node.meta["val"].dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scale, zero = f"{scale}.to({wide})", f"{zero}.to({wide})"
    steps = f"torch.round(torch.div({x}.to({wide}), {scale}))"
    return f"torch.mul(torch.clamp({steps}, {qmin} - {zero}, {qmax} - {zero}), {scale}).to({dtype})"


_SPECIAL: Mapping[Any, Callable[..., str]] = {
    **{function: _infix(mark) for function, mark in _INFIX.items()},
    operator.neg: lambda node, a: f"-{a}",
    operator.pos: lambda node, a: a,
    operator.abs: lambda node, a: f"abs({a})",
    operator.not_: lambda node, a: f"not {a}",
    torch.sym_not: lambda node, a: f"not {a}",
    torch.sym_max: lambda node, a, b: f"max({a}, {b})",
    torch.sym_min: lambda node, a, b: f"min({a}, {b})",
    torch.sym_sum: lambda node, terms: f"sum({terms})",
    torch.sym_float: lambda node, a: f"float({a})",
    torch.sym_int: lambda node, a: f"int({a})",
    torch.sym_ite: lambda node, c, a, b: f"({a} if {c} else {b})",
    torch.sym_sqrt: lambda node, a: f"math.sqrt({a})",
    math.ceil: lambda node, a: f"math.ceil({a})",
    math.floor: lambda node, a: f"math.floor({a})",
    math.trunc: lambda node, a: f"int({a})",
    math.sqrt: lambda node, a: f"math.sqrt({a})",
    aten.sym_size.int: lambda node, x, axis: f"torch.ops.aten.size({x}, {axis})",
    aten.sym_stride.int: lambda node, x, axis: f"torch.ops.aten.stride({x}, {axis})",
    aten.sym_numel.default: lambda node, x: f"torch.ops.aten.numel({x})",
    aten.item.default: lambda node, x: _as_number(node, x),
    aten._local_scalar_dense.default: lambda node, x: _as_number(node, x),
    aten._assert_scalar.default: lambda node, a, message: f"assert bool({a}), {message}",
    aten.sym_constrain_range_for_size.default: lambda node, *_: "pass",
    aten.sym_constrain_range.default: lambda node, *_: "pass",
    fake_quantize: _fake_quantize,
}
