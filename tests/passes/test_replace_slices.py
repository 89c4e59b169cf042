"""replace-slices: space to depth, slices that follow each other, and what is neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.passes.replace_slices import ReplaceSlices
from fxopt.testing import check_pass

X = torch.randn(2, 8, 6, 16, generator=torch.Generator().manual_seed(0))


class Cut(torch.nn.Module):
    """Cuts what a sine made."""

    def __init__(self, cut: Callable[[Any], Any]) -> None:
        super().__init__()
        self.cut = cut

    def forward(self, x: torch.Tensor) -> Any:
        return self.cut(x.sin()).cos()


def merged(x: torch.Tensor) -> torch.Tensor:
    """Patch merging, as Swin does it."""
    corners = [x[:, a::2, b::2] for b in (0, 1) for a in (0, 1)]
    return torch.cat(corners, -1)


def focus(x: torch.Tensor) -> torch.Tensor:
    """A focus layer, as YOLO does it."""
    return torch.cat([x[..., a::2, b::2] for b in (0, 1) for a in (0, 1)], 1)


SPACE_TO_DEPTH: list[Callable[[Any], Any]] = [
    merged,
    lambda x: torch.cat([x[:, a::2, b::3] for a in (0, 1) for b in (0, 1, 2)], 3),
    lambda x: torch.cat([x[:, i::4] for i in range(4)], 1),
    lambda x: torch.cat([x[:, i::4] for i in range(4)], 0),
    lambda x: torch.cat([x[a::2, b::2, c::2] for a in (0, 1) for b in (0, 1) for c in (0, 1)], 2),
]


@pytest.mark.parametrize("cut", SPACE_TO_DEPTH)
def test_strided_slices_become_one_permute(cut: Callable[[Any], Any]) -> None:
    check_pass(
        ReplaceSlices(), Cut(cut), X, rewrites=1,
        after={"slice": 0, "cat": 0, "reshape": 2, "permute": 1},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_any_dtype(dtype: torch.dtype) -> None:
    model = Cut(lambda x: merged((x * 9).to(dtype)))
    check_pass(ReplaceSlices(), model, X, rewrites=1, double=False, gradients=False, tolerance=1e-3)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (lambda x: torch.cat([x[:, i::3] for i in range(3)], 1), "a stride is not known to divide"),
        (lambda x: torch.cat([x[:, i::4] for i in (0, 1, 2)], 1), "all offsets"),
        (lambda x: torch.cat([x[:, i::4] for i in (0, 2, 1, 3)], 1), "all offsets"),
        (lambda x: torch.cat([x[:, i::2] for i in (0, 1)], 1), "is used elsewhere"),
        (lambda x: torch.cat([x[:, 0::4], x[:, 1::4], x[:, 2::4], x.cos()[:, 3::4]], 1), None),
        (lambda x: torch.cat([x[:, 0::2, :3], x[:, 1::2, :3]], 1), None),
        (focus, "its rows have 1 elements"),
        (lambda x: merged(x[..., :8]), "its rows have 8 elements"),
        (lambda x: torch.cat([x[:, 0::2], x[:, :, 1::2, :].mT.mT[:, :4].repeat(1, 1, 2, 1)]), None),
    ],
)
def test_other_slices_stay(cut: Callable[[Any], Any], reason: str | None) -> None:
    check_pass(ReplaceSlices(), Cut(cut), X, rewrites=0, misses=[reason] if reason else [])


def test_slices_that_others_use_stay() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            x = x.sin()
            parts = [x[:, i::4] for i in range(4)]
            return torch.cat(parts, 1).cos(), parts[0] * parts[1]

    check_pass(ReplaceSlices(), Both(), X, rewrites=0, misses=["used elsewhere"])


def test_symbolic_sizes() -> None:
    def halves(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ops.aten.slice(x, 1, i, 2**63 - 1, 4) for i in range(4)], 3)

    graph, _ = check_pass(
        ReplaceSlices(), Cut(halves), X, rewrites=1, dynamic_shapes={"x": {0: "n"}}
    )
    x = torch.randn(5, 8, 6, 16, dtype=torch.float64)
    assert torch.equal(graph(x), Cut(halves)(x))
    check_pass(
        ReplaceSlices(), Cut(halves), X, rewrites=0, misses=["not known to divide"],
        dynamic_shapes={"x": {1: 4 * torch.export.Dim("h", min=2, max=64)}},
    )  # fmt: skip


# -- slices that follow each other -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "slices"),
    [
        (lambda x: torch.cat([x[:, 1:3], x[:, 3:5], x[:, 5:]], 1), 1),
        (lambda x: torch.cat([x[:, 5:], x[:, :2], x[:, 2:4]], 1), 2),
        (lambda x: torch.cat([x[:, 1:2], x[:, 2:4], x.cos(), x[:, 4:6]], 1), 2),
        (lambda x: torch.cat([x[..., :1], x[..., 1:2], x[..., 2:]], -1), 0),
    ],
)
def test_neighbours_become_one_slice(cut: Callable[[Any], Any], slices: int) -> None:
    graph, _ = check_pass(ReplaceSlices(), Cut(cut), X, rewrites=1)
    found = graph.find(torch.ops.aten.slice.Tensor)
    assert len([s for s in found if s.args[2:4] != (0, 9223372036854775807)]) == slices


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: torch.cat([x[:, 3:5], x[:, 1:3]], 1),
        lambda x: torch.cat([x[:, 1:3], x[:, 4:6]], 1),
        lambda x: torch.cat([x[:, 1:3], x[:, 3:5]], 0),
        lambda x: torch.cat([x[:, 1:3], x.cos()[:, 3:5]], 1),
        lambda x: torch.cat([x[:, 1:3], x[:, 3:7:2]], 1),
    ],
)
def test_others_stay(cut: Callable[[Any], Any]) -> None:
    check_pass(ReplaceSlices(), Cut(cut), X, rewrites=0)
