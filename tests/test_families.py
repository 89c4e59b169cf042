"""Operators by family."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fxopt.families import FAMILIES, family_of

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "family"),
    [
        (aten.conv_transpose2d.input, "convolution"),
        (aten.batch_norm.default, "normalization"),
        (aten.rms_norm.default, "normalization"),
        (aten.linalg_vector_norm.default, "reduction"),
        (aten.norm.Scalar, "reduction"),
        (aten.normal.Tensor_float, "creation"),
        (aten.leaky_relu.default, "activation"),
        (aten.max_pool2d.default, "pooling"),
        (aten.max.dim, "reduction"),
        (aten.maximum.default, "elementwise"),
        (aten.t.default, "shape"),
        (aten.to.dtype, "shape"),
        (aten.topk.default, "reduction"),
        (aten.tan.default, "elementwise"),
        (aten.mm.default, "contraction"),
        (aten.lstm.input, "recurrent"),
        (aten.scaled_dot_product_attention.default, "attention"),
        (aten.add.Tensor, "elementwise"),
        (torch.ops.higher_order.cond, "control"),
    ],
)
def test_the_family_of_an_operator(target: object, family: str) -> None:
    assert family_of(SimpleNamespace(op="call_function", target=target)) == family
    assert family in FAMILIES


def test_what_is_no_call() -> None:
    assert family_of(SimpleNamespace(op="placeholder", target="x")) == "input"
    assert family_of(SimpleNamespace(op="get_attr", target="w")) == "constant"
