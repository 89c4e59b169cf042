"""Emitters of layers and of products, against PyTorch, with noise in weights and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backends.onnx_check import check, flags, integers, noisy, normal, positive

LAYERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1), normal(2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, 3, 2, 1, bias=False), normal(2, 4, 9, 9)),
    "conv2d uneven": lambda: (
        nn.Conv2d(4, 8, (3, 1), (1, 2), (1, 0), (2, 1), groups=2),
        normal(2, 4, 9, 9),
    ),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2), normal(1, 2, 4, 4, 4)),
    "conv same": lambda: (nn.Conv2d(2, 3, 4, padding="same"), normal(1, 2, 7, 7)),
    "conv same dilated": lambda: (nn.Conv1d(2, 3, 2, padding="same", dilation=3), normal(1, 2, 9)),
    "conv valid": lambda: (nn.Conv2d(2, 3, 3, padding="valid"), normal(1, 2, 7, 7)),
    "conv without batch": lambda: (nn.Conv2d(2, 3, 3), normal(2, 7, 7)),
    "conv reflect": lambda: (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        normal(1, 2, 7, 7),
    ),
    "conv circular": lambda: (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        normal(1, 2, 7, 7),
    ),
    "conv transpose 1d": lambda: (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), normal(2, 4, 9)),
    "conv transpose 2d": lambda: (
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
        normal(2, 4, 5, 5),
    ),
    "conv transpose dilated": lambda: (
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 0, dilation=2),
        normal(2, 4, 5, 5),
    ),
    "conv transpose 3d": lambda: (nn.ConvTranspose3d(2, 2, 2, 2), normal(1, 2, 3, 3, 3)),
    "batch norm 1d": lambda: (nn.BatchNorm1d(3), normal(5, 3)),
    "batch norm without affine": lambda: (nn.BatchNorm2d(3, affine=False), normal(5, 3, 4, 4)),
    "batch norm without statistics": lambda: (
        nn.BatchNorm2d(3, track_running_stats=False),
        normal(5, 3, 4, 4),
    ),
    "layer norm": lambda: (nn.LayerNorm(6), normal(2, 3, 6)),
    "layer norm of two": lambda: (nn.LayerNorm((3, 6), elementwise_affine=False), normal(2, 3, 6)),
    "layer norm without bias": lambda: (nn.LayerNorm(6, bias=False), normal(2, 3, 6)),
    "group norm": lambda: (nn.GroupNorm(2, 6), normal(2, 6, 4, 4)),
    "group norm flat": lambda: (nn.GroupNorm(1, 6), normal(2, 6)),
    "group norm without affine": lambda: (nn.GroupNorm(3, 6, affine=False), normal(2, 6, 5)),
    "instance norm": lambda: (nn.InstanceNorm2d(3), normal(2, 3, 4, 4)),
    "instance norm affine": lambda: (nn.InstanceNorm1d(3, affine=True), normal(2, 3, 8)),
    "instance norm statistics": lambda: (
        nn.InstanceNorm1d(3, track_running_stats=True),
        normal(2, 3, 8),
    ),
    "rms norm": lambda: (nn.RMSNorm(6), normal(2, 3, 6)),
    "rms norm without weight": lambda: (nn.RMSNorm(6, 1e-3, False), normal(2, 3, 6)),
    "local response norm": lambda: (nn.LocalResponseNorm(3), normal(2, 5, 4, 4)),
    "weight norm": lambda: (
        torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        normal(2, 3),
    ),
    "linear": lambda: (nn.Linear(3, 4), normal(2, 3)),
    "linear of three dimensions": lambda: (nn.Linear(3, 4), normal(2, 5, 3)),
    "linear of one": lambda: (nn.Linear(3, 4), normal(3)),
    "linear without bias": lambda: (nn.Linear(3, 4, bias=False), normal(2, 5, 3)),
    "embedding": lambda: (nn.Embedding(7, 4, padding_idx=0), integers(2, 3)),
    "lstm": lambda: (nn.LSTM(4, 5), normal(6, 2, 4)),
    "lstm both ways": lambda: (
        nn.LSTM(4, 5, 2, bidirectional=True, batch_first=True),
        normal(2, 6, 4),
    ),
    "lstm without bias": lambda: (nn.LSTM(4, 5, bias=False), normal(6, 2, 4)),
    "lstm without batch": lambda: (nn.LSTM(4, 5), normal(6, 4)),
    "gru": lambda: (nn.GRU(4, 5, 2, batch_first=True), normal(2, 6, 4)),
    "gru both ways": lambda: (nn.GRU(4, 5, bidirectional=True), normal(6, 2, 4)),
    "rnn": lambda: (nn.RNN(4, 5), normal(6, 2, 4)),
    "rnn relu": lambda: (nn.RNN(4, 5, nonlinearity="relu", bidirectional=True), normal(6, 2, 4)),
    "lstm cell": lambda: (nn.LSTMCell(4, 5), normal(2, 4)),
    "gru cell": lambda: (nn.GRUCell(4, 5), normal(2, 4)),
    "max pool": lambda: (nn.MaxPool2d(3, 2, 1), normal(2, 3, 9, 10)),
    "max pool 1d": lambda: (nn.MaxPool1d(3, 2, 1), normal(2, 3, 9)),
    "max pool 3d": lambda: (nn.MaxPool3d(2), normal(1, 2, 4, 4, 4)),
    "max pool rounded up": lambda: (nn.MaxPool2d(3, 2, ceil_mode=True), normal(2, 3, 10, 10)),
    "max pool dilated": lambda: (nn.MaxPool2d(2, 1, dilation=2), normal(2, 3, 10, 10)),
    "max pool with indices": lambda: (nn.MaxPool2d(2, return_indices=True), normal(2, 3, 4, 4)),
    "average pool": lambda: (nn.AvgPool2d(3, 2, 1), normal(2, 3, 9, 9)),
    "average pool without padding": lambda: (
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        normal(2, 3, 9, 9),
    ),
    "average pool rounded up": lambda: (
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        normal(2, 3, 10, 10),
    ),
    "average pool rounded up without padding": lambda: (
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        normal(2, 3, 10, 10),
    ),
    "average pool with divisor": lambda: (nn.AvgPool2d(2, divisor_override=3), normal(2, 3, 4, 4)),
    "average pool 3d": lambda: (nn.AvgPool3d(2), normal(1, 2, 4, 4, 4)),
    "adaptive average": lambda: (nn.AdaptiveAvgPool2d(1), normal(2, 3, 5, 5)),
    "adaptive average even": lambda: (nn.AdaptiveAvgPool2d((2, 3)), normal(2, 3, 4, 6)),
    "adaptive average uneven": lambda: (nn.AdaptiveAvgPool2d((3, 2)), normal(2, 3, 7, 5)),
    "adaptive average 3d": lambda: (nn.AdaptiveAvgPool3d((2, 1, 3)), normal(2, 3, 4, 5, 7)),
    "adaptive maximum": lambda: (nn.AdaptiveMaxPool2d(1), normal(2, 3, 4, 6)),
    "adaptive maximum uneven": lambda: (nn.AdaptiveMaxPool2d((3, 2)), normal(2, 3, 7, 5)),
    "power pool": lambda: (nn.LPPool2d(2, 2), normal(2, 3, 4, 4)),
    "encoder layer": lambda: (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        normal(2, 5, 8),
    ),
    "fold": lambda: (nn.Fold((4, 5), (2, 2)), normal(1, 12, 12)),
    "unfold": lambda: (nn.Unfold((2, 3), padding=1, stride=2), normal(2, 3, 7, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    model, inputs = LAYERS[name]()
    check(noisy(model), (inputs,))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize(
    "size", [{"size": (7, 9)}, {"size": (3, 2)}, {"scale_factor": 2}, {"scale_factor": (1.7, 0.6)}]
)
def test_interpolate(mode: str, size: dict[str, Any]) -> None:
    check(lambda x: F.interpolate(x, mode=mode, **size), (normal(1, 2, 5, 4),))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_interpolate_aligned_and_antialiased(mode: str) -> None:
    def resize(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.interpolate(x, size=(7, 9), mode=mode, align_corners=True),
            F.interpolate(x, size=(7, 9), mode=mode, antialias=True),
            F.interpolate(x, size=(3, 2), mode=mode, antialias=True),
        )

    check(resize, (normal(1, 2, 5, 4),))


def test_interpolate_in_one_and_three_dimensions() -> None:
    check(
        lambda x: (
            F.interpolate(x, scale_factor=2.0, mode="linear"),
            F.interpolate(x, size=7),
            F.interpolate(x, size=7, mode="linear", align_corners=True),
        ),
        (normal(1, 2, 5),),
    )
    check(
        lambda x: (
            F.interpolate(x, size=(4, 5, 6), mode="trilinear"),
            F.interpolate(x, scale_factor=2),
        ),
        (normal(1, 2, 3, 3, 3),),
    )


@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample(mode: str, padding: str) -> None:
    def sample(x: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.grid_sample(x, grid, mode, padding, True), F.grid_sample(
            x, grid, mode, padding, False
        )

    check(sample, (normal(2, 3, 5, 6), normal(2, 4, 4, 2) * 0.8))


def test_grids() -> None:
    check(
        lambda t: (F.affine_grid(t, (2, 3, 4, 5), False), F.affine_grid(t, (2, 3, 4, 5), True)),
        (normal(2, 2, 3),),
    )
    check(
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        (normal(1, 2, 3, 4, 5), normal(1, 2, 3, 2, 3)),
    )


# -- products -------------------------------------------------------------------------------------

PRODUCTS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "matmul": lambda: (
        lambda a, b: (a @ b, torch.matmul(a, b[0]), torch.bmm(a, b), a[0] @ b[0, :, 0]),
        (normal(2, 3, 4), normal(2, 4, 5)),
    ),
    "vectors": lambda: (
        lambda a, b: (a @ b, b @ a.t(), torch.dot(b, b), torch.outer(b, b), torch.mv(a, b)),
        (normal(3, 4), normal(4)),
    ),
    "addmm": lambda: (
        lambda a, b, c: (torch.addmm(a, b, c), torch.addmm(a, b, c, alpha=0.5, beta=2)),
        (normal(3, 5), normal(3, 4), normal(4, 5)),
    ),
    "baddbmm": lambda: (
        lambda a, b, c: (
            torch.baddbmm(a, b, c, alpha=0.5, beta=0),
            torch.baddbmm(a, b, c),
            torch.addbmm(a[0], b, c),
        ),
        (normal(2, 3, 5), normal(2, 3, 4), normal(2, 4, 5)),
    ),
    "of integers": lambda: (lambda a, b: a @ b, (integers(3, 4), integers(4, 5))),
    "einsum": lambda: (
        lambda a, b: (
            torch.einsum("bij,bjk->bik", a, b),
            torch.einsum("bij,bkj->bik", a, b.mT),
            torch.einsum("bij->bji", a),
            torch.einsum("bij,bjk->", a, b),
            torch.einsum("...ij,...jk->...ik", a, b),
            torch.einsum("bji,bjk->bik", a.mT, b),
        ),
        (normal(2, 3, 4), normal(2, 4, 5)),
    ),
    "cross": lambda: (torch.linalg.cross, (normal(4, 3), normal(4, 3))),
    "attention": lambda: (
        F.scaled_dot_product_attention,
        (normal(2, 4, 5, 8), normal(2, 4, 6, 8), normal(2, 4, 6, 7)),
    ),
    "attention causal": lambda: (
        lambda q, k: (
            F.scaled_dot_product_attention(q, k, k, is_causal=True),
            F.scaled_dot_product_attention(q, k[:, :, :3], k[:, :, :3], is_causal=True),
        ),
        (normal(2, 4, 5, 8), normal(2, 4, 5, 8)),
    ),
    "attention masked": lambda: (
        lambda q, m: (
            F.scaled_dot_product_attention(q, q, q, m > 0),
            F.scaled_dot_product_attention(q, q, q, m, scale=0.3),
        ),
        (normal(2, 4, 5, 8), normal(5, 5)),
    ),
    "attention to nothing": lambda: (
        lambda q, m: F.scaled_dot_product_attention(q, q, q, m[:, None]),
        (normal(2, 5, 8), torch.tensor([True, True, False, True, True])),
    ),
    "attention grouped": lambda: (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True),
        (normal(2, 4, 5, 8), normal(2, 2, 5, 8)),
    ),
    "attention of three dimensions": lambda: (
        F.scaled_dot_product_attention,
        (normal(2, 5, 8), normal(2, 6, 8), normal(2, 6, 8)),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_product(name: str) -> None:
    function, inputs = PRODUCTS[name]()
    check(function, inputs)


# -- other dtypes ---------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolution, norms, attention, indexing and reductions, in any dtype."""

    def __init__(self, conv: bool = True) -> None:
        super().__init__()
        self.conv = (
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
            if conv
            else nn.Conv1d(3, 8, 1)
        )
        self.first = conv
        self.norm = nn.LayerNorm(8)
        self.attention = nn.Linear(8, 24)
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.conv(x).relu() if self.first else x[:, :1].expand(-1, 8, -1, -1)
        x = self.norm(x.flatten(2).transpose(1, 2)) + self.table(index).unsqueeze(1)
        q, k, v = (
            self.attention(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        )
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = torch.cat([x, F.pad(x[:, 1:], (0, 0, 0, 1))], 1)
        return (
            self.head(x.mean(1)),
            x.amax(1),
            torch.where(x > 0, x, x * 0.1).sum((1, 2)),
            x.argmax(2) < 3,
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-10)]
)
def test_dtype(dtype: torch.dtype, tolerance: float) -> None:
    model = noisy(Small(conv=dtype != torch.float64)).to(dtype)  # the runtime convolves no doubles
    executable = check(
        model, (normal(2, 3, 4, 4, dtype=dtype), torch.tensor([1, 3])), tolerance=tolerance
    )
    noted = any("bfloat16" in note for note in executable.notes)
    assert noted == (dtype == torch.bfloat16)


def test_reductions_while_scattering_in_half_precision() -> None:
    def scatter(x: torch.Tensor, i: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            x.scatter_add(1, i, s),
            x.index_add(1, i[0], s),
            x.index_put((i[:, 0],), s[0, 0], accumulate=True),
        )

    given = (
        normal(2, 5, dtype=torch.half),
        torch.tensor([[0, 2], [1, 1]]),
        normal(2, 2, dtype=torch.half),
    )
    check(scatter, given, tolerance=2e-3)


def test_weights_that_are_inputs() -> None:
    check(
        lambda x, w, b: (F.linear(x, w, b), F.conv1d(x, w[:, :, None].expand(4, 5, 1))),
        (normal(2, 5, 5), normal(4, 5), normal(4)),
    )
    check(lambda x, m, v: F.batch_norm(x, m, v), (normal(2, 3, 4), normal(3), positive(3)))
    check(lambda x, m: x.masked_fill(m, 0.0), (normal(2, 3), flags(2, 3)))
