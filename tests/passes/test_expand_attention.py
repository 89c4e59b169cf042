"""expand-attention: attention as products and a softmax, and what these share with others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.capture import capture
from fxopt.passes import ExpandAttention
from fxopt.rewrite import fuel
from fxopt.testing import check_pass, op_counts, relative_error

aten = torch.ops.aten
attend = F.scaled_dot_product_attention
EXPANDED = {"scaled_dot_product_attention": 0, "matmul": 2, "softmax": 1}
Call = Callable[..., Any]


class Calls(nn.Module):
    """A model made of a function, and of the constants and layers that it uses."""

    def __init__(self, call: Call, **parts: Any) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part, persistent=False)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def heads() -> tuple[torch.Tensor, ...]:
    return normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 6)


def expands(call: Call, inputs: Any, after: dict[str, int], **parts: Any) -> Any:
    model = Calls(call, **parts)
    graph, _ = check_pass(
        ExpandAttention(), model, inputs, after=EXPANDED | after, misses=[], add_noise=False
    )
    return graph


PLAIN: dict[str, tuple[Call, Any, dict[str, int]]] = {
    "four axes": (lambda m, q, k, v: attend(q, k, v), heads(), {"mul": 1, "permute": 1, "add": 0}),
    "three axes": (
        lambda m, q, k, v: attend(q, k, v, scale=0.5),
        (normal(2, 5, 8), normal(2, 7, 8), normal(2, 7, 6)), {"mul": 1, "permute": 1},
    ),
    "two axes": (
        lambda m, q, k, v: attend(q, k, v), (normal(5, 8), normal(7, 8), normal(7, 6)), {"mul": 1}
    ),
    "no scale": (lambda m, q, k, v: attend(q, k, v, scale=1.0), heads(), {"mul": 0}),
    "a permute that makes the keys": (
        lambda m, q, k, v: attend(q, k.transpose(1, 2), v),
        (heads()[0], normal(2, 7, 3, 8), heads()[2]), {"permute": 1},
    ),
    "keys that were transposed": (
        lambda m, q, k, v: attend(q, k.mT, v),
        (heads()[0], normal(2, 3, 8, 7), heads()[2]), {"permute": 0},
    ),
    "values and result transposed": (
        lambda m, q, k, v: attend(q, k, v.mT).mT.relu(),
        (*heads()[:2], normal(2, 3, 6, 7)), {"permute": 2, "relu": 1},
    ),
    "a mask of floats": (
        lambda m, q, k, v, x: attend(q, k, v, x[None]), (*heads(), normal(3, 5, 7)),
        {"add": 1, "amax": 1, "where": 2, "unsqueeze": 0},
    ),
    "one head of keys": (
        lambda m, q, k, v: attend(q, k, v, enable_gqa=True),
        (heads()[0], normal(2, 1, 7, 8), normal(2, 1, 7, 6)), {"unsqueeze": 0, "unflatten": 0},
    ),
    "heads that share keys": (
        lambda m, q, k, v: attend(q, k, v, enable_gqa=True),
        (normal(2, 6, 5, 8), *heads()[1:]), {"unsqueeze": 2, "unflatten": 1, "flatten": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_expands(name: str) -> None:
    call, inputs, after = PLAIN[name]
    expands(call, inputs, after)


def projected(m: Any, x: Any) -> Any:
    q, k, v = (
        layer(x).reshape(2, 5, 3, 8).permute(0, 2, 1, 3) for layer in (m.query, m.key, m.value)
    )
    return attend(q, k, v).permute(0, 2, 1, 3)


def test_the_layer_of_the_queries_takes_the_scale() -> None:
    layers = {name: nn.Linear(24, 24) for name in ("query", "key", "value")}
    graph = expands(projected, normal(2, 5, 24), {"mul": 0, "permute": 4, "linear": 3}, **layers)
    assert len(graph.info.recipes) == 2  # a weight and a bias


def test_a_joint_layer_scales_the_rows_of_the_queries() -> None:
    def call(m: Any, x: Any) -> Any:
        q, k, v = m.layer(x).reshape(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return attend(q, k, v)

    expands(call, normal(2, 5, 24), {"mul": 0, "linear": 1}, layer=nn.Linear(24, 72))


def test_attentions_share_scaled_queries_and_transposed_keys() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v) + attend(q, k, v.relu())

    expands(call, heads(), {"matmul": 4, "softmax": 2, "mul": 1, "permute": 1})


def test_other_products_stay() -> None:
    def call(m: Any, x: Any) -> Any:
        q = m.layer(x) * 2
        return attend(q, q, q)

    expands(call, normal(2, 5, 24), {"mul": 2}, layer=nn.Linear(24, 24))


# -- masks -----------------------------------------------------------------------------------------

HIDDEN = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])[:, None, None]  # all, in one batch


def test_attentions_share_what_a_boolean_mask_becomes() -> None:
    def call(m: Any, q: Any, k: Any, v: Any, x: Any) -> Any:
        return attend(q, k, v, x) * attend(q, k * 2, v, x)

    graph = expands(
        call, (*heads(), HIDDEN),
        {"matmul": 4, "softmax": 2, "add": 2, "any": 1, "full": 1, "where": 3},
    )  # fmt: skip
    inputs = tuple(x.double() for x in heads())
    assert bool((graph(*inputs, HIDDEN)[1] == 0).all())


@pytest.mark.parametrize(
    "shown",
    [
        torch.ones(5, 7).tril() > 0,
        (torch.ones(5, 7).tril() > 0) & (torch.arange(5) != 2)[:, None],
        normal(2, 3, 5, 7) > 1.5,
        torch.arange(5)[:, None] > 2,
    ],
)
def test_boolean_masks_of_every_shape(shown: torch.Tensor) -> None:
    expands(lambda m, q, k, v, x: attend(q, k, v, x), (*heads(), shown), {"where": 2, "any": 1})


def test_a_constant_mask_that_shows_every_query_something_is_added() -> None:
    shown = torch.ones(5, 7).tril() > 0
    call = lambda m, q, k, v: attend(q, k, v, m.shown)  # noqa: E731
    expands(call, heads(), {"where": 0, "any": 0, "add": 1}, shown=shown)
    expands(call, heads(), {"where": 2, "any": 1, "add": 1}, shown=shown[:1] & False)


def test_a_float_mask_that_hides_a_whole_row() -> None:
    """PyTorch's attention is 0 there, and a softmax nan."""
    call = lambda m, q, k, v, x: attend(q, k, v, x)  # noqa: E731
    mask = torch.zeros(5, 7).index_fill(0, torch.tensor([2]), -math.inf)
    counts = {"amax": 1, "ne": 1, "where": 2}
    graph = expands(call, (*heads(), mask), counts)
    result = graph(*(x.double() for x in (*heads(), mask)))
    assert bool((result[..., 2, :] == 0).all()) and not bool(result.isnan().any())
    constant = lambda m, q, k, v: attend(q, k, v, m.hidden)  # noqa: E731
    expands(constant, heads(), {"amax": 0, "where": 2}, hidden=mask)
    finite = {"amax": 0, "where": 0}
    expands(constant, heads(), finite, hidden=mask.clamp(min=-1e30))
    triangle = torch.full((5, 7), -math.inf).triu(1)
    expands(constant, heads(), finite, hidden=triangle)
    computed = lambda m, q, k, v, x: attend(q, k, v, x.tanh())  # noqa: E731
    expands(computed, (*heads(), mask), finite)


