"""Values of a graph inside a rule: ask them for shape, dtype and users, and compute with them.

Torch functions, methods and operators on a `Value` build new nodes; `new_constant` computes new
weights. A condition gets Values, too, but cannot build with them.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fxopt.errors import OptionError, RuleError
from fxopt.pattern import Match
from fxopt.shapes import is_tensor
from fxopt.sizes import node_of_size, operators_ask
from fxopt.spelling import Traced, operator_of, results_of

if TYPE_CHECKING:
    from fxopt.graph_module import GraphModule
    from fxopt.rewrite import Rewriter

map_nested: Callable[[Any, Callable[[Any], Any]], Any] = fx.node.map_aggregate  # typed wider


class Place:
    """Where a rule builds: in which graph, in front of which node, in whose name."""

    def __init__(self, rewriter: Rewriter, match: Match, before: fx.Node) -> None:
        self.rewriter, self.match, self.before = rewriter, match, before

    def insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """Insert a call whose arguments may be Values, and sizes of Values."""
        args, kwargs = map_nested((args, kwargs), self._argument)
        return Value(self._node(target, *args, **kwargs), self)

    def _argument(self, leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return leaf.node
        if isinstance(leaf, (torch.SymInt, torch.SymFloat)):
            return node_of_size(leaf, self._around(), self.before, self._node)
        return leaf

    def _around(self) -> Iterator[fx.Node]:
        """Yield tensors that may have a size which a rule asks for, those that stay first."""
        nodes = self.match.nodes
        yield from (n for node in nodes for n in node.all_input_nodes if n not in nodes)
        yield from self.before.graph.find_nodes(op="placeholder")
        yield from self.rewriter.built
        yield from nodes

    def _node(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with operators_ask():
            return self.rewriter.insert(
                target, *args, before=self.before, origin=self.match.nodes, **kwargs
            )


class SizedFactories(TorchFunctionMode):
    """Makes `torch.zeros(x.shape[0], 3)` a node where the size is symbolic."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Insert a factory's call; leave all others as they are."""
        named = dict(kwargs or {})
        if function in _FACTORIES and _has_size((tuple(args), named)):
            several = function in _BY_SIZE and args and not isinstance(args[0], (list, tuple))
            args = (list(args),) if several else args  # zeros(2, 3) is zeros([2, 3])
            return self._place.insert(*operator_of(function, tuple(args), named))
        return function(*args, **named)


_BY_SIZE = (torch.zeros, torch.ones, torch.empty)
_FACTORIES = (*_BY_SIZE, torch.full, torch.arange, torch.eye)


def _has_size(nested: Any) -> bool:
    found = []
    map_nested(nested, lambda leaf: found.append(isinstance(leaf, torch.SymInt)))
    return any(found)


