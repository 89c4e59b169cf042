"""From what people write to operators: functions, methods and arithmetic on tensors that stand in.

A `Traced` is a tensor without data. Whatever is called on it, torch functions, methods, Python's
operators, becomes one ATen operator with its arguments, in `_call`. The symbols of a pattern and
the values that a rule computes with are such tensors.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from fxopt.errors import OptionError
from fxopt.normalize import Call, ShapeNeeded, canonical

aten = torch.ops.aten
F = torch.nn.functional
ANY = ...  # matches every argument

_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow", "matmul": "matmul",
    "floordiv": "floor_divide", "mod": "remainder", "and": "__and__", "or": "__or__",
    "xor": "__xor__", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne",
}  # fmt: skip
_CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16,
    "bfloat16": torch.bfloat16, "bool": torch.bool, "byte": torch.uint8, "char": torch.int8,
    "short": torch.int16, "int": torch.int32, "long": torch.int64, "cfloat": torch.complex64,
    "cdouble": torch.complex128,
}  # fmt: skip


class Traced:
    """A tensor that stands for itself: calls on it become operators, by `_call`."""

    _in_pattern: ClassVar[bool] = False

    @property
    def _may_be_number(self) -> bool:
        """Whether a symbol of a pattern may turn out to be a number."""
        return False

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        owner = next(a for a in _flat(args, kwargs) if isinstance(a, Traced))
        result = owner._call(*operator_of(function, tuple(args), dict(kwargs or {})))
        return result[0] if has_further_results(function) else result

    if TYPE_CHECKING:  # _add_operators makes them, and more

        def __add__(self, other: Any) -> Any: ...
        def __sub__(self, other: Any) -> Any: ...
        def __mul__(self, other: Any) -> Any: ...
        def __truediv__(self, other: Any) -> Any: ...
        def __pow__(self, other: Any) -> Any: ...
        def __matmul__(self, other: Any) -> Any: ...

    __hash__ = object.__hash__  # equality is an operator

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "mT"):
            return self._call(*operator_of({"T": "numpy_T", "mT": "mT"}[name], (self,), {}))
        if not name.startswith("_") and name in (results := self._results()):
            return self[results.index(name)]
        if name.startswith("_") or not callable(getattr(torch.Tensor, name, None)):
            raise AttributeError(f"{type(self).__name__} has no method '{name}'")
        return lambda *args, **kwargs: self._call(*operator_of(name, (self, *args), kwargs))

    def __neg__(self) -> Any:
        return self._call(*operator_of("neg", (self,), {}))

    def __abs__(self) -> Any:
        return self._call(*operator_of("abs", (self,), {}))

    def __invert__(self) -> Any:
        return self._call(*operator_of("bitwise_not", (self,), {}))

    def __getitem__(self, index: Any) -> Any:
        if self._results():
            return self._call(operator.getitem, (self, index), {})
        return self._indexed(index)

    def _results(self) -> list[str]:
        """Return the names of what the call returns that computes it; [] for a single tensor."""
        return []

    def _whole(self, dim: int) -> Any:
        """Return `x[:]` along a dimension."""
        return self

    def _indexed(self, index: Any) -> Any:
        """Return `x[1:, ..., None, 0]` as the calls that it stands for, from left to right."""
        items = list(index) if isinstance(index, tuple) else [index]
        asked = [item for item in items if item is not None and item is not ...]
        result, dim, gap = self, 0, False
        for item in items:
            if item is ...:
                dim, gap = -len(asked), True
            elif item is None:
                result = result._call(aten.unsqueeze.default, (result, dim - gap), {})
                dim += not gap
            elif isinstance(item, slice):
                cut = (item.start, item.stop, 1 if item.step is None else item.step)
                result = (
                    result._whole(dim) if item.start is item.stop is item.step is None
                    else result._call(aten.slice.Tensor, (result, dim, *cut), {})
                )  # fmt: skip
                dim += 1
            elif _is_size(item) and getattr(item, "_may_be_number", True):
                result = result._call(aten.select.int, (result, dim, item), {})
                dim += gap
            else:
                raise OptionError(
                    f"x[{item!r}]: an index is a number, a slice, ... or None here. Write "
                    "torch.index_select, torch.gather or torch.where for an index that is a tensor."
                )
            asked = asked[1:] if item is not None and item is not ... else asked
        return result


def _flat(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *(kwargs or {}).values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def results_of(target: Any) -> list[str]:
    """Return the names of an operator's results, of a list's just one; [] for a single tensor."""
    if not isinstance(target, OpOverload):
        return []
    returned = target._schema.returns
    single = len(returned) == 1 and not str(returned[0].type).startswith("List")
    return [] if single else [one.name for one in returned]


def _add_operators() -> None:
    """Give Traced Python's arithmetic: `x + y` is `torch.add(x, y)`, on either side."""
    for python_name, name in _BINARY.items():

        def forward(self: Traced, other: Any, name: str = name) -> Any:
            return self._call(*operator_of(name, (self, other), {}))

        def backward(self: Traced, other: Any, name: str = name) -> Any:
            if name in ("add", "mul"):
                return self._call(*operator_of(name, (self, other), {}))
            if name == "sub":
                return self._call(aten.rsub.Scalar, (self, other), {})
            if name == "div":
                return self._call(*operator_of("mul", (self.reciprocal(), other), {}))
            return self._call(*operator_of(name, (other, self), {}))

        setattr(Traced, f"__{python_name}__", forward)
        setattr(Traced, f"__r{python_name}__", backward)


