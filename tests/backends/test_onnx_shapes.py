"""Emitters that rearrange, index, reduce, sort and create, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.backends.onnx_check import check, flags, integers, normal, positive

Case = tuple[Callable[..., Any], tuple[Any, ...]]


def written(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    x = x.clone()
    x[index] = value
    return x


def written_in_slices(x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[1:3] = row
    x[:, 0] = 7.0
    x[::2, 1] = 1.0
    x[-1] += 1
    return x


SHAPES: dict[str, Callable[[], Case]] = {
    "reshape": lambda: (
        lambda x: (
            x.reshape(6, 4),
            x.view(-1),
            x.flatten(1),
            x.reshape(1, -1, 2),
            x.unflatten(2, (2, -1)),
        ),
        (normal(2, 3, 4),),
    ),
    "permute": lambda: (
        lambda x: (x.permute(2, 0, 1), x.transpose(0, 2), x.mT, x.movedim(0, 2), x[0].t()),
        (normal(2, 3, 4),),
    ),
    "squeeze": lambda: (
        lambda x: (x.squeeze(), x.squeeze(1), x.unsqueeze(-1)),
        (normal(2, 1, 3, 1),),
    ),
    "expand": lambda: (
        lambda a, b: (a.expand(4, 3, 5), a.expand(-1, 5), a.expand_as(b)),
        (normal(3, 1), normal(2, 3, 5)),
    ),
    "cat": lambda: (
        lambda a, b, i: (
            torch.cat([a, b], 1),
            torch.stack([a, b], -1),
            torch.cat([a]),
            torch.cat([a[0], i]),
        ),
        (normal(2, 3), normal(2, 3), integers(4)),
    ),
    "split": lambda: (
        lambda x: (
            *x.split(2, 1),
            *x.chunk(2, 1),
            *x.split([1, 4], 1),
            *x.unbind(0),
            *x.tensor_split(3, 1),
        ),
        (normal(2, 5),),
    ),
    "repeat": lambda: (
        lambda x: (
            x.repeat(2, 1, 3),
            x.tile(2),
            x.repeat_interleave(2, 0),
            x.repeat_interleave(3, 1),
            x.repeat_interleave(2),
        ),
        (normal(2, 3),),
    ),
    "flip and roll": lambda: (
        lambda x: (x.flip(0), x.flip(0, 2), x.roll(1, 0), x.roll((1, -2), (0, 2)), x.roll(2)),
        (normal(2, 3, 4),),
    ),
    "meshgrid": lambda: (
        lambda a, b: (*torch.meshgrid(a, b, indexing="ij"), *torch.meshgrid(a, b, indexing="xy")),
        (normal(3), normal(4)),
    ),
    "pixels": lambda: (
        lambda x: (
            F.pixel_shuffle(x, 2),
            F.pixel_unshuffle(x, 2),
            F.channel_shuffle(x, 4),
            F.pixel_shuffle(x[0], 2),
            F.pixel_unshuffle(x[0], 2),
            F.pixel_unshuffle(x[:, :1], 2),
            F.pixel_unshuffle(x[0, :1], 2),
        ),
        (normal(2, 8, 4, 6),),
    ),
    "diagonals": lambda: (
        lambda x: (
            x.diagonal(),
            x.diagonal(1),
            x.diagonal(-1),
            x.tril(),
            x.triu(1),
            x.tril(-1),
            x.trace(),
            x.diag(),
        ),
        (normal(4, 5),),
    ),
    "diagonal of a batch": lambda: (
        lambda x: (x.diagonal(0, 1, 2), torch.diag_embed(x[0], 0, 1, 2)),
        (normal(2, 3, 4),),
    ),
    "triangles of integers": lambda: (lambda x: (x.tril(), (x > 2).triu()), (integers(4, 4),)),
    "unfold": lambda: (lambda x: (x.unfold(1, 3, 2), x.unfold(0, 2, 1)), (normal(4, 9, 2),)),
    "as_strided": lambda: (lambda x: x.as_strided((3, 3), (2, 1), 1), (normal(4, 4),)),
    "pad": lambda: (
        lambda x: (
            F.pad(x, (1, 2)),
            F.pad(x, (1, 2), value=2.5),
            F.pad(x, (-1, 1)),
            F.pad(x, (0, 0, 1, 1)),
            *(F.pad(x, (1, 2, 3, 0), mode) for mode in ("reflect", "replicate", "circular")),
        ),
        (normal(1, 2, 5, 5),),
    ),
    "pad integers and flags": lambda: (
        lambda a, b: (F.pad(a, (1, 1), value=7), F.pad(b, (1, 1), value=True)),
        (integers(2, 3), flags(2, 3)),
    ),
    "creation": lambda: (
        lambda x: (
            x + torch.arange(4),
            torch.arange(1, 5, 0.5) + x[0, 0],
            torch.linspace(0, 1, 5) + x[0, 0],
            torch.eye(4) + x[0],
            torch.full((2, 3), 7) + x[0, 0],
            torch.zeros_like(x) + x,
            torch.ones(100, 100) * x[0, 0],
            x.new_zeros(2) + x[0, 0],
            torch.full_like(x, 2) * x,
            torch.tril_indices(3, 3) + x[0, 0].int(),
        ),
        (normal(3, 4),),
    ),
}

INDEXING: dict[str, Callable[[], Case]] = {
    "slices": lambda: (
        lambda x: (
            x[:, 1:],
            x[::2],
            x[..., -2:],
            x[:, 1:3, ::2],
            x[-1],
            x[:, 0],
            x[None],
            x.narrow(1, 1, 2),
        ),
        (normal(4, 5, 6),),
    ),
    "one index": lambda: (
        lambda x, i: (x[i], x[:, i], x[:, :, i]),
        (normal(4, 5, 6), integers(3, high=4)),
    ),
    "two indices": lambda: (
        lambda x, i, j: (x[i, j], x[:, i, j], x[i, :, j], x[i[:, None], j[None]], x[i, 2:4, j]),
        (normal(4, 5, 6), integers(3, high=4), integers(3, high=4)),
    ),
    "negative index": lambda: (lambda x: x[torch.tensor([-1, -2])], (normal(4, 5),)),
    "mask": lambda: (
        lambda x, m: (x[x > 0], x[:, m], x.masked_select(m[:, None])),
        (normal(3, 4, 2), flags(4)),
    ),
    "gather": lambda: (
        lambda x, i: (
            x.gather(1, i),
            x.index_select(1, i[0]),
            x.take(i),
            torch.take_along_dim(x, i, 1),
            F.one_hot(i, 5),
        ),
        (normal(3, 4), integers(3, 2, high=4)),
    ),
    "scatter": lambda: (
        lambda x, i, s: (
            x.scatter(1, i, s),
            x.scatter(1, i, 2.0),
            x.scatter_add(1, i, s),
            x.scatter_reduce(1, i, s, "amax"),
            x.scatter_reduce(1, i, s, "sum", include_self=False),
        ),
        (normal(3, 5), torch.tensor([[0, 2], [1, 3], [4, 0]]), normal(3, 3)),
    ),
    "index_add": lambda: (
        lambda x, i, s: (
            x.index_add(1, i, s),
            x.index_add(1, i, s, alpha=2),
            x.index_copy(1, i, s),
            x.index_fill(1, i, 3.0),
        ),
        (normal(3, 5), torch.tensor([0, 3]), normal(3, 2)),
    ),
    "index_put": lambda: (
        lambda x, i, v: (
            written(x, i, v),
            written(x, i, 0.0),
            x.index_put((i,), v, accumulate=True),
            written(x, (slice(None), i), 1.5),
            written(x, x > 0, 0.5),
        ),
        (normal(5, 3), torch.tensor([0, 2]), normal(2, 3)),
    ),
    "index_put behind dimensions": lambda: (
        lambda x, i, j, v: (
            written(x, (slice(None), i, j), v),
            written(x, (i[:2] % 2, slice(None), j[:2]), 3.0),
        ),
        (normal(2, 5, 4), torch.tensor([0, 3, 1]), torch.tensor([0, 3, 2]), normal(2, 3)),
    ),
    "mask of rows": lambda: (lambda x, m: written(x, m, 7.0), (normal(3, 4), flags(3))),
    "written in slices": lambda: (written_in_slices, (normal(5, 3), normal(3))),
    "slice_scatter": lambda: (
        lambda x, s: (torch.slice_scatter(x, s, 1, 1, 4), torch.select_scatter(x, s[:, 0], 1, 2)),
        (normal(3, 5), normal(3, 3)),
    ),
    "masked_scatter": lambda: (
        lambda x, m, s: x.masked_scatter(m, s),
        (normal(3, 4), flags(3, 4), normal(12)),
    ),
    "nonzero": lambda: (
        lambda x: (x.nonzero(), *x.nonzero(as_tuple=True)),
        (integers(3, 4, high=2),),
    ),
}

REDUCTIONS: dict[str, Callable[[], Case]] = {
    "maxima": lambda: (
        lambda x: (
            *x.max(1),
            *x.min(0, keepdim=True),
            x.max(),
            x.min(),
            x.max(1).values,
            *x.aminmax(dim=1),
        ),
        (normal(3, 4),),
    ),
    "sums of integers": lambda: (
        lambda x: (
            x.sum(),
            x.sum(0),
            x.bool().sum(),
            x.sum(0, dtype=torch.float64),
            x.any(),
            x.all(1),
        ),
        (integers(3, 4, high=2, dtype=torch.int32),),
    ),
    "variances": lambda: (
        lambda x: (
            x.var(1, correction=0),
            x.std(0, unbiased=False),
            *torch.var_mean(x, 1),
            *torch.std_mean(x, 0, keepdim=True),
            x.std(),
        ),
        (normal(3, 4),),
    ),
    "norms": lambda: (
        lambda x: (
            x.norm(),
            x.norm(dim=1),
            x.norm(p=1, dim=0, keepdim=True),
            x.norm(p=3, dim=1),
            x.norm(p=float("inf"), dim=1),
            torch.linalg.vector_norm(x, 0, 1),
            F.normalize(x, dim=1),
        ),
        (normal(3, 4),),
    ),
    "counts": lambda: (
        lambda x: (x.count_nonzero(), x.count_nonzero(1)),
        (integers(3, 4, high=2),),
    ),
    "cumulations": lambda: (
        lambda x: (x.cumsum(1), x.cumprod(1), x.logcumsumexp(1), x.cummax(1)[0], x.cummin(0)[0]),
        (normal(3, 9),),
    ),
    "cumulations of integers": lambda: (
        lambda x: (x.cumsum(0), (x > 2).cumsum(1)),
        (integers(3, 9, dtype=torch.int32),),
    ),
    "diff": lambda: (
        lambda x, i: (x.diff(), x.diff(n=2, dim=0), i.diff(prepend=i[:, :1])),
        (normal(4, 5), integers(4, 5)),
    ),
    "distances": lambda: (
        lambda a, b: (
            torch.cdist(a, b),
            torch.cdist(a, b, p=1.0),
            F.cosine_similarity(a[0, :1], b[0], 1),
            torch.dist(a[0, 0], b[0, 0]),
        ),
        (normal(2, 3, 4), normal(2, 5, 4)),
    ),
    "order": lambda: (
        lambda x: (
            *x.topk(3),
            *x.topk(2, 0, largest=False),
            *x.sort(),
            *x.sort(0, descending=True),
            x.argsort(),
            *x.kthvalue(2),
            *x.median(1),
            x.median(),
            *torch.sort(x, stable=True),
            x.msort(),
        ),
        (normal(5, 7),),
    ),
    "search": lambda: (
        lambda x, edges: (
            torch.bucketize(x, edges),
            torch.bucketize(x, edges, right=True),
            torch.searchsorted(edges, x),
        ),
        (normal(3, 4), torch.tensor([-1.0, 0.0, 0.5])),
    ),
    "logits": lambda: (
        lambda x, t: (F.cross_entropy(x, t), F.mse_loss(x, x * 2), F.huber_loss(x, x * 3)),
        (normal(3, 4), integers(3, high=4)),
    ),
    "of empty tensors": lambda: (
        lambda x: (x + 1, x.sum(), torch.cat([x, x], 1)),
        (torch.zeros(0, 3),),
    ),
    "of numbers": lambda: (lambda x: (x + 1, x * x, x.sum(), x.reshape(1)), (torch.tensor(2.0),)),
}

REDUCING = (
    "sum",
    "mean",
    "amax",
    "amin",
    "prod",
    "std",
    "var",
    "logsumexp",
    "any",
    "all",
    "argmax",
    "argmin",
)
ALL = {**SHAPES, **INDEXING, **REDUCTIONS}


@pytest.mark.parametrize("name", ALL)
def test_case(name: str) -> None:
    function, inputs = ALL[name]()
    check(function, inputs)


@pytest.mark.parametrize(
    ("function", "channels", "nodes"),
    [
        (lambda x: F.pixel_shuffle(x, 2), 8, {"DepthToSpace": 1}),
        (lambda x: F.pixel_unshuffle(x, 2), 1, {"SpaceToDepth": 1}),
        (lambda x: F.pixel_unshuffle(x, 2), 2, {"Reshape": 2, "Transpose": 1}),
        (lambda x: x.index_select(1, torch.tensor([1, 0])), 2, {"Gather": 1}),
        (lambda x: F.adaptive_avg_pool2d(x, 1), 2, {"GlobalAveragePool": 1}),
        (lambda x: x.mean((2, 3)), 2, {"ReduceMean": 1}),
    ],
)
def test_one_call_is_one_node(
    function: Callable[..., Any], channels: int, nodes: dict[str, int]
) -> None:
    assert check(function, (normal(2, channels, 4, 6),)).op_counts() == nodes


@pytest.mark.parametrize("name", REDUCING)
def test_reduction(name: str) -> None:
    reduce = getattr(torch, name)
    check(lambda x: (reduce(x, 1), reduce(x, -1, keepdim=True)), (normal(3, 4, 5),))
    if name != "logsumexp":
        check(reduce, (normal(3, 4, 5),))
    if name in ("sum", "mean", "amax", "std", "logsumexp"):
        check(lambda x: (reduce(x, (0, 2)), reduce(x, (1, 2), keepdim=True)), (positive(3, 4, 5),))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x[1:, 1:3, ::2] + 1, 1),
        (lambda x: x[1:, 1:][:2] + 1, 2),  # one axis twice
        (lambda x: (x[1:][:, 2:] + 1, x[1:].relu()), 2),  # what is between has another reader
        (lambda x: (x[1:], x[1:][:, 2:]), 2),
        (lambda x: x[1:][:, 2:], 1),
        (lambda x: x[1:, 1:][:, :, 1:][:, :, :-1] + 1, 2),
    ],
)
def test_slices_along_several_axes_are_one(function: Callable[..., Any], count: int) -> None:
    assert check(function, (normal(4, 5, 6),)).op_counts()["Slice"] == count


def test_slices_of_symbolic_sizes_stay_apart() -> None:
    check(lambda x: x[1:, 1:].relu(), (normal(4, 5),), dynamic_shapes=({0: "n"},))
