"""What fuse-attention knows about PyTorch's kernels, and what once went wrong around it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes import ExpandAttention, FuseAttention
from fxopt.testing import check_pass, op_counts

attend = F.scaled_dot_product_attention


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_attention_gives_zero_where_softmax_gives_nan() -> None:
    """If this changes, masks with −∞ need not hold the fusion back any more."""
    q = normal(1, 2, 5, 8)
    mask = torch.zeros(5, 5).index_fill(0, torch.tensor([2]), -math.inf)
    for x in (q, q[0]):  # the fused kernel, and the plain one
        assert bool((attend(x, x, x, mask)[..., 2, :] == 0).all())
        assert bool((attend(x, x, x, mask == 0)[..., 2, :] == 0).all())
    assert bool((q @ q.mT + mask).softmax(-1)[..., 2, :].isnan().all())


def test_a_row_that_is_hidden_by_a_finite_number_is_uniform() -> None:
    q = normal(1, 2, 5, 8)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min)
    for x in (q, q[0]):
        expected = x.mean(-2, keepdim=True).expand_as(x)
        torch.testing.assert_close(attend(x, x, x, mask), expected)


class Shared(nn.Module):
    """Two attentions with the same queries: scaled twice, they took a node more in ONNX."""

    def forward(self, q: Any, k: Any, v: Any) -> Any:
        q = q * 0.3
        first = (q @ k.mT).softmax(-1) @ v
        return (q @ first.mT).softmax(-1) @ v


def test_queries_of_two_attentions_are_scaled_once() -> None:
    inputs = tuple(normal(2, 3, 5, 8) for _ in range(3))
    graph = fxopt.optimize(Shared(), inputs, passes=[FuseAttention(), ExpandAttention()])
    assert op_counts(graph)["mul"] == 1


class Hidden(nn.Module):
    def forward(self, q: Any, shown: Any) -> Any:
        return attend(q, q, q, shown)


def test_a_hidden_row_has_a_gradient() -> None:
    """With a bias of −∞ its softmax was nan, and so were all gradients."""
    shown = torch.ones(5, 5) > 0
    shown[2] = False
    check_pass(ExpandAttention(), Hidden(), (normal(2, 3, 5, 8), shown), rewrites=1)


class Dropped(nn.Module):
    def forward(self, q: Any) -> Any:
        return F.dropout((q @ q.mT).softmax(-1), 0.0, True) @ q


def test_a_dropout_in_training_mode_is_not_left_behind_without_users() -> None:
    check_pass(FuseAttention(), Dropped(), normal(2, 3, 5, 8), rewrites=0, misses=["training mode"])
