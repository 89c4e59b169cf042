"""Quantization: numbers rounded to a few integers, where an engine has kernels that read these.

    policy        what the integer kernels of an engine read and write, as a table
    placement     from that: which values of a graph are rounded, who reads them, who shares a scale
    calibration   runs the graph on data, and counts what each value holds in a `histogram`
    ranges        from a histogram to a range: minmax, percentile, mse, entropy, …
    scheme        from a range to a scale and a zero point
    weights       the same for weights, which are known
    operator      `fake_quantize`, which rounds within a graph of floats, and trains
    record        what was done, for the report

The pass that does it is `fxopt.passes.InsertFakeQuant`; backends lower what it leaves.
"""

from fxopt.quantization.errors import CalibrationError
from fxopt.quantization.policy import POLICIES, Policy
from fxopt.quantization.record import QuantizationRecord
from fxopt.quantization.scheme import Scheme

__all__ = ["POLICIES", "CalibrationError", "Policy", "QuantizationRecord", "Scheme"]
