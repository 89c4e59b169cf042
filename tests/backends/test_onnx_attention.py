"""Attention in ONNX: in how few nodes it is said, and what ONNX Runtime computes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import LoweringError
from fxopt.passes import FuseAttention
from tests.backends.onnx_check import Function, check, lowered, noisy, normal

attend = F.scaled_dot_product_attention


class Layers(nn.Module):
    """Several attentions behind each other, each with projections of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 72) for _ in range(count))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            q, k, v = (
                part.reshape(2, 5, 3, 8).permute(0, 2, 1, 3) for part in layer(x).chunk(3, -1)
            )
            x = x + attend(q, k, v, mask).permute(0, 2, 1, 3).reshape(2, 5, 24)
        return x


MASK = torch.tensor([[True, True, True, False, False], [False] * 5])[:, None, None]


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_layers_share_a_boolean_mask(opset: int) -> None:
    """One bias, one reduction, and two nodes in each layer: an Add, and a Where behind it all."""
    executable = check(noisy(Layers(3)), (normal(2, 5, 24), MASK), opset=opset)
    counts = executable.op_counts()
    assert counts["Where"] == 1 + 3 and counts["ReduceMax"] == 1
    assert "IsNaN" not in counts and "Mul" not in counts
    assert counts["Transpose"] == 3 * 4  # of queries, keys, values and result: none for kᵀ


def test_a_constant_mask_is_a_bias() -> None:
    triangle = torch.ones(5, 5).tril() > 0
    counts = check(lambda q: attend(q, q, q, triangle), (normal(2, 3, 5, 8),)).op_counts()
    assert "Where" not in counts and counts["Add"] == 1


def test_heads_that_share_keys_share_them_in_the_product() -> None:
    inputs = normal(2, 6, 5, 8), normal(2, 3, 5, 8)
    counts = check(lambda q, k: attend(q, k, k, enable_gqa=True), inputs).op_counts()
    assert "Expand" not in counts and sum(counts.values()) == 9


def by_hand(q: Any, k: Any, v: Any) -> Any:
    return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


def channels_first(q: Any, k: Any, v: Any) -> Any:
    return (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)).relu()


def einsum(q: Any, k: Any, v: Any) -> Any:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def transposed_keys(q: Any, k: Any, v: Any) -> Any:
    q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
    return ((q @ k) * 0.3).softmax(-1) @ v


def merged(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


def counts_of(call: Callable[..., Any], passes: list[Any]) -> dict[str, int]:
    inputs = tuple(normal(2, 3, 5, 8) for _ in range(3))
    compiled = fxopt.compile(Function(call), inputs, backend="onnx", passes=passes)
    counts: dict[str, int] = compiled.executable.op_counts()
    return counts


@pytest.mark.parametrize("call", [by_hand, channels_first, transposed_keys, merged])
def test_fused_attention_takes_no_more_nodes_than_what_was_written(call: Any) -> None:
    written, fused = counts_of(call, []), counts_of(call, [FuseAttention()])
    assert sum(fused.values()) <= sum(written.values())


def test_einsum_becomes_products() -> None:
    """Einsum is one node, but the runtime takes 5 to 80 % longer for it than for its parts."""
    assert counts_of(einsum, []) == {"Einsum": 2, "Softmax": 1}
    assert counts_of(einsum, [FuseAttention()]) == {"MatMul": 2, "Softmax": 1, "Transpose": 4}


def test_dropout_is_refused() -> None:
    with pytest.raises(LoweringError, match="attention with dropout is random"):
        lowered(lambda q: attend(q, q, q, dropout_p=0.5), (normal(2, 3, 5, 8),))
