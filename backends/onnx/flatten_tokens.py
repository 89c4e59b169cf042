"""Carry tokens as matrices through what treats each token alone.

Before                                   After
    n = layer_norm(x)     # (B, N, C)        m = reshape(x, [-1, C])       # (B·N, C)
    y = linear(n, w, b)                      y = linear(layer_norm(m), w, b)
    z = reshape(y, [B, N, h, d])             z = reshape(y, [B, N, h, d])

ONNX has a linear layer for matrices only: a Gemm. For more dimensions it takes a MatMul and an Add,
which ONNX Runtime turns into a Gemm between two Reshapes. So runs of linear layers, norms over the
last dimension, activations and sums are computed on matrices. Reshapes go to the borders, where
they merge with those that are there anyway (attention splits heads, windows are cut out).

Left alone: a run in which the nodes saved are no more than the Reshapes added; sums that broadcast
over tokens, which hold for one token beside another; a last dimension of symbolic size; shapes with
several symbolic sizes that are no sizes of an input.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.backends.onnx.describe import shape_of
from fxopt.backends.onnx.layouts import (
    LEFT,
    WRITTEN,
    Comes,
    Layouts,
    Step,
    is_by_element,
)
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, rank_of, same_metadata, same_shape

aten = torch.ops.aten

_VIEWS = (
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dims,
    aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default,
)  # fmt: skip
# Calls along one dimension, and where that stands among their arguments.
_ALONG = {
    aten.softmax.int: 1, aten.log_softmax.int: 1, aten.glu.default: 1, aten.cat.default: 1,
    aten.slice.Tensor: 1, aten.split_with_sizes.default: 2, aten.mean.dim: 1,
}  # fmt: skip
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class FlattenTokens:
    """Compute linear layers on matrices, and what stands between them."""

    name: ClassVar[str] = "flatten-tokens"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Choose the runs of calls that shall compute on matrices, and rebuild them."""
        rewriter = Rewriter(graph)
        sizes = _Sizes(rewriter)
        steps = [step for node in graph.graph.nodes if (step := _step(graph, sizes, node))]
        if any(step.saved for step in steps):
            layouts = Layouts(
                steps,
                {node: comes for node in graph.graph.nodes if (comes := _comes(node))},
                reads_any=lambda user: _is_reshape(user) and not _is_matrix_of(user),
                needs_moved=_is_matrix_of,
            )
            for group in layouts.choose(lambda group: sizes.overhead(layouts, group)):
                if not rewriter.out_of_fuel:
                    _rebuild(rewriter, layouts, sizes, group)
        return rewriter.result()


# -- which calls treat each token alone ------------------------------------------------------------


def _is_tokens(node: Any) -> bool:
    """Whether a value has more than two dimensions, the last of a known size, and elements."""
    if not is_tensor(node) or rank_of(node) < 3:
        return False
    shape = shape_of(node)
    return isinstance(shape[-1], int) and not any(_is(size, 0) for size in shape)


def _is(size: Any, number: int) -> bool:
    """Whether a size is known, and this number; a symbolic one is not asked."""
    return isinstance(size, int) and size == number


def _is_view(node: fx.Node) -> bool:
    """Whether a call only lays out the same tokens in other leading dimensions."""
    if not _is_reshape(node):
        return False
    source: Any = node.args[0]
    return bool(shape_of(source)) and same_shape(shape_of(source)[-1:], shape_of(node)[-1:])


def _is_reshape(node: fx.Node) -> bool:
    """Whether a call keeps the elements in their order."""
    if node.target is not aten.permute.default:
        return node.target in _VIEWS
    args: Any = node.args
    shape = shape_of(args[0])
    moved = [axis for axis in args[1] if not _is(shape[axis], 1)]
    return moved == sorted(moved) and list(args[1]) != sorted(args[1])


def _is_matrix_of(node: fx.Node) -> bool:
    """Whether a call makes a matrix of tokens."""
    return _is_view(node) and rank_of(node) == 2 and _is_tokens(node.args[0])


def _comes(node: fx.Node) -> Comes | None:
    if not _is_reshape(node) or not _is_tokens(node):
        return None
    source: Any = node.args[0]
    return Comes.MOVED if _is_view(node) and rank_of(source) == 2 else Comes.EITHER


def _step(graph: GraphModule, sizes: _Sizes, node: fx.Node) -> Step | None:
    """Describe a call that may compute on matrices; None for another."""
    if node.op != "call_function" or not (node.users and is_pure(node)) or _names_a_layout(node):
        return None
    if node.target is aten.split_with_sizes.default:
        parts = tuple(user for user in node.users if user.target is operator.getitem)
        whole: Any = node.args[0]
        good = _is_tokens(whole) and _is_along_last(node) and len(parts) == len(node.users)
        good = good and all(_is_tokens(part) and sizes.can_spell(part) for part in parts)
        return Step(node, (whole,), parts) if good else None
    if not (_is_tokens(node) and sizes.can_spell(node)):
        return None
    inputs = _inputs(graph, node)
    if inputs is None:
        return None
    saves = node.target is aten.linear.default and node.args[2] is not None
    saved = WRITTEN + 2 * LEFT if saves and dtype_of(node).is_floating_point else 0
    return Step(node, inputs, (node,), saved, view=_is_reshape(node))


