"""A graph as text: one line per node, stable across runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.graph_module import GraphModule

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def graph_text(graph: GraphModule | fx.Graph) -> str:
    """Return the graph, one line per node: `%relu: f32[1,64] = relu(%conv2d)`."""
    nodes = graph.graph.nodes if isinstance(graph, GraphModule) else graph.nodes
    return "\n".join(node_text(node) for node in nodes) + "\n"


def node_text(node: fx.Node, *, inline: bool = False) -> str:
    """Return one node as text; with `inline` a constant stands where it is used, by its name."""
    args, kwargs = node.args, node.kwargs
    if inline:
        args, kwargs = fx.map_arg((args, kwargs), _constant_or_node)
    if node.op == "output":
        return f"return {value_text(args[0])}"
    head = f"%{node.name}: {type_text(node.meta.get('val'))} = "
    if node.op == "placeholder":
        return head + "input"
    if node.op == "get_attr":
        return head + f"constant '{node.target}'"
    named = [f"{key}={value_text(value)}" for key, value in kwargs.items()]
    arguments = ", ".join([*map(value_text, args), *named])
    return head + f"{target_text(node.target)}({arguments})"


def _constant_or_node(node: fx.Node) -> Any:
    return str(node.target) if node.op == "get_attr" else node


def target_text(target: Any) -> str:
    """Return an operator's short name: `conv2d`, `add.Tensor`, `mylib::op`."""
    if isinstance(target, OpOverload):
        space, name = target._schema.name.split("::")
        overload = target._overloadname
        name += "" if overload in ("", "default") else f".{overload}"
        return name if space == "aten" else f"{space}::{name}"
    return str(getattr(target, "__name__", target))


def type_text(value: Any) -> str:
    """Return the type of a node's value: `f32[1,64,s0]`, `int`, or a list of types."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_text(value.dtype)}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(type_text, value)) + ")"
    if isinstance(value, torch.SymInt):
        return "int"
    return type(value).__name__ if value is not None else "graph"


def dtype_text(dtype: torch.dtype) -> str:
    """Return a dtype's short name."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def value_text(value: Any) -> str:
    """Return an argument as text."""
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(value_text, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    if isinstance(value, (torch.device, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    return repr(value)


def quantity_text(number: float) -> str:
    """Return a count with three digits and its prefix: `950`, `70.4k`, `25.6M`, `4.09G`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            return f"{number / 10**power:.3g}{prefix}"
    return f"{number:.3g}"


def plain_text(shown: Any, width: int = 110) -> str:
    """Return what rich prints of an object, without colours and without spaces at the ends."""
    from rich.console import Console

    console = Console(width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
