"""Least squares for the weights of a layer: near those it has, and better on rows held out.

    minimize  ‖X · Wᵀ − Y‖² + λ′ · ‖W − W₀‖²                     λ′ = λ · mean(diag(XᵀX))
    Wᵀ = (XᵀX + λ′ I)⁻¹ (XᵀY + λ′ W₀ᵀ)

X are rows [rows, inputs] and Y [rows, outputs], W the weights [outputs, inputs], for each group of
the layer by itself. With a bias, X and Y are taken relative to their means, and the bias follows
from these. Each output is a problem of its own: of several λ, and of the weights that it has, it
takes what is best on rows that nothing is fit to.

Rows are multiplied in the precision that they have, and added up and solved for in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
_CHUNK = 4096


@dataclass(frozen=True)
class Rows:
    """What a layer reads, x [rows, groups, inputs], and should return, y [rows, groups, outputs].
    """

    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Linear:
    """Weights [groups, outputs, inputs] and bias [groups, outputs], or none."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> Linear:
        """Return the weights as they are when stored in `dtype`."""
        return Linear(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def errors(self, rows: Rows) -> torch.Tensor:
        """Return Σ (x · weight + bias − y)² of each output, [groups, outputs]."""
        found = torch.einsum("rgi,goi->rgo", rows.x, self.weight.to(rows.x.dtype)).double()
        if self.bias is not None:
            found += self.bias.double()
        return (found - rows.y.double()).square().sum(0)

    def where(self, better: torch.Tensor, other: Linear) -> Linear:
        """Return these where `better` [groups, outputs] says so, and `other` elsewhere."""
        weight = torch.where(better[..., None], self.weight, other.weight)
        if self.bias is None or other.bias is None:
            return Linear(weight, None)
        return Linear(weight, torch.where(better, self.bias, other.bias))


def fit(rows: Rows, held_out: Rows, old: Linear) -> Linear:
    """Return weights that fit `rows`, in the dtype of the old ones, which stay where not beaten."""
    best, least = old, old.errors(held_out)
    for found in _solutions(rows, old.to(torch.float64)):
        stored = found.to(old.weight.dtype)
        errors = stored.errors(held_out)
        better = errors < least
        best, least = stored.where(better, best), torch.where(better, errors, least)
    return best


def _solutions(rows: Rows, old: Linear) -> list[Linear]:
    """Return the weights for each λ."""
    x_mean = y_mean = torch.zeros((), dtype=torch.float64, device=rows.x.device)
    if old.bias is not None:
        x_mean, y_mean = (part.mean(0, dtype=torch.float64) for part in (rows.x, rows.y))
    gram, mixed = products(rows, x_mean, y_mean)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    unit = diagonal.mean(1, keepdim=True)  # of each group
    there, found = torch.zeros_like(unit), []
    for strength in STRENGTHS:
        near = strength * unit
        diagonal += near - there  # in place: of `gram`
        there = near
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.any():
            continue  # singular to working precision: a stronger pull to the old weights helps
        weight = torch.cholesky_solve(mixed + near[..., None] * old.weight.mT, factor).mT
        bias = None if old.bias is None else y_mean - (weight @ x_mean[..., None])[..., 0]
        found.append(Linear(weight, bias))
    return found


def products(
    rows: Rows, x_mean: torch.Tensor, y_mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return XᵀX [groups, inputs, inputs] and XᵀY [groups, inputs, outputs]."""
    _, groups, inputs = rows.x.shape
    outputs = rows.y.shape[2]
    gram = x_mean.new_zeros(groups, inputs, inputs)
    mixed = x_mean.new_zeros(groups, inputs, outputs)
    for x, y in zip(rows.x.split(_CHUNK), rows.y.split(_CHUNK), strict=True):
        left = (x - x_mean.to(x.dtype)).transpose(0, 1)
        right = (y - y_mean.to(y.dtype)).transpose(0, 1)
        gram += left.mT @ left
        mixed += left.mT @ right
    return gram, mixed
