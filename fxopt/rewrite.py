"""The one way to change a graph: insert, replace, erase, and remember what was done.

A pass makes one `Rewriter`, builds new nodes with `insert` and `constant`, commits each rewrite
with `replace` (or `update`), notes with `miss` where it held back and why, and returns `result()`.
The rewriter keeps shapes, provenance and counts; a pass cannot forget them.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.contract import Miss, PassResult, RuleCount
from fxopt.effects import is_pure
from fxopt.errors import FxoptError
from fxopt.graph_module import GraphModule, Recipe
from fxopt.normalize import canonical, node_name
from fxopt.shapes import describe, fake_of, infer, same_shape

_SHAPED_LIKE_FIRST = {  # a batch norm takes twenty milliseconds on fake tensors
    torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default,
    torch.ops.aten.layer_norm.default, torch.ops.aten.group_norm.default,
    torch.ops.aten.relu.default, torch.ops.aten.dropout.default,
}  # fmt: skip
Mend = Callable[[fx.Node], fx.Node | tuple[Any, ...] | None]
_PATIENCE = 100  # how often more than ten times per node a rewrite is refused


class OutOfFuel(FxoptError):
    """A pass without fuel does not stop asking for rewrites; its graph is legal as it is."""


@dataclass
class Fuel:
    """How many rewrites may be made; how many were, and by which rule the last."""

    limit: int | None  # None: any number
    spent: int = 0
    refused: int = 0
    rule: str | None = None

    @property
    def is_out(self) -> bool:
        """Whether no further rewrite may be made."""
        return self.limit is not None and self.spent >= self.limit


_fuel: contextvars.ContextVar[Fuel | None] = contextvars.ContextVar("fuel", default=None)


@contextlib.contextmanager
def fuel(rewrites: int | None) -> Iterator[Fuel]:
    """Let the rewriters inside make at most this many rewrites, and count them.

    Bisection needs it. Raises OutOfFuel through a pass that never stops asking for more.
    """
    tank = Fuel(rewrites)
    token = _fuel.set(tank)
    try:
        yield tank
    finally:
        _fuel.reset(token)


class Rewriter:
    """Changes one graph on behalf of one run of one pass."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.rule: str | None = None  # set by the rule driver: the rule now rewriting
        self.rewrites = 0
        self.rule_counts: dict[str, RuleCount] = {}
        self._misses: list[Miss] = []
        self._created: dict[fx.Node, tuple[str, ...]] = {}
        self._erased: dict[str, None] = {}
        self._changed: dict[str, None] = {}
        self._unreachable: set[str] = set()
        self._in_vain: set[str] = set()  # constants that no rewrite used
        self._uncommitted: list[fx.Node] = []
        self._moved: list[tuple[fx.Node, fx.Node]] = []  # with what stood before them
        self._fuel = _fuel.get()
        # a name stands for one value for ever: recipes tell how one follows from others
        self._once_taken = {one.name for one in graph.info.recipes} | set(graph.info.held)

    # -- building -----------------------------------------------------------------------------

    def insert(
        self,
        target: Any,
        *args: Any,
        before: fx.Node,
        origin: fx.Node | Iterable[fx.Node] | None = None,
        like: fx.Node | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert a call in its canonical spelling and return its node, with its shape known.

        `origin` names the nodes it stands for (default: `before`): module path and source line
        are taken from the first. `like` names a node of the same shape, dtype and device, which
        saves computing them. A call that would return its argument unchanged inserts nothing
        and returns that argument.
        """
        call = canonical(target, args, kwargs, describe)
        if call.target is None:
            node = call.args[0]
            assert isinstance(node, fx.Node)
            return node
        if like is not None:
            value = like.meta["val"]
        else:
            value = infer(call.target, call.args, call.kwargs, self.graph.info.fake_mode)
        with self.graph.graph.inserting_before(before):
            node = self.graph.graph.create_node(
                "call_function", call.target, call.args, call.kwargs, name=node_name(call.target)
            )
        node.meta["val"] = value
        self._adopt(node, _origins(origin, before))
        return node

    def constant(
        self,
        compute: Callable[..., torch.Tensor],
        sources: Sequence[fx.Node],
        *,
        name: str,
        before: fx.Node,
        origin: fx.Node | Iterable[fx.Node] | None = None,
        is_part: bool = False,
        trainable: bool | None = None,
    ) -> fx.Node:
        """Register the constant `compute(*values of sources)` and return its get_attr node.

        The computation is recorded, so that new weights can be put through it again. The result is
        a parameter where one of the sources is a parameter that requires grad, else a buffer. What
        `is_part` of its one source is of the same kind: a frozen parameter's is a frozen parameter.
        `trainable` says by itself whether it is a parameter that requires grad, or a buffer.
        `name` is a hint: a suffix makes it unique. `compute` must not write to its arguments.
        """
        values = [self.graph.value(node) for node in sources]
        with torch.no_grad():
            tensor = compute(*values).detach().contiguous()
        return self.constant_of(
            tensor, compute, sources, name=name, before=before, origin=origin, is_part=is_part,
            trainable=trainable,
        )  # fmt: skip

    def constant_of(
        self,
        tensor: torch.Tensor,
        compute: Callable[..., torch.Tensor],
        sources: Sequence[fx.Node],
        *,
        name: str,
        before: fx.Node,
        origin: fx.Node | Iterable[fx.Node] | None = None,
        is_part: bool = False,
        trainable: bool | None = None,
    ) -> fx.Node:
        """Like `constant`, for a caller who has computed the tensor already."""
        if trainable is None:
            trainable = tensor.is_floating_point() and any(
                isinstance(value, torch.nn.Parameter) and value.requires_grad
                for value in map(self.graph.value, sources)
            )
        memory = tensor.untyped_storage().data_ptr()
        if any(self.graph.value(n).untyped_storage().data_ptr() == memory for n in sources):
            tensor = tensor.clone()  # a view of its source: never two constants in one memory
        if trainable or (is_part and isinstance(self.graph.value(sources[0]), torch.nn.Parameter)):
            tensor = torch.nn.Parameter(tensor, requires_grad=trainable)
        unique = self._unique_name(name)
        self.graph.set_constant(unique, tensor)
        names = tuple(str(node.target) for node in sources)
        self.graph.info.recipes.append(Recipe(unique, names, compute))
        return self._get_attr(unique, tensor, before, origin)

    # -- committing ---------------------------------------------------------------------------

    def replace(
        self,
        old: fx.Node | Mapping[fx.Node, fx.Node],
        new: fx.Node | None = None,
        *,
        users: Collection[fx.Node] | None = None,
    ) -> bool:
        """Let every user of `old` use `new` instead: one rewrite. `old` goes when nothing needs it.

        `users` are those that shall, if not all. A mapping replaces several nodes as one rewrite.
        Returns False, and undoes what was inserted for it, when the fuel has run out. Raises
        ValueError where shape or dtype would change.
        """
        pairs = dict(old) if isinstance(old, Mapping) else {old: new}
        for before, after in pairs.items():
            assert after is not None
            _check_same_value(before, after)
        built = set(self._uncommitted)
        if not self._spend():
            return False
        for before, after in pairs.items():
            assert after is not None
            if after in self._created:
                self._created[after] = tuple(dict.fromkeys((*self._created[after], before.name)))
                after.meta["replaces"] = self._created[after]
            told = set(before.users if users is None else users) - built
            for user in before.users:
                if user in told and user not in self._created:
                    self._changed[user.name] = None
            before.replace_all_uses_with(after, delete_user_cb=told.__contains__)
        for before in pairs:
            self._erase_cone(before)
        return True

    def update(self, node: fx.Node, args: tuple[Any, ...]) -> bool:
        """Give `node` other positional arguments: one rewrite, like `replace`."""
        value = infer(node.target, args, node.kwargs, self.graph.info.fake_mode)
        if not _same_value(node.meta["val"], value):
            raise ValueError(f"{node.name} would change its shape or dtype")
        if not self._spend():
            return False
        inputs = list(node.all_input_nodes)
        node.args = args
        node.meta["val"] = value
        if node not in self._created:
            self._changed[node.name] = None
        for used in inputs:
            self._erase_cone(used)
        return True

    def resize(self, mend: Mend) -> bool:
        """Change sizes throughout the graph: one rewrite. What the graph returns keeps its shape.

        `mend(node)` is asked of every node, in order, when all before it have their new sizes. It
        returns other positional arguments, another node that takes its place, or None where the
        node is right as it is. Raises ValueError where an output would change its shape or dtype;
        then, and when `mend` raises, the graph is no longer legal: resize a copy.
        """
        if self._fuel is not None and self._fuel.is_out:
            self._refuse(self._fuel)
            return False
        returned = [(node, node.meta["val"]) for node in self.graph.output_node.all_input_nodes]
        places = {node: node for node, _ in returned}
        stale: set[fx.Node] = set()
        for node in list(self.graph.graph.nodes):
            mended = mend(node)
            if isinstance(mended, fx.Node):
                stale.update(node.users)
                _redirect(node, mended, set())
                places[node] = mended
                self._erase_cone(node)
            elif mended is not None or node in stale and node.op == "call_function":
                self._resize_one(node, node.args if mended is None else mended, stale)
        for node, value in returned:
            if not _same_value(value, places[node].meta["val"]):
                raise ValueError(f"{node.name}, which the graph returns, would change its shape")
        self._uncommitted = [node for node in self._uncommitted if not node._erased]
        return self._spend()

    def _resize_one(self, node: fx.Node, args: tuple[Any, ...], stale: set[fx.Node]) -> None:
        """Give a node its arguments and its new value; its users follow if that is another."""
        value = args[0].meta["val"] if node.target in _SHAPED_LIKE_FIRST else None
        if value is None or value.dtype != node.meta["val"].dtype:
            value = infer(node.target, args, node.kwargs, self.graph.info.fake_mode)
        if not _same_value(node.meta["val"], value):
            stale.update(node.users)
        node.args, node.meta["val"] = args, value
        if node not in self._created:
            self._changed[node.name] = None

    def erase(self, node: fx.Node) -> bool:
        """Erase a node that nobody uses, and what only it used, unless it has an effect."""
        if node.users or not is_pure(node) or not self._spend():
            return False
        self._erase_cone(node)
        return True

    def miss(self, node: fx.Node, reason: str) -> None:
        """Record that the pass nearly applied at `node`, and why it did not."""
        self._misses.append(Miss(node.name, reason))

    def result(self) -> PassResult:
        """Finish: drop what was inserted and never used, and return the record."""
        self.discard()
        live = {str(node.target) for node in self.graph.graph.find_nodes(op="get_attr")}
        for name in self._unreachable - live:
            self.graph.delete_constant(name)
        if self._in_vain - live:
            self.graph.forget_recipes(self._in_vain - live)
        self.graph.recompile()
        created = {node.name: names for node, names in self._created.items()}
        return PassResult(
            rewrites=self.rewrites,
            misses=tuple(self._misses),
            created=tuple(created),
            erased=tuple(self._erased),
            changed=tuple(name for name in self._changed if name not in self._erased),
            origins={name: names for name, names in created.items() if names},
            rules=dict(self.rule_counts),
        )

    @property
    def out_of_fuel(self) -> bool:
        """Whether bisection has stopped this pass; a loop may as well end."""
        return self._fuel is not None and self._fuel.is_out

    # -- for the driver of rules --------------------------------------------------------------

    @property
    def built(self) -> tuple[fx.Node, ...]:
        """The nodes that were inserted since the last rewrite."""
        return tuple(self._uncommitted)

    def prune(self, kept: Iterable[fx.Node]) -> None:
        """Drop the nodes inserted since the last rewrite that nobody uses and nobody returns."""
        wanted = set(kept)
        for node in reversed(self._uncommitted):
            if not node.users and node not in wanted:
                self._drop(node)
        self._uncommitted = [node for node in self._uncommitted if not node._erased]

    @contextlib.contextmanager
    def on_behalf_of(self, rule: str) -> Iterator[None]:
        """Let what is built inside bear the name of a rule."""
        self.rule = rule
        try:
            yield
        finally:
            self.rule = None

    def move(self, nodes: Sequence[fx.Node], *, before: fx.Node) -> None:
        """Move nodes, in this order, to just before another; `discard` moves them back."""
        for node in nodes:
            self._moved.append((node, node.prev))
            before.prepend(node)

    # -- inside -------------------------------------------------------------------------------

    def _spend(self) -> bool:
        tank = self._fuel
        if tank is not None and tank.is_out:
            self._refuse(tank)
            return False
        if tank is not None:
            tank.spent, tank.rule = tank.spent + 1, self.rule
        self.rewrites += 1
        self._uncommitted.clear()
        self._moved.clear()
        return True

    def _refuse(self, tank: Fuel) -> None:
        self.discard()
        tank.refused += 1
        if tank.refused > _PATIENCE + 10 * len(self.graph.graph.nodes):
            self.result()
            raise OutOfFuel("A pass that was stopped goes on asking for rewrites without end.")

    def discard(self) -> None:
        """Drop the nodes inserted since the last rewrite that nobody uses, and undo moves."""
        for node in reversed(self._uncommitted):
            if not node._erased and not node.users:
                self._drop(node)
        self._uncommitted.clear()
        for node, previous in reversed(self._moved):
            previous.append(node)
        self._moved.clear()

    def _adopt(self, node: fx.Node, origins: tuple[fx.Node, ...]) -> None:
        for key in ("path", "module", "source"):
            if origins and key in origins[0].meta:
                node.meta[key] = origins[0].meta[key]
        if self.rule is not None:
            node.meta["rule"] = self.rule
        node.meta["replaces"] = tuple(origin.name for origin in origins)
        self._created[node] = node.meta["replaces"]
        self._uncommitted.append(node)

    def _get_attr(
        self,
        name: str,
        tensor: torch.Tensor,
        before: fx.Node,
        origin: fx.Node | Iterable[fx.Node] | None,
    ) -> fx.Node:
        with self.graph.graph.inserting_before(before):
            node = self.graph.graph.create_node(
                "get_attr", name, name=name.replace(".", "_")
            )
        node.meta["val"] = fake_of(tensor, self.graph.info.fake_mode)
        self._adopt(node, _origins(origin, before))
        return node

    def _unique_name(self, hint: str) -> str:
        name, count = hint, 2
        while self.graph.has_constant(name) or name in self._once_taken:
            name, count = f"{hint}_{count}", count + 1
        return name

    def _erase_cone(self, node: fx.Node) -> None:
        """Erase a node that nobody uses, then those of its inputs that nobody uses any more."""
        pending = [node]
        while pending:
            dead = pending.pop()
            if dead._erased or dead.users or not is_pure(dead):
                continue
            pending.extend(dead.all_input_nodes)
            self._erase(dead)

    def _erase(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._unreachable.add(str(node.target))
        if self._created.pop(node, None) is None:
            self._erased[node.name] = None
        self.graph.graph.erase_node(node)

    def _drop(self, node: fx.Node) -> None:
        """Erase a node that was inserted for nothing; `result` forgets how a constant was made."""
        self._erase(node)
        if node.op == "get_attr":
            self._in_vain.add(str(node.target))


def _redirect(old: fx.Node, new: fx.Node, built: set[fx.Node]) -> None:
    """Let all users of `old` use `new`, but those that were built for this very rewrite."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in built)


def _origins(origin: fx.Node | Iterable[fx.Node] | None, default: fx.Node) -> tuple[fx.Node, ...]:
    if origin is None:
        return (default,)
    return (origin,) if isinstance(origin, fx.Node) else tuple(origin)


def _check_same_value(old: fx.Node, new: fx.Node) -> None:
    if not _same_value(old.meta.get("val"), new.meta.get("val")):
        raise ValueError(
            f"{new.name} cannot replace {old.name}: it is {_text(new.meta.get('val'))}, "
            f"and {old.name} is {_text(old.meta.get('val'))}"
        )


def _same_value(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        return (
            old.dtype == new.dtype
            and old.device == new.device
            and same_shape(old.shape, new.shape)
        )
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return len(old) == len(new) and all(map(_same_value, old, new))
    return type(old) is type(new)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
