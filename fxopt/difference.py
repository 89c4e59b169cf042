"""How far two results lie apart."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree


def relative_error(found: Any, expected: Any) -> float:
    """Return max |found − expected| / max |expected| over all tensors of two nested values.

    Infinite where structure, dtype or shape differ, where integers or booleans differ at all, and
    where one value is NaN or infinite and the other is not.
    """
    ours, our_spec = pytree.tree_flatten(found)
    theirs, their_spec = pytree.tree_flatten(expected)
    if our_spec != their_spec:
        return float("inf")
    return max(map(_leaf_error, ours, theirs), default=0.0)


def _leaf_error(found: Any, expected: Any) -> float:
    if not isinstance(expected, torch.Tensor):
        return 0.0 if found == expected else float("inf")
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return float("inf")
    if found.dtype != expected.dtype:
        return float("inf")
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else float("inf")
    if expected.numel() == 0:
        return 0.0
    a, b = _wide(found), _wide(expected)
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return float("inf")
    if not torch.equal(_specials(a[~finite]), _specials(b[~finite])):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (a - b)[finite].abs().max().item()
    return float(difference / max(b[finite].abs().max().item(), 1e-30))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64; a complex one as pairs of real and imaginary part."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.detach().to(torch.complex128).resolve_conj())
    return tensor.detach().to(torch.float64)


def _specials(values: torch.Tensor) -> torch.Tensor:
    """Return distinct numbers for NaN, +inf and −inf."""
    return torch.nan_to_num(values, nan=0.0, posinf=1.0, neginf=-1.0)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's elements, in order, whatever its strides."""
    packed = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return packed.reshape(-1).view(torch.uint8).numpy().tobytes()
