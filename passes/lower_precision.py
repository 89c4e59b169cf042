"""Compute in bfloat16 or float16 where that is safe; the rest, and what goes in and out, stays.

Before                                       After
    y = conv2d(x, w)                             y = conv2d(x.to(bf16), w.to(bf16))
    z = relu(y)                                  z = relu(y)
    return z.exp()                               return z.to(float32).exp()

Three kinds of calls, as in mixed-precision training (Micikevicius et al., "Mixed Precision
Training", ICLR 2018) and PyTorch's autocast:

- Those that multiply (convolutions, linear layers, products, attention, embeddings) compute in the
  lower precision: there it pays. Kernels add up in float32.
- Those whose result is as exact as what they read (activations, sums of two, moves, pools, norms,
  softmax) follow: they compute in the precision that all their inputs have.
- All others are islands of the precision they had: exponentials, logarithms, powers and sums,
  whose errors grow, and all that is computed from inputs alone, such as positions and masks.

Constants that a layer reads are converted once; finite values that the lower precision does not
have become its largest ones, since a mask of −3.4·10³⁸ must not become −∞. The report says how far
results moved on the example inputs, and `max_error` bounds that.

Left alone: what reads or returns more than an eighth of float16's 65504 on the example inputs
(other inputs may still go beyond); numbers and integers as operands that the lower precision does
not have; random calls; recurrent layers; bodies of control flow. `y * y` is not known to be half of
a variance, as `y.pow(2)` is: name such layers in `keep`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt.contract import Effect, PassResult, Precondition
from fxopt.difference import relative_error
from fxopt.effects import is_pure
from fxopt.errors import OptionError, VerifyError, check_choice
from fxopt.graph_module import GraphModule
from fxopt.interpreter import Interpreter, in_evaluation
from fxopt.naming import check_patterns, fits, operators
from fxopt.rewrite import Rewriter
from fxopt.verify import runner, seeded

aten = torch.ops.aten

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MARGIN = 8  # times what the example inputs lead to must fit into float16


_MULTIPLY = operators("""
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear bilinear
    matmul mm bmm mv addmm baddbmm scaled_dot_product_attention embedding
""")
_FOLLOW = operators("""
    alias clone contiguous view reshape permute transpose t unsqueeze squeeze expand expand_as
    flatten unflatten slice select narrow split split_with_sizes chunk unbind cat stack roll flip
    constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
    pixel_shuffle pixel_unshuffle channel_shuffle repeat tile index_select gather unfold
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d mean amax amin upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d upsample_bicubic2d
    batch_norm instance_norm layer_norm group_norm rms_norm softmax dropout
    relu relu6 hardtanh hardswish hardsigmoid leaky_relu elu selu celu gelu silu mish sigmoid tanh
    prelu threshold softplus clamp clamp_min clamp_max add sub rsub mul div neg abs maximum minimum
    where masked_fill
""")
# of these, numbers and integer tensors are operands
_ARITHMETIC = operators("""
    add sub rsub mul div clamp clamp_min clamp_max maximum minimum where masked_fill threshold
    hardtanh
