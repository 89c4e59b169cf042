"""What nodes cost: MACs, FLOPs, parameters and bytes, from the shapes alone.

One formula per kind of operator, each a function whose docstring says what it counts:

    contraction      convolutions, linears, matrix products, attention, einsum
    elementwise      activations and arithmetic; also what only moves or creates data
    normalization    batch, layer, group, instance and RMS norm
    pooling          pooling, interpolation and sampling
    reduction        sums, softmax, norms, sorting, scattered sums
    recurrent        LSTM, GRU and plain recurrent layers
    fourier          Fourier transforms

`memory` says which bytes move and `liveness` which stay. docs/costs.md explains the figures.
"""

from fxopt.cost import (
    contraction,
    elementwise,
    fourier,
    normalization,
    pooling,
    recurrent,
    reduction,
)
from fxopt.cost.call import Call
from fxopt.cost.formula import FORMULAS, Formula, Work, formula
from fxopt.cost.liveness import live_bytes, peak
from fxopt.cost.node import Cost, cost_of, is_counted, macs, parameters_of, total

__all__ = [
    "Call",
    "Cost",
    "FORMULAS",
    "Formula",
    "Work",
    "contraction",
    "cost_of",
    "elementwise",
    "formula",
    "fourier",
    "is_counted",
    "live_bytes",
    "macs",
    "normalization",
    "parameters_of",
    "peak",
    "pooling",
    "recurrent",
    "reduction",
    "total",
]
