"""The TorchScript backend: one `.pt` file that runs in PyTorch from Python and C++ alike.

Legacy: PyTorch deprecates TorchScript, and this backend serves those who deploy it already.

The graph becomes TorchScript source, one line per node, which TorchScript compiles: a trace would
fix every symbolic size at its example, because operators called by overload take plain integers.

Left alone, with a LoweringError: control flow, and graphs that write state back.
"""

from __future__ import annotations

import io
import json
import math
import operator
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.contract import Pass
from fxopt.errors import ArtefactError, LoweringError
from fxopt.files import write_atomic
from fxopt.graph_module import GraphModule

aten = torch.ops.aten
_MANIFEST = "fxopt.json"
_LEGACY = "TorchScript is legacy: PyTorch deprecates it. Prefer 'eager' or 'onnx' for new work."


class TorchScriptExecutable:
    """A script module that holds copies of the graph's constants, run under no_grad."""

    notes: tuple[str, ...] = (_LEGACY,)

    def __init__(self, module: Any, *, optimize: bool) -> None:
        self._module = module  # what is saved; the optimized one is for this machine only
        self._runner = module
        if optimize:
            twin = io.BytesIO()  # optimizing changes the module so that it cannot be saved
            with _quiet():
                torch.jit.save(module, twin)
                twin.seek(0)
                self._runner = torch.jit.optimize_for_inference(torch.jit.load(twin))

    @property
    def code(self) -> str:
        """The TorchScript source of the graph."""
        return str(self._module.code)

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs."""
        with torch.no_grad():
            result = self._runner(*flat)
        return () if result is None else tuple(result)

    def save(self, path: Path, manifest: str) -> None:
        """Write a TorchScript archive that holds the manifest as an extra file."""
        buffer = io.BytesIO()
        with _quiet():
            torch.jit.save(self._module, buffer, _extra_files={_MANIFEST: manifest})
        write_atomic(path, buffer.getvalue())


@dataclass(frozen=True)
class TorchScript:
    """TorchScript, compiled from the graph. Legacy: PyTorch deprecates it."""

    name: ClassVar[str] = "torchscript"
    suffix: ClassVar[str] = ".pt"
    legalize: ClassVar[tuple[Pass, ...]] = ()

    freeze: bool = True  # make the weights constants of the code, and fold what follows from them
    optimize_for_inference: bool = False  # also for this processor; never saved

    def missing(self) -> str | None:
        """PyTorch is always there."""
        return None

    def lower(self, graph: GraphModule) -> TorchScriptExecutable:
        """Compile the graph's TorchScript source.

        Raises LoweringError, naming the node, for control flow, state, and whatever TorchScript
        has no form of.
        """
        source = _Source(graph)
        with _quiet():
            module = torch.jit.script(source.holder)
            try:
                module.define(source.text)  # finds `torch` and `math` in this file
            except RuntimeError as error:
                raise source.error(error) from error
            module.eval()
            if self.freeze:
                module = torch.jit.freeze(module)
        return TorchScriptExecutable(module, optimize=self.optimize_for_inference)

    def load(self, path: Path) -> tuple[TorchScriptExecutable, str]:
        """Read an archive that `save` wrote.

        No Python code from the file is run: TorchScript has its own interpreter, and can call only
        the operators that are registered in this process. Those include some that read and write
        files, so run an archive only if you trust whoever made it.
        """
        manifest = _manifest(path)
        try:
            with _quiet():
                module = torch.jit.load(str(path))
        except RuntimeError as error:
            raise ArtefactError(
                f"'{path}' is not a TorchScript archive that can be read here: {error!s:.300} "
                "Get the file again, or save the model again."
            ) from error
        return TorchScriptExecutable(module, optimize=self.optimize_for_inference), manifest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.jit says about its own deprecation, and nothing else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        yield


def _manifest(path: Path) -> str:
    """Return the manifest of a whole archive; every member's checksum is verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            extra = [name for name in names if name.endswith(f"/extra/{_MANIFEST}")]
            is_script = any(name.endswith("/constants.pkl") for name in names)
            if len(extra) != 1 or not is_script:
                raise ArtefactError(
                    f"'{path}' holds no fxopt manifest, so fxopt did not save it. Load it with "
                    "torch.jit.load or torch.load, or save the model with CompiledModel.save."
                )
            broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"its part '{broken}' has a wrong checksum")
            return archive.read(extra[0]).decode()
    except OSError as error:
        raise ArtefactError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except ArtefactError:
        raise
    except Exception as error:  # a damaged zip fails in many ways
        raise ArtefactError(
            f"'{path}' is not a whole TorchScript archive ({error}). It was cut off or damaged, or "
            "is something else. Get the file again, or save the model again."
        ) from error