""")
_MASK = {aten.scaled_dot_product_attention.default: 3}


@dataclass(frozen=True)
class LowerPrecision:
    """Compute in `dtype`, "bf16" or "fp16", where that is safe.

    `keep` are patterns of paths of layers or of names of nodes, such as "head" or "blocks.0.*":
    what they fit computes as before. `max_error` bounds max |Δ| / max |reference| of the example
    inputs' outputs; beyond it, or where a number is finite no more, `run` raises VerifyError.
    Weights become ones of the lower precision: train before.
    """

    dtype: str = "bf16"
    keep: tuple[str, ...] = ()
    max_error: float = 0.1

    name: ClassVar[str] = "lower-precision"
    effect: ClassVar[Effect] = Effect.LOSSY
    requires: ClassVar[tuple[Precondition, ...]] = ()

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, tuple(HALF_DTYPES))
        if not _is_number(self.max_error) or not self.max_error >= 0:
            raise OptionError(f"max_error={self.max_error!r}: it is a number, at least 0.")
        if isinstance(self.keep, str):
            raise OptionError(f"keep={self.keep!r} is one text; write keep=({self.keep!r},).")
        if not isinstance(self.keep, (tuple, list)) or not all(
            isinstance(pattern, str) for pattern in self.keep
        ):
            raise OptionError(f"keep={self.keep!r}: it is a tuple of patterns, each a text.")

    def run(self, graph: GraphModule) -> PassResult:
        """Give every call that may compute in the lower precision a twin there."""
        rewriter = Rewriter(graph)
        if graph.is_subgraph:
            return rewriter.result()
        check_patterns(graph, self.keep)
        before, dtype = graph.copy(), HALF_DTYPES[self.dtype]
        lowering = _Lowering(rewriter, dtype, _too_large(graph, dtype))
        for node in list(graph.graph.nodes):
            if node._erased:
                continue
            obstacle = lowering.obstacle(node)
            if obstacle is None and self._keeps(node):
                obstacle = "it is to be kept"
            if obstacle is None:
                if not lowering.rewrite(node):
                    break
            elif obstacle:
                rewriter.miss(node, f"it stays in {_short(node)}: {obstacle}")
        result = rewriter.result()
        if not result.rewrites:
            return result
        return replace(result, details=self._measured(before, graph, result.rewrites))

    def _measured(self, before: GraphModule, graph: GraphModule, lowered: int) -> str:
        """Say how far the results moved; raise VerifyError where that is too far."""
        inputs = before.info.example_inputs
        reference = seeded(runner(before), inputs)
        error = relative_error(list(seeded(runner(graph), inputs)), list(reference))
        if not error <= self.max_error:
            raise VerifyError(
                f"Computing in {self.dtype} moves the outputs by {error:.3g} of the largest, and "
                f"max_error is {self.max_error:g}. Name layers in keep=, or allow more: by "
                "max_error= of the pass, or tolerance= of fxopt.compile."
            )
        return (
            f"Calls that compute in {self.dtype}: {lowered}. On the example inputs that moves the "
            f"outputs by {error:.2g} of the largest."
        )

    def _keeps(self, node: fx.Node) -> bool:
        return any(fits(node, pattern) for pattern in self.keep)


@dataclass
class _Lowering:
    """One graph on its way.

    `twins` are values that were computed in the lower precision, `rounded` copies of others.
    """

    rewriter: Rewriter
    dtype: torch.dtype
    too_large: Mapping[str, float]  # values, by name, that do not fit, and the largest in them
    twins: dict[fx.Node, fx.Node] = field(default_factory=dict)
    rounded: dict[tuple[fx.Node, bool], fx.Node] = field(default_factory=dict)  # masks, and others

    def obstacle(self, node: fx.Node) -> str | None:
        """Return why a call stays as it is, "" where that needs no words, or None: it may go."""
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            return ""
        if node.target is aten.to.dtype and _dtype(node.args[0]) == self.dtype:
            if self._is_wide(node):
                self.twins[node] = node.all_input_nodes[0]
            return ""
        operator_name = node.target._schema.name
        if operator_name not in _MULTIPLY and operator_name not in _FOLLOW:
            return ""
        read = [value for value in node.all_input_nodes if self._is_wide(value)]
        if not read or not self._returns_what_it_reads(node):
            return ""
        if operator_name in _FOLLOW:
            if not any(value in self.twins for value in read):
                return ""
            if not all(value in self.twins or self._is_weight(value) for value in read):
                return "not all that it reads was computed in the lower precision"
        if not is_pure(node):
            return "it is random, or has another effect"
        if operator_name in _ARITHMETIC:
            strange = next((a for a in node.args if self._has_no(a)), None)
            if strange is not None:
                return f"the number {strange} among its arguments has no like in {self.dtype}"
            if any(_is_integer(value) for value in node.all_input_nodes):
                return "it reads integers, which the lower precision does not all have"
        for value in (*read, node):
            if value.name in self.too_large and not _is_mask(value, node):
                largest = self.too_large[value.name]
                return f"{value.name} reaches {largest:.3g} on the example inputs"
        return None

    def rewrite(self, node: fx.Node) -> bool:
        """Let a twin of a call take its place, behind a cast; return False without fuel."""
        def lower(value: fx.Node) -> fx.Node:
            return self._low(value, node) if self._is_wide(value) else value

        args = fx.node.map_arg(node.args, lower)
        kwargs: Any = fx.node.map_arg(node.kwargs, lower)
        twin = self.rewriter.insert(node.target, *args, before=node, **kwargs)
        if "switch" in node.meta:  # what `train()` switches
            twin.meta["switch"] = node.meta["switch"]
        if isinstance(node.meta["val"], torch.Tensor):
            new = {node: twin}
        else:
            new = {
                item: self.rewriter.insert(operator.getitem, twin, item.args[1], before=node,
                                           origin=item)
                for item in node.users
            }  # fmt: skip
        back = {old: self._cast(one, _dtype(old), before=node) for old, one in new.items()}
        self.twins.update({back[old]: one for old, one in new.items()})
        return self.rewriter.replace(back)

    # -- values -------------------------------------------------------------------------------

    def _is_wide(self, value: Any) -> bool:
        """Whether a value has a floating dtype that is not the lower precision."""
        dtype = _dtype(value)
        return dtype is not None and dtype.is_floating_point and dtype != self.dtype

    def _is_weight(self, value: fx.Node) -> bool:
        """Whether a value is a constant for good."""
        return value.op == "get_attr" and value.target not in self.rewriter.graph.info.mutated

    def _returns_what_it_reads(self, node: fx.Node) -> bool:
        """Whether all of a call's results are floating, and no dtype is asked for by name."""
        if any(isinstance(one, torch.dtype) for one in (*node.args, *node.kwargs.values())):
            return False
        if isinstance(node.meta["val"], torch.Tensor):
            return self._is_wide(node)
        return bool(node.users) and all(
            user.target is operator.getitem and self._is_wide(user) for user in node.users
        )

    def _has_no(self, number: Any) -> bool:
        """Whether a finite number is too large or too small for the lower precision."""
        if not _is_number(number) or not math.isfinite(number):
            return False
        info = torch.finfo(self.dtype)
        return not abs(number) <= info.max or 0 < abs(number) < info.smallest_normal

    def _low(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """Return a value in the lower precision, for `user`."""
        if value in self.twins:
            return self.twins[value]
        is_mask = _is_mask(value, user)
        if (value, is_mask) not in self.rounded:
            self.rounded[value, is_mask] = self._rounded(value, user, saturating=is_mask)
        return self.rounded[value, is_mask]

    def _rounded(self, value: fx.Node, user: fx.Node, *, saturating: bool) -> fx.Node:
        if self._is_weight(value):
            convert = _saturated if saturating or self.dtype == torch.bfloat16 else _fitted
            return self.rewriter.constant(
                partial(convert, dtype=self.dtype), [value],
                name=f"{value.target}_{_SHORT[self.dtype]}", before=user, origin=value,
                is_part=True,
            )  # fmt: skip
        finite = self._finite(value, user) if saturating else value
        return self._cast(finite, self.dtype, before=user)

    def _finite(self, value: fx.Node, user: fx.Node) -> fx.Node:
        """Return a value whose finite numbers are finite in the lower precision, too."""
        insert, largest = self.rewriter.insert, _largest(_dtype(value), self.dtype)
        within = insert(aten.clamp.default, value, -largest, largest, before=user, origin=value)
        is_infinite = insert(aten.isinf.default, value, before=user, origin=value)
        return insert(aten.where.self, is_infinite, value, within, before=user, origin=value)

    def _cast(self, value: fx.Node, dtype: torch.dtype | None, before: fx.Node) -> fx.Node:
        return self.rewriter.insert(aten.to.dtype, value, dtype, before=before, origin=value)


_SHORT = {dtype: name for name, dtype in HALF_DTYPES.items()}


def _saturated(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in another dtype; of what is finite, the largest stays finite."""
    largest = _largest(tensor.dtype, dtype)
    return torch.where(tensor.isinf(), tensor, tensor.clamp(-largest, largest)).to(dtype)


def _fitted(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in another dtype; raise VerifyError where new weights do not fit."""
    if float(torch.where(tensor.isinf(), 0, tensor).abs().max()) > torch.finfo(dtype).max:
        raise VerifyError(
            f"A weight of {list(tensor.shape)} does not fit into {dtype}. Compile the model with "
            "these weights anew: then what they are in stays as it is."
        )
    return tensor.to(dtype)


def _largest(wide: torch.dtype | None, low: torch.dtype) -> float:
    """Return the largest number that both dtypes have."""
    assert wide is not None
    return min(torch.finfo(wide).max, torch.finfo(low).max)


def _is_mask(value: fx.Node, user: fx.Node) -> bool:
    """Whether a value is what attention adds to its scores: finite numbers may saturate there."""
    return user.target in _MASK and user.args[_MASK[user.target]] is value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: fx.Node) -> bool:
    dtype = _dtype(value)
    return dtype is not None and not dtype.is_floating_point and dtype != torch.bool


def _dtype(value: Any) -> torch.dtype | None:
    held = value.meta.get("val") if isinstance(value, fx.Node) else None
    return held.dtype if isinstance(held, torch.Tensor) else None


def _short(node: fx.Node) -> str:
    dtype = _dtype(node) or next(filter(None, map(_dtype, node.users)))
    return str(dtype).removeprefix("torch.")


def _too_large(graph: GraphModule, dtype: torch.dtype) -> dict[str, float]:
    """Return the values of the example inputs' run that have no room in a dtype, by name.

    Nothing is too large for bfloat16, which reaches as far as float32.
    """
    if dtype != torch.float16:
        return {}
    limit = torch.finfo(dtype).max / _MARGIN
    return {name: largest for name, largest in _magnitudes(graph) if not largest <= limit}


@torch.no_grad()
def _magnitudes(graph: GraphModule) -> Iterator[tuple[str, float]]:
    """Yield the largest magnitude of each floating value, on the example inputs."""
    twin = in_evaluation(graph)
    twin.own_storage()  # running it may write its state
    interpreter = Interpreter(twin)
    interpreter.args_iter = iter(
        value.clone() if isinstance(value, torch.Tensor) else value
        for value in graph.info.example_inputs
    )
    for node in twin.graph.nodes:
        value = interpreter.advance(node)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            yield node.name, float(value.abs().max())
