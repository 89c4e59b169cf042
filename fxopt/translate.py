"""From torch.export's graph to a dialect graph: functional, in canonical spelling, flat."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import (  # the wrappers that export makes of context managers
    wrap_with_autocast,
    wrap_with_set_grad_enabled,
)
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.dialect import is_operator
from fxopt.effects import training_flag
from fxopt.errors import CaptureError, FxoptError
from fxopt.functionalize import (
    Ref,
    Storage,
    alias_of,
    fill_diagonal,
    functional,
    inverse,
    is_whole,
    returns_argument,
    sizes_of,
)
from fxopt.graph_module import GraphInfo, GraphModule
from fxopt.normalize import Call, argument_index, canonical, node_name
from fxopt.provenance import module_of, source_line
from fxopt.shapes import describe, infer

aten = torch.ops.aten

# Checks of what capture has already fixed: they hold by construction.
_DROPPED = {
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
# In-place operators that change a tensor's shape, not its values.
_RESHAPES_ITSELF = {
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
    aten.detach_.default: aten.detach.default,
    aten.swapaxes_.default: aten.transpose.int,
    aten.swapdims_.default: aten.transpose.int,
}
_STRIDED = (
    "as_strided looks at memory that is written to, and a graph knows values only. Use slices, "
    "unfold or reshape, or take it of a clone. "
)
_RECURRENT = {aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu}
# Operators whose tensors must all have one dtype.
_ONE_DTYPE = {
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
}


class Autocast:
    """An autocast region: what it casts to, and which operators it casts for."""

    def __init__(self, device: str, dtype: torch.dtype | None) -> None:
        self.dtype = dtype or torch.get_autocast_dtype(device)
        self._key = f"Autocast{device.upper()}"

    def changes(self, target: OpOverload) -> bool:
        """Whether autocast has a rule of its own for an operator."""
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), self._key))


class Translator:
    """Builds a dialect graph node by node, reading the nodes of an exported one."""

    def __init__(
        self,
        module: torch.nn.Module,
        mode: FakeTensorMode,
        switches: Callable[[str, str | None], bool],
    ) -> None:
        self.graph = fx.Graph()
        self.subgraphs: dict[str, GraphModule] = {}
        self._module = module  # the exported graph module, for its sub-modules
        self._mode = mode
        self._switches = switches
        self._refs: dict[fx.Node, Ref] = {}
        self._storages: list[Storage] = []
        self._roots: dict[Storage, Ref] = {}
        self._by_origin: dict[fx.Node, Ref] = {}
        self._without_gradients = False  # whether the region being inlined is under no_grad
        self._casts: Autocast | None = None  # of the region being inlined
        self._at: fx.Node | None = None  # the exported node being translated

    # -- inputs and outputs -------------------------------------------------------------------

    def bind(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new`, a placeholder or a constant, stand for `old`."""
        known = self._by_origin.get(new)
        if known is not None:  # tied: two names, one tensor
            self._refs[old] = known
            return
        self._define(old, new, origin=new)
        self._by_origin[new] = self._refs[old]

    def read(self, value: Any) -> Any:
        """Return arguments of the exported graph as arguments of the new one."""
        return fx.map_arg(value, lambda node: self._refs[node].read())

    def write_back(self) -> set[fx.Node]:
        """Emit one copy_ for each input and constant that was written; return those."""
        written = set()
        for storage in self._storages:
            if storage.version and storage.origin is not None:
                value = self._roots[storage].read()
                node = self._create(Call(aten.copy_.default, (storage.origin, value, False), {}))
                node.meta["val"] = storage.origin.meta["val"]
                written.add(storage.origin)
        return written

    # -- nodes --------------------------------------------------------------------------------

    def translate(self, nodes: Iterable[fx.Node]) -> None:
        """Translate call and get_attr nodes, in order."""
        for node in nodes:
            self._at = node
            try:
                if node.op == "get_attr":
                    self._get_attr(node)
                elif node.op == "call_function" and node.target not in _DROPPED:
                    self._call(node)
            except FxoptError:
                raise
            except Exception as error:
                raise CaptureError(
                    f"fxopt cannot translate {node.target}: {type(error).__name__}: {error}\n"
                    f"{self._where()} The model itself may be right; please report this."
                ) from error

    def _get_attr(self, node: fx.Node) -> None:
        value = _attribute(self._module, str(node.target))
        if isinstance(value, fx.GraphModule):
            return  # wrappers are inlined where they are called; others become constants there
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            one = self.emit(
                aten.full.default, list(value.shape), value.item(),
                dtype=value.dtype, device=value.device,
            )  # fmt: skip
            self._define(node, one)
            return
        raise CaptureError(
            f"The body of a control-flow operator holds the constant '{node.target}'. "
            f"{self._where()} Make it a buffer of the model."
            if isinstance(value, torch.Tensor)
            else f"Constant '{node.target}' is a {type(value).__name__}, and only tensors can be "
            f"part of a graph. {self._where()}"
        )

    def _call(self, node: fx.Node) -> None:
        target = node.target
        if target is wrap_with_set_grad_enabled:
            enabled, body, *args = node.args
            self._inline(node, body, args, detach=not enabled)
        elif target is wrap_with_autocast:
            device, dtype, enabled, _, body, *args = node.args
            outer = self._casts
            region = Autocast(str(device), dtype)  # type: ignore[arg-type]
            self._casts = region if enabled else None
            self._inline(node, body, args)
            self._casts = outer
        elif isinstance(target, HigherOrderOperator):
            self._control_flow(node)
        elif target is operator.getitem and self._is_region(node.args[0]):
            self._refs[node] = self._refs[node.args[0]].value[node.args[1]]  # type: ignore[index]
        elif isinstance(target, OpOverload) and target in _RESHAPES_ITSELF:
            self._reshape_itself(node, Call(_RESHAPES_ITSELF[target], node.args, dict(node.kwargs)))
        elif isinstance(target, OpOverload) and target._schema.is_mutable:
            self._write(node)
        elif is_operator(target):
            self._pure(node, Call(target, node.args, dict(node.kwargs)))
        else:
            raise CaptureError(
                f"The model calls {getattr(target, '__name__', target)}, which is no operator and "
                f"cannot be part of a graph. {self._where()}"
            )

    def _is_region(self, node: Any) -> bool:
        """Whether an exported node is a region that was inlined: its value is a tuple of Refs."""
        return isinstance(self._refs[node].value, tuple)

    def _pure(self, node: fx.Node, call: Call) -> None:
        """Translate a call that writes nothing; its value may be a view."""
        value, spelled = self._emit(node, call)
        parent = alias_of(node)
        if parent is None:
            self._define(node, value)
            return
        if call.target is operator.getitem:  # a part of a split is a view of what was split
            parent = alias_of(parent)
            if parent is None:  # one of several results, each with memory of its own
                self._define(node, value)
                return
        base = self._refs[parent]
        if call.target is aten.as_strided.default and base.storage.version:
            raise CaptureError(_STRIDED + self._where())
        self._refs[node] = Ref(
            base.storage, value, base.storage.version, base,
            self._view(spelled, base.value), inverse(spelled, self.emit), is_whole(spelled),
        )  # fmt: skip

    def _view(self, spelled: Call, base: fx.Node) -> Callable[[Any], Any]:
        """Return how the view `spelled` of `base` is taken of another value."""
        where = self._where()

        def view(value: Any) -> Any:
            if spelled.target is aten.as_strided.default:
                raise CaptureError(_STRIDED + where)

            def other(argument: Any) -> Any:
                return value if argument is base else argument

            if spelled.target is None:
                return value
            arguments = fx.map_arg(spelled.args, other)
            if spelled.target is operator.getitem and spelled.args[0] is not base:
                parts = spelled.args[0]
                arguments = (self.emit(parts.target, *fx.map_arg(parts.args, other)), arguments[1])
            return self.emit(spelled.target, *arguments, **fx.map_arg(spelled.kwargs, other))

        return view

    def _reshape_itself(self, node: fx.Node, call: Call) -> None:
        """Translate `x.t_()` and its like: from now on, `x` means the result."""
        argument = node.args[0]
        assert isinstance(argument, fx.Node)
        ref = self._refs[argument]
        # What returns its argument made no tensor of its own; torch.export takes it for one.
        owned = ref.parent is None and ref.storage.origin is not None or returns_argument(argument)
        old, new = ref.value.meta["val"], node.meta["val"]
        if owned and (old.shape != new.shape or old.stride() != new.stride()):
            raise CaptureError(
                f"{node.target} changes the shape of an input, of a buffer, or of a tensor of "
                f"another name, which a graph cannot. {self._where()} Use the form without "
                "underscore."
            )
        self._pure(node, call)
        self._refs[argument] = self._refs[node]

    def _write(self, node: fx.Node) -> None:
        """Translate an in-place operator: compute the value, then write it through the views."""
        target = node.target
        assert isinstance(target, OpOverload)
        found = functional(target)
        special = (aten.copy_.default, aten.fill_diagonal_.default)
        if target not in special and found is None:
            raise CaptureError(
                f"{target} writes to its arguments in a way that fxopt does not know. "
                f"{self._where()} Use the form without underscore or out=."
            )
        plain, name = found or (None, "self")
        destination = self._argument(node, name)
        ref = self._refs[destination]
        before = ref.read()
        if target in (aten.copy_.default, aten.fill_.Tensor):
            value = self.read(node.args[1])
        elif target is aten.fill_diagonal_.default:
            value = fill_diagonal(before, *self.read(node.args[1:]), emit=self.emit)
        else:
            args = node.args + ((0,) if target is aten.zero_.default else ())
            kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
            value, _ = self._emit(node, Call(plain, args, kwargs), val=None)
        value = self._shaped_like(value, before)
        if target in (aten.copy_.default, aten.fill_.Tensor):
            value = self.emit(aten.clone.default, value)  # as it is now, whatever is written to it
        if self._without_gradients and ref.storage.origin is not None:
            value = self._detach(value)  # state must not hold on to the calls before
        ref.write(value, self.emit, self._where())
        self._refs[node] = ref

    def _shaped_like(self, value: fx.Node, destination: fx.Node) -> fx.Node:
        """Cast and broadcast a value to what a write stores in `destination`."""
        old, new = destination.meta["val"], value.meta["val"]
        if new.dtype != old.dtype or new.device != old.device:
            value = self.emit(aten.to.device, value, old.device, old.dtype)
        if list(new.shape) != list(old.shape):
            value = self.emit(aten.expand.default, value, sizes_of(destination, self.emit))
        return value

    def _argument(self, node: fx.Node, name: str) -> fx.Node:
        position = argument_index(node.target, name)
        if name in node.kwargs:
            return node.kwargs[name]  # type: ignore[return-value]
        assert position is not None
        return node.args[position]  # type: ignore[return-value]

    # -- regions ------------------------------------------------------------------------------

    def _inline(
        self, node: fx.Node, body: Any, args: Iterable[Any], *, detach: bool = False
    ) -> None:
        """Translate a wrapped region in place; its outputs become the node's parts."""
        known = set(self._refs.values())
        before, self._without_gradients = self._without_gradients, detach or self._without_gradients
        inner = _attribute(self._module, str(body.target))
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for placeholder, argument in zip(placeholders, args, strict=True):
            if isinstance(argument, fx.Node):
                self._refs[placeholder] = self._refs[argument]
        outer, self._module = self._module, inner
        self.translate(inner.graph.nodes)
        self._module, self._without_gradients = outer, before
        outputs = inner.graph.output_node().args[0]
        parts = [self._refs[out] if isinstance(out, fx.Node) else out for out in outputs]
        if detach:  # what was computed without gradients carries none to the outside
            parts = [p if p is None or p in known else self._detached(p) for p in parts]
        self._refs[node] = Ref(Storage(), tuple(parts))

    def _detached(self, ref: Ref) -> Ref:
        value = self._detach(ref.read())
        return Ref(
            ref.storage, value, ref.storage.version, ref, self._detach,
            lambda base, new: new, is_whole=True,
        )  # fmt: skip

    def _detach(self, value: fx.Node) -> fx.Node:
        fake = value.meta.get("val")
        inexact = isinstance(fake, torch.Tensor) and (fake.is_floating_point() or fake.is_complex())
        return self.emit(aten.detach.default, value) if inexact else value

    def _control_flow(self, node: fx.Node) -> None:
        """Keep cond, while_loop, map and scan as one node over dialect sub-graphs."""
        subgraphs = {}
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument not in self._refs:
                inner = _attribute(self._module, str(argument.target))
                name = f"{argument.target}"
                self.subgraphs[name] = translate_subgraph(inner, self._mode, self._switches)
                subgraphs[argument] = self.graph.create_node("get_attr", name)
        args = fx.map_arg(
            node.args, lambda n: subgraphs[n] if n in subgraphs else self._refs[n].read()
        )
        value = self._create(Call(node.target, args, dict(node.kwargs)), node)
        value.meta["val"] = node.meta.get("val")
        self._define(node, value)

    # -- creating -----------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, val: Any = None, **kwargs: Any) -> fx.Node:
        """Create a call on new nodes, in canonical spelling, with its value inferred."""
        call = canonical(target, args, kwargs, describe)
        if call.target is None:
            return call.args[0]
        node = self._create(call, self._at)
        node.meta["val"] = infer(*call, self._mode) if val is None else val
        return node

    def _emit(self, node: fx.Node, call: Call, val: Any = "keep") -> tuple[Any, Call]:
        """Create `call`, given in old nodes, and return its new node and its spelling."""
        args, kwargs = self.read(call.args), self.read(call.kwargs)
        if self._casts is not None and isinstance(call.target, OpOverload):
            args = self._autocast(call.target, args, kwargs, node)
        spelled = canonical(call.target, args, kwargs, describe)
        if spelled.target is None:
            return spelled.args[0], spelled
        if spelled.target in _ONE_DTYPE:
            self._check_one_dtype(spelled)
        created = self._create(spelled, node)
        created.meta["val"] = node.meta.get("val") if val == "keep" else infer(*spelled, self._mode)
        return created, spelled

    def _check_one_dtype(self, call: Call) -> None:
        """Refuse what a fake tensor accepts and a real one does not: operands of several dtypes."""
        values = [describe(a) for a in call.args if isinstance(a, fx.Node)]
        dtypes = list(dict.fromkeys(v.dtype for v in values if isinstance(v, torch.Tensor)))
        if len(dtypes) > 1:
            raise CaptureError(
                f"{node_name(call.target)} gets {' and '.join(map(str, dtypes))}, and takes one "
                f"dtype. {self._where()} Give inputs in the dtype of the weights, or convert the "
                "model."
            )

    def _create(self, call: Call, origin: fx.Node | None = None) -> fx.Node:
        node = self.graph.create_node(
            "call_function", call.target, call.args, call.kwargs, name=node_name(call.target)
        )
        if origin is not None:
            path, kind = module_of(origin.meta)
            source = source_line(origin.meta.get("stack_trace"))
            node.meta.update(path=path, module=kind, source=source)
            position = training_flag(call.target)
            if position is not None and call.args[position] is False:
                if self._switches(path, source):
                    node.meta["switch"] = position
        return node

    def _autocast(
        self, target: OpOverload, args: Any, kwargs: Mapping[str, Any], node: fx.Node
    ) -> Any:
        """Return `args` with the casts that autocast made, told by the dtype that came out."""
        wanted = _dtype_of(node.meta.get("val"))
        if wanted is None or target._schema.is_mutable or self._casts is None:
            return args
        if target.overloadpacket in _RECURRENT:
            raise CaptureError(
                f"Autocast over a recurrent layer ({node_name(target)}) cannot be captured: "
                f"torch.export loses its casts. {self._where()} Disable autocast around the layer."
            )
        casts = (self._casts.dtype, torch.float32)
        for dtype in (*casts, None) if self._casts.changes(target) else (None, *casts):
            trial = args if dtype is None else tuple(_as_float(a, dtype) for a in args)
            try:
                found = infer(target, fx.map_arg(trial, describe), kwargs, self._mode)
            except RuntimeError:
                continue  # mixed dtypes: the cast that autocast made is missing
            if _dtype_of(found) == wanted:
                return args if dtype is None else self._casted(args, dtype)
        raise CaptureError(
            f"Autocast did something to {target} that fxopt cannot express. {self._where()}"
        )

    def _casted(self, args: Any, dtype: torch.dtype) -> Any:
        def cast(node: fx.Node) -> fx.Node:
            value: Any = node.meta.get("val")
            if not _is_cast_by_autocast(value) or value.dtype == dtype:
                return node
            return self.emit(aten.to.dtype, node, dtype)

        return fx.map_arg(args, cast)

    def _define(self, old: fx.Node, new: Any, origin: fx.Node | None = None) -> None:
        storage = Storage(origin)
        self._refs[old] = self._roots[storage] = Ref(storage, new)
        if origin is not None:
            self._storages.append(storage)

    def _where(self) -> str:
        meta = self._at.meta if self._at is not None else {}
        source = source_line(meta.get("stack_trace"))
        path, _ = module_of(meta)
        return f"In module '{path}', at {source or 'an unknown line'}."


