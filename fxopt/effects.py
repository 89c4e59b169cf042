"""Which calls may be removed, merged or computed early, and which may not."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fxopt.normalize import argument_index

aten = torch.ops.aten

# Namespaces whose schemas tell the truth about what an operator changes. A custom operator's
# schema is a promise of its author's, and a print or a counter is not in it.
_TRUSTED = {
    "aten", "prims", "torchvision", "quantized", "quantized_decomposed", "mkldnn", "onednn",
    "fxopt",
}  # fmt: skip

# Operators with a flag that makes them random or lets them update statistics.
_TRAINING_FLAG = {
    aten.batch_norm.default: 5,
    aten.instance_norm.default: 5,
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.rrelu.default: 3,
}


def training_flag(target: Any) -> int | None:
    """Return the position of an operator's `training` argument, or None where it has none."""
    position = _TRAINING_FLAG.get(target)
    if position is None and isinstance(target, OpOverload):
        if target.overloadpacket in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu):
            return argument_index(target, "train")
    return position


@functools.lru_cache(maxsize=None)
def _always(target: OpOverload) -> str | None:
    """Why a call of `target` always has an effect, or None."""
    if target.namespace not in _TRUSTED:
        return "a custom operator may do more than its schema says"
    if target._schema.is_mutable:
        return "it writes to its argument"
    if target in (aten._assert_scalar.default, aten._assert_async.msg, aten._assert_async.default):
        return "it is an assertion"
    if target in (aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default):
        return "it is an assertion"
    if torch.Tag.nondeterministic_seeded in target.tags and training_flag(target) is None:
        if target is not aten.scaled_dot_product_attention.default:
            return "it is random"
    return None


def effect(node: fx.Node) -> str | None:
    """Why this call must stay even when nobody uses its result, in words; None when it is pure."""
    if node.op == "call_function":
        target = node.target
        if isinstance(target, OpOverload):
            position = training_flag(target)
            if position is not None and node.args[position] is True:
                if not (position == 5 and node.args[3] is None):
                    return "it is in training mode"
            if target is aten.scaled_dot_product_attention.default and node.args[4] != 0.0:
                return "it is random"
            return _always(target)
        if isinstance(target, HigherOrderOperator):
            return "it holds sub-graphs"
        return None
    return None if node.op == "get_attr" else "it is an input or the output"


def is_pure(node: fx.Node) -> bool:
    """Whether a node does nothing but compute its value from its arguments, always the same."""
    return effect(node) is None
