"""Convolutions and linear layers as linear maps: scaled, summed, chained and stacked.

    sum      (w ∗ x + b) + (v ∗ x + c)  =  (w + v) ∗ x + (b + c)
    chain    v ∗ (w ∗ x + b) + c        =  (v ∗ w) ∗ x + (Σ v · b + c)
    scale    (w ∗ x + b) · s + t        =  (w · s) ∗ x + (b · s + t)
    stack    w ∗ x + b,  v ∗ x + c      =  the channels of [w, v] ∗ x + [b, c]

A `Kernel` is one such map: where its taps lie, and how its weight and bias follow from constants.
Nothing is computed until `insert` registers the new weights; that is done in float64 and stored in
the layers' dtype, and the computation is kept for new weights.
A tap is a place of the kernel: along each axis, tap j of output o reads the input at
`o · stride − padding + j · dilation`, which is zero outside of the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from fxopt.affine import is_constant, wide
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, rank_of, same_metadata, shape_of

aten = torch.ops.aten
Compute = Callable[..., torch.Tensor]  # from the values of sources, in float64

_CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_CALLS = (aten.linear, aten.conv1d, aten.conv2d, aten.conv3d)
LAYERS = (aten.linear.default, *_CONVOLUTIONS)


class Axis(NamedTuple):
    """How a kernel moves along one axis of the input."""

    taps: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1


@dataclass(frozen=True)
class Kernel:
    """The map `x ↦ weight ∗ x + bias`; a linear layer is one without axes."""

    x: fx.Node
    inputs: int
    outputs: int
    groups: int
    axes: tuple[Axis, ...]
    sources: tuple[fx.Node, ...]
    weight: Compute  # of the values of the sources: (outputs, inputs / groups, *taps)
    bias: Compute | None
    path: str = ""  # of the layer whose name the new weights get
    work: int = 0  # multiplications per position of the output, as the graph does them now

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.outputs, self.inputs // self.groups, *(axis.taps for axis in self.axes)

    @property
    def channel_axis(self) -> int:
        """The dimension of x, and of the result, that holds the channels."""
        return rank_of(self.x) - 1 - len(self.axes)


def kernel_of(graph: GraphModule, node: fx.Node) -> Kernel | str | None:
    """Read a layer; return why its weights must stay, or None for another call."""
    if node.target not in LAYERS:
        return None
    args: Any = node.args
    x, weight, bias = args[:3]
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and not is_constant(graph, given):
            return f"the {name} of {node.name} is not a constant"
    if not dtype_of(node).is_floating_point or rank_of(weight) < 2:
        return f"{node.name} is not a layer of floating-point channels"
    outputs, inputs, *taps = map(int, shape_of(weight))
    groups = args[6] if node.target in _CONVOLUTIONS else 1
    axes = _axes(taps, *args[3:6]) if node.target in _CONVOLUTIONS else ()
    if axes is None:
        return f"{node.name} pads one side more than the other"
    return Kernel(
        x,
        inputs * groups,
        outputs,
        groups,
        axes,
        tuple(source for source in (weight, bias) if source is not None),
        lambda *values: wide(values[0]),
        None if bias is None else lambda *values: wide(values[1]),
        str(weight.target).rpartition(".")[0],
        outputs * inputs * math.prod(taps),
    )


def _axes(
    taps: list[int], strides: list[int], padding: list[int] | str, dilations: list[int]
) -> tuple[Axis, ...] | None:
    if isinstance(padding, str):
        same = padding == "same"
        reach = [d * (k - 1) * same for k, d in zip(taps, dilations, strict=True)]
        if any(size % 2 for size in reach):
            return None
        padding = [size // 2 for size in reach]
    return tuple(
        Axis(k, s, p, d if k > 1 else 1)
        for k, s, p, d in zip(taps, strides, padding, dilations, strict=True)
    )


def identity(x: fx.Node, like: Kernel) -> Kernel:
    """Return x ↦ x as a kernel of one tap, in as many groups as `like` has."""
    channels, groups = like.inputs, like.groups

    def weight() -> torch.Tensor:
        block = torch.eye(channels // groups, dtype=torch.float64).repeat(groups, 1)
        return block.reshape(channels, channels // groups, *[1] * len(like.axes))

    axes = (Axis(),) * len(like.axes)
    return Kernel(x, channels, channels, groups, axes, (), weight, None)


# -- scale ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """A call that computes `x · scale + shift` with constants; `shape` is that of both."""

    x: fx.Node
    shape: tuple[int, ...]
    sources: tuple[fx.Node, ...]
    scale: Compute
    shift: Compute | None = None


def scaling_of(graph: GraphModule, node: fx.Node) -> Scaling | str | None:
    """Read a product with a constant or a batch norm in inference; else return why not, or None."""
    if node.target is aten.batch_norm.default:
        return _batch_norm(graph, node)
    if node.target is not aten.mul.Tensor or not dtype_of(node).is_floating_point:
        return None
    args: Any = node.args
    for x, factor in (args, args[::-1]):
        if not is_tensor(x) or not same_metadata(x, node):
            continue
        if isinstance(factor, (int, float)) and math.isfinite(factor):
            return Scaling(x, (), (), partial(torch.tensor, factor, dtype=torch.float64))
        if is_constant(graph, factor):
            return _finite(graph, Scaling(x, shape_of(factor), (factor,), wide))
    return None


def _batch_norm(graph: GraphModule, norm: fx.Node) -> Scaling | str:
    """s = γ / √(σ² + ε),  t = β − μ · s"""
    args: Any = norm.args
    x, gamma, beta, mean, variance, batch_statistics, _, epsilon, _ = args
    if batch_statistics is not False or mean is None or variance is None:
        return f"{norm.name} uses batch statistics"
    sources = tuple(node for node in (mean, variance, gamma, beta) if node is not None)
    if not all(is_constant(graph, source) for source in sources):
        return f"a weight of {norm.name} is not a constant"
    shape = (*shape_of(mean), *(1,) * (rank_of(norm) - 2))

    def scale(mean: torch.Tensor, variance: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        precision = torch.rsqrt(wide(variance) + epsilon)
        return (precision * wide(weights[0]) if gamma is not None else precision).reshape(shape)

    def shift(mean: torch.Tensor, variance: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        moved = -wide(mean).reshape(shape) * scale(mean, variance, *weights)
        return moved + wide(weights[-1]).reshape(shape) if beta is not None else moved

    return _finite(graph, Scaling(x, shape, sources, scale, shift))


def _finite(graph: GraphModule, scaling: Scaling) -> Scaling | str:
    """Hold infinite coefficients back: 0 · ∞ in a weight is NaN."""
    values = [graph.value(source).detach() for source in scaling.sources]
    for compute in filter(None, (scaling.scale, scaling.shift)):
        if not bool(compute(*values).isfinite().all()):
            return "its coefficients are not finite"
    return scaling


def scaled(kernel: Kernel, scaling: Scaling) -> Kernel | None:
    """Return (w ∗ x + b) · s + t as a kernel; None where s and t vary along other axes."""
    axis, rank = kernel.channel_axis, rank_of(kernel.x)
    shape = (1,) * (rank - len(scaling.shape)) + scaling.shape
    if len(shape) > rank or any(size != 1 for d, size in enumerate(shape) if d != axis):
        return None
    count = len(kernel.sources)

    def per_channel(compute: Compute, values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return wide(compute(*values[count:])).reshape(-1).expand(kernel.outputs)

    def weight(*values: torch.Tensor) -> torch.Tensor:
        factor = per_channel(scaling.scale, values)
        given = kernel.weight(*values[:count])
        return given.to(factor.device) * factor.reshape(-1, *[1] * (given.dim() - 1))

    def bias(*values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(kernel.outputs, dtype=torch.float64)
        if kernel.bias is not None:
            given = kernel.bias(*values[:count])
            total = given * per_channel(scaling.scale, values).to(given.device)
        if scaling.shift is None:
            return total
        shift = per_channel(scaling.shift, values)
        return total.to(shift.device) + shift

    biased = kernel.bias is not None or scaling.shift is not None
    sources = (*kernel.sources, *scaling.sources)
    return replace(kernel, sources=sources, weight=weight, bias=bias if biased else None)


# -- sum -----------------------------------------------------------------------------------------

SUMS = (aten.add.Tensor, aten.sub.Tensor)
Summand = tuple[float, fx.Node]  # factor and term


def _operands(node: fx.Node) -> tuple[Summand, Summand] | None:
    """Read a sum of two tensors of its own shape and dtype."""
    if node.target not in SUMS or not dtype_of(node).is_floating_point:
        return None
    args: Any = node.args
    (a, b), alpha = args, node.kwargs["alpha"]
    if a is b or not (same_metadata(a, node) and same_metadata(b, node)):
        return None
    if not isinstance(alpha, (int, float)):
        return None
    return (1, a), (alpha if node.target is aten.add.Tensor else -alpha, b)


def is_summand(node: fx.Node) -> bool:
    """Whether a value is only used as a term of one sum."""
    return len(node.users) == 1 and _operands(next(iter(node.users))) is not None


def summands(root: fx.Node) -> list[Summand]:
    """Return the terms of a sum of sums, with their factors; of another call, itself."""
    terms: list[Summand] = []
    pending: list[Summand] = [(1, root)]
    while pending:
        factor, node = pending.pop()
        operands = _operands(node) if node is root or len(node.users) == 1 else None
        if operands is None:
            terms.append((factor, node))
        else:
            pending += [(factor * times, operand) for times, operand in reversed(operands)]
    return terms


def insert_sum(rewriter: Rewriter, terms: list[Summand], root: fx.Node) -> fx.Node:
    """Insert the sum that replaces `root`; the factor of the first term is one."""
    total = terms[0][1]
    for factor, node in terms[1:]:
        call = aten.sub.Tensor if factor < 0 else aten.add.Tensor
        total = rewriter.insert(call, total, node, alpha=abs(factor), before=root, like=root)
    return total


def summed(host: Kernel, guests: tuple[Kernel, ...]) -> Kernel:
    """Return the sum of kernels as one with the host's taps; all of them `fit` into it."""
    terms = (host, *guests)
    places = [_place(guest, host) for guest in guests]

    def weight(*values: torch.Tensor) -> torch.Tensor:
        first, *others = _computed(terms, values, lambda term: term.weight)
        total = first.clone()
        for part, place in zip(others, places, strict=True):
            assert place is not None
            total[(slice(None), slice(None), *place)] += part.to(total.device)
        return total

    def bias(*values: torch.Tensor) -> torch.Tensor:
        parts = _computed(terms, values, lambda term: term.bias)
        return torch.stack([part.to(values[0].device) for part in parts]).sum(0)

    return replace(
        host,
        sources=tuple(source for term in terms for source in term.sources),
        weight=weight,
        bias=bias if any(term.bias is not None for term in terms) else None,
        work=sum(term.work for term in terms),
    )


