"""Norms, pools, means and sums: constant where their input is, or where their scale is 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.channels.follower import arguments
from fxopt.pruning.constancy.known import Constancy, Found, Known, call, evaluates
from fxopt.shapes import dtype_of, rank_of, shape_of

aten = torch.ops.aten


@evaluates(aten.batch_norm.default)
def _batch_norm(seen: Constancy, node: fx.Node) -> Found:
    """(x − μ) / √(σ² + ε) · γ + β; β where γ = 0."""
    x, gamma, beta, mean, variance, training, momentum, epsilon, _ = arguments(node)
    tensors = [None if one is None else seen.of(one) for one in (gamma, beta, mean, variance)]
    given = [one for one in (gamma, beta, mean, variance) if one is not None]
    if training or mean is None or variance is None or any(seen.of(one) is None for one in given):
        return None
    entering = seen.of(x)
    zero = None if tensors[0] is None else tensors[0].is_zero
    if entering is None and (zero is None or not bool(zero.any())):
        return None
    width, rank = int(shape_of(mean)[0]), rank_of(node)
    spread = (1, width, *(1,) * (rank - 2))
    tensor = tensors[2]
    assert tensor is not None
    if entering is None:
        inside = torch.zeros(spread, dtype=dtype_of(node), device=tensor.values.device)
        known = torch.zeros(spread, dtype=torch.bool, device=inside.device)
    else:
        inside, known = _spread(entering, 1, width)
        inside = torch.where(known, inside, torch.zeros_like(inside))
    values = aten.batch_norm.default(
        inside, *[None if one is None else one.values for one in tensors],
        False, float(momentum), float(epsilon), False,
    )  # fmt: skip
    if zero is not None:
        known = known | zero.reshape(spread)
    return Known(values, known)


@evaluates(aten.group_norm.default)
def _group_norm(seen: Constancy, node: fx.Node) -> Found:
    """β where γ = 0, whatever the group's mean and variance are."""
    _, _, gamma, beta = arguments(node)[:4]
    scale = None if gamma is None else seen.of(gamma)
    if scale is None or not bool(scale.is_zero.any()):
        return None
    shift = None if beta is None else seen.of(beta)
    if beta is not None and shift is None:
        return None
    spread = (1, -1, *(1,) * (rank_of(node) - 2))
    values = torch.zeros_like(scale.values) if shift is None else shift.values
    return Known(values.reshape(spread), scale.is_zero.reshape(spread))


def _spread(found: Known, dim: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is known with all indices of a dimension written out."""
    shape = [size if d == dim else n for d, n in enumerate(found.values.shape)]
    return found.values.expand(shape), found.known.expand(shape)


# -- pools, means, sums ------------------------------------------------------------------------


@evaluates(aten.mean.dim, aten.mean.default, aten.amax.default, aten.amin.default)
def _mean(seen: Constancy, node: fx.Node) -> Found:
    """The mean, or an extreme, of equal numbers is that number; of others, they must be known."""
    x = arguments(node)[0]
    found = seen.of(x)
    if found is None:
        return None
    values = call(node, {x: found.values})
    return Known(values, _all_of(node, found.known).expand_as(values))


@evaluates(aten.sum.dim_IntList, aten.sum.default)
def _sum(seen: Constancy, node: fx.Node) -> Found:
    """A sum of zeros; others would have to be counted."""
    found = seen.of(arguments(node)[0])
    if found is None:
        return None
    zero = _all_of(node, found.is_zero)
    return Known(torch.zeros(zero.shape, dtype=dtype_of(node), device=zero.device), zero)


def _all_of(node: fx.Node, flags: torch.Tensor) -> torch.Tensor:
    """Return whether all flags hold over the dimensions that a call reduces."""
    rest = arguments(node)[1:]
    dims: Any = rest[0] if rest and isinstance(rest[0], (list, tuple)) else None
    keep = bool(len(rest) > 1 and rest[1] is True)
    if flags.dim() == 0:
        return flags
    return torch.all(flags, tuple(dims or range(flags.dim())), keepdim=keep)


_POOLS = {
    "max_pool1d.default": 1, "max_pool2d.default": 2, "max_pool3d.default": 3,
    "adaptive_avg_pool1d.default": 1, "adaptive_avg_pool2d.default": 2,
    "adaptive_avg_pool3d.default": 3, "upsample_nearest1d.vec": 1, "upsample_nearest2d.vec": 2,
    "upsample_nearest3d.vec": 3, "upsample_linear1d.vec": 1, "upsample_bilinear2d.vec": 2,
    "upsample_trilinear3d.vec": 3, "upsample_bicubic2d.vec": 2,
}  # fmt: skip
_POOL_DIMS: dict[Any, int] = {
    getattr(getattr(aten, name.partition(".")[0]), name.partition(".")[2]): dims
    for name, dims in _POOLS.items()
}


@evaluates(*_POOL_DIMS)
def _pool(seen: Constancy, node: fx.Node) -> Found:
    """A maximum, or an average whose weights sum to 1, of places that are all alike."""
    found = seen.of(arguments(node)[0])
    return found if found is not None and _is_flat(found, _POOL_DIMS[node.target]) else None


_AVERAGES: dict[Any, int] = {
    aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3,
}  # fmt: skip


@evaluates(*_AVERAGES)
def _average(seen: Constancy, node: fx.Node) -> Found:
    """At a border that is padded with zeros, and with another divisor, only 0 stays what it is."""
    x, _, _, padding, _, count_padding, *divisor = arguments(node)
    found = seen.of(x)
    if found is None or not _is_flat(found, _AVERAGES[node.target]):
        return None
    if (count_padding and any(padding)) or any(one is not None for one in divisor):
        return Known(found.values, found.is_zero)
    return found


def _is_flat(found: Known, dims: int) -> bool:
    """Whether nothing varies along the last dimensions."""
    return all(size == 1 for size in found.values.shape[-dims:])
