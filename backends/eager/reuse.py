"""Where a call may write its result over one of its arguments.

That saves an allocation, and the memory is in the cache already. It is right where the argument's
memory was made by an earlier call of the same program, nothing reads it afterwards, and nobody else
holds it: it is no input, no constant, no output, and no view of one.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from networkx.utils import UnionFind
from torch import fx
from torch._ops import OpOverload

from fxopt.backends.eager.onednn import operators
from fxopt.effects import training_flag
from fxopt.shapes import is_tensor, same_metadata

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn
_NUMBERS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


class Overwrite(NamedTuple):
    """A call that writes over one of its arguments, in the place of one that does not."""

    target: Any
    args: tuple[Any, ...]
    over: int = 0  # which argument


_UNARY: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.sigmoid.default: aten.sigmoid_.default,
    aten.tanh.default: aten.tanh_.default,
    aten.silu.default: aten.silu_.default,
    aten.hardswish.default: aten.hardswish_.default,
    aten.hardsigmoid.default: aten.hardsigmoid_.default,
    aten.hardtanh.default: aten.hardtanh_.default,
    aten.leaky_relu.default: aten.leaky_relu_.default,
    aten.gelu.default: aten.gelu_.default,
    aten.elu.default: aten.elu_.default,
    aten.exp.default: aten.exp_.default,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
}  # fmt: skip
_COMMUTATIVE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
}
_REARRANGING = {aten.permute.default, aten.unsqueeze.default, aten.reshape.default}
# Composite operators may return an argument as it is, whatever their schemas say; these never do.
_NEVER_AN_ARGUMENT = {
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default,
    aten.matmul.default, aten.layer_norm.default, aten.batch_norm.default, aten.group_norm.default,
    aten.max_pool2d.default, aten.adaptive_avg_pool2d.default,
}  # fmt: skip
# Found among all of ATen's operators by running PyTorch's own samples of each.
_MAY_BE_AN_ARGUMENT = {
    aten.lift.default, aten._unsafe_view.default, aten.dequantize.self,
    aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
}  # fmt: skip


class Memory:
    """Which values of a program may share their memory.

    `of_input` and `of_constant` say of a value whether it may lie in somebody else's.
    """

    def __init__(self, inputs: Iterable[fx.Node], calls: Iterable[fx.Node]) -> None:
        self._sets = UnionFind()
        self._own = set()
        self._sets.union("inputs", *filter(_has_memory, inputs))
        for node in calls:
            self._own.add(node)
            self._sets[node]
            if not _is_fresh(node):
                self._sets.union(node, *map(self._place, filter(_has_memory, node.all_input_nodes)))
        self._makers = Counter(self._sets[node] for node in self._own if not _is_view(node))

    def of_constant(self, value: fx.Node) -> bool:
        """Whether a value may lie in a constant's memory."""
        return self.of(value) == self._sets["constants"]

    def of_input(self, value: fx.Node) -> bool:
        """Whether a value may lie in an input's memory."""
        return self.of(value) == self._sets["inputs"]

    def of(self, value: fx.Node) -> Any:
        """Return what stands for the memory of a value, the same for all that may share it."""
        return self._sets[self._place(value)]

    def is_all_of_one_call(self, value: Any) -> bool:
        """Whether a value is all the memory that one call made, each element once."""
        maker = value
        while isinstance(maker, fx.Node) and maker.target in _REARRANGING:
            maker = maker.args[0]
        return (
            isinstance(maker, fx.Node)
            and maker in self._own
            and _is_fresh(maker)
            and self._makers[self.of(value)] == 1
        )

    def _place(self, value: fx.Node) -> Any:
        known = value in self._sets.parents
        return value if known else "constants"


def overwrites(
    memory: Memory, calls: Sequence[fx.Node], outputs: Iterable[Any]
) -> dict[fx.Node, Overwrite]:
    """Return those of `calls`, in the order in which they run, that may write over an argument."""
    last_read: dict[Any, float] = {}
    for index, node in enumerate(calls):
        last_read.update({memory.of(value): index for value in node.all_input_nodes})
    last_read.update({memory.of(value): math.inf for value in outputs if is_tensor(value)})
    found: dict[fx.Node, Overwrite] = {}
    for index, node in enumerate(calls):
        for overwrite in _forms(node):
            others = list(overwrite.args)
            victim = others.pop(overwrite.over)
            if (
                memory.is_all_of_one_call(victim)
                and last_read[memory.of(victim)] == index
                and same_metadata(victim, node)
                and all(memory.of(one) != memory.of(victim) for one in others if is_tensor(one))
            ):
                found[node] = overwrite
                break
    return found


def _forms(node: fx.Node) -> Iterable[Overwrite]:
    """Yield the ways to write a call so that it overwrites an argument."""
    args: Any = node.args
    if node.target in _UNARY:
        yield Overwrite(_UNARY[node.target], args)
    elif node.target in _COMMUTATIVE:
        target = _COMMUTATIVE[node.target]
        yield Overwrite(target, args)
        if is_tensor(args[1]) and node.kwargs.get("alpha", 1) == 1:
            yield Overwrite(target, (args[1], args[0], *args[2:]))
    elif node.target is mkldnn._convolution_pointwise.binary:
        x, other, *rest = args
        yield Overwrite(mkldnn._convolution_pointwise_.binary, (other, x, *rest))
    elif node.target is operators.convolution_add:
        yield Overwrite(operators.convolution_add_, args, over=1)
    elif node.target is operators.linear_add:
        yield Overwrite(operators.linear_add_, args, over=1)


def _has_memory(node: fx.Node) -> bool:
    """Whether a value is no number, such as a size."""
    return not isinstance(node.meta.get("val"), _NUMBERS)


def _is_view(node: fx.Node) -> bool:
    """Whether a call makes no memory of its own, whatever else it does."""
    return node.target is operator.getitem or node.target in _REARRANGING


@functools.cache
def _allocates(target: Any) -> bool:
    """Whether an operator's results always lie in memory of their own."""
    if target in _NEVER_AN_ARGUMENT:
        return True
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "mkldnn", "fxopt"):
        return False
    if target in _MAY_BE_AN_ARGUMENT:
        return False
    if any(returned.alias_info is not None for returned in target._schema.returns):
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return training_flag(target) is None and not target.has_kernel_for_dispatch_key(composite)


def _is_fresh(node: fx.Node) -> bool:
    return node.op == "call_function" and _allocates(node.target)