_add_operators()


def _reordered(name: str, *order: str) -> Callable[..., tuple[str, tuple[Any, ...]]]:
    """Describe a function of torch.nn.functional whose arguments differ from the operator's."""

    def bind(bound: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
        return name, tuple(bound[key] for key in order)

    return bind


_POOLING = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_CUDNN = "cudnn"  # an argument of the operator that torch.nn.functional does not show

_FUNCTIONALS: dict[Any, Callable[..., tuple[str, tuple[Any, ...]]]] = {
    F.batch_norm: _reordered(
        "batch_norm", "input", "weight", "bias", "running_mean", "running_var", "training",
        "momentum", "eps", _CUDNN,
    ),
    F.instance_norm: _reordered(
        "instance_norm", "input", "weight", "bias", "running_mean", "running_var",
        "use_input_stats", "momentum", "eps", _CUDNN,
    ),
    F.max_pool1d: _reordered("max_pool1d", *_POOLING),
    F.max_pool2d: _reordered("max_pool2d", *_POOLING),
    F.max_pool3d: _reordered("max_pool3d", *_POOLING),
    F.layer_norm: _reordered("layer_norm", "input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: _reordered("group_norm", "input", "num_groups", "weight", "bias", "eps"),
    F.dropout: _reordered("dropout", "input", "p", "training"),
    F.softmax: _reordered("softmax.int", "input", "dim", "dtype"),
    F.log_softmax: _reordered("log_softmax.int", "input", "dim", "dtype"),
    F.embedding: _reordered(
        "embedding", "weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"
    ),
    F.relu: _reordered("relu", "input"),
    F.relu6: _reordered("relu6", "input"),
    F.silu: _reordered("silu", "input"),
    F.mish: _reordered("mish", "input"),
    F.elu: _reordered("elu", "input", "alpha"),
    F.selu: _reordered("selu", "input"),
    F.leaky_relu: _reordered("leaky_relu", "input", "negative_slope"),
    F.hardtanh: _reordered("hardtanh", "input", "min_val", "max_val"),
    F.hardswish: _reordered("hardswish", "input"),
    F.hardsigmoid: _reordered("hardsigmoid", "input"),
    F.adaptive_avg_pool2d: _reordered("adaptive_avg_pool2d", "input", "output_size"),
}  # fmt: skip


def operator_of(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return (operator, args, kwargs) for a call written with a function, a method or a name.

    Raises OptionError for what is not one ATen operator.
    """
    if isinstance(function, OpOverload) or function is operator.getitem:
        return function, args, kwargs
    reordered = _FUNCTIONALS.get(function)
    if reordered is not None:
        return _choose(*reordered(_bound(function, args, kwargs)), {})
    name = function if isinstance(function, str) else _name_of(function)
    if name in _CASTS and len(args) == 1 and not kwargs:
        return aten.to.dtype, (args[0], _CASTS[name]), {}
    if has_further_results(function):
        kwargs = {key: value for key, value in kwargs.items() if key != "return_indices"}
    if name == "norm" and function is not torch.linalg.norm:
        return _norm(*args, **kwargs)
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]  # a graph has no in-place calls: relu_ stands for relu
    return _choose(name, args, kwargs)


def _bound(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function of torch.nn.functional by name; ANY behind `...`."""
    signature = inspect.signature(_SIGNED.get(function, function))
    rest_is_any = bool(args) and args[-1] is ANY
    bound = signature.bind_partial(*(args[:-1] if rest_is_any else args), **kwargs)
    if not rest_is_any:
        bound.apply_defaults()
    values = {name: bound.arguments.get(name, ANY) for name in signature.parameters}
    in_pattern = any(getattr(a, "_in_pattern", False) for a in _flat(args, kwargs))
    values[_CUDNN] = ANY if in_pattern else torch.backends.cudnn.enabled
    if values.get("padding_idx", ANY) is None:
        values["padding_idx"] = -1  # how the operator writes that there is none
    if "kernel_size" in values and values.get("stride", ANY) is None:
        values["stride"] = []
    if values.get("return_indices") is True:
        raise OptionError(f"Write torch.{function.__name__}_with_indices: it has two results.")
    return values


_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
# those that choose by return_indices are signed (*args, **kwargs)
_SIGNED = {getattr(F, name): getattr(F, f"_{name}") for name in _POOLS}
_ADAPTIVE = ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")


def has_further_results(function: Any) -> bool:
    """Whether a function returns the first result of its operator only."""
    module = getattr(function, "__module__", None)
    return module == F.__name__ and function.__name__ in _ADAPTIVE


def _norm(
    x: Any, p: Any = "fro", dim: Any = None, keepdim: Any = False, dtype: Any = None,
    out: Any = None,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Return x.norm(…) as the operator that it calls."""
    if out is not None or p is None or isinstance(p, str) and p != "fro":
        raise OptionError("A norm is written torch.linalg.vector_norm or torch.linalg.matrix_norm.")
    p = 2 if isinstance(p, str) else p
    dims = [dim] if isinstance(dim, int) else dim
    return aten.linalg_vector_norm.default, (x, p, dims, keepdim), {"dtype": dtype}


def operators_named(function: Any) -> tuple[OpOverload, ...]:
    """Return the operators as which a function, a packet or an overload stands in a graph.

    Raises OptionError for what is no operator, and for one that a graph writes as another with
    other arguments: relu6(x) as hardtanh(x, 0, 6).
    """
    found: dict[OpOverload, None] = {}
    others = []
    for form in _forms(function):
        given = tuple(
            1 if a.name.startswith("dim") else _Given(a.type)
            for a in form._schema.arguments if not a.has_default_value()
        )  # fmt: skip
        call = _in_graph(form, given)
        if call.target in (form, None) or _takes_the_same(form, call, given):
            found[call.target or form] = None
        else:
            others.append(call)
    if others and not found:
        call = others[0]
        args = ("..." if isinstance(arg, (int, list)) else repr(arg) for arg in call.args)
        text = f"{call.target._schema.name.split('::')[1]}({', '.join(args)})"
        raise OptionError(
            f"'{_name_of(function)}' stands in a graph as {text}; write that call in the pattern."
        )
    return tuple(found)


def _forms(function: Any) -> list[OpOverload]:
    if isinstance(function, OpOverload):
        return [function]
    name = _name_of(_SIGNED.get(function, function)).removesuffix("_")
    packet = getattr(aten, name.removeprefix("_") if function in _SIGNED else name, None)
    forms = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    found = [form for form in forms if not form._schema.is_mutable and _stands_in_graphs(form)]
    if not found:
        raise OptionError(f"'{name}' is not one ATen operator.")
    return found


def _stands_in_graphs(form: OpOverload) -> bool:
    """Whether a form of an operator computes tensors, and dimensions are numbers in it."""
    schema = form._schema
    by_name = any("Dimname" in str(a.type) for a in schema.arguments)
    return not by_name and any("Tensor" in str(result.type) for result in schema.returns)


@dataclass(frozen=True, eq=False)
class _Given:
    """An argument that a call needs, whatever it is."""

    kind: Any

    def __repr__(self) -> str:
        return "x" if "Tensor" in str(self.kind) else "..."


def _in_graph(form: OpOverload, given: tuple[Any, ...]) -> Call:
    dummy = torch.empty(2, 3, 4, device="meta")
    try:
        return canonical(form, given, {}, lambda a: dummy if isinstance(a, _Given) else None)
    except (ShapeNeeded, TypeError, ValueError, IndexError, AttributeError):
        return Call(form, given, {})  # how it is written depends on its arguments


def _takes_the_same(form: OpOverload, call: Call, given: tuple[Any, ...]) -> bool:
    """Whether the call is of a synonym, with the very same arguments."""
    count = len(form._schema.arguments)
    return len(call.target._schema.arguments) == count and call.args[: len(given)] == given


def is_operator(function: Any) -> bool:
    """Whether a function of torch computes a tensor by one operator, so that it asks nothing."""
    if not isinstance(function, (OpOverload, OpOverloadPacket)):
        owner = getattr(function, "__objclass__", None) or function
        if not callable(function) or str(getattr(owner, "__module__", "")).split(".")[0] != "torch":
            return False
    with contextlib.suppress(OptionError):
        return bool(_forms(function))
    return False


def _name_of(function: Any) -> str:
    if isinstance(function, OpOverloadPacket):
        return str(function.__name__)
    return str(getattr(function, "__name__", function))


def _choose(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[OpOverload, tuple[Any, ...], dict[str, Any]]:
    """Choose the overload that takes these arguments."""
    packet_name, _, overload = name.partition(".")
    packet = getattr(aten, packet_name, None)
    if packet is None:
        raise OptionError(f"'{name}' is not one ATen operator; write the operators it stands for.")
    names = [overload] if overload else packet.overloads()
    args, kwargs = _in_schema_words(packet, args, kwargs)
    best: tuple[int, OpOverload] | None = None
    preferred = ("default", "Tensor", "Tensor_Scalar", "int", "dim")  # where several fit as well
    for candidate in sorted(names, key=lambda n: preferred.index(n) if n in preferred else 9):
        target = getattr(packet, candidate)
        if not any("Tensor" in str(returned.type) for returned in target._schema.returns):
            continue  # arithmetic of plain numbers
        cost = None if target._schema.is_mutable else _cost(target, args, kwargs)
        if cost is not None and (best is None or cost < best[0]):
            best = (cost, target)
    if best is not None:
        return best[1], *_listed(best[1], args, kwargs)
    packed = _packed(args)
    if packed is not None:
        return _choose(name, packed, kwargs)
    given = [*map(_shown, args), *(f"{key}={_shown(value)}" for key, value in kwargs.items())]
    hint = " A tensor that is computed here becomes a constant by new_constant(...)." if any(
        isinstance(a, torch.Tensor) for a in _flat(args, kwargs)) else ""  # fmt: skip
    raise OptionError(f"No form of aten.{name} takes the arguments ({', '.join(given)}).{hint}")


def _shown(value: Any) -> str:
    """Return an argument as an error shows it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, torch.Tensor):
        return "a torch.Tensor"
    return "..." if value is ANY else repr(value)


def _in_schema_words(
    packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rename the keywords that torch takes, and its operators' schemas do not know."""
    known = {a.name for name in packet.overloads() for a in getattr(packet, name)._schema.arguments}
    named = {key if key in known else _KEYWORDS.get(key, key): v for key, v in kwargs.items()}
    if "input" in named and "input" not in known:
        args = (named.pop("input"), *args)
    return args, named


_KEYWORDS = {"axis": "dim", "keepdims": "keepdim"}


def _packed(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments of `x.permute(0, 2, 1)` as those of `x.permute([0, 2, 1])`."""
    rest = args[1:]
    count = next((i for i, value in enumerate(rest) if not _is_size(value)), len(rest))
    return (args[0], list(rest[:count]), *rest[count:]) if count > 1 else None


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt, Traced, fx.Node)) and not isinstance(value, bool)


def _listed(
    target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Write a single integer where a list of them is meant, as a list: `x.sum(1)`."""
    known = {a.name: a for a in target._schema.arguments}

    def listed(argument: Any, value: Any) -> Any:
        many = str(argument.type).removeprefix("Optional[").startswith("List")
        single = many and isinstance(value, (int, torch.SymInt))
        return [value] * (argument.N or 1) if single else value

    named = {key: listed(known[key], value) for key, value in kwargs.items()}
    return tuple(listed(a, v) for a, v in zip(known.values(), args, strict=False)), named


def _cost(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return how badly an overload fits the arguments, 0 for exactly; None where it does not."""
    arguments = target._schema.arguments
    open_ended = bool(args) and args[-1] is ANY
    written = args[:-1] if open_ended else args
    positional = [a for a in arguments if not a.kwarg_only]
    kinds = {a.name: str(a.type) for a in arguments}
    if len(written) > len(positional) or any(key not in kinds for key in kwargs):
        return None
    given = {a.name: value for a, value in zip(positional, written, strict=False)}
    if set(given) & set(kwargs):
        return None
    given.update(kwargs)
    missing = [a.name for a in arguments if a.name not in given and not a.has_default_value()]
    if missing and not open_ended:
        return None
    costs = [_argument_cost(kinds[name], value) for name, value in given.items()]
    if any(cost is None for cost in costs):
        return None
    return sum(cost for cost in costs if cost is not None)


def _argument_cost(kind: str, value: Any) -> int | None:
    """Return 0 where a schema type is what the value is, 1 where it converts, None where not."""
    if value is ANY:
        return 0
    if kind.startswith("Optional["):
        return 0 if value is None else _argument_cost(kind[9:-1], value)
    if isinstance(value, (Traced, fx.Node)):  # a symbol of a pattern may turn out to be a number
        return 0 if kind == "Tensor" or getattr(value, "_may_be_number", False) else None
    for literal, kinds in _LITERALS:
        if isinstance(value, literal):
            if literal is _INTEGERS and kind == "List[int]":
                return 1
            return 0 if kind in kinds else 1 if kind == "Tensor" and literal is not str else None
    if isinstance(value, (list, tuple)):
        return 0 if kind.startswith("List") else None
    return 0 if kind in _OPAQUE_KINDS and value is not None else None


_INTEGERS = (int, torch.SymInt)
_LITERALS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (bool, ("bool", "number", "Scalar")),
    (_INTEGERS, ("int", "SymInt", "float", "number", "Scalar")),
    ((float, torch.SymFloat), ("float", "number", "Scalar")),
    (str, ("str",)),
)
_OPAQUE_KINDS = ("int", "Device", "Layout", "MemoryFormat", "ScalarType", "Generator")
