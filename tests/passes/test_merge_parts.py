"""merge-parts: one split for many selections, one move for many parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.passes.merge_parts import MergeParts
from fxopt.testing import check_pass

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


class Attention(torch.nn.Module):
    """Cuts what a sine made into parts and uses each in its own way."""

    def __init__(self, cut: Callable[[Any], Any], last: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.cut, self.last = cut, last

    def forward(self, x: torch.Tensor) -> Any:
        parts = self.cut(x.sin())
        if self.last is not None:
            return self.last(*parts)
        return sum((part * (i + 1)).cos() for i, part in enumerate(parts))


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)


# -- selections ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: heads(x),
        lambda x: heads(x).unbind(0),
        lambda x: [*map(heads(x).select, (0, 0, 0, 0), (2, -3, 1, 1))],
        lambda x: x.reshape(2, 5, 3, 8).unbind(2),
        lambda x: x.reshape(2, 5, 3, 8).permute(2, 0, 1, 3).unbind(0),
        lambda x: x.reshape(2, 5, 4, 6).permute(3, 0, 2, 1).unbind(2),
        lambda x: x.unflatten(2, (2, 3, 4)).unbind(2),
    ],
)
def test_selections_become_one_split(cut: Callable[[Any], Any]) -> None:
    check_pass(
        MergeParts(), Attention(cut), X, rewrites=1,
        after={"split_with_sizes": 1, "select": 0, "unbind": 0, "reshape": 1},
    )  # fmt: skip


def test_the_split_shows_heads_first() -> None:
    graph, _ = check_pass(
        MergeParts(), Attention(heads), X,
        before={"unbind": 1, "permute": 1, "reshape": 1},
        after={"permute": 1, "reshape": 1, "split_with_sizes": 1, "getitem": 3},
    )  # fmt: skip
    (permute,), (split,) = (graph.find(op) for op in (
        torch.ops.aten.permute.default, torch.ops.aten.split_with_sizes.default,
    ))  # fmt: skip
    assert permute.args[1] == [0, 2, 1, 3] and split.args[1:] == ([2, 2, 2], 1)


def test_a_permute_that_keeps_the_order_goes() -> None:
    def cut(x: torch.Tensor) -> Any:
        return x.reshape(2, 5, 3, 8).permute(2, 0, 1, 3).unbind(0)

    check_pass(MergeParts(), Attention(cut), X, before={"permute": 1}, after={"permute": 0})


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (lambda x: (heads(x)[0], heads(x)[2]), None),
        (lambda x: x.reshape(2, 5, 8, 3).unbind(3), "no dimension of known size follows"),
        (lambda x: x.sin().cos().unbind(0), "as many calls"),
        (lambda x: (x[:, 0], x[:, 1]), None),
    ],
)
def test_selections_that_stay(cut: Callable[[Any], Any], reason: str | None) -> None:
    wanted = [] if reason is None else [reason]
    check_pass(MergeParts(), Attention(cut), X, rewrites=0, misses=wanted)


def test_parts_that_are_outputs_stay() -> None:
    check_pass(
        MergeParts(), Attention(heads, lambda q, k, v: (q, k + v)), X,
        rewrites=0, misses=["is an output"],
    )  # fmt: skip


def test_a_whole_that_others_read_stays_for_them() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            y = heads(x.sin())
            return y[0] * y[1] + y[2], y.sum()

    check_pass(MergeParts(), Both(), X, rewrites=0, misses=["as many calls"])


# -- slices ----------------------------------------------------------------------------------------


def test_slices_become_one_split() -> None:
    def cut(x: torch.Tensor) -> Any:
        return x[..., :8], x[..., 8:10].repeat(1, 1, 4), x[:, :, 10:18]

    def whole(x: torch.Tensor) -> Any:
        return (*cut(x), x[..., 18:].mean(-1, keepdim=True))

    check_pass(MergeParts(), Attention(whole), X, before={"slice": 4},
               after={"slice": 0, "split_with_sizes": 1})  # fmt: skip
    check_pass(MergeParts(), Attention(cut), X, rewrites=0, misses=[])


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: (x[..., :12], x[..., 11:23]),
        lambda x: (x[..., :12:2], x[..., 12::2]),
        lambda x: (x[..., :12], x[..., :12], x[..., 12:]),
        lambda x: (x[..., :12], x[:, :, 12:, None].squeeze(3), x[..., :11].sum(-1, True)),
    ],
)
def test_slices_that_overlap_or_step_stay(cut: Callable[[Any], Any]) -> None:
    check_pass(MergeParts(), Attention(cut), X, after={"split_with_sizes": 0})


# -- moves -----------------------------------------------------------------------------------------


def test_heads_are_split_once() -> None:
    def cut(x: torch.Tensor) -> Any:
        return [part.reshape(2, 5, 2, 4).transpose(1, 2) for part in x.chunk(3, -1)]

    check_pass(
        MergeParts(), Attention(cut), X, rewrites=2,
        before={"reshape": 3, "permute": 3}, after={"reshape": 1, "permute": 1},
    )  # fmt: skip


def test_keys_keep_their_own_turn() -> None:
    def cut(x: torch.Tensor) -> Any:
        q, k, v = x.reshape(2, 5, 4, 6).split([1, 1, 4], 3)
        return q.transpose(1, 2), k.permute(0, 2, 3, 1), v.transpose(1, 2)

    model = Attention(cut, lambda q, k, v: (q @ k).softmax(-1) @ v)
    check_pass(MergeParts(), model, X, before={"permute": 3}, after={"permute": 2}, rewrites=1)


def test_parts_of_other_shapes_that_one_dimension_tells_apart() -> None:
    def cut(x: torch.Tensor) -> Any:
        q, kv = x.split([8, 16], 2)
        return q.reshape(10, 2, 4), kv.reshape(10, 4, 4)

    model = Attention(cut, lambda q, kv: q.sum(1) + kv.sum(1))
    check_pass(MergeParts(), model, X, before={"reshape": 2}, after={"reshape": 1}, rewrites=1)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (lambda x: [p.reshape(10, 8).t() if i else p.reshape(8, 10)
                    for i, p in enumerate(x.chunk(3, -1))], "shapes that no split has"),
        (lambda x: [p.reshape(5, 16).reshape(2, 5, 8) for p in x.chunk(3, -1)], None),
        (lambda x: [x.chunk(3, -1)[0].reshape(2, 5, 2, 4), x.chunk(3, -1)[1].reshape(2, 5, 2, 4)],
         None),
    ],
)  # fmt: skip
def test_parts_that_are_treated_differently_stay(cut: Any, reason: str | None) -> None:
    model = Attention(cut, lambda *parts: sum(part.cos().sum() for part in parts))
    check_pass(MergeParts(), model, X, rewrites=0, misses=None if reason is None else [reason])


def test_a_part_without_a_permute_outweighs_one() -> None:
    def cut(x: torch.Tensor) -> Any:
        q, k, v = x.reshape(2, 5, 3, 8).split(1, 2)
        return q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v

    model = Attention(cut, lambda q, k, v: q * k + v.permute(0, 2, 1, 3).cos() + v.sum())
    check_pass(MergeParts(), model, X, after={"permute": 2})


def test_two_permutes_do_not_outweigh_a_part_without_one() -> None:
    def cut(x: torch.Tensor) -> Any:
        q, k, v = x.reshape(2, 5, 3, 8).split(1, 2)
        return q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3), v

    model = Attention(cut, lambda q, k, v: (q * k).sum() + v.cos())
    check_pass(MergeParts(), model, X, rewrites=0)


def test_moved_parts_that_are_outputs_stay() -> None:
    def cut(x: torch.Tensor) -> Any:
        return [part.mT for part in x.chunk(3, -1)]

    model = Attention(cut, lambda q, k, v: (q, k, v))
    check_pass(MergeParts(), model, X, rewrites=0, misses=["is an output"])


# -- dtypes and sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_any_dtype(dtype: torch.dtype) -> None:
    model = Attention(lambda x: heads(x.to(dtype)), lambda q, k, v: q + k * v)
    check_pass(
        MergeParts(), model, X, rewrites=1, double=False, gradients=False, tolerance=0
    )


def test_symbolic_sizes() -> None:
    def cut(x: torch.Tensor) -> Any:
        n, t, _ = x.shape
        return x.reshape(n, t, 3, 2, 4).permute(2, 0, 3, 1, 4)

    model = Attention(cut, lambda q, k, v: (q @ k.mT) @ v)
    graph, _ = check_pass(MergeParts(), model, X, rewrites=1, dynamic_shapes={"x": {0: "n"}})
    y = torch.randn(7, 5, 24, dtype=torch.float64)
    assert torch.equal(graph(y), model(y))
    check_pass(
        MergeParts(), model, X, rewrites=0, misses=["several symbolic sizes"],
        dynamic_shapes={"x": {0: "n", 1: "t"}},
    )  # fmt: skip
