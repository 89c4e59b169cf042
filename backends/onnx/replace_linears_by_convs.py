"""Compute linear layers between two transpositions as 1×1 convolutions.

Before                                   After
    t = permute(x, [0, 2, 3, 1])             y = conv2d(x, w[:, :, None, None], b)
    y = linear(t, w, b)       # NHWC         z = gelu(y)                     # NCHW
    z = permute(gelu(y), [0, 3, 1, 2])

A linear layer over the channels of a picture is a 1×1 convolution, and that wants the channels in
front. In ONNX the convolution is one node, the linear layer a MatMul and an Add; what is computed
element by element between several of them goes along, and the transpositions cancel.

Left alone: linear layers where a transposition more would be needed (they are better computed on
matrices); a norm over the last dimension, which stays between two transpositions; a weight that is
tied, or no constant.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.backends.onnx.layouts import LEFT, Comes, Layouts, Step, is_by_element
from fxopt.contract import Effect, PassResult, Precondition
from fxopt.effects import is_pure
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, rank_of, same_shape, shape_of

aten = torch.ops.aten
TO_FRONT, TO_BACK = [0, 3, 1, 2], [0, 2, 3, 1]
# Calls along the channels, and where that dimension stands among their arguments.
_ALONG = {aten.cat.default: 1, aten.slice.Tensor: 1, aten.split_with_sizes.default: 2}


@dataclass(frozen=True)
class ReplaceLinearsByConvs:
    """Compute linear layers over the channels of pictures as convolutions.

    In float64 only with `double`: ONNX Runtime's CPU provider has no such convolution.
    """

    double: bool = False

    name: ClassVar[str] = "replace-linears-by-convs"
    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def run(self, graph: GraphModule) -> PassResult:
        """Choose the calls that shall have the channels in front, and rebuild them."""
        rewriter = Rewriter(graph)
        steps = [step for node in graph.graph.nodes if (step := self._step(rewriter, node))]
        if any(step.saved for step in steps):
            backs = graph.find(aten.permute.default)
            layouts = Layouts(
                steps,
                {node: Comes.MOVED for node in backs if list(node.args[1]) == TO_BACK},  # type: ignore[arg-type]
                reads_any=lambda user: False,
                needs_moved=_is_to_front,
            )
            for group in layouts.choose():
                if not rewriter.out_of_fuel:
                    _rebuild(rewriter, layouts, group)
        return rewriter.result()

    def _step(self, rewriter: Rewriter, node: fx.Node) -> Step | None:
        """Describe a call that may compute with the channels in front; None for another."""
        if node.op != "call_function" or not (node.users and is_pure(node)):
            return None
        args: Any = node.args
        if node.target is aten.split_with_sizes.default:
            parts = tuple(user for user in node.users if user.target is operator.getitem)
            good = _is_picture(args[0]) and args[2] == 3 and len(parts) == len(node.users)
            return Step(node, (args[0],), parts) if good else None
        if not _is_picture(node):
            return None
        if node.target is aten.linear.default:
            return self._linear(rewriter, node)
        if node.target in _ALONG:
            parts = tuple(args[0]) if node.target is aten.cat.default else (args[0],)
            return Step(node, parts, (node,)) if args[1] == 3 else None
        return _by_element(rewriter.graph, node) if is_by_element(node.target) else None

    def _linear(self, rewriter: Rewriter, node: fx.Node) -> Step | None:
        x, weight, bias = node.args
        if not (isinstance(weight, fx.Node) and rank_of(weight) == 2 and _is_picture(x)):
            return None
        if not dtype_of(node).is_floating_point:
            return None
        if not _is_constant(rewriter.graph, weight):
            rewriter.miss(node, f"its weight {weight.name} is not a constant")
            return None
        if len(weight.users) > 1:
            rewriter.miss(node, f"its weight {weight.name} is used elsewhere too")
            return None
        if dtype_of(node) is torch.float64 and not self.double:
            rewriter.miss(node, "ONNX Runtime has no convolution in float64")
            return None
        assert isinstance(x, fx.Node)
        # what is saved is the Add of the bias: worth no transposition
        return Step(node, (x,), (node,), saved=0 if bias is None else LEFT)


def _is_to_front(node: fx.Node) -> bool:
    return node.target is aten.permute.default and list(node.args[1]) == TO_FRONT  # type: ignore[arg-type]


def _is_picture(node: Any) -> bool:
    return is_tensor(node) and rank_of(node) == 4


def _by_element(graph: GraphModule, node: fx.Node) -> Step | None:
    """Describe a call element by element, of pictures of one shape and of numbers per channel."""
    pictures = []
    for tensor in node.all_input_nodes:
        if not is_tensor(tensor):
            return None
        if rank_of(tensor) == 4 and same_shape(shape_of(tensor), shape_of(node)):
            pictures.append(tensor)
        elif rank_of(tensor) > 1 or rank_of(tensor) == 1 and not _is_constant(graph, tensor):
            return None
    return Step(node, tuple(pictures), (node,)) if pictures else None


def _is_constant(graph: GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target) not in graph.info.mutated


# -- rebuilding ------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Connected calls that are being rebuilt with the channels in front."""

    rewriter: Rewriter
    layouts: Layouts
    front: dict[fx.Node, fx.Node] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def in_front(self, value: fx.Node, before: fx.Node) -> fx.Node:
        """Return a value with its channels in front."""
        if value not in self.front:
            turned = min(filter(_is_to_front, value.users), default=before)
            if value.target is aten.permute.default and list(value.args[1]) == TO_BACK:  # type: ignore[arg-type]
                self.front[value] = value.args[0]  # type: ignore[assignment]
            elif turned < before:
                self.front[value] = turned
            else:
                self.front[value] = self.rewriter.insert(
                    aten.permute.default, value, TO_FRONT, before=before, origin=value
                )
                self.replace_turned(value)
        return self.front[value]

    def replace_turned(self, value: fx.Node) -> None:
        """Let nobody turn a value again that is there with its channels in front."""
        front = self.front[value]
        self.replaced.update((u, front) for u in value.users if _is_to_front(u) and u is not front)

    def argument(self, node: fx.Node, step: Step) -> fx.Node:
        """Return what stands for a tensor among the arguments of a call."""
        if node in step.inputs:
            return self.in_front(node, step.node)
        if rank_of(node) == 0:
            return node
        if node not in self.front:
            self.front[node] = self.rewriter.constant(
                lambda value: value.reshape(-1, 1, 1),
                [node], name=f"{node.target}_in_front", before=step.node,
            )  # fmt: skip
        return self.front[node]

    def move(self, step: Step) -> None:
        """Compute a step with the channels in front; turn its values where readers want that."""
        node = step.node
        new = self.conv(step) if node.target is aten.linear.default else self.same(step)
        for value in step.outputs:
            self.front[value] = new if value is node else self.rewriter.insert(
                operator.getitem, new, value.args[1], before=node, origin=value
            )  # fmt: skip
            if self.layouts.is_needed_kept(value):
                self.replaced[value] = self.rewriter.insert(
                    aten.permute.default, self.front[value], TO_BACK, before=node, origin=value
                )
            self.replace_turned(value)

    def conv(self, step: Step) -> fx.Node:
        """linear(x, w, b) over the last dimension = conv2d(x, w[:, :, None, None], b)"""
        node = step.node
        _, weight, bias = node.args
        assert isinstance(weight, fx.Node)
        kernel = self.rewriter.constant(
            lambda value: value[:, :, None, None],
            [weight], name=f"{weight.target}_1x1", before=node,
        )  # fmt: skip
        ones, zeros = [1, 1], [0, 0]
        return self.rewriter.insert(
            aten.conv2d.default, self.in_front(step.inputs[0], node), kernel, bias,
            ones, zeros, ones, 1, before=node,
        )  # fmt: skip

    def same(self, step: Step) -> fx.Node:
        """Return a step's own call, of values with the channels in front."""
        node = step.node
        args = fx.map_arg(node.args, lambda n: self.argument(n, step))
        place = _ALONG.get(node.target)  # type: ignore[call-overload]
        if place is not None:
            args = (*args[:place], 1, *args[place + 1 :])
        kwargs: dict[str, Any] = dict(node.kwargs)
        return self.rewriter.insert(node.target, *args, before=node, **kwargs)


def _rebuild(rewriter: Rewriter, layouts: Layouts, steps: list[Step]) -> None:
    group = _Group(rewriter, layouts)
    for step in steps:
        group.move(step)
    rewriter.replace(group.replaced)
