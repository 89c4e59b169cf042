"""merge-parallel-layers: which layers of one input become one, which do not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.capture import capture
from fxopt.passes.merge_parallel_layers import MergeParallelLayers
from fxopt.testing import check_pass

MERGE = MergeParallelLayers(limit=2**22)


class Calls(nn.Module):
    """A model made of named layers and a function of them and the input."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def attention(m: Calls, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (layer(x).reshape(*x.shape[:2], 2, -1).transpose(1, 2) for layer in m.children())
    return F.scaled_dot_product_attention(q, k, v)


def gated(m: Calls, x: torch.Tensor) -> torch.Tensor:
    return F.silu(m.a(x)) * m.b(x)  # type: ignore[operator]


def branches(m: Calls, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.relu(layer(x)) for layer in m.children()], 1)


def linears(bias: tuple[bool, ...] = (True, True, True)) -> dict[str, nn.Module]:
    return {f"layer{n}": nn.Linear(8, 8, bias=has) for n, has in enumerate(bias)}


MERGED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "query, key and value": (Calls(attention, **linears()), (2, 5, 8), "linear"),
    "no bias": (Calls(attention, **linears((False,) * 3)), (2, 5, 8), "linear"),
    "one bias": (Calls(attention, **linears((False, True, False))), (2, 5, 8), "linear"),
    "gate and up": (Calls(gated, a=nn.Linear(8, 6), b=nn.Linear(8, 6)), (3, 8), "linear"),
    "what is copied anyway": (
        Calls(lambda m, x: m.a(x).t().contiguous().sin() + m.b(x).t().contiguous().cos(),
              a=nn.Linear(8, 6), b=nn.Linear(8, 6)),
        (3, 8), "linear",
    ),
    "a vector": (Calls(gated, a=nn.Linear(8, 6), b=nn.Linear(8, 6)), (8,), "linear"),
    "1×1": (
        Calls(branches, a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(4, 2, 1, bias=False)), (2, 4, 5, 5),
        "conv2d",
    ),
    "3×3": (
        Calls(
            branches, a=nn.Conv2d(4, 3, 3, stride=2, padding=1),
            b=nn.Conv2d(4, 2, 3, stride=2, padding=1),
        ),
        (2, 4, 7, 7), "conv2d",
    ),
    "1d": (Calls(branches, a=nn.Conv1d(4, 3, 3), b=nn.Conv1d(4, 2, 3)), (2, 4, 7), "conv1d"),
    "large convolutions": (
        Calls(branches, a=nn.Conv2d(64, 64, 3), b=nn.Conv2d(64, 64, 3)), (1, 64, 16, 16), "conv2d"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_merges_into_one_layer(case: str) -> None:
    model, shape, layer = MERGED[case]
    after = {layer: 1, "split_with_sizes": 1}
    check_pass(
        MERGE, model, torch.randn(shape), after=after, rewrites=1, misses=[]
    )


def test_the_new_graph_reads_as_expected() -> None:
    model = Calls(gated, a=nn.Linear(8, 6), b=nn.Linear(8, 6, bias=False))
    check_pass(MERGE, model, torch.randn(3, 8), text="""
%inputs_0: f64[3,8] = input
%a_weight_stacked: f64[12,8] = constant 'a.weight_stacked'
%a_bias_stacked: f64[12] = constant 'a.bias_stacked'
%linear_2: f64[3,12] = linear(%inputs_0, %a_weight_stacked, %a_bias_stacked)
%split_with_sizes: (f64[3,6], f64[3,6]) = split_with_sizes(%linear_2, [6, 6], 1)
%getitem: f64[3,6] = getitem(%split_with_sizes, 0)
%getitem_1: f64[3,6] = getitem(%split_with_sizes, 1)
%silu: f64[3,6] = silu(%getitem)
%mul: f64[3,6] = mul.Tensor(%silu, %getitem_1)
return (%mul)
""")


def test_layers_behind_parts_merge_too() -> None:
    def call(m: Calls, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x), m.b(x)
        return torch.sin(m.c(a)) + torch.cos(m.d(a)) + m.e(b)

    names = "abcde"
    model = Calls(call, **{name: nn.Linear(4, 4) for name in names})
    after = {"linear": 3, "split_with_sizes": 2}
    check_pass(MERGE, model, torch.randn(3, 4), after=after, rewrites=2, misses=[])


def test_the_batch_of_convolutions_may_be_symbolic() -> None:
    model, shape, _ = MERGED["1×1"]
    check_pass(
        MERGE, model, torch.randn(shape), dynamic_shapes={0: "batch"}, rewrites=1
    )


def test_a_missing_bias_keeps_the_sign_of_zero() -> None:
    model = Calls(
        lambda m, x: m.a(x).sign() / m.b(x).abs().sqrt(),
        a=nn.Linear(2, 2, bias=False), b=nn.Linear(2, 2),
    ).eval()
    graph = capture(model, torch.zeros(1, 2))
    assert MERGE.run(graph).rewrites == 1
    bias = graph.constant("b.bias_stacked") if graph.has_constant("b.bias_stacked") else None
    stacked = graph.constant("a.bias_stacked") if bias is None else bias
    assert torch.signbit(stacked[:2]).all()


def test_weights_are_copied_bit_by_bit() -> None:
    model = Calls(gated, a=nn.Linear(8, 6), b=nn.Linear(8, 6)).half()
    graph = capture(model.eval(), torch.randn(3, 8).half())
    MERGE.run(graph)
    assert torch.equal(
        graph.constant("a.weight_stacked"), torch.cat([model.a.weight, model.b.weight])
    )


# -- what does not ---------------------------------------------------------------------------------


def flat(m: Calls, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer(x).flatten(1).sin() for layer in m.children()], 1)


