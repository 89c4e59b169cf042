"""Least squares for the weights of a layer: near those it has, and better on rows held out.

    minimize  ‖X · W − Y‖² + λ · mean(diag(XᵀX)) · ‖W − W₀‖²
    W = (XᵀX + λ′ I)⁻¹ (XᵀY + λ′ W₀)                      λ′ = λ · mean(diag(XᵀX))

per group, in float64. With a bias, X and Y are taken relative to their means, and the bias follows
from these. Of several λ the one with the least error on the last eighth of the rows is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
HELD_OUT = 8  # one row in so many
_CHUNK = 4096


@dataclass(frozen=True)
class Solution:
    """New weights [groups, outputs, inputs] and bias [groups, outputs], with the errors held out.

    `weight` is None where none is better than what there is.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    before: float
    after: float


def solve(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Solution:
    """Fit weights and bias to rows x [rows, groups, inputs] and y [rows, groups, outputs]."""
    held = len(x) - max(len(x) // HELD_OUT, 1)
    weight = weight.double()
    old_bias = None if bias is None else bias.double()
    before = _error(x[held:], y[held:], weight, old_bias)
    best = Solution(None, None, before, before)
    x, y, x_held, y_held = x[:held], y[:held], x[held:], y[held:]
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    x_mean, y_mean = (
        (zero, zero) if bias is None else (_mean(x), _mean(y))
    )  # [groups, inputs], [groups, outputs]
    gram, mixed = _products(x, y, x_mean, y_mean)
    unit = gram.diagonal(dim1=1, dim2=2).mean().clamp(min=torch.finfo(torch.float64).tiny)
    eye = torch.eye(gram.shape[1], dtype=torch.float64, device=x.device)
    for strength in STRENGTHS:
        near = strength * unit
        factor, failed = torch.linalg.cholesky_ex(gram + near * eye)
        if failed.any():
            continue  # singular to working precision: a stronger pull to the old weights helps
        found = torch.cholesky_solve(mixed + near * weight.mT, factor).mT
        moved = None if bias is None else y_mean - (found @ x_mean[..., None])[..., 0]
        error = _error(x_held, y_held, found, moved)
        if error < best.after:
            best = Solution(found, moved, before, error)
    return best


def _mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(0, dtype=torch.float64)


def _products(
    x: torch.Tensor, y: torch.Tensor, x_mean: torch.Tensor, y_mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return XᵀX [groups, inputs, inputs] and XᵀY [groups, inputs, outputs].

    Chunks are multiplied in the precision that they have, and added up in float64.
    """
    gram: torch.Tensor | float = 0.0
    mixed: torch.Tensor | float = 0.0
    for a, b in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        left = (a - x_mean.to(a.dtype)).transpose(0, 1)
        right = (b - y_mean.to(b.dtype)).transpose(0, 1)
        gram = gram + (left.mT @ left).double()
        mixed = mixed + (left.mT @ right).double()
    assert isinstance(gram, torch.Tensor)
    assert isinstance(mixed, torch.Tensor)
    return gram, mixed


def _error(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> float:
    """Return Σ (x · weight + bias − y)² / Σ (y − mean y)²."""
    found = torch.einsum("rgi,goi->rgo", x, weight.to(x.dtype)).double()
    if bias is not None:
        found += bias
    wanted = y.double()
    spread = (wanted - wanted.mean(0)).square().sum()
    tiny = torch.finfo(torch.float64).tiny
    return float((found - wanted).square().sum() / spread.clamp(min=tiny))
