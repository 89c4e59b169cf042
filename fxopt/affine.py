"""Per-channel scales and shifts, and how the weights before or behind them take them in.

An affine call `z = y · s + t`, whose coefficients vary along the channels of a layer (a
convolution or a linear layer) and along nothing else, is part of that layer's weights:

    behind the layer        (w ∗ x + b) · s + t  =  (w · s_out) ∗ x + (b · s + t)
    in front of the layer   w ∗ (x · s + t) + b  =  (w · s_in) ∗ x + (b + Σ w · t)

The shift in front needs every output to see the whole kernel: no zero padding, no transposed
convolution. Both hold through calls that only move elements, take some of them, or average over
what is no channel (reshape, permute, split, dropout in evaluation, mean); where the channels went
is computed from shapes.
New weights are computed in float64 and stored in the old weights' dtype. No decision depends on the
value of a constant, so new weights can be put through the same computations; but for one: infinite
coefficients (a division by zero, a variance of zero) stay, since 0 · ∞ in the weights is NaN.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import fx

from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.shapes import dtype_of, is_tensor, rank_of, same_metadata, shape_of

aten = torch.ops.aten
Coefficients = Callable[..., torch.Tensor]  # from the values of an affine call's sources

FOLDED = "folded"  # what folding in one direction returns; else a reason, or None: no layer there
_NOT_ALONE = "its coefficients do not vary along the channels of {} alone"
_NOT_FOLLOWED = "the channels of {} cannot be followed through the calls between"
_CACHED = 2**16  # elements of a weight that stay in a core's cache while they are computed
_REACH = 32  # how many calls may stand between the two: it bounds the work at each


@dataclass(frozen=True)
class Affine:
    """A call that computes `input · scale + shift`.

    `scale` and `shift` (None: 1 and 0) compute coefficients from the values of `sources`; both
    broadcast to `shape`, and that to the call's own shape. `obstacle` says why the call is not what
    it looks like. `bare` are the arguments of a norm that must stay, without its coefficients.
    """

    node: fx.Node
    input: fx.Node
    shape: tuple[int, ...] = ()
    sources: tuple[fx.Node, ...] = ()
    scale: Coefficients | None = None
    shift: Coefficients | None = None
    obstacle: str | None = None
    bare: tuple[Any, ...] | None = None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in the precision that new weights are computed in."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def is_constant(graph: GraphModule, node: Any) -> bool:
    """Whether a node is a constant tensor that the graph itself does not change."""
    known = isinstance(node, fx.Node) and node.op == "get_attr" and is_tensor(node)
    return known and str(node.target) not in graph.info.mutated


def fold_all(
    rewriter: Rewriter, targets: Iterable[Any], read: Callable[[fx.Node], Affine | None]
) -> None:
    """Fold each call of `targets` into the layer before it, else into those behind it.

    `read` tells what a call computes, or None. The nearest to a layer goes first: in graph order
    backwards, in reverse order forwards; so one visit in each direction folds whole chains.
    """
    targets = tuple(targets)
    reasons: dict[fx.Node, str | None] = {}
    for node in rewriter.graph.find(*targets):
        affine = _read(rewriter.graph, node, read)
        reason = None if affine is None else _into_producer(rewriter, affine)
        if reason is not FOLDED:
            reasons[node] = reason
    for node in reversed(rewriter.graph.find(*targets)):
        affine = _read(rewriter.graph, node, read)
        ahead = None if affine is None else _into_consumers(rewriter, affine)
        why = dict.fromkeys(filter(None, (reasons.get(node), ahead)))
        if ahead is not FOLDED and why:
            rewriter.miss(node, "; ".join(why))


def _read(
    graph: GraphModule, node: fx.Node, read: Callable[[fx.Node], Affine | None]
) -> Affine | None:
    affine = read(node) if node.users else None
    if affine is None or not same_metadata(node, affine.input):
        return None
    if affine.obstacle is None and not _is_finite(graph, affine):
        return replace(affine, obstacle="its coefficients are not finite")
    return affine


def _is_finite(graph: GraphModule, affine: Affine) -> bool:
    values = [graph.value(source).detach() for source in affine.sources]
    computed = [compute(*values) for compute in (affine.scale, affine.shift) if compute is not None]
    return all(bool(coefficients.isfinite().all()) for coefficients in computed)


# -- layers --------------------------------------------------------------------------------------

_CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
_TRANSPOSED = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


@dataclass(frozen=True)
class _Layer:
    """A call (x, weight, bias, …) whose weights scale and shift the channels of its output."""

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    axis: int  # of the channels, in the input and in the output
    groups: int = 1
    transposed: bool = False
    padded: bool = False

    def obstacle(self, graph: GraphModule) -> str | None:
        """Why this layer cannot have other weights, or None."""
        for name, node in (("weight", self.weight), ("bias", self.bias)):
            if node is not None and not is_constant(graph, node):
                return f"the {name} of {self.node.name} is not a constant"
        return None


def _layer(node: fx.Node) -> _Layer | None:
    """Read a convolution or a linear layer."""
    target: Any = node.target
    args: Any = node.args
    if target is aten.linear.default and rank_of(args[1]) == 2:
        return _Layer(node, args[1], args[2], rank_of(node) - 1)
    if target in _CONVOLUTIONS:
        padded = isinstance(args[4], str) or any(width != 0 for width in args[4])
        axis = rank_of(node) - 1 - _CONVOLUTIONS[target]
        return _Layer(node, args[1], args[2], axis, args[6], padded=padded)
    if target in _TRANSPOSED:
        axis = rank_of(node) - 1 - _TRANSPOSED[target]
        return _Layer(node, args[1], args[2], axis, args[6], transposed=True)
    return None


def _producer(node: fx.Node) -> _Layer | None:
    """Read a layer, or a batch norm with weights: both end with a scale and a shift."""
    args: Any = node.args
    if node.target is aten.batch_norm.default and args[1] is not None and args[5] is False:
        return _Layer(node, args[1], args[2], 1)
    return _layer(node)


# -- new weights ---------------------------------------------------------------------------------


def _blocks(layer: _Layer, weight: torch.Tensor) -> torch.Tensor:
    """View a weight, widened, as (groups, outputs per group, inputs per group, kernel)."""
    rows, *rest = weight.shape
    columns = rest[0] if rest else 1
    kernel = torch.Size(rest[1:]).numel()
    blocks = wide(weight).reshape(layer.groups, rows // layer.groups, columns, kernel)
    return blocks.transpose(1, 2) if layer.transposed else blocks


def _times(layer: _Layer, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return a weight times a factor that broadcasts to its blocks, a few rows at a time.

    Rows that stay in the cache, from widening to rounding, take less than half the time.
    """
    factor = factor.transpose(1, 2) if layer.transposed else factor
    rows = weight.reshape(weight.shape[0], weight.shape[1] if weight.dim() > 1 else 1, -1)
    factors = factor.expand(-1, len(rows) // layer.groups, -1, -1).flatten(0, 1)
    product = torch.empty_like(rows, memory_format=torch.contiguous_format)
    count = max(1, _CACHED // max(1, rows.shape[1] * rows.shape[2]))
    for start in range(0, len(rows), count):
        some = slice(start, start + count)
        product[some] = wide(rows[some]) * factors[some]
    return product.reshape(weight.shape)


def _scale(affine: Affine, index: torch.Tensor) -> Coefficients | None:
    return affine.scale and _per_channel(affine, affine.scale, index, 1)


def _shift(affine: Affine, index: torch.Tensor) -> Coefficients | None:
    return affine.shift and _per_channel(affine, affine.shift, index, 0)


def _per_channel(
    affine: Affine, compute: Coefficients, index: torch.Tensor, neutral: float
) -> Coefficients:
    """Return the computation of one coefficient per channel, on its first argument's device.

    `index` holds each channel's position among the coefficients, −1 for the neutral one.
    """

    def pick(like: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        given = wide(compute(*values)).expand(affine.shape).flatten()
        return torch.cat([given, given.new_full((1,), neutral)])[index].to(like.device)

    return pick


def _new_layer(
    rewriter: Rewriter, layer: _Layer, affine: Affine, index: torch.Tensor, *, behind: bool
) -> fx.Node:
    """Insert the layer's call with weights that took in the affine call beside it."""
    old, weight, bias = layer.node, layer.weight, layer.bias
    place: dict[str, Any] = {"before": old, "origin": (old, affine.node)}
    shape = (layer.groups, -1, 1, 1) if behind else (layer.groups, 1, -1, 1)
    scale = _scale(affine, index)
    if scale is not None:

        def scaled(value: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            return _times(layer, value, scale(value, *values).reshape(shape))

        sources = (layer.weight, *affine.sources)
        weight = rewriter.constant(scaled, sources, name=_name(layer, "weight"), **place)
    compute = _bias_behind(layer, affine, index) if behind else _bias_in_front(layer, affine, index)
    if compute is not None:
        sources = (*filter(None, (layer.weight, layer.bias)), *affine.sources)
        bias = rewriter.constant(compute, sources, name=_name(layer, "bias"), **place)
    args = (old.args[0], weight, bias, *old.args[3:])
    new = rewriter.insert(old.target, *args, like=old, **place)
    if "switch" in old.meta:
        new.meta["switch"] = old.meta["switch"]
    return new


def _bias_behind(layer: _Layer, affine: Affine, index: torch.Tensor) -> Coefficients | None:
    """b' = b · s + t"""
    if affine.shift is None and layer.bias is None:
        return None
    scale, shift = _scale(affine, index), _shift(affine, index)
    biased = layer.bias is not None

    def compute(weight: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        bias, rest = (wide(values[0]), values[1:]) if biased else (None, values)
        if bias is not None and scale is not None:
            bias = bias * scale(weight, *rest)
        if shift is not None:
            bias = shift(weight, *rest) + (0 if bias is None else bias)
        assert bias is not None
        return bias.to(weight.dtype)

    return compute


def _bias_in_front(layer: _Layer, affine: Affine, index: torch.Tensor) -> Coefficients | None:
    """b' = b + Σ w · t, over the inputs and the kernel"""
    shift = _shift(affine, index)
    if shift is None:
        return None
    biased = layer.bias is not None

    def compute(weight: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        bias, rest = (wide(values[0]), values[1:]) if biased else (0, values)
        moved = _blocks(layer, weight) * shift(weight, *rest).reshape(layer.groups, 1, -1, 1)
        return (bias + moved.sum((2, 3)).flatten()).to(weight.dtype)

    return compute


def _name(layer: _Layer, leaf: str) -> str:
    """Return the name of a new constant: it stands beside the layer's old weight."""
    path, dot, _ = str(layer.weight.target).rpartition(".")
    old = layer.weight if leaf == "weight" else layer.bias
    if old is not None:
        path, dot, leaf = str(old.target).rpartition(".")
    return path + dot + re.sub(r"_folded(_\d+)?$", "", leaf) + "_folded"


# -- where the channels are ----------------------------------------------------------------------


class _Factor(NamedTuple):
    """A part of an axis: `size` steps, each `stride` channels further (0: the channel stays)."""

    size: Any  # an int, or the expression of a symbolic size
    stride: int


class _Layout(NamedTuple):
    """Which channel each position belongs to: `first`, and the steps of all its factors."""

    axes: tuple[tuple[_Factor, ...], ...]  # the factors of each axis, outermost first; none: size 1
    first: int = 0


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _axis(size: Any, stride: int) -> tuple[_Factor, ...]:
    return () if _size(size) == 1 else (_Factor(_size(size), stride),)


def _layout_of(shape: tuple[Any, ...], varying: tuple[int, ...]) -> _Layout:
    """Return the layout of a tensor whose channels are the elements of the shape `varying`."""
    axes: list[tuple[_Factor, ...]] = []
    padded = (1,) * (len(shape) - len(varying)) + varying
    stride = 1
    for size, steps in zip(reversed(shape), reversed(padded), strict=True):
        axes.append(_axis(size, 0 if steps == 1 else stride))
        stride *= steps
    return _Layout(tuple(reversed(axes)))


def _follow_reshape(layout: _Layout, node: fx.Node) -> _Layout | None:
    """Deal the factors out to axes of the new sizes, splitting them where needed."""
    factors = [factor for axis in reversed(layout.axes) for factor in reversed(axis)]
    axes = []
    for size in map(_size, shape_of(node)):
        taken: list[_Factor] = []
        while size != 1:
            if not factors:
                return None
            factor = factors.pop()
            rest = _quotient(size, factor.size)
            if rest is None:
                inner = _quotient(factor.size, size)
                if not isinstance(inner, int):
                    return None
                factors.append(_Factor(inner, factor.stride))
                factor, rest = _Factor(size, factor.stride * inner), 1
            taken.append(factor)
            size = rest
        axes.append(tuple(taken))
    return None if factors else layout._replace(axes=tuple(axes))


def _quotient(size: Any, divisor: Any) -> Any:
    """Return size / divisor where it is whole for every value of the symbols, else None."""
    if size == divisor:
        return 1
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size and size % divisor == 0 else None
    quotient = size / divisor
    if quotient.is_Integer:
        return int(quotient)
    return quotient if quotient.as_numer_denom()[1] == 1 else None


def _follow_permute(layout: _Layout, node: fx.Node) -> _Layout | None:
    order: Any = node.args[1]
    return layout._replace(axes=tuple(layout.axes[axis] for axis in order))


def _follow_dropout(layout: _Layout, node: fx.Node) -> _Layout | None:
    return layout if node.args[2] is False else None


def _holds_channels(layout: _Layout, axis: int) -> bool:
    return any(factor.stride for factor in layout.axes[axis])


def _follow_resize(layout: _Layout, node: fx.Node, axes: Iterable[int]) -> _Layout | None:
    """Follow a call that averages over or picks from some axes that hold no channels."""
    touched = set(axes)
    if any(_holds_channels(layout, axis) for axis in touched):
        return None
    shape = shape_of(node)
    if len(shape) < len(layout.axes):
        kept = [axis for d, axis in enumerate(layout.axes) if d not in touched]
    else:
        kept = [_axis(shape[d], 0) if d in touched else a for d, a in enumerate(layout.axes)]
    return layout._replace(axes=tuple(kept))


def _follow_mean(layout: _Layout, node: fx.Node) -> _Layout | None:
    dims: Any = node.args[1]
    return _follow_resize(layout, node, dims or range(len(layout.axes)))


def _follow_split(layout: _Layout, node: fx.Node) -> _Layout | None:
    return layout  # of the whole; the getitem behind it takes its part


def _follow_part(layout: _Layout, node: fx.Node) -> _Layout | None:
    """Follow a call that takes some of the channels, or of the positions."""
    part = _part(node)
    if part is None:
        return None
    if not _holds_channels(layout, part.axis):
        return _follow_resize(layout, node, (part.axis,))
    if len(layout.axes[part.axis]) != 1 or not part.start < part.stop:
        return None
    axes = list(layout.axes)
    stride = axes[part.axis][0].stride
    axes[part.axis] = _axis(part.stop - part.start, stride)
    if len(shape_of(node)) < len(axes):
        del axes[part.axis]
    return _Layout(tuple(axes), layout.first + part.start * stride)


class _Part(NamedTuple):
    """The range of one axis that a call takes from its source; empty where it is not known."""

    axis: int
    start: int = 0
    stop: int = 0


def _part(node: fx.Node) -> _Part | None:
    args: Any = node.args
    if node.target is operator.getitem:
        return _part_of_split(args[0], args[1])
    if node.target is aten.select.int:
        known = isinstance(args[2], int) and args[2] >= 0
        return _Part(args[1], args[2], args[2] + 1) if known else _Part(args[1])
    if node.target is aten.slice.Tensor:
        _, axis, start, stop, step = args
        size = shape_of(args[0])[axis]
        known = step == 1 and all(isinstance(place, int) for place in (start, stop, size))
        return _Part(axis, start, min(stop, size)) if known and start >= 0 else _Part(axis)
    return None


def _part_of_split(split: fx.Node, place: int) -> _Part:
    args: Any = split.args
    if split.target is aten.unbind.int:
        return _Part(args[1], place, place + 1)
    if not all(isinstance(size, int) for size in args[1]):
        return _Part(args[2])
    return _Part(args[2], sum(args[1][:place]), sum(args[1][: place + 1]))


def _follow_pool(layout: _Layout, node: fx.Node) -> _Layout | None:
    """Follow an average pool; one that counts zero padding would lessen a shift at the border."""
    args: Any = node.args
    pooled = len(args[1])
    if len(args) > 2 and (any(args[3]) or args[4] or args[6:] not in ((), (None,))):
        return None
    return _follow_resize(layout, node, range(len(layout.axes) - pooled, len(layout.axes)))


def _follow_pad(layout: _Layout, node: fx.Node) -> _Layout | None:
    """Follow padding by the tensor's own values (reflect, replicate, circular)."""
    args: Any = node.args
    if args[2] == "constant":
        return None
    rank = len(layout.axes)
    return _follow_resize(layout, node, range(rank - len(args[1]) // 2, rank))


_CARRIERS: dict[Any, Callable[[_Layout, fx.Node], _Layout | None]] = {
    aten.reshape.default: _follow_reshape,
    aten.reshape_as.default: _follow_reshape,
    aten.view_as.default: _follow_reshape,
    aten.flatten.using_ints: _follow_reshape,
    aten.unflatten.int: _follow_reshape,
    aten.squeeze.dims: _follow_reshape,
    aten.unsqueeze.default: _follow_reshape,
    aten.permute.default: _follow_permute,
    aten.contiguous.default: _follow_reshape,
    aten.clone.default: _follow_reshape,
    aten.alias.default: _follow_reshape,
    aten.dropout.default: _follow_dropout,
    aten.feature_dropout.default: _follow_dropout,
    aten.alpha_dropout.default: _follow_dropout,
    aten.feature_alpha_dropout.default: _follow_dropout,
    aten.mean.dim: _follow_mean,
    aten.select.int: _follow_part,
    aten.slice.Tensor: _follow_part,
    aten.unbind.int: _follow_split,
    aten.split_with_sizes.default: _follow_split,
    operator.getitem: _follow_part,
    aten.avg_pool1d.default: _follow_pool,
    aten.avg_pool2d.default: _follow_pool,
    aten.avg_pool3d.default: _follow_pool,
    aten.adaptive_avg_pool1d.default: _follow_pool,
    aten.adaptive_avg_pool2d.default: _follow_pool,
    aten.adaptive_avg_pool3d.default: _follow_pool,
    aten.pad.default: _follow_pad,
}
_SPLITS = (aten.unbind.int, aten.split_with_sizes.default)
_SHAPE_OF_SECOND = (aten.reshape_as.default, aten.view_as.default, aten.expand_as.default)


def _carries(node: fx.Node, source: Any) -> bool:
    """Whether a call passes the elements of `source`, its first argument, on without a cast."""
    if node.target not in _CARRIERS or not isinstance(source, fx.Node):
        return False
    if node.args[0] is not source:
        return False
    if node.target in _SPLITS or source.target in _SPLITS:
        return True
    return is_tensor(node) and is_tensor(source) and dtype_of(node) == dtype_of(source)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the users of a node that read its elements, not just its shape."""
    for user in node.users:
        if user.target is aten.sym_size.int:
            continue
        if user.target in _SHAPE_OF_SECOND and user.args[0] is not node:
            continue
        yield user


# -- backwards -----------------------------------------------------------------------------------


def _into_producer(rewriter: Rewriter, affine: Affine) -> str | None:
    """Fold an affine call into the layer before it."""
    path = _path_back(affine.input)
    layer = _producer(path[-1])
    if layer is None or affine.bare is not None or rewriter.out_of_fuel:
        return None
    obstacle = affine.obstacle or layer.obstacle(rewriter.graph)
    if obstacle is not None:
        return obstacle
    layout = _channels_at(layer, (affine.node, *path))
    if not isinstance(layout, _Layout):
        return layout
    index = _coefficient_of_channel(layout, affine.shape, _channels(layer))
    if index is None:
        return _NOT_ALONE.format(layer.node.name)
    new = _new_layer(rewriter, layer, affine, index, behind=True)
    result = affine.input if len(path) > 1 else new
    rewriter.replace({affine.node: result, layer.node: new})
    return FOLDED


def _path_back(node: fx.Node) -> list[fx.Node]:
    """Return the calls that pass elements on, from `node` back to the call that made them."""
    path = [node]
    while len(path) <= _REACH and path[-1].args and _carries(path[-1], path[-1].args[0]):
        source = path[-1].args[0]
        assert isinstance(source, fx.Node)
        path.append(source)
    return path


def _channels(layer: _Layer) -> int:
    return int(shape_of(layer.node)[layer.axis])


def _channels_at(layer: _Layer, path: tuple[fx.Node, ...]) -> _Layout | str:
    """Return where the layer's channels are at the end of a path (its last call first), or why not.

    Nothing but the path may read them on the way; others may read other channels.
    """
    shape = shape_of(layer.node)
    varying = (_channels(layer),) + (1,) * (len(shape) - 1 - layer.axis)
    layout: _Layout | None = _layout_of(shape, varying)
    for source, node in zip(path[:0:-1], path[-2::-1], strict=True):
        if layout is None:
            break
        for other in _readers(source):
            if other is not node and not _reads_other_channels(layout, node, other):
                return f"{source.name} has another user, {other.name}"
        if node is not path[0]:
            layout = _CARRIERS[node.target](layout, node)
    return _NOT_FOLLOWED.format(layer.node.name) if layout is None else layout


def _reads_other_channels(layout: _Layout, node: fx.Node, other: fx.Node) -> bool:
    """Whether two readers of one tensor take different channels of it."""
    a, b = _part(node), _part(other)
    if a is None or b is None or a.axis != b.axis or len(layout.axes[a.axis]) != 1:
        return False
    known = a.start < a.stop and b.start < b.stop
    apart = a.stop <= b.start or b.stop <= a.start
    return known and apart and _holds_channels(layout, a.axis)


def _coefficient_of_channel(
    layout: _Layout, shape: tuple[int, ...], channels: int
) -> torch.Tensor | None:
    """Return for each channel the position of its coefficient among those of `shape`, or −1."""
    channel, coefficient = torch.tensor([layout.first]), torch.tensor([0])
    stride = 1
    padded = (1,) * (len(layout.axes) - len(shape)) + shape
    for factors, size in zip(reversed(layout.axes), reversed(padded), strict=True):
        for factor in reversed(factors):
            if factor.stride:
                steps = torch.arange(factor.size)[:, None]
                channel = (channel + steps * factor.stride).flatten()
                coefficient = (coefficient + steps * (stride if size != 1 else 0)).flatten()
            elif size != 1:
                return None
            stride *= factor.size if size != 1 else 1
    index = torch.full((channels,), -1)
    index[channel] = coefficient
    return index


# -- forwards ------------------------------------------------------------------------------------


def _into_consumers(rewriter: Rewriter, affine: Affine) -> str | None:
    """Fold an affine call into the layers behind it, all of those that read it."""
    ends = list(_ends(affine))
    layers = [(_layer(user), via, layout) for user, via, layout in ends]
    near = [layer for layer, _, _ in layers if layer is not None]
    if not near or rewriter.out_of_fuel:
        return None
    if affine.obstacle is not None:
        return affine.obstacle
    taken: list[tuple[_Layer, torch.Tensor]] = []
    for (user, _, _), (layer, via, layout) in zip(ends, layers, strict=True):
        if layer is None or user.args[0] is not via:
            return f"{user.name} uses it beside {near[0].node.name}"
        found = _coefficients_of(rewriter.graph, affine, layer, layout)
        if isinstance(found, str):
            return found
        taken.append((layer, found))
    kept = affine.input
    if affine.bare is not None:
        kept = rewriter.insert(affine.node.target, *affine.bare, before=affine.node)
    new = {
        layer.node: _new_layer(rewriter, layer, affine, index, behind=False)
        for layer, index in taken
    }
    for node in new.values():  # the new layers are built already: no replacement reaches them
        node.replace_input_with(affine.node, kept)
    rewriter.replace({affine.node: kept, **new})
    return FOLDED


def _ends(affine: Affine) -> Iterator[tuple[fx.Node, fx.Node, _Layout | None]]:
    """Yield (reader, what it reads, layout of that), past calls that pass the elements on."""
    start: _Layout | None = _layout_of(shape_of(affine.node), affine.shape)
    pending = [(affine.node, start)]
    for count, (node, layout) in enumerate(pending):
        for user in _readers(node):
            if count < _REACH and _carries(user, node):
                follow = _CARRIERS[user.target]
                pending.append((user, None if layout is None else follow(layout, user)))
            else:
                yield user, node, layout


def _coefficients_of(
    graph: GraphModule, affine: Affine, layer: _Layer, layout: _Layout | None
) -> torch.Tensor | str:
    """Return for each input channel of the layer the position of its coefficient, or why not."""
    obstacle = layer.obstacle(graph)
    if obstacle is not None:
        return obstacle
    if affine.shift is not None and layer.padded:
        return f"{layer.node.name} pads with zeros, which have no shift"
    if affine.shift is not None and layer.transposed:
        return f"{layer.node.name} is transposed: at its border a shift is not a bias"
    if layout is None:
        return _NOT_FOLLOWED.format(layer.node.name)
    index = _coefficient_of_input(layout, layer.axis)
    return _NOT_ALONE.format(layer.node.name) if index is None else index


def _coefficient_of_input(layout: _Layout, channels: int) -> torch.Tensor | None:
    """Return for each position along the axis `channels` that of its coefficient."""
    others = (axis for axis in range(len(layout.axes)) if axis != channels)
    if any(_holds_channels(layout, axis) for axis in others):
        return None
    index = torch.tensor([layout.first])
    for size, stride in layout.axes[channels]:
        if not isinstance(size, int):
            return None
        index = (index[:, None] + torch.arange(size) * stride).flatten()
    return index
