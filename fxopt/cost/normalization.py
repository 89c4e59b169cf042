"""Formulas of normalizations."""

from __future__ import annotations

import math

from fxopt.cost.call import Call, Size
from fxopt.cost.formula import Work, formula


@formula("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> Work:
    """x · s + t: 2 per element; 5 per channel for s = γ / √(σ² + ε) and t = β − μ · s. With batch
    statistics as `layer_norm`, a row being a channel.
    """
    channels = call.shape("input")[1]
    if call["training"] or call["running_mean"] is None:
        return _normalized(call, channels)
    return Work(0, 2 * call.elements("input") + 5 * channels)


@formula("layer_norm", "native_layer_norm")
def layer_norm(call: Call) -> Work:
    """5 per element: mean, x − μ, square, variance, · 1/σ; 4 per row: two divisions, + ε, 1/√;
    γ and β one per element each.
    """
    shape = call.shape("input")
    return _normalized(call, math.prod(shape[: len(shape) - len(call["normalized_shape"])]))


@formula("group_norm", "native_group_norm")
def group_norm(call: Call) -> Work:
    """As `layer_norm`, a row being one group of one sample."""
    return _normalized(call, call.shape("input")[0] * (call["num_groups"] or call["group"]))


@formula("instance_norm")
def instance_norm(call: Call) -> Work:
    """As `layer_norm`, a row being one channel of one sample; as `batch_norm` where it uses
    running statistics.
    """
    batch, channels, *_ = call.shape("input")
    if not call["use_input_stats"]:
        return Work(0, 2 * call.elements("input") + 5 * batch * channels)
    return _normalized(call, batch * channels)


@formula("rms_norm", "_fused_rms_norm")
def rms_norm(call: Call) -> Work:
    """3 per element: square, mean, · 1/rms; 3 per row: division, + ε, 1/√; γ one per element."""
    shape, elements = call.shape("input"), call.elements("input")
    rows = math.prod(shape[: len(shape) - len(call["normalized_shape"])])
    return Work(0, (3 + (call["weight"] is not None)) * elements + 3 * rows)


@formula("_weight_norm", "_weight_norm_interface")
def weight_norm(call: Call) -> Work:
    """3 per element of v: square, sum, · g/‖v‖; 2 per row: √, ÷."""
    return Work(0, 3 * call.elements("v") + 2 * call.elements("g"))


def _normalized(call: Call, rows: Size) -> Work:
    affine = sum(call[name] is not None for name in ("weight", "bias"))
    return Work(0, (5 + affine) * call.elements("input") + 4 * rows)
