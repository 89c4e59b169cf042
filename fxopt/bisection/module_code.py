"""A fragment as the source code of an nn.Module: one readable line per call."""

from __future__ import annotations

import keyword
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.bisection.fragment import Fragment
from fxopt.errors import FxoptError

MOST_INLINE = 16  # elements of a tensor that is written into the code
WIDTH = 100
_TAKEN = {"self", "torch", "operator", "math", "draw", "stored", "float"}


class Unspellable(FxoptError):
    """Something in a graph has no Python source of its own, such as a call with sub-graphs."""


@dataclass
class ModuleCode:
    """The code of a module that computes what a fragment does, and of its inputs.

    `values` holds what goes into the fragment and its constants. With `random`, tensors are drawn
    anew, with the same shape and spread; otherwise those that are too large to be written down
    are collected in `stored`, by the name under which the code asks for them.
    """

    fragment: Fragment
    values: Mapping[fx.Node, Any]
    random: bool
    name: str = "Fragment"
    stored: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names: dict[fx.Node, str] = {}
        for node in (*self.fragment.inputs, *self.fragment.calls):
            self._names[node] = f"{node.name}_" if node.name in _TAKEN else node.name
        self._names |= {node: f"self.{name}" for node, name in self._constant_names().items()}

    def module(self) -> str:
        """Return the class; its forward takes the fragment's tensors."""
        names = [self._names[node] for node in self._tensors]
        head = [*self._init(), f"def forward({', '.join(['self', *names])}):"]
        lines = [f"class {self.name}(torch.nn.Module):", *_indented(head)]
        body = [line for node in self.fragment.calls for line in self._call(node)]
        outputs = ", ".join(self._names[node] for node in self.fragment.outputs)
        return "\n".join([*lines, *_indented(body, 8), f"        return {outputs}"])

    def inputs(self) -> str:
        """Return the function that makes the inputs."""
        made = [
            f"{self._tensor(self.values[node], f'input.{node.name}')},  # {self._names[node]}"
            for node in self._tensors
        ]
        lines = ["def inputs():"]
        if any("=draw" in line for line in made):
            lines.append("    draw = torch.Generator().manual_seed(1)")
        return "\n".join([*lines, "    return (", *_indented(made, 8), "    )"])

    @property
    def _tensors(self) -> list[fx.Node]:
        """The inputs that are tensors; sizes are written as numbers."""
        return [n for n in self.fragment.inputs if isinstance(self.values[n], torch.Tensor)]

    def _constant_names(self) -> dict[fx.Node, str]:
        """Name constants by the last part of their path where that is clear."""
        leaves = [str(node.target).rpartition(".")[2] for node in self.fragment.constants]
        plain = torch.nn.Module()
        found = {}
        for node, leaf in zip(self.fragment.constants, leaves, strict=True):
            clear = leaves.count(leaf) == 1 and leaf.isidentifier() and not keyword.iskeyword(leaf)
            name = leaf if clear else node.name
            found[node] = f"constant_{name}" if hasattr(plain, name) else name
        return found

    def _init(self) -> list[str]:
        lines = []
        for node in self.fragment.constants:
            value = self.values[node]
            if not isinstance(value, torch.Tensor):
                raise Unspellable(f"'{node.target}' is a sub-graph, not a tensor.")
            name = self._names[node].removeprefix("self.")
            made = self._tensor(value, str(node.target))
            if isinstance(value, torch.nn.Parameter):
                grad = "" if value.requires_grad else ", requires_grad=False"
                lines.append(f"    self.{name} = torch.nn.Parameter({made}{grad})")
            else:
                lines.append(f'    self.register_buffer("{name}", {made})')
        if not lines:
            return []
        if any("=draw" in line for line in lines):
            lines.insert(0, "    draw = torch.Generator().manual_seed(0)")
        return ["def __init__(self):", "    super().__init__()", *lines, ""]

    # -- calls --------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Iterator[str]:
        arguments = [self._literal(one) for one in node.args]
        name, target = self._names[node], node.target
        if getattr(target, "__name__", "") == "getitem":
            yield f"{name} = {arguments[0]}[{arguments[1]}]"
            return
        arguments += [f"{key}={self._literal(one)}" for key, one in node.kwargs.items()]
        yield from _wrapped(f"{name} = {_function(target)}(", arguments, ")")

    def _literal(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            known = self.values.get(value)
            return self._names[value] if _is_name(value, known) else self._literal(known)
        if isinstance(value, (list, tuple)):
            inside = ", ".join(map(self._literal, value))
            if isinstance(value, list):
                return f"[{inside}]"
            return f"({inside},)" if len(value) == 1 else f"({inside})"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if value is None or isinstance(value, (bool, int, float, str, complex)):
            return repr(value)
        raise Unspellable(f"{value!r:.80} cannot be written as Python.")

    # -- tensors ------------------------------------------------------------------------------

    def _tensor(self, value: torch.Tensor, key: str) -> str:
        """Return an expression for a tensor: written down, drawn, or stored under a key."""
        value = value.detach()
        if self.random:
            return _drawn(value) + _layout(value)
        if value.numel() <= MOST_INLINE and not value.is_complex() and _is_plain(value):
            return _plain(value)
        self.stored[key] = value.contiguous()
        return f'stored["{key}"]{_layout(value)}'


def _is_name(node: fx.Node, known: Any) -> bool:
    """Whether a node stands in the code by name, and not as a number."""
    return known is None or isinstance(known, torch.Tensor) or node.op == "get_attr"


def _function(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    known = {"_operator": "operator", "math": "math", "torch": "torch"}
    if module in known and hasattr(__import__(known[module]), name):
        return f"{known[module]}.{name}"
    raise Unspellable(f"A call of {target} cannot be written as Python.")


def _plain(value: torch.Tensor) -> str:
    return f"torch.tensor({value.tolist()}, dtype={value.dtype})"


def _is_plain(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _drawn(value: torch.Tensor) -> str:
    """Return an expression that draws a tensor of the same shape, dtype and spread."""
    shape = ", ".join(map(str, value.shape)) or "()"
    sizes = f"({shape},)" if value.dim() == 1 else f"({shape})" if value.dim() else "()"
    if value.numel() == 0:
        return f"torch.empty({shape}, dtype={value.dtype})"
    if value.is_complex():
        return f"torch.randn({shape}, generator=draw, dtype={value.dtype})"
    finite = value.double()[torch.isfinite(value.double())]
    low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (0.0, 1.0)
    if low == high and finite.numel() == value.numel():
        return f"torch.full({sizes}, {value.flatten()[0].item()}, dtype={value.dtype})"
    if value.dtype is torch.bool:
        return f"torch.randint(0, 2, {sizes}, generator=draw).bool()"
    if not value.is_floating_point():
        drawn = f"torch.randint({int(low)}, {int(high) + 1}, {sizes}, generator=draw)"
        return drawn + ("" if value.dtype is torch.int64 else f".to({value.dtype})")
    kind, scale = ("rand", high) if low >= 0 else ("randn", finite.std(correction=0).item())
    times = "" if 0.3 < scale < 3 else f" * {scale:.2g}"
    dtype = "" if value.dtype is torch.float32 else f".to({value.dtype})"
    drawn = f"torch.{kind}({shape}, generator=draw){times}"
    return f"({drawn}){dtype}" if times and dtype else drawn + dtype


def _layout(value: torch.Tensor) -> str:
    """Return what brings a tensor into the memory layout and to the device of another one."""
    text = "" if value.device.type == "cpu" else f'.to("{value.device}")'
    for dim, form in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if value.dim() == dim and not value.is_contiguous():
            if value.is_contiguous(memory_format=form):
                text += f".contiguous(memory_format={form})"
    return text


# -- lines ----------------------------------------------------------------------------------------


def _indented(lines: Sequence[str], by: int = 4) -> list[str]:
    return [" " * by + line if line else line for line in lines]


def _wrapped(head: str, arguments: Sequence[str], tail: str) -> Iterator[str]:
    """Yield a call in one line, or in several that are not too long."""
    if len(head) + len(", ".join(arguments)) + len(tail) + 8 <= WIDTH:
        yield head + ", ".join(arguments) + tail
        return
    yield head
    line = "   "
    for argument in arguments:
        if len(line) + len(argument) + 10 > WIDTH and line.strip():
            yield line
            line = "   "
        line += f" {argument},"
    yield from (line, tail)