def _computed(
    terms: tuple[Kernel, ...],
    values: tuple[torch.Tensor, ...],
    which: Callable[[Kernel], Compute | None],
) -> Iterator[torch.Tensor]:
    """Yield what each term computes from its own share of the values."""
    start = 0
    for term in terms:
        stop = start + len(term.sources)
        compute = which(term)
        if compute is not None:
            yield compute(*values[start:stop])
        start = stop


def fits(guest: Kernel, host: Kernel) -> bool:
    """Whether every tap of `guest` is one of `host`'s, and all else is alike."""
    alike = (guest.x, guest.outputs, guest.groups) == (host.x, host.outputs, host.groups)
    return alike and len(guest.axes) == len(host.axes) and _place(guest, host) is not None


def _place(guest: Kernel, host: Kernel) -> tuple[slice, ...] | None:
    """Return where a kernel's taps lie among those of another one, along each axis."""
    place = []
    for small, large in zip(guest.axes, host.axes, strict=True):
        first, between = divmod(large.padding - small.padding, large.dilation)
        step, uneven = divmod(small.dilation, large.dilation) if small.taps > 1 else (1, 0)
        last = first + step * (small.taps - 1)
        if small.stride != large.stride or between or uneven or first < 0 or last >= large.taps:
            return None
        place.append(slice(first, last + 1, step))
    return tuple(place)


