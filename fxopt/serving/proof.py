"""Proof by example that a model computes each row by itself.

A softmax over the batch, or a batch norm in training mode, has the right shape and mixes rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from fxopt.difference import relative_error
from fxopt.errors import OptionError, ShapeError
from fxopt.serving.batching import BatchLayout
from fxopt.verify import BASE_TOLERANCE, bound_of

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel


def prove_rows_apart(model: CompiledModel, layout: BatchLayout, example: Sequence[Any]) -> None:
    """Run requests made from an example, alone and as one batch; raise OptionError if they differ.

    The requests have other values in every row: where the example's rows are all the same, a mean
    over them would go unseen.
    """
    requests = _requests(model, layout, example)
    rows = [layout.rows(flat) for flat in requests]
    joined = layout.join(requests)
    alone = [model.run_flat(flat) for flat in requests]
    together = model.run_flat(joined)
    if not any(bool(torch.isfinite(value).any()) for value in together):
        raise OptionError(
            "Whether requests can run as one batch cannot be tried: no output for the example "
            "inputs is a finite number. Give others with example_inputs=."
        )
    if any(value.dim() == 0 or value.shape[0] != sum(rows) for value in together):
        raise OptionError(
            "Requests cannot run as one batch: not every output has the batch in dimension 0. "
            "Serve the model without max_batch."
        )
    split = layout.split(together, rows)
    error = max(relative_error(list(a), list(b)) for a, b in zip(split, alone, strict=True))
    bound = _bound(model, error, joined, together)
    if error > bound:
        raise OptionError(
            "Requests cannot run as one batch: in a batch they get other results than alone, max "
            f"|Δ| / max |reference| is {error:.3g} and the bound {bound:.3g}. The model mixes the "
            "rows of a batch, as a softmax over dimension 0 or a batch norm in training mode does. "
            "Serve it without max_batch."
        )


def _requests(
    model: CompiledModel, layout: BatchLayout, example: Sequence[Any]
) -> list[list[Any]]:
    """Return requests that the model takes alone and all together: two, and a third of one row."""
    rows = layout.rows(example)
    if rows == 0:
        raise OptionError("example_inputs has no rows: nothing can be tried on an empty batch.")
    if layout.high is not None:
        rows = min(rows, layout.high // 2)
    generator = torch.Generator().manual_seed(0)
    pair = [_varied(layout, example, rows, generator) for _ in range(2)]
    trio = [*pair, _varied(layout, example, 1, generator)]
    for requests in (trio, pair):
        try:
            for flat in (*requests, layout.join(requests)):
                model.signature.check(flat)
            return requests
        except ShapeError as error:
            refused = error
    raise OptionError(
        "Whether requests can run as one batch cannot be tried on the example inputs: "
        f"{refused} Compile with a wider range, or serve the model without max_batch."
    )


def _varied(
    layout: BatchLayout, example: Sequence[Any], rows: int, generator: torch.Generator
) -> list[Any]:
    """Return a request of the example's first rows with other values, of the same kind."""
    return [
        _other_values(value[:rows], generator) if batched else value
        for batched, value in zip(layout.batched, example, strict=True)
    ]


def _other_values(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return numbers of the same sign and size, or the same integers in another order."""
    if not (value.is_floating_point() or value.is_complex()):
        order = torch.randperm(value.numel(), generator=generator).to(value.device)
        return value.reshape(-1)[order].reshape(value.shape)
    factor = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64) / 2
    factor = factor.to(value)
    return torch.where(value == 0, factor, value * factor)


def _bound(
    model: CompiledModel, error: float, flat: Sequence[Any], outputs: Sequence[torch.Tensor]
) -> float:
    if model.graph is not None:
        return bound_of(error, model.graph, flat, None)
    return max((BASE_TOLERANCE.get(value.dtype, 0.0) for value in outputs), default=0.0)