# the constants whose numbers a rule has looked at, while it is asked: name to tensor and version
reads: contextvars.ContextVar[dict[str, tuple[torch.Tensor, int]] | None] = contextvars.ContextVar(
    "reads", default=None
)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to; an inference tensor does not count."""
    return 0 if tensor.is_inference() else tensor._version


class Value(Traced):
    """A matched tensor: ask it for shape, dtype, users; compute with it to build new nodes."""

    def __init__(self, node: fx.Node, place: Place | None = None) -> None:
        self.node = node
        self._place = place

    @property
    def fake(self) -> Any:
        """The fake tensor: shape, dtype and device without data."""
        return self.node.meta["val"]

    @property
    def shape(self) -> Any:
        """The shape; sizes may be symbolic."""
        return self.fake.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        dtype = self.fake.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        device = self.fake.device
        assert isinstance(device, torch.device)
        return device

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return int(self.fake.dim())

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one dimension; sizes may be symbolic."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> Any:
        """Return the number of elements, which may be symbolic."""
        return self.fake.numel()

    def is_floating_point(self) -> bool:
        """Return whether these are real floating-point numbers."""
        return bool(self.dtype.is_floating_point)

    def is_complex(self) -> bool:
        """Return whether these are complex numbers."""
        return bool(self.dtype.is_complex)

    @property
    def is_floating(self) -> bool:
        """Whether this is a tensor of real floating-point numbers."""
        return is_tensor(self.node) and self.dtype.is_floating_point

    @property
    def graph(self) -> GraphModule:
        """The graph that holds it."""
        graph: Any = self.node.graph.owning_module
        return graph

    @property
    def is_constant(self) -> bool:
        """Whether this is a constant of the graph that nothing writes to."""
        return self.node.op == "get_attr" and self.node.target not in self.graph.info.mutated

    @property
    def tensor(self) -> torch.Tensor:
        """The data of a constant, only to read; raises OptionError for other values.

        A rewrite that has looked at a weight is right for this weight only: `update` with another
        one is refused then. What is computed by `new_constant` is not looked at.
        """
        if not self.is_constant:
            raise OptionError(f"{self.node.name} is not a constant; ask is_constant first.")
        tensor = self._data()
        noted = reads.get()
        if noted is not None:
            noted.setdefault(str(self.node.target), (tensor, version_of(tensor)))
        return tensor.detach()

    def _data(self) -> torch.Tensor:
        tensor = self.graph.value(self.node)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    @property
    def users(self) -> int:
        """How many nodes use this value."""
        return len(self.node.users)

    @property
    def target(self) -> Any:
        """The operator that computes it; a name for an input or a constant."""
        return self.node.target

    @property
    def args(self) -> Any:
        """The positional arguments of the call that computes it, with values for the tensors."""
        return values_of(self.node.args, self._place)

    def _results(self) -> list[str]:
        if not isinstance(self.node.meta.get("val"), (list, tuple)):
            return []
        return results_of(self.node.target) or [""]

    def __iter__(self) -> Iterator[Any]:
        if self._results():
            yield from (self[index] for index in range(len(self.fake)))
        else:
            yield from self.unbind(0)

    def __bool__(self) -> bool:
        raise OptionError(
            f"{self.node.name} is a tensor without data, and neither true nor false: compute with "
            "torch.where, or ask for its shape, its dtype, is_constant or 'is None'."
        )

    def __repr__(self) -> str:
        return f"<value of {self.node.name}>"

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        if self._place is None:
            raise OptionError("A condition only asks; compute in the rule itself.")
        return self._place.insert(target, args, kwargs)


def new_constant(compute: Callable[..., torch.Tensor], *values: Value, name: str = "") -> Value:
    """Register the constant `compute(*tensors of values)` and return its Value.

    The computation is recorded, so that new weights can be put through it again: it must depend on
    its arguments alone, and not write to them. Compute in float64 and store in the weight's dtype.
    Raises OptionError for a value that is not a constant.
    """
    if not values:
        raise OptionError("new_constant(compute, *values): it needs the constants it comes from.")
    for value in values:
        if not value.is_constant:
            raise OptionError(f"{value.node.name} is not a constant; ask is_constant first.")
    place = values[0]._place
    if place is None:
        raise OptionError("A condition only asks; compute in the rule itself.")
    tensors = [value._data() for value in values]
    before = list(map(version_of, tensors))
    node = place.rewriter.constant(
        compute, [value.node for value in values], before=place.before, origin=place.match.nodes,
        name=name or str(values[0].node.target),
    )  # fmt: skip
    for value, version in zip(values, before, strict=True):
        if version_of(value._data()) != version:
            raise RuleError(
                f"new_constant(…) writes to '{value.node.target}', which is the model's own. "
                "Compute a new tensor."
            )
    return Value(node, place)


def node_of(nested: Any) -> Any:
    """Return nested arguments with the node of each Value."""
    return map_nested(nested, lambda leaf: leaf.node if isinstance(leaf, Value) else leaf)


def values_of(nested: Any, place: Place | None = None) -> Any:
    """Return nested arguments with a Value for each node."""
    return map_nested(
        nested, lambda leaf: Value(leaf, place) if isinstance(leaf, fx.Node) else leaf
    )