# -- chain ---------------------------------------------------------------------------------------


def chained(outer: Kernel, inner: Kernel) -> Kernel | str:
    """Return `outer` of `inner` as one kernel, or why there is none."""
    if len(outer.axes) != len(inner.axes) or rank_of(outer.x) != rank_of(inner.x):
        return "their channels lie along different axes"
    few, many = sorted((outer.groups, inner.groups))
    if many % few:
        return "the groups of one are not made of those of the other"
    axes = []
    for a, b in zip(outer.axes, inner.axes, strict=True):
        if a.taps > 1 and b.taps > 1:
            return "both have several taps along an axis, and their product has more than both"
        if a.padding and (b.taps > 1 or b.stride > 1 or b.padding):
            return "the second pads what the first computes, not its input"
        if a.padding and inner.bias is not None:
            return "the second pads with zeros, and the first has a bias"
        dilation = a.dilation * b.stride if a.taps > 1 else b.dilation
        padding = a.padding + b.padding  # one of the two is zero
        axes.append(Axis(max(a.taps, b.taps), a.stride * b.stride, padding, dilation))
    count = len(outer.sources)

    def weight(*values: torch.Tensor) -> torch.Tensor:
        left = _dense(outer.weight(*values[:count]), outer.groups, few)
        right = _dense(inner.weight(*values[count:]), inner.groups, few).to(left.device)
        size = [axis.taps for axis in axes]
        left = left.expand(*left.shape[:3], *size)
        right = right.expand(*right.shape[:3], *size)
        return torch.einsum("gom...,gmi...->goi...", left, right).flatten(0, 1)

    def bias(*values: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        if inner.bias is not None:
            left = _dense(outer.weight(*values[:count]), outer.groups, few)
            over_taps = left.reshape(*left.shape[:3], -1).sum(3)
            given = inner.bias(*values[count:]).to(left.device).reshape(few, -1)
            total = torch.einsum("gom,gm->go", over_taps, given).flatten()
        if outer.bias is not None:
            own = outer.bias(*values[:count])
            total = total.to(own.device) + own
        return total

    biased = outer.bias is not None or inner.bias is not None
    return Kernel(
        inner.x,
        inner.inputs,
        outer.outputs,
        few,
        tuple(axes),
        (*outer.sources, *inner.sources),
        weight,
        bias if biased else None,
        outer.path,
        outer.work + inner.work,
    )


def _dense(weight: torch.Tensor, groups: int, fewer: int) -> torch.Tensor:
    """Return a weight as (fewer groups, outputs, inputs, *taps), with zeros between its groups."""
    outputs, inputs, *taps = weight.shape
    share = groups // fewer
    blocks = weight.reshape(fewer, share, outputs // groups, inputs, *taps)
    wider = weight.new_zeros(fewer, share, outputs // groups, share, inputs, *taps)
    for place in range(share):
        wider[:, place, :, place] = blocks[:, place]
    return wider.reshape(fewer, outputs // fewer, share * inputs, *taps)


# -- stack ---------------------------------------------------------------------------------------


def stacked(kernels: tuple[Kernel, ...]) -> Kernel:
    """Return the kernel that computes the channels of all, one after the other; one group each.

    A missing bias becomes −0, since y + (−0) is y whatever the sign of a zero.
    """
    first = kernels[0]

    def weight(*values: torch.Tensor) -> torch.Tensor:
        parts = _computed(kernels, values, lambda term: term.weight)
        return torch.cat([part.to(values[0].device) for part in parts])

    def bias(*values: torch.Tensor) -> torch.Tensor:
        filled = tuple(replace(kernel, bias=kernel.bias or _no_bias(kernel)) for kernel in kernels)
        parts = _computed(filled, values, lambda term: term.bias)
        return torch.cat([part.to(values[0].device) for part in parts])

    return replace(
        first,
        outputs=sum(kernel.outputs for kernel in kernels),
        sources=tuple(source for kernel in kernels for source in kernel.sources),
        weight=weight,
        bias=bias if any(kernel.bias is not None for kernel in kernels) else None,
        work=sum(kernel.work for kernel in kernels),
    )


def _no_bias(kernel: Kernel) -> Compute:
    return lambda *values: torch.full((kernel.outputs,), -0.0, dtype=torch.float64)


# -- into the graph ------------------------------------------------------------------------------


def insert(
    rewriter: Rewriter,
    kernel: Kernel,
    *,
    word: str,
    before: fx.Node,
    origin: tuple[fx.Node, ...],
    like: fx.Node | None = None,
) -> fx.Node:
    """Insert the call of a kernel, with new constants whose names end in `word`."""
    dtype = dtype_of(kernel.x)
    dot = "." if kernel.path else ""

    def constant(compute: Compute, leaf: str) -> fx.Node:
        return rewriter.constant(
            lambda *values: compute(*values).to(values[0].device, dtype),
            kernel.sources,
            name=f"{kernel.path}{dot}{leaf}_{word}",
            before=before,
            origin=origin,
        )

    weight = constant(kernel.weight, "weight")
    bias = None if kernel.bias is None else constant(kernel.bias, "bias")
    args: tuple[Any, ...] = (kernel.x, weight, bias)
    if kernel.axes:
        _, strides, paddings, dilations = map(list, zip(*kernel.axes, strict=True))
        args = (*args, strides, paddings, dilations, kernel.groups)
    target = _CALLS[len(kernel.axes)].default
    return rewriter.insert(target, *args, before=before, origin=origin, like=like)