# -- from the graph to source ---------------------------------------------------------------------


class _Source:
    """The TorchScript source of a graph, and the module that holds its constants."""

    def __init__(self, graph: GraphModule) -> None:
        # A class of its own: TorchScript gives all modules of one class and shape one code.
        self.holder = type("Graph", (torch.nn.Module,), {"__module__": __name__})()
        self._graph = graph
        self._names: dict[fx.Node, str] = {}
        self._nodes: list[fx.Node | None] = []  # of each line of the source
        self._lines: list[str] = []
        self._memory = _storages([n.meta.get("val") for n in graph.graph.find_nodes(op="get_attr")])
        inputs = [self._input(node) for node in graph.placeholders]
        self._write(None, f"def forward({', '.join(['self', *inputs])}):")
        for node in graph.graph.nodes:
            self._node(node)

    @property
    def text(self) -> str:
        """The whole source."""
        return "\n".join(self._lines) + "\n"

    def error(self, error: RuntimeError) -> LoweringError:
        """Return TorchScript's own refusal as one that names the node."""
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
            outputs = ", ".join(self._output(value) for value in node.args[0])  # type: ignore[union-attr]
            self._write(node, f"    return ({outputs},)" if outputs else "    return None")
        elif node.op == "call_function":
            text = self._call(node)
            is_check = node.meta.get("val") is None
            self._write(node, f"    {text}" if is_check else f"    {self._name(node)} = {text}")

    def _constant(self, node: fx.Node) -> None:
        value = self._graph.value(node)
        if not isinstance(value, torch.Tensor):
            raise _refused(node, "it is the sub-graph of a control-flow operator")
        name = f"c{len(self._names)}"
        self.holder.register_buffer(name, value.detach().clone())
        self._write(node, f"    {self._name(node)} = self.{name}")

    def _output(self, node: Any) -> str:
        """Return an output; one in a constant's memory as a copy, which the caller may write to."""
        shares = _storages(node.meta.get("val")) & self._memory
        return f"torch.clone({self._name(node)})" if shares else self._name(node)

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
        is_bool = isinstance(value, bool)  # TorchScript would make a number of it
        if is_number and "Tensor" in wanted and (is_bool or not _takes_numbers(target)):
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


def _takes_numbers(target: OpOverload) -> bool:
    """Whether an operator that takes a tensor has a form that takes a number in its place."""
    names = torch._C._jit_get_schemas_for_operator(target._schema.name)
    return any("Scalar" in schema.overload_name for schema in names)


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


def _storages(value: Any) -> set[int]:
    """Return the memory of a fake tensor, or of a list of them."""
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata}
    if isinstance(value, (list, tuple)):
        return set().union(*map(_storages, value))
    return set()


def _refused(node: fx.Node, reason: str) -> LoweringError:
    where = node.meta.get("source") or "an unknown line"
    return LoweringError(
        f"The backend 'torchscript' cannot express '{node.name}' = {node.target} (from {where}): "
        f"{reason}. Use backend='eager', or backend='onnx'."
    )


# -- symbolic sizes and checks ----------------------------------------------------------------------


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
}