def test_a_mask_that_is_not_a_number_stays_so() -> None:
    call = lambda m, q, k, v, x: attend(q, k, v, x)  # noqa: E731
    mask = torch.zeros(5, 7).index_fill(0, torch.tensor([2]), math.nan)
    model = Calls(call)
    graph = fxopt.optimize(model, (*heads(), mask), passes=[ExpandAttention()], verify="off")
    assert bool(graph(*heads(), mask)[..., 2, :].isnan().all())


@pytest.mark.parametrize("lengths", [(5, 7), (7, 5), (1, 4)])
def test_causal(lengths: tuple[int, int]) -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        first = attend(q, k, v, is_causal=True)
        return first * attend(q, k * 2, v, is_causal=True)

    rows, columns = lengths
    inputs = normal(2, 3, rows, 8), normal(2, 3, columns, 8), normal(2, 3, columns, 6)
    graph = expands(call, inputs, {"matmul": 4, "softmax": 2, "add": 2, "where": 0, "triu": 0})
    assert len(graph.graph.find_nodes(op="get_attr")) == 1


@pytest.mark.parametrize(
    "mask",
    [normal(5, 7), normal(1, 5, 7), normal(6, 5, 7), normal(2, 1, 5, 7), normal(2, 6, 1, 7)],
    ids=lambda mask: str(list(mask.shape)),
)
@pytest.mark.parametrize("boolean", [False, True])
def test_masks_of_heads_that_share_keys(mask: torch.Tensor, boolean: bool) -> None:
    def call(m: Any, q: Any, k: Any, v: Any, x: Any) -> Any:
        return attend(q, k, v, x, enable_gqa=True)

    inputs = normal(2, 6, 5, 8), *heads()[1:], mask > 1 if boolean else mask
    expands(call, inputs, {"add": 1})