def _names_a_layout(node: fx.Node) -> bool:
    """Whether a call asks for a memory layout that matrices do not have."""
    given = (*node.args, *node.kwargs.values())
    return torch.channels_last in given or torch.channels_last_3d in given


def _inputs(graph: GraphModule, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Return the tokens that a call reads; None where it is not computed token by token."""
    args: Any = node.args
    target: Any = node.target
    if target is aten.linear.default:
        return (args[0],) if rank_of(args[1]) == 2 and _is_tokens(args[0]) else None
    if target in _NORMS:
        return (args[0],) if len(args[1]) == 1 else None
    if _is_reshape(node):
        return (args[0],) if _is_view(node) and _is_tokens(args[0]) else None
    if target in _ALONG:
        parts = args[0] if target is aten.cat.default else [args[0]]
        keeps = target is not aten.mean.dim or args[2]
        good = keeps and _is_along_last(node) and all(map(_is_tokens, parts))
        return _operands(graph, node, parts) if good else None
    return _operands(graph, node, node.all_input_nodes) if is_by_element(target) else None


def _is_along_last(node: fx.Node) -> bool:
    args: Any = node.args
    first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    dim, last = args[_ALONG[node.target]], rank_of(first) - 1  # type: ignore[index]
    return bool(dim == last or dim == [last])


def _operands(graph: GraphModule, node: fx.Node, tensors: list[Any]) -> tuple[fx.Node, ...] | None:
    """Return those of a call's tensors that hold tokens; None where one has another form."""
    inputs = []
    for tensor in tensors:
        if not is_tensor(tensor):
            return None
        if rank_of(tensor) < 2 or _is_constant(graph, tensor) and _is_row(tensor):
            continue
        if not _same_tokens(tensor, node) or not isinstance(shape_of(tensor)[-1], int):
            return None
        if rank_of(tensor) > 2 and not _is_constant(graph, tensor):
            inputs.append(tensor)
    return tuple(dict.fromkeys(inputs)) or None


def _is_constant(graph: GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target) not in graph.info.mutated


def _is_row(node: fx.Node) -> bool:
    """Whether a tensor holds the same for all tokens."""
    return all(_is(size, 1) for size in shape_of(node)[:-1])


def _same_tokens(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have the same tokens, up to dimensions of size 1 in front."""
    shapes = []
    for node in (a, b):
        leading = shape_of(node)[:-1]
        while leading and _is(leading[0], 1):
            leading = leading[1:]
        shapes.append(leading)
    return same_shape(*shapes)


# -- symbolic sizes --------------------------------------------------------------------------------


class _Sizes:
    """Writes shapes as arguments of a reshape.

    One symbolic size is −1, others are taken from the inputs that have them.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self._rewriter = rewriter
        self._known: dict[Any, tuple[fx.Node, int]] = {}
        self._nodes: dict[Any, fx.Node] = {}
        for node in rewriter.graph.placeholders:
            for axis, size in enumerate(shape_of(node) if is_tensor(node) else ()):
                if not isinstance(size, int):
                    self._known.setdefault(size.node.expr, (node, axis))

    def _symbolic(self, node: fx.Node) -> list[int]:
        return [axis for axis, size in enumerate(shape_of(node)) if not isinstance(size, int)]

    def can_spell(self, node: fx.Node) -> bool:
        """Whether at most one size of a value is neither known nor a size of an input."""
        shape = shape_of(node)
        return sum(shape[d].node.expr not in self._known for d in self._symbolic(node)) <= 1

    def spelled(self, node: fx.Node) -> list[Any]:
        """Return the arguments that reshape to a value's shape."""
        shape = shape_of(node)
        axes = self._symbolic(node)
        if not axes:
            return shape
        unknown = [axis for axis in axes if shape[axis].node.expr not in self._known]
        free = (unknown or axes)[-1]
        return [
            -1 if axis == free else self._node(size) if axis in axes else size
            for axis, size in enumerate(shape)
        ]

    def _node(self, size: Any) -> fx.Node:
        expression = size.node.expr
        if expression not in self._nodes:
            source, axis = self._known[expression]
            nodes = self._rewriter.graph.graph.nodes
            first = next(n for n in nodes if n.op not in ("placeholder", "get_attr"))
            self._nodes[expression] = self._rewriter.insert(
                aten.sym_size.int, source, axis, before=first
            )
        return self._nodes[expression]

    def overhead(self, layouts: Layouts, group: list[Step]) -> int:
        """Return what the shapes cost that have several symbolic sizes: they are computed."""
        computed = set()
        for step in group:
            for value in step.outputs:
                for node in (value, *(u for u in value.users if _is_reshape(u))):
                    if node not in layouts.steps and len(self._symbolic(node)) > 1 or (
                        node is value and layouts.is_needed_kept(value)
                        and len(self._symbolic(value)) > 1
                    ):  # fmt: skip
                        computed.add(str(shape_of(node)))
        return (2 + len(computed)) * WRITTEN if computed else 0


# -- rebuilding ------------------------------------------------------------------------------------


@dataclass
class _Group:
    """One run of calls that is being rebuilt on matrices."""

    rewriter: Rewriter
    layouts: Layouts
    sizes: _Sizes
    flat: dict[fx.Node, fx.Node] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def matrix(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """Return the matrix of a value's tokens."""
        found = self.flat.get(value)
        if found is None:
            source: Any = value
            if _is_reshape(value):
                source = value.args[0]
                source = self.flat.get(source) or self.replaced.get(source, source)
            width = shape_of(value)[-1]
            if rank_of(source) != 2 or not _is(shape_of(source)[-1], width):
                there = min(filter(_is_matrix_of, value.users), default=before)
                source = there if there < before else self.rewriter.insert(
                    aten.reshape.default, source, [-1, width], before=before, origin=value
                )  # fmt: skip
                self.replaced.update(
                    (user, source) for user in value.users
                    if _is_matrix_of(user) and user is not source
                    and same_metadata(user, source)
                )  # fmt: skip
            found = self.flat[value] = source
        return found

    def argument(self, node: fx.Node, step: Step) -> fx.Node:
        """Return what stands for a tensor among the arguments of a call."""
        if node in step.inputs:
            return self.matrix(node, step.node)
        constant = rank_of(node) > 2 and _is_constant(self.rewriter.graph, node)
        return self.constant(node, step.node) if constant else self.replaced.get(node, node)

    def constant(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """Return a constant as a matrix, of one row where it is the same for all tokens."""
        width = shape_of(node)[-1]
        if node not in self.flat:
            self.flat[node] = self.rewriter.constant(
                lambda value: value.reshape(-1, width),
                [node], name=f"{node.target}_flat", before=before,
            )  # fmt: skip
        return self.flat[node]

    def move(self, step: Step) -> None:
        """Compute a step on matrices; give its values their own shapes where those are needed."""
        node = step.node
        if step.view:
            self.flat[node] = self.matrix(step.inputs[0], node)
        else:
            args = fx.map_arg(node.args, lambda n: self.argument(n, step))
            place = _ALONG.get(node.target)  # type: ignore[call-overload]
            if place is not None:
                dim = [1] if isinstance(args[place], (list, tuple)) else 1
                args = (*args[:place], dim, *args[place + 1 :])
            kwargs: dict[str, Any] = dict(node.kwargs)
            new = self.rewriter.insert(node.target, *args, before=node, **kwargs)
            for value in step.outputs:
                self.flat[value] = new if value is node else self.rewriter.insert(
                    operator.getitem, new, value.args[1], before=node, origin=value
                )  # fmt: skip
        for value in step.outputs:
            self.hand_out(value, node)

    def hand_out(self, value: fx.Node, place: fx.Node) -> None:
        """Give the readers of a value what they read, where they are no steps."""
        if self.layouts.is_needed_kept(value):
            self.replaced[value] = self.reshaped(self.flat[value], value, place)
        for user in value.users:
            if not _is_reshape(user):
                continue
            if _is_matrix_of(user):
                self.replaced[user] = self.reshaped(self.flat[value], user, user)
            elif value not in self.replaced and not self.layouts.moved.get(user, False):
                if not (user in self.flat or _is_only_moved(self.layouts, user)):
                    self.replaced[user] = self.reshaped(self.flat[value], user, user)

    def reshaped(self, matrix: fx.Node, like: fx.Node, before: fx.Node) -> fx.Node:
        """Return a matrix in the shape of another value."""
        if same_metadata(matrix, like):
            return matrix
        sizes = self.sizes.spelled(like)
        return self.rewriter.insert(
            aten.reshape.default, matrix, sizes, before=before, origin=like, like=like
        )


def _is_only_moved(layouts: Layouts, view: fx.Node) -> bool:
    return layouts.is_needed_moved(view) and not layouts.is_needed_kept(view)


def _rebuild(rewriter: Rewriter, layouts: Layouts, sizes: _Sizes, steps: list[Step]) -> None:
    group = _Group(rewriter, layouts, sizes)
    for step in steps:
        group.move(step)
    rewriter.replace(group.replaced)


