"""The passes that bring a graph to the fastest kernels that PyTorch has for a CPU."""

from __future__ import annotations

from fxopt.backends.eager.cpu.fold_quantized_weights import FoldQuantizedWeights
from fxopt.backends.eager.cpu.lower_batch_norms import LowerBatchNorms
from fxopt.backends.eager.cpu.lower_convolutions import LowerConvolutions
from fxopt.backends.eager.cpu.lower_linears import LowerLinears
from fxopt.backends.eager.cpu.lower_max_pools import LowerMaxPools
from fxopt.backends.eager.cpu.lower_quantized_layers import LowerQuantizedLayers
from fxopt.backends.eager.cpu.lower_transposed_convolutions import LowerTransposedConvolutions
from fxopt.backends.eager.cpu.nest_concatenations import NestConcatenations
from fxopt.backends.eager.cpu.quantize_activations import QuantizeActivations
from fxopt.backends.eager.cpu.sink_dequantizations import SinkDequantizations
from fxopt.contract import Pass
from fxopt.passes.merge_moves import MergeMoves
from fxopt.passes.sink_permutes import SinkPermutes
from fxopt.timings import Timings


def cpu_passes(timings: Timings | None) -> tuple[Pass, ...]:
    """Return the passes in order; without `timings` each chooses by rule."""
    return (
        QuantizeActivations(),
        SinkDequantizations(),
        LowerQuantizedLayers(timings),
        FoldQuantizedWeights(),  # what is left are layers of floats
        LowerLinears(timings),  # before convolutions, some of which become linear layers
        LowerConvolutions(timings),
        LowerTransposedConvolutions(timings),
        LowerMaxPools(timings),
        NestConcatenations(),
        LowerBatchNorms(timings),
        SinkPermutes(),  # those around 1×1 convolutions meet, and are views that cost a call each
        MergeMoves(),
    )
