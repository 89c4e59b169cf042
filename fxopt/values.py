"""Values of a graph inside a rule: ask them for shape, dtype and users, and compute with them.

Torch functions, methods and operators on a `Value` build new nodes; `new_constant` computes new
weights. A condition gets Values, too, but cannot build with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxopt.errors import OptionError
from fxopt.pattern import Match
from fxopt.shapes import is_tensor
from fxopt.spelling import Traced

if TYPE_CHECKING:
    from fxopt.graph_module import GraphModule
    from fxopt.rewrite import Rewriter

map_nested: Callable[[Any, Callable[[Any], Any]], Any] = fx.node.map_aggregate  # typed wider


class Place:
    """Where a rule builds: in which graph, in front of which node, in whose name."""

    def __init__(self, rewriter: Rewriter, match: Match, before: fx.Node) -> None:
        self.rewriter, self.match, self.before = rewriter, match, before

    def insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """Insert a call whose arguments may be Values."""
        args, kwargs = node_of(args), node_of(kwargs)
        node = self.rewriter.insert(
            target, *args, before=self.before, origin=self.match.nodes, **kwargs
        )
        return Value(node, self)


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
    def ndim(self) -> int:
        """The number of dimensions."""
        return int(self.fake.dim())

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
        """The data of a constant, only to read; raises OptionError for other values."""
        if not self.is_constant:
            raise OptionError(f"{self.node.name} is not a constant; ask is_constant first.")
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
        value.tensor  # noqa: B018 - raises where there is none
    place = values[0]._place
    if place is None:
        raise OptionError("A condition only asks; compute in the rule itself.")
    node = place.rewriter.constant(
        compute, [value.node for value in values], before=place.before, origin=place.match.nodes,
        name=name or str(values[0].node.target),
    )  # fmt: skip
    return Value(node, place)


def node_of(nested: Any) -> Any:
    """Return nested arguments with the node of each Value."""
    return map_nested(nested, lambda leaf: leaf.node if isinstance(leaf, Value) else leaf)


def values_of(nested: Any, place: Place | None = None) -> Any:
    """Return nested arguments with a Value for each node."""
    return map_nested(
        nested, lambda leaf: Value(leaf, place) if isinstance(leaf, fx.Node) else leaf
    )