# -- dtypes and sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [None, torch.float32, torch.bool])
def test_half_precision(dtype: torch.dtype, mask: torch.dtype | None) -> None:
    def call(m: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return attend(q, k, v, *rest)

    given = () if mask is None else ((normal(5, 7) - 1e5 * (normal(5, 7) > 0)).to(mask),)
    inputs = (*(x.to(dtype) for x in heads()), *given)
    wide = 4 if dtype is torch.bfloat16 else 2 if mask is torch.float32 else 0
    check_pass(
        ExpandAttention(), Calls(call), inputs, after=EXPANDED | {"to": wide}, double=False,
        tolerance=0.02, gradients=False,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
def test_symbolic_sizes(causal: bool) -> None:
    batch, n, m = (torch.export.Dim(x, min=2, max=64) for x in "bnm")
    shapes = ({0: batch, 2: n}, {0: batch, 2: m}, {0: batch, 2: m})
    model = Calls(lambda _, q, k, v: attend(q, k, v, is_causal=causal, enable_gqa=True))
    inputs = normal(2, 6, 5, 8), *heads()[1:]
    graph, _ = check_pass(
        ExpandAttention(), model, inputs, after=EXPANDED, dynamic_shapes=(shapes,)
    )
    other = tuple(torch.cat([x, x], 2).double() for x in inputs)
    assert relative_error(graph(*other), model(*other)) < 1e-10


# -- what stays ------------------------------------------------------------------------------------


def test_dropout_stays() -> None:
    model = Calls(lambda m, q, k, v: attend(q, k, v, dropout_p=0.5))
    check_pass(
        ExpandAttention(), model, heads(), rewrites=0, misses=["its dropout draws random"],
        gradients=False,
    )  # fmt: skip


def test_heads_of_a_symbolic_size_stay() -> None:
    size = {3: torch.export.Dim("d", min=2, max=64)}
    check_pass(
        ExpandAttention(), Calls(lambda m, q, k: attend(q, k, k)), heads()[:2], rewrites=0,
        misses=["its heads have a symbolic size"], dynamic_shapes=((size, size),),
    )  # fmt: skip


same = normal(2, 3, 7, 8)
FAST: dict[str, tuple[Call, Any, bool]] = {
    "four axes": (lambda m, q, v: attend(q, q, v), (same, same), True),
    "a mask": (lambda m, q, v: attend(q, q, v, m.mask[None, None]), (same, same), True),
    "causal": (lambda m, q, v: attend(q, q, v, is_causal=True), (same, same), True),
    "wider values": (lambda m, q, v: attend(q, q, v), (same, normal(2, 3, 7, 9)), False),
    "three axes": (lambda m, q, v: attend(q[0], q[0], v[0]), (same, same), False),
    "channels first": (lambda m, q, v: attend(q.mT, q.mT, v.mT), (same, same), False),
}


@pytest.mark.parametrize("name", FAST)
def test_keeps_what_has_a_kernel_of_its_own(name: str) -> None:
    call, inputs, fast = FAST[name]
    model = Calls(call, mask=normal(7, 7))
    graph, _ = check_pass(ExpandAttention(keep_fast=True), model, inputs)
    assert ("scaled_dot_product_attention" in op_counts(graph)) is fast


def test_a_trained_bias_does_not_keep_attention_from_its_kernel() -> None:
    model = Calls(lambda m, q: attend(q, q, q, m.bias), bias=nn.Parameter(normal(7, 7)))
    graph, _ = check_pass(
        ExpandAttention(keep_fast=True), model, same, after={"detach": 1}, gradients=False
    )
    check_pass(ExpandAttention(), model, same, after=EXPANDED | {"detach": 0})
    assert graph.find(aten.scaled_dot_product_attention.default)


def test_new_weights_go_through_the_scale() -> None:
    layers = {name: nn.Linear(24, 24) for name in ("query", "key", "value")}
    model = Calls(projected, **layers).eval()
    x = normal(2, 5, 24)
    compiled = fxopt.compile(model, x, passes=[ExpandAttention()])
    with torch.no_grad():
        model.query.weight.mul_(math.pi)  # type: ignore[operator,union-attr]
    compiled.update(model.state_dict())
    assert relative_error(compiled(x), model(x)) < 1e-5


def test_stops_when_fuel_is_out() -> None:
    model = Calls(lambda m, q, k, v: attend(attend(q, k, v, scale=1.0), v, v, scale=1.0))
    graph = capture(model.eval(), (heads()[0], *heads()[1:]))
    with fuel(1):
        ExpandAttention().run(graph)
    assert op_counts(graph)["scaled_dot_product_attention"] == 1
