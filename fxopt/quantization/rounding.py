"""Which integers stand for a layer's weights, chosen together: one makes up for another.

    minimize  ‖X · Ŵᵀ − Y‖² + λ′ · ‖Ŵ − W‖²      over Ŵ on the grid;  λ′ = λ · mean(diag(XᵀX))
            = ‖(Ŵ − W*) · L‖² + what Ŵ does not change;               L · Lᵀ = H = XᵀX + λ′ I
    W*ᵀ = H⁻¹ (XᵀY + λ′ Wᵀ)

X is what the layer reads in the rounded graph, Y what it returned in the graph of floats, W its
weight. The best real weight W* is known; from there each column of weights is rounded in turn, and
its error spread over the columns that are still free, as H says: Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, algorithm 1, from
Hassibi and Stork, "Optimal Brain Surgeon", 1993. Columns of large inputs come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.quantization.operator import fake_quantize

_BLOCK = 64  # columns: later ones are told of a block's errors at once


@dataclass(frozen=True)
class Grid:
    """The numbers that weights [groups, outputs, inputs] can become; scale and zero point alike."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    qmin: int
    qmax: int

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Round a weight, each number by itself."""
        rounded: torch.Tensor = fake_quantize(
            weight, self.scale, self.zero_point, self.qmin, self.qmax
        )
        return rounded

    def ordered(self, order: torch.Tensor) -> Grid:
        """Return the grid of weights with their columns in another order, [groups, 1, inputs]."""
        scale, zero_point = (_taken(each, order) for each in (self.scale, self.zero_point))
        return Grid(scale, zero_point, self.qmin, self.qmax)

    def column(self, weight: torch.Tensor, at: int) -> torch.Tensor:
        """Round one column, [groups, outputs]."""
        scale, zero_point = self.scale[..., at], self.zero_point[..., at]
        rounded: torch.Tensor = fake_quantize(weight, scale, zero_point, self.qmin, self.qmax)
        return rounded


def round_together(target: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return weights on the grid near `target`, [groups, outputs, inputs], as `hessian` weighs it.

    `hessian`, [groups, inputs, inputs], is positive definite, in the dtype of the target.
    """
    inputs = target.shape[-1]
    order = hessian.diagonal(dim1=1, dim2=2).argsort(descending=True, stable=True)[:, None]
    left, grid = _taken(target, order), grid.ordered(order)
    turned = _taken(_taken(hessian, order).mT, order)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(turned))
    spread = torch.linalg.cholesky(inverse, upper=True)
    found = torch.empty_like(left)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = torch.empty_like(left[..., start:end])
        for at in range(start, end):
            column = left[..., at]
            found[..., at] = grid.column(column, at)
            error = (column - found[..., at]) / spread[:, None, at, at]
            left[..., at + 1 : end] -= error[..., None] * spread[:, None, at, at + 1 : end]
            errors[..., at - start] = error
        left[..., end:] -= errors @ spread[:, start:end, end:]
    return found.scatter(-1, order.expand_as(found), found.clone())


def _taken(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return a matrix with its columns in another order; never the matrix itself."""
    return matrix.gather(-1, order.expand(*matrix.shape[:-1], -1))
