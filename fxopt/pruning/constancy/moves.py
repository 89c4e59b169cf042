"""Data movement: what is known goes where the call takes it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.channels.follower import arguments
from fxopt.channels.reshapes import blocks
from fxopt.pruning.constancy.known import Constancy, Found, Known, call, evaluates
from fxopt.shapes import dtype_of, is_tensor, rank_of, same_shape, shape_of

aten = torch.ops.aten


@evaluates(aten.permute.default, aten.unsqueeze.default, aten.squeeze.dims)
def _reordered(seen: Constancy, node: fx.Node) -> Found:
    """Run the call on both the numbers and what of them is known."""
    found = seen.of(arguments(node)[0])
    return None if found is None else _moved(node, found)


@evaluates(aten.slice.Tensor, aten.index_select.default, aten.channel_shuffle.default,
           aten.native_channel_shuffle.default, aten.flip.default, aten.roll.default)  # fmt: skip
def _along_dims(seen: Constancy, node: fx.Node) -> Found:
    """The same, where the numbers vary along the dimensions that the call moves."""
    found = seen.of(arguments(node)[0])
    if found is None:
        return None
    dims = _moved_dims(node)
    if all(found.values.shape[dim] == 1 for dim in dims):
        return found
    others = list(node.all_input_nodes[1:])
    operands = {one: seen.of(one) for one in others}
    if not all(map(is_tensor, others)) or None in operands.values():
        return None
    shape = [
        shape_of(arguments(node)[0])[dim] if dim in dims else size
        for dim, size in enumerate(found.values.shape)
    ]
    if not all(isinstance(size, int) for size in shape):
        return None
    whole = Known(found.values.expand(shape), found.known.expand(shape))
    return _moved(node, whole, {one: known.values for one, known in operands.items() if known})


def _moved_dims(node: fx.Node) -> tuple[int, ...]:
    args: Any = arguments(node)
    if node.target in (aten.channel_shuffle.default, aten.native_channel_shuffle.default):
        return (1,)
    if node.target is aten.roll.default:
        return tuple(args[2]) or tuple(range(rank_of(node)))
    return tuple(args[1]) if node.target is aten.flip.default else (args[1],)


def _moved(node: fx.Node, found: Known, others: dict[fx.Node, torch.Tensor] | None = None) -> Known:
    """Run a call that moves elements on the numbers, and on what of them is known."""
    x: Any = arguments(node)[0]
    rest = others or {}
    return Known(call(node, {x: found.values, **rest}), call(node, {x: found.known, **rest}))


@evaluates(aten.select.int)
def _select(seen: Constancy, node: fx.Node) -> Found:
    x, dim, index = arguments(node)
    found = seen.of(x)
    if found is None or not isinstance(index, int):
        return None
    place = 0 if found.values.shape[dim] == 1 else index
    return Known(found.values.select(dim, place), found.known.select(dim, place))


@evaluates(aten.split_with_sizes.default)
def _split(seen: Constancy, node: fx.Node) -> list[Found]:
    x, sizes, dim = arguments(node)
    found = seen.of(x)
    if found is None or found.values.shape[dim] == 1:
        return [found] * len(sizes)
    if not all(isinstance(size, int) for size in sizes):
        return [None] * len(sizes)
    parts = zip(found.values.split(sizes, dim), found.known.split(sizes, dim), strict=True)
    return [Known(*part) for part in parts]


@evaluates(aten.unbind.int)
def _unbind(seen: Constancy, node: fx.Node) -> list[Found]:
    x, dim = arguments(node)
    found, count = seen.of(x), len(node.meta["val"])
    if found is None:
        return [None] * count
    places = [0 if found.values.shape[dim] == 1 else place for place in range(count)]
    return [Known(found.values.select(dim, p), found.known.select(dim, p)) for p in places]


@evaluates(operator.getitem)
def _getitem(seen: Constancy, node: fx.Node) -> Found:
    values, index = arguments(node)
    parts = seen.parts(values)
    return parts[index] if parts and isinstance(index, int) else None


@evaluates(aten.cat.default)
def _cat(seen: Constancy, node: fx.Node) -> Found:
    """Beside one another, what is known and what is not."""
    parts: Any = [part for part in arguments(node)[0] if rank_of(part) == rank_of(node)]
    dim: Any = arguments(node)[1]
    found = [seen.of(part) for part in parts]
    sizes = [shape_of(part)[dim] for part in parts]
    if not any(found) or not all(isinstance(size, int) for size in sizes):
        return None
    return _side_by_side(node, found, sizes, dim)


@evaluates(aten.stack.default)
def _stack(seen: Constancy, node: fx.Node) -> Found:
    parts: Any = arguments(node)[0]
    dim: Any = arguments(node)[1]
    found = [seen.of(part) for part in parts]
    if not any(found):
        return None
    apart = [
        None if one is None else Known(one.values.unsqueeze(dim), one.known.unsqueeze(dim))
        for one in found
    ]
    return _side_by_side(node, apart, [1] * len(parts), dim)


def _side_by_side(
    node: fx.Node, found: Sequence[Found], sizes: Sequence[int], dim: int
) -> Known:
    shapes = [one.values.shape for one in found if one is not None]
    common = [max(sizes_of_dim) for sizes_of_dim in zip(*shapes, strict=True)]
    device = next(one.values.device for one in found if one is not None)
    values, known = [], []
    for one, size in zip(found, sizes, strict=True):
        shape = [size if d == dim else n for d, n in enumerate(common)]
        if one is None:
            values.append(torch.zeros(shape, dtype=dtype_of(node), device=device))
            known.append(torch.zeros(shape, dtype=torch.bool, device=device))
        else:
            values.append(one.values.to(dtype_of(node)).expand(shape))
            known.append(one.known.expand(shape))
    return Known(torch.cat(values, dim), torch.cat(known, dim))


@evaluates(aten.expand.default, aten.expand_as.default)
def _expand(seen: Constancy, node: fx.Node) -> Found:
    """A dimension that is repeated stays 1: all along it is alike."""
    found = seen.of(arguments(node)[0])
    if found is None:
        return None
    shape = (1,) * (rank_of(node) - found.values.dim()) + tuple(found.values.shape)
    return Known(found.values.reshape(shape), found.known.reshape(shape))


@evaluates(aten.pad.default)
def _pad(seen: Constancy, node: fx.Node) -> Found:
    """Padding with the number that stands there changes nothing; along channels it adds some."""
    x, pads, mode, value = arguments(node)
    found, fill = seen.of(x), 0.0 if value is None else value
    for pair in range(len(pads) // 2):
        pads_here = pads[2 * pair : 2 * pair + 2]
        dim = rank_of(node) - 1 - pair
        if found is None or pads_here == [0, 0]:
            continue
        if found.values.shape[dim] == 1:
            alike = found.values == fill if mode == "constant" else found.known
            found = Known(found.values, found.known & alike)
        elif mode == "constant" and all(isinstance(size, int) for size in pads_here):
            here = [0, 0] * pair + list(pads_here)
            values = torch.constant_pad_nd(found.values, here, fill)
            known = torch.constant_pad_nd(found.known.to(torch.uint8), here, 1).bool()
            found = Known(values, known)
        else:
            found = None
    return found


@evaluates(
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default,
    aten.reshape_as.default,
)  # fmt: skip
def _reshape(seen: Constancy, node: fx.Node) -> Found:
    """Within each block of dimensions that cover the same elements, as the tensor is reshaped."""
    x: Any = arguments(node)[0]
    found = seen.of(x)
    before, after = shape_of(x), shape_of(node)
    hints = _hints(before), _hints(after)
    if found is None or 0 in hints[0]:
        return None
    written, result = list(found.values.shape), [1] * len(after)
    proven = True  # what follows this block covers the same elements for all sizes
    for inner, outer in reversed(list(blocks(*hints))):
        sizes, wanted = [before[d] for d in inner], [after[d] for d in outer]
        fixed = all(isinstance(size, int) for size in (*sizes, *wanted))
        if any(written[d] != 1 for d in inner):
            if not (fixed and proven):
                return None
            for one, size in zip(inner, sizes, strict=True):
                written[one] = size
            for one, size in zip(outer, wanted, strict=True):
                result[one] = size
        proven = proven and (fixed or same_shape(sizes, wanted))
    return Known(
        found.values.expand(written).reshape(result), found.known.expand(written).reshape(result)
    )


def _hints(shape: Sequence[Any]) -> list[int]:
    """Return the sizes of the example; 0 for one that depends on data."""
    return [size if isinstance(size, int) else int(size.node.hint or 0) for size in shape]