pair = {"a": nn.Linear(8, 6), "b": nn.Linear(8, 6)}
APART: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "much work": (
        Calls(gated, a=nn.Linear(64, 64), b=nn.Linear(64, 64)), (1024, 64),
        "1024 rows times 8192 weights are more than",
    ),
    "large weights": (
        Calls(gated, a=nn.Linear(512, 600), b=nn.Linear(512, 600)), (1, 512),
        "reading 614400 weights",
    ),
    "an output": (Calls(lambda m, x: (m.a(x), m.b(x)), **pair), (3, 8), "an output"),
    "an output behind a view": (
        Calls(lambda m, x: (m.a(x).unsqueeze(0), m.b(x).t()), **pair), (3, 8), "an output"
    ),
    "flattened": (Calls(flat, **pair), (2, 3, 8), "would have to copy"),
    "other kernels": (
        Calls(branches, a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(4, 2, 3, padding=1)), (2, 4, 5, 5), ""
    ),
    "other strides": (
        Calls(lambda m, x: m.a(x).sum() + m.b(x).sum(), a=nn.Conv2d(4, 3, 1),
              b=nn.Conv2d(4, 2, 1, stride=2)),
        (2, 4, 5, 5), "",
    ),
    "groups": (
        Calls(branches, a=nn.Conv2d(4, 4, 1, groups=2), b=nn.Conv2d(4, 2, 1, groups=2)),
        (2, 4, 5, 5), "dealt out anew",
    ),
    "one layer": (Calls(lambda m, x: m.a(x).relu(), **pair), (3, 8), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_stays_apart(case: str) -> None:
    model, shape, reason = APART[case]
    misses = [reason] if reason else None
    _, result = check_pass(
        MERGE, model, torch.randn(shape), rewrites=0, misses=misses
    )
    assert reason or not result.misses


def test_rows_that_are_not_known_prevent_it() -> None:
    model, shape, _ = MERGED["query, key and value"]
    check_pass(
        MERGE, model, torch.randn(shape), dynamic_shapes={0: "batch"}, rewrites=0,
        misses=["how many rows there are is not known"],
    )


def test_weights_that_are_computed_prevent_it() -> None:
    def call(m: Calls, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return m.a(x).sin() * F.linear(x, w).cos()  # type: ignore[operator]

    inputs = (torch.randn(3, 8), torch.randn(6, 8))
    model = Calls(call, a=nn.Linear(8, 6))
    misses = ["weight of linear_1 is not a constant"]
    check_pass(MERGE, model, inputs, rewrites=0, misses=misses)


def test_linear_layers_stay_unless_a_limit_is_given() -> None:
    model, shape, _ = APART["much work"]
    check_pass(MergeParallelLayers(), model, torch.randn(shape), rewrites=0, misses=["limit, 0"])
    check_pass(MergeParallelLayers(limit=2**24), model, torch.randn(shape), rewrites=1)


def test_convolutions_need_no_limit() -> None:
    model, shape, _ = MERGED["large convolutions"]
    check_pass(MergeParallelLayers(), model, torch.randn(shape), rewrites=1, misses=[])
