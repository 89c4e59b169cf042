"""fuse-attention: what is attention, in all its spellings, and what only looks like it."""

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
from fxopt.passes import FoldConstants, FuseAttention, RemoveDeadNodes, RemoveNoOps
from fxopt.rewrite import fuel
from fxopt.testing import check_pass, op_counts, relative_error

aten = torch.ops.aten
FUSED = {"scaled_dot_product_attention": 1, "softmax": 0}
LOWEST = torch.finfo(torch.float32).min
Call = Callable[..., Any]


class Calls(nn.Module):
    """A model made of a function, and of the buffers and parameters that it uses."""

    def __init__(self, call: Call, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.call = call
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor, persistent=False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape))


def heads() -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of two batches, three heads, and lengths and widths of their own."""
    return normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 6)


def fuses(call: Call, inputs: Any, after: dict[str, int] | None = None, **tensors: Any) -> Any:
    """Check that the call becomes one attention, and return that node."""
    model = Calls(call, **tensors)
    graph, _ = check_pass(
        FuseAttention(), model, inputs, after=FUSED | (after or {}), misses=[], add_noise=False
    )
    return graph.find(aten.scaled_dot_product_attention.default)[0]


def holds_back(call: Call, inputs: Any, reason: str, **tensors: Any) -> None:
    model = Calls(call, **tensors)
    check_pass(FuseAttention(), model, inputs, rewrites=0, misses=[reason], add_noise=False)


def attention(change: Call, end: Call = lambda m, w: w) -> Call:
    """Return plain attention whose scores and weights are changed on their way."""

    def call(m: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        return end(m, change(m, q @ k.transpose(-2, -1), *rest).softmax(-1)) @ v

    return call


# -- layouts ---------------------------------------------------------------------------------------


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-2, -1)


LAYOUTS: dict[str, tuple[Call, Any]] = {
    "matmul": (lambda m, q, k, v: torch.matmul(torch.matmul(q, k.mT).softmax(-1), v), heads()),
    "two axes": (
        lambda m, q, k, v: torch.mm(torch.mm(q, k.t()).softmax(1), v),
        (normal(5, 8), normal(7, 8), normal(7, 6)),
    ),
    "three axes": (
        lambda m, q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=2), v),
        (normal(6, 5, 8), normal(6, 7, 8), normal(6, 7, 6)),
    ),
    "five axes": (
        lambda m, q, k, v: (q @ transposed(k)).softmax(-1) @ v,
        (normal(2, 2, 3, 5, 8), normal(2, 2, 3, 7, 8), normal(2, 2, 3, 7, 6)),
    ),
    "batch and heads merged": (
        lambda m, q, k, v: torch.bmm(
            torch.bmm(q.reshape(6, 5, 8), k.reshape(6, 7, 8).transpose(1, 2)).softmax(-1),
            v.reshape(6, 7, 6),
        ),
        heads(),
    ),
    "keys transposed by the projection": (
        lambda m, q, k, v: (q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v,
        (normal(2, 5, 3, 8), normal(2, 7, 3, 8), normal(2, 3, 7, 6)),
    ),
    "einsum": (
        lambda m, q, k, v: torch.einsum(
            "bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v
        ),
        heads(),
    ),
    "einsum, heads behind positions": (
        lambda m, q, k, v: torch.einsum(
            "bhqk,bkhd->bqhd", torch.einsum("bqhd, bkhd -> bhqk", q, k).softmax(-1), v
        ),
        (normal(2, 5, 3, 8), normal(2, 7, 3, 8), normal(2, 7, 3, 6)),
    ),
    "einsum with dots": (
        lambda m, q, k, v: torch.einsum(
            "...qk,...kd->...qd", torch.einsum("...qd,...kd->...qk", q, k).softmax(-1), v
        ),
        heads(),
    ),
    "einsum, keys shared by two axes of queries": (
        lambda m, q, k, v: torch.einsum(
            "bhwk,bkd->bhwd", torch.einsum("bhwd,bkd->bhwk", q, k).softmax(-1), v
        ),
        (normal(2, 3, 4, 8), normal(2, 7, 8), normal(2, 7, 6)),
    ),
    "einsum, then matmul": (
        lambda m, q, k, v: torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1) @ v, heads()
    ),
    "channels first": (
        lambda m, q, k, v: v @ transposed((transposed(q) @ k).softmax(-1)),
        (normal(2, 3, 8, 5), normal(2, 3, 8, 7), normal(2, 3, 6, 7)),
    ),
    "channels first, softmax over the rows": (
        lambda m, q, k, v: v @ (transposed(k) @ q).softmax(-2),
        (normal(2, 3, 8, 5), normal(2, 3, 8, 7), normal(2, 3, 6, 7)),
    ),
    "between channels": (
        lambda m, q, k, v: (transposed(q) @ k).softmax(-1) @ transposed(v),
        (normal(2, 3, 9, 5), normal(2, 3, 9, 7), normal(2, 3, 9, 7)),
    ),
    "the same queries, keys and values": (
        lambda m, x: (x @ transposed(x)).softmax(-1) @ x, (normal(2, 3, 5, 8),)
    ),
    "queries that broadcast": (
        lambda m, q, k, v: (q @ transposed(k)).softmax(-1) @ v,
        (normal(1, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 6)),
    ),
    "the heads of the weights permuted": (
        lambda m, q, k, v: (q @ transposed(k)).permute(1, 0, 2, 3).softmax(-1) @ v.transpose(0, 1),
        heads(),
    ),
    "split after the softmax": (
        lambda m, q, k, v: (q @ transposed(k)).softmax(-1).reshape(2, 3, 5, 7) @ v,
        (normal(6, 5, 8), normal(6, 7, 8), normal(2, 3, 7, 6)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_fuses_every_layout(name: str) -> None:
    node = fuses(*LAYOUTS[name], {"matmul": 0, "bmm": 0, "mm": 0, "einsum": 0})
    assert node.kwargs["scale"] == 1.0 and node.args[3:] == (None, 0.0, False)


def test_a_permute_that_makes_the_keys_makes_them_as_attention_wants_them() -> None:
    call, inputs = LAYOUTS["keys transposed by the projection"]
    fuses(call, inputs, {"permute": 2})


@pytest.mark.parametrize(
    ("between", "after"),
    [
        (lambda m, w: F.dropout(w, 0.5, False), {"dropout": 0}),
        (lambda m, w: w.clone().contiguous(), {"clone": 0, "contiguous": 0}),
        (lambda m, w: w.double(), {"to": 0}),
    ],
)
def test_what_changes_no_weight_may_stand_before_the_values(between: Call, after: Any) -> None:
    fuses(attention(lambda m, s: s, between), heads(), after)


# -- scales ----------------------------------------------------------------------------------------

SCALES: dict[str, tuple[Call, float]] = {
    "behind the product": (lambda m, q, k: (q @ transposed(k)) * 0.3, 0.3),
    "as a quotient": (lambda m, q, k: q @ transposed(k) / math.sqrt(8), 8**-0.5),
    "on the queries": (lambda m, q, k: (q * 0.3) @ transposed(k), 0.3),
    "on the keys": (lambda m, q, k: q @ transposed(k / 4), 0.25),
    "on both": (lambda m, q, k: (q * 0.3) @ transposed(k * 0.5), 0.15),
    "everywhere": (lambda m, q, k: (q * 3) @ (0.5 * k).mT / 2 * 5, 3.75),
    "by a constant of one element": (lambda m, q, k: q @ transposed(k) / m.root, 0.5),
    "by a constant on the queries": (lambda m, q, k: (q / m.root) @ transposed(k), 0.5),
    "negative": (lambda m, q, k: -(q @ transposed(k)), -1.0),
    "by alpha": (
        lambda m, q, k: torch.baddbmm(
            m.zero, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.3
        ).view(2, 3, 5, 7),
        0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_the_scale_may_stand_anywhere(name: str) -> None:
    call, scale = SCALES[name]
    tensors = {"root": torch.tensor([2.0]), "zero": normal(6, 5, 7)}
    node = fuses(
        lambda m, q, k, v: call(m, q, k).softmax(-1) @ v, heads(), {"mul": 0, "div": 0}, **tensors
    )
    assert node.kwargs["scale"] == pytest.approx(scale)


@pytest.mark.parametrize(
    ("shape", "divides"), [((3, 1, 1), False), ((1,), False), ((), True), ((2, 1, 5, 1), True)]
)
def test_a_tensor_that_scales_heads_or_rows_goes_to_the_queries(
    shape: tuple[int, ...], divides: bool
) -> None:
    call = attention(lambda m, s: s / m.t if divides else s * m.t)
    node = fuses(call, heads(), t=weight(*shape))
    assert node.args[0].target in (aten.mul.Tensor, aten.div.Tensor)


def test_a_tensor_that_scales_columns_goes_to_the_keys() -> None:
    node = fuses(attention(lambda m, s: s * m.t), heads(), t=weight(3, 1, 7))
    assert node.args[1].target is aten.mul.Tensor


def test_cosine_attention() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return (s * m.t.clamp(max=4.6).exp() + m.bias).softmax(-1) @ v

    fuses(call, heads(), t=weight(3, 1, 1), bias=weight(1, 3, 5, 7))


# -- masks -----------------------------------------------------------------------------------------

ADDED: dict[str, tuple[Call, dict[str, torch.Tensor], tuple[int, ...]]] = {
    "a bias per head": (lambda m, s: s + m.a, {"a": weight(3, 5, 7)}, (1, 3, 5, 7)),
    "a bias of all axes": (lambda m, s: m.a + s, {"a": normal(2, 3, 5, 7)}, (2, 3, 5, 7)),
    "a matrix": (lambda m, s: s - m.a, {"a": normal(5, 7)}, (5, 7)),
    "a row": (lambda m, s: s + m.a, {"a": normal(7)}, (1, 7)),
    "integers": (lambda m, s: s + m.a, {"a": torch.arange(7)}, (1, 7)),
    "two": (
        lambda m, s: s + m.a + m.b, {"a": weight(3, 5, 7), "b": normal(2, 1, 1, 7)}, (2, 3, 5, 7)
    ),
    "before the scale": (lambda m, s: (s + m.a) * 0.5 + m.a, {"a": weight(5, 7)}, (5, 7)),
    "with alpha": (lambda m, s: torch.add(s, m.a, alpha=2), {"a": weight(5, 7)}, (5, 7)),
    "with the scores' alpha": (
        lambda m, s: torch.add(m.a, s, alpha=2), {"a": weight(5, 7)}, (5, 7)
    ),
    "a number beside": (lambda m, s: s + 3 + m.a, {"a": normal(5, 7)}, (5, 7)),
    "hiding some": (
        lambda m, s: s + m.a,
        {"a": normal(5, 7).where(torch.ones(5, 7).tril() > 0, -math.inf)}, (5, 7),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_constants_that_are_added_become_one_mask(name: str) -> None:
    change, tensors, shape = ADDED[name]
    node = fuses(attention(change), heads(), {"add": 0, "sub": 0, "mul": 0}, **tensors)
    assert node.args[3].op == "get_attr" and tuple(node.args[3].meta["val"].shape) == shape


def test_a_mask_of_trained_weights_is_trained_and_follows_new_ones() -> None:
    model = Calls(attention(lambda m, s: (s + m.a) * 0.5), a=weight(5, 7)).eval()
    compiled = fxopt.compile(model, heads(), passes=[FuseAttention()])
    mask = compiled.graph.find(aten.scaled_dot_product_attention.default)[0].args[3]
    assert compiled.graph.value(mask).requires_grad
    with torch.no_grad():
        model.a += 1 + normal(5, 7)
    compiled.update(model.state_dict())
    assert relative_error(compiled(*heads()), model(*heads())) < 1e-6


def test_baddbmm_adds_the_mask() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        return torch.bmm(torch.baddbmm(m.a, q, k.mT, alpha=0.5).softmax(-1), v)

    inputs = normal(6, 5, 8), normal(6, 7, 8), normal(6, 7, 6)
    node = fuses(call, inputs, a=weight(6, 5, 7))
    assert node.kwargs["scale"] == 0.5 and node.args[3].op == "get_attr"


def computed(m: Any, s: Any, x: Any) -> Any:
    return s + (x @ m.a).tanh()[:, None, None]


def test_masks_that_are_computed() -> None:
    """Each comes with the number of calls on masks that are left."""
    given = (*heads(), normal(2, 4))
    fuses(attention(computed), given, {"add": 0}, a=weight(4, 7))
    fuses(attention(lambda m, s, x: computed(m, s, x) + m.b), given, {"add": 1}, a=weight(4, 7),
          b=weight(3, 5, 7))  # fmt: skip


SHOWN = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])[:, None, None]  # nothing in one batch
FILLED: dict[str, Call] = {
    "masked_fill": lambda m, s, x: s.masked_fill(~x, LOWEST),
    "masked_fill with a tensor": lambda m, s, x: s.masked_fill(~x, m.lowest),
    "where": lambda m, s, x: torch.where(x, s, LOWEST),
    "where not": lambda m, s, x: torch.where(~x, LOWEST, s),
    "where with a tensor": lambda m, s, x: torch.where(x, s, m.lowest),
    "behind a bias": lambda m, s, x: (s * 0.3 + m.a).masked_fill(x == 0, LOWEST),
    "in front of a bias": lambda m, s, x: s.masked_fill(~x, LOWEST) + m.a,
    "added": lambda m, s, x: s + torch.where(x, 0.0, LOWEST),
    "added from 0 and 1": lambda m, s, x: s + (1.0 - x.to(s.dtype)) * LOWEST,
    "twice": lambda m, s, x: s.masked_fill(~x, LOWEST).masked_fill(~x, LOWEST),
}


@pytest.mark.parametrize("name", FILLED)
def test_a_row_hidden_by_the_lowest_number_stays_uniform(name: str) -> None:
    model = Calls(attention(FILLED[name]), a=weight(3, 5, 7), lowest=torch.tensor(LOWEST))
    inputs = (*heads(), SHOWN)
    graph, _ = check_pass(
        FuseAttention(), model, inputs, after=FUSED, misses=[], add_noise=False, gradients=False
    )
    double = tuple(x.double() for x in heads())
    hidden = double[2][1].mean(1, keepdim=True).expand(3, 5, 6)
    assert relative_error(graph(*double, SHOWN)[1], hidden) < 1e-6
    with torch.no_grad():  # in single precision, too
        model.float()
        found = fxopt.optimize(model, inputs, passes=[FuseAttention()])(*inputs)
        assert relative_error(found, model(*inputs)) < 1e-6


TRIANGLE = torch.ones(5, 7).tril()
CAUSAL: dict[str, tuple[Call, torch.Tensor]] = {
    "filled with infinity": (lambda m, s: s.masked_fill(m.a, -math.inf), TRIANGLE == 0),
    "filled with a low number": (lambda m, s: s.masked_fill(m.a, -1e9), TRIANGLE == 0),
    "filled with the lowest": (lambda m, s: torch.where(m.a, s, LOWEST), TRIANGLE[None, None] > 0),
    "added": (
        lambda m, s: s + m.a, torch.zeros(5, 7).masked_fill(TRIANGLE == 0, -math.inf)
    ),
    "added, finite": (lambda m, s: s + m.a, (1 - TRIANGLE)[None] * LOWEST),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSAL)
def test_a_constant_triangle_is_causal(name: str) -> None:
    change, mask = CAUSAL[name]
    node = fuses(attention(change), heads(), a=mask)
    is_low = name == "filled with a low number"  # which is a mask like any other
    assert node.args[5] is not is_low and (node.args[3] is None) is not is_low


def test_a_triangle_cut_from_a_larger_one() -> None:
    def change(m: Any, s: Any) -> Any:
        cut = m.a[:, :, : s.shape[-2], : s.shape[-1]]
        return torch.where(cut, s, torch.full([], LOWEST, dtype=s.dtype))

    model = Calls(attention(change), a=torch.ones(1, 1, 16, 16).tril() > 0)
    graph = fxopt.optimize(model, heads(), passes=[FoldConstants(), FuseAttention()])
    (node,) = graph.find(aten.scaled_dot_product_attention.default)
    assert node.args[5] is True and relative_error(graph(*heads()), model(*heads())) < 1e-6


def test_a_triangle_that_may_change_stays_a_mask() -> None:
    model = Calls(attention(lambda m, s: s + m.a))
    model.a = nn.Parameter((1 - TRIANGLE) * LOWEST)
    graph, _ = check_pass(FuseAttention(), model, heads(), after=FUSED, add_noise=False)
    (node,) = graph.find(aten.scaled_dot_product_attention.default)
    assert node.args[3] is not None and node.args[5] is False


@pytest.mark.parametrize("mask", [torch.ones(5, 7) > 0, torch.zeros(2, 1, 1, 7)])
def test_a_mask_that_hides_nothing_goes(mask: torch.Tensor) -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, m.a)

    graph, _ = check_pass(
        FuseAttention(), Calls(call, a=mask), heads(), rewrites=1, add_noise=False
    )
    assert graph.find(aten.scaled_dot_product_attention.default)[0].args[3] is None
    model = Calls(call)
    model.register_buffer("a", mask)  # which other weights may change
    check_pass(FuseAttention(), model, heads(), rewrites=0, add_noise=False)


@pytest.mark.parametrize("shift", ["amax", "max", "all"])
def test_a_maximum_that_is_taken_away_changes_nothing(shift: str) -> None:
    def change(m: Any, s: Any) -> Any:
        if shift == "max":
            return s - s.max(-1, keepdim=True)[0]
        return s - (s.max() if shift == "all" else s.amax(-1, keepdim=True))

    model = Calls(attention(change))
    graph = fxopt.optimize(model, heads(), passes=[RemoveDeadNodes(), FuseAttention()])
    assert op_counts(graph) == {"scaled_dot_product_attention": 1}
    assert relative_error(graph(*heads()), model(*heads())) < 1e-6


# -- batch and heads, merged and split around a mask -----------------------------------------------


def windows(m: Any, s: Any) -> Any:
    batch, n = s.shape[0], m.shifted.shape[0]
    s = (s + m.bias).view(batch // n, n, 3, 5, 5) + m.shifted
    return s.view(batch, 3, 5, 5)


@pytest.mark.parametrize(("batch", "repeats"), [(1, 0), (2, 1)])
def test_window_masks(batch: int, repeats: int) -> None:
    x = normal(4 * batch, 3, 5, 8)
    shifted = normal(4, 1, 5, 5).where(normal(4, 1, 5, 5) > 0, -100.0)
    inputs = (x, x + 1, x[..., :6])
    node = fuses(
        attention(windows), inputs, {"add": 0, "reshape": repeats, "expand": repeats},
        bias=weight(1, 3, 5, 5), shifted=shifted,
    )  # fmt: skip
    assert tuple(node.args[3].meta["val"].shape) == (4 * batch, 3, 5, 5)


def test_a_window_mask_that_would_be_too_large_is_added_at_each_run() -> None:
    x = normal(4, 3, 5, 8)
    tensors = {"bias": weight(1, 3, 5, 5), "shifted": normal(4, 1, 5, 5)}
    model = Calls(attention(windows), **tensors)
    graph, _ = check_pass(
        FuseAttention(largest_mask=64), model, (x, x, x), after=FUSED | {"add": 1}, add_noise=False
    )
    assert not graph.info.recipes


def test_heads_split_around_a_mask() -> None:
    """Queries, keys and values are split, since the mask would have to be repeated."""

    def call(m: Any, q: Any, k: Any, v: Any, shown: Any) -> Any:
        s = torch.bmm(q, k.transpose(1, 2)).view(2, 3, 5, 7)
        s = (s + torch.where(shown, 0.0, LOWEST).to(s.dtype)).view(6, 5, 7)
        return torch.bmm(s.softmax(-1), v)

    inputs = (normal(6, 5, 8), normal(6, 7, 8), normal(6, 7, 6), normal(2, 1, 5, 7) > 0)
    node = fuses(call, inputs, {"add": 0})
    assert tuple(node.meta["val"].shape) == (2, 3, 5, 6)


def test_positions_split_around_a_bias() -> None:
    """s[h, w, h', w'] + row[h, w, h'] + column[h, w, w']"""

    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        grid = q.reshape(2, 3, 2, 3, 8)
        row = torch.einsum("bnhwc,hkc->bnhwk", grid, m.row)
        column = torch.einsum("bnhwc,wkc->bnhwk", grid, m.column)
        s = (q * 0.3 @ k.mT).view(2, 3, 2, 3, 4, 2)
        s = s + row[..., None] + column[..., None, :]
        return s.view(2, 3, 6, 8).softmax(-1) @ v

    inputs = normal(2, 3, 6, 8), normal(2, 3, 8, 8), normal(2, 3, 8, 6)
    fuses(call, inputs, {"einsum": 2, "add": 1}, row=weight(2, 4, 8), column=weight(3, 2, 8))


def test_multihead_attention_whose_weights_nobody_wants() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x)[0]

    x = normal(2, 5, 8)
    passes = [RemoveDeadNodes(), RemoveNoOps(), FuseAttention()]
    graph = fxopt.optimize(Model().eval(), x, passes=passes)
    assert op_counts(graph)["scaled_dot_product_attention"] == 1
    assert "softmax" not in op_counts(graph)


# -- grouped heads ---------------------------------------------------------------------------------


def repeated(x: torch.Tensor) -> torch.Tensor:
    batch, few, length, width = x.shape
    return x[:, :, None].expand(batch, few, 2, length, width).reshape(batch, 2 * few, length, width)


@pytest.mark.parametrize("repeat", [repeated, lambda x: x.repeat_interleave(2, dim=1)])
@pytest.mark.parametrize("fused", [False, True])
def test_repeated_heads_are_grouped(repeat: Call, fused: bool) -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        if fused:
            return F.scaled_dot_product_attention(q, repeat(k), repeat(v))
        return (q @ transposed(repeat(k)) * 0.3).softmax(-1) @ repeat(v)

    inputs = normal(2, 6, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 7, 6)
    model = Calls(call)
    graph, _ = check_pass(FuseAttention(), model, inputs, misses=[])
    assert op_counts(graph) == {"scaled_dot_product_attention": 1}
    node = graph.find(aten.scaled_dot_product_attention.default)[0]
    assert node.kwargs["enable_gqa"] is True


def test_one_head_of_keys_is_a_group() -> None:
    inputs = normal(2, 6, 5, 8), normal(2, 1, 7, 8), normal(2, 1, 7, 6)
    node = fuses(attention(lambda m, s: s), inputs)
    assert node.kwargs["enable_gqa"] is True


def test_heads_are_not_grouped_where_only_the_keys_repeat() -> None:
    inputs = normal(2, 6, 5, 8), normal(2, 3, 7, 8), normal(2, 6, 7, 6)
    node = fuses(lambda m, q, k, v: (q @ transposed(repeated(k))).softmax(-1) @ v, inputs)
    assert node.kwargs["enable_gqa"] is False


# -- what holds it back ----------------------------------------------------------------------------

HELD_BACK: dict[str, tuple[Call, str]] = {
    "clamp": (attention(lambda m, s: s.clamp(-5, 5)), "clamp stands between its product and"),
    "tanh": (attention(lambda m, s: (s / 5).tanh() * 5), "tanh stands between its product and"),
    "talking heads": (
        attention(lambda m, s: F.linear(s.permute(0, 2, 3, 1), m.mix).permute(0, 3, 1, 2)),
        "linear stands between its product and the softmax",
    ),
    "mixed weights": (
        attention(lambda m, s: s, lambda m, w: F.linear(w.transpose(1, 3), m.mix).transpose(1, 3)),
        "linear stands between the softmax and the values",
    ),
    "gated weights": (
        attention(lambda m, s: s, lambda m, w: w * m.gate), "mul.Tensor stands between the softmax"
    ),
    "dropout": (
        attention(lambda m, s: s, lambda m, w: F.dropout(w, 0.5, True)), "is in training mode"
    ),
    "weights returned": (
        lambda m, q, k, v: (lambda w: (w @ v, w))((q @ transposed(k)).softmax(-1)),
        "its weights are used elsewhere too",
    ),
    "scores returned": (
        lambda m, q, k, v: (lambda s: (s.softmax(-1) @ v, s))(q @ transposed(k)),
        "matmul is used elsewhere too",
    ),
    "masked scores returned": (
        lambda m, q, k, v: (lambda s: (s.softmax(-1) @ v, s))(q @ transposed(k) + m.bias),
        "add is used elsewhere too",
    ),
    "no product": (
        lambda m, q, k, v: F.linear(q, m.narrow).softmax(-1) @ v, "its scores come from linear"
    ),
    "an input": (lambda m, q, k, v: q[..., :7].softmax(-1) @ v, "its scores come from slice"),
    "over the queries": (
        lambda m, q, k, v: (q @ transposed(k)).softmax(-2) @ v, "not summed over the keys alone"
    ),
    "over a batch axis": (
        lambda m, q, k, v: (q @ transposed(k)).softmax(1) @ v, "its softmax is not over the keys"
    ),
    "a maximum of the columns": (
        attention(lambda m, s: s - s.amax(-2, keepdim=True)), "differs between the keys"
    ),
    "a factor for each score": (
        attention(lambda m, s: s * m.gate), "every score has a factor of its own"
    ),
    "a tensor that scales the mask": (
        attention(lambda m, s: (s + m.bias) * m.heads), "scales scores and mask by a tensor"
    ),
    "a bias larger than the scores": (
        attention(lambda m, s: s[:1] + m.large), "slice.Tensor stands between its product"
    ),
    "filled with an ordinary number": (
        attention(lambda m, s: s.masked_fill(m.gate > 0, -1e4)), "scores may be lower"
    ),
    "infinity added": (attention(lambda m, s: s + math.inf), "inf is added to its scores"),
    "scaled by nothing": (attention(lambda m, s: s * 0), "scales by 0"),
    "the scores twice": (attention(lambda m, s: s + s), "takes the scores twice"),
    "a mask that hides a row": (
        attention(lambda m, s: s + m.hidden), "its mask hides all keys of a query"
    ),
    "a mask that is not a number": (attention(lambda m, s: s + m.nan), "its mask is not finite"),
    "rounded": (
        attention(lambda m, s: s.half(), lambda m, w: w.to(torch.float64)),
        "rounds to torch.float16",
    ),
    "a single query": (
        lambda m, q, k, v: torch.einsum(
            "bhk,bhkd->bhd", torch.einsum("bhd,bhkd->bhk", q[:, :, 0], k).softmax(-1), v
        ),
        "it has no axis of queries",
    ),
    "two axes in the sum": (
        lambda m, q, k, v: torch.einsum(
            "bqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bqk", q, k).softmax(-1), v
        ),
        "its scores are summed over more than one axis",
    ),
    "the weights times themselves": (
        lambda m, q, k, v: (lambda w: w @ w)((q @ transposed(q)).softmax(-1)), "with themselves"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD_BACK)
def test_holds_back_and_says_why(name: str) -> None:
    call, reason = HELD_BACK[name]
    tensors: dict[str, torch.Tensor] = {
        "mix": weight(3, 3), "gate": normal(5, 7), "narrow": weight(7, 8), "bias": weight(5, 7),
        "heads": weight(3, 1, 1), "large": normal(2, 3, 5, 7),
        "nan": torch.full((5, 7), math.nan),
        "hidden": torch.zeros(5, 7).index_fill(0, torch.tensor([2]), -math.inf),
    }  # fmt: skip
    model = Calls(call, **tensors)
    check_pass(
        FuseAttention(), model, heads(), rewrites=0, misses=[reason], add_noise=False,
        tolerance=1e-3 if name == "rounded" else 1e-10,
        gradients=name not in ("dropout", "infinity added", "a mask that is not a number",
                               "a mask that hides a row"),
    )  # fmt: skip


UNKNOWN: dict[str, Call] = {
    "a float input": lambda m, s, x, shown: s + x,
    "a float input, selected from": lambda m, s, x, shown: s + x[:1] * 2,
    "infinity for what is hidden": lambda m, s, x, shown: s.masked_fill(~shown, -math.inf),
    "infinity that is added": lambda m, s, x, shown: s + torch.where(shown, 0.0, -math.inf),
    "a logarithm": lambda m, s, x, shown: s + shown.to(s.dtype).log(),
    "part of a float input": lambda m, s, x, shown: s + x.chunk(1)[0].unbind()[0],
    "a bounded float input": lambda m, s, x, shown: s + torch.minimum(x.clamp(max=0), x * 0 + 1),
    "one divided by a mask": lambda m, s, x, shown: s - 1 / shown.to(s.dtype),
    "a pole": lambda m, s, x, shown: s - shown.to(s.dtype) ** -1.0,
    "a low number that is not lost in": lambda m, s, x, shown: s.masked_fill(~shown, -1e9),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_mask_that_may_hide_a_whole_row_holds_back(name: str) -> None:
    """Softmax gives nan there, or the same weight to all, and attention 0, or other weights."""
    inputs = (*heads(), normal(5, 7), normal(2, 1, 5, 7) > -1)
    holds_back(attention(UNKNOWN[name]), inputs, "a mask may hide all keys of a query")


def test_two_lowest_masks_may_add_up_to_infinity() -> None:
    def change(m: Any, s: Any, shown: Any) -> Any:
        return s + torch.where(shown, 0.0, LOWEST) + torch.where(shown[..., :1], 0.0, LOWEST)

    inputs = (*heads(), normal(2, 1, 5, 7) > -1)
    holds_back(attention(change), inputs, "its masks may add up to -inf")


@pytest.mark.parametrize(("lowest", "fuses"), [(-65504.0, False), (-300.0, False), (-200.0, True)])
def test_half_precision_masks_that_swallow_the_scores(lowest: float, fuses: bool) -> None:
    """s + lowest loses digits of s in float16, and the kernel adds in float32."""

    def change(m: Any, s: Any, shown: Any) -> Any:
        return s + (~shown).to(s.dtype) * lowest

    inputs = tuple(x.half() for x in heads())
    model = Calls(attention(change))
    graph = fxopt.optimize(
        model, (*inputs, normal(2, 1, 5, 7) > -1), passes=[FuseAttention()], verify="off"
    )
    assert op_counts(graph).get("scaled_dot_product_attention", 0) == fuses


def test_a_softmax_that_feeds_no_product_is_no_near_miss() -> None:
    check_pass(
        FuseAttention(), Calls(lambda m, x: x.softmax(-1) * 2), normal(3, 4), rewrites=0, misses=[]
    )


# -- dtypes, sizes, sharing ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_half_precision(dtype: torch.dtype, wide: bool) -> None:
    """The weights may be computed in float32, as attention does by itself."""

    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        s = q @ transposed(k) * 0.3 + m.bias
        return s.softmax(-1, dtype=torch.float32 if wide else None).to(q.dtype) @ v

    inputs = tuple(x.to(dtype) for x in heads())
    model = Calls(call, bias=weight(3, 5, 7).to(dtype).detach())
    check_pass(
        FuseAttention(), model, inputs, after=FUSED | {"to": 0}, misses=[], double=False,
        add_noise=False, tolerance=0.02, gradients=False,
    )  # fmt: skip


def test_a_mask_of_another_dtype() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        return (q @ transposed(k) + m.bias).softmax(-1).to(q.dtype) @ v

    inputs = tuple(x.half() for x in heads())
    model = Calls(call, bias=normal(5, 7).double())
    graph, _ = check_pass(
        FuseAttention(), model, inputs, after=FUSED, double=False, add_noise=False, tolerance=0.02,
        gradients=False,
    )  # fmt: skip
    (node,) = graph.find(aten.scaled_dot_product_attention.default)
    assert node.args[3].meta["val"].dtype is torch.float16


def test_integers_are_no_attention() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        return (q @ transposed(k)).softmax(-1, dtype=torch.float64).to(torch.int64) @ v

    inputs = tuple((x * 3).long() for x in heads())
    holds_back(call, inputs, "attention does not take torch.int64")


DYNAMIC: dict[str, tuple[Call, tuple[dict[int, Any] | None, ...]]] = {
    "batch": (attention(lambda m, s: s * 0.3 + m.bias), ({0: "b"}, {0: "b"}, {0: "b"})),
    "batch and lengths": (
        attention(lambda m, s: s * 0.3), ({0: "b", 2: "n"}, {0: "b", 2: "m"}, {0: "b", 2: "m"})
    ),
    "einsum": (LAYOUTS["einsum"][0], ({0: "b", 2: "n"}, {0: "b", 2: "m"}, {0: "b", 2: "m"})),
    "merged heads": (
        lambda m, q, k, v: torch.bmm(
            torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
        ),
        ({0: "b"}, {0: "b"}, {0: "b"}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DYNAMIC)
def test_symbolic_sizes(name: str) -> None:
    call, sizes = DYNAMIC[name]
    dims = {x: torch.export.Dim(x, min=2, max=64) for x in ("b", "n", "m")}
    shapes = tuple({a: dims[x] for a, x in (one or {}).items()} for one in sizes)
    model = Calls(call, bias=weight(3, 5, 7))
    graph, _ = check_pass(
        FuseAttention(), model, heads(), after=FUSED, misses=[], dynamic_shapes=(shapes,),
        add_noise=False,
    )  # fmt: skip
    others = tuple(torch.cat([x, x]).double() for x in heads())
    assert relative_error(graph(*others), model.double()(*others)) < 1e-10


def test_window_masks_of_a_symbolic_batch() -> None:
    x = normal(8, 3, 5, 8)
    model = Calls(attention(windows), bias=weight(1, 3, 5, 5), shifted=normal(4, 1, 5, 5))
    dims = {0: 4 * torch.export.Dim("b", min=2, max=16)}
    graph, _ = check_pass(
        FuseAttention(), model, (x, x, x), after=FUSED, dynamic_shapes=((dims, dims, dims),),
        add_noise=False,
    )  # fmt: skip
    other = normal(12, 3, 5, 8).double()
    assert relative_error(graph(other, other, other), model.double()(other, other, other)) < 1e-10


def test_attentions_may_share_all_they_use() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        first = (q @ transposed(k) + m.bias).softmax(-1) @ v
        return first + (q @ transposed(k * 2) + m.bias).softmax(-1) @ v

    model = Calls(call, bias=weight(3, 5, 7))
    check_pass(
        FuseAttention(), model, heads(), after={"scaled_dot_product_attention": 2, "softmax": 0},
        rewrites=2, add_noise=False,
    )  # fmt: skip


def test_scaled_queries_with_other_users_stay() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        q = q * 0.3
        return (q @ transposed(k)).softmax(-1) @ v, q

    node = fuses(call, heads(), {"mul": 1})
    assert node.kwargs["scale"] == 1.0


def test_stops_when_fuel_is_out() -> None:
    def call(m: Any, q: Any, k: Any, v: Any) -> Any:
        x = (q @ transposed(k)).softmax(-1) @ v
        return (x @ transposed(x)).softmax(-1) @ x

    graph = capture(Calls(call).eval(), heads())
    with fuel(1):
        FuseAttention().run(graph)
    assert op_counts(graph)["scaled_dot_product_attention"] == 1


def test_a_mask_may_come_a_long_way() -> None:
    class Far(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            mask = q.tanh() @ k.tanh().transpose(-1, -2)
            for _ in range(60):
                mask = mask.neg().flip(-1)
            return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v

    inputs = tuple(torch.randn(2, 3, 5, 4) for _ in range(3))
    graph = fxopt.optimize(Far(), inputs, passes=[FuseAttention()], verify="final")
    assert op_counts(graph)["scaled_dot_product_attention"] == 1