def translate_subgraph(
    module: fx.GraphModule, mode: FakeTensorMode, switches: Callable[[str, str | None], bool]
) -> GraphModule:
    """Translate the body of a control-flow operator."""
    translator = Translator(module, mode, switches)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            new = translator.graph.placeholder(node.name)
            new.meta["val"] = node.meta.get("val")
            translator.bind(node, new)
    translator.translate(module.graph.nodes)
    if translator.write_back():
        raise CaptureError("The body of a control-flow operator writes to its inputs.")
    outputs = translator.read(module.graph.output_node().args[0])
    # the condition of a while_loop returns one value, and must go on doing so
    translator.graph.output(tuple(outputs) if isinstance(outputs, (tuple, list)) else outputs)
    result = GraphModule(torch.nn.Module(), fx.Graph())
    result.meta["fxopt"] = GraphInfo(None, mode)
    for name, subgraph in translator.subgraphs.items():
        result.set_constant(name, subgraph)
    result.graph = translator.graph
    return result


def _as_float(argument: Any, dtype: torch.dtype) -> Any:
    def cast(node: fx.Node) -> Any:
        value: Any = node.meta.get("val")
        return value.to(dtype) if _is_cast_by_autocast(value) else value

    return fx.map_arg(argument, cast)


def _is_cast_by_autocast(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or value.dtype == torch.float64:
        return False
    return value.is_floating_point()


def _dtype_of(value: Any) -> torch.dtype | None:
    """Return the dtype of a value, or of the first of several results."""
    first = next(iter(value), None) if isinstance(value, (tuple, list)) else value
    return getattr(first, "dtype", None)


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


