"""Fake-quantized graphs in OpenVINO: the numbers, and that the layers compute with integers."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.openvino import OpenVino
from fxopt.quantization.operator import fake_quantize
from tests.backends.quantized import Residual, Round, Rounded, agrees, openvino_layers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def check(
    model: Any, *inputs: torch.Tensor, more: Any = (), shapes: Any = None, **named: Any
) -> Any:
    """Lower, run, and compare as `agrees` says."""
    model = (model if isinstance(model, nn.Module) else Calls(model)).eval()
    graph = fxopt.capture(model, inputs, dynamic_shapes=shapes)
    compiled = fxopt.lower(graph, backend=OpenVino(threads=1))
    for given in (inputs, *more):
        with torch.no_grad():
            agrees(compiled(*given), model(*given), **named)
    return compiled


def layers(compiled: Any) -> dict[str, Any]:
    return dict(openvino_layers(compiled.executable.compiled))


def test_a_residual_network_computes_with_integers() -> None:
    torch.manual_seed(0)
    compiled = check(Residual(), torch.randn(2, 3, 11, 11), rare=1.0, bound=0.02)
    assert layers(compiled) == {"Convolution": ["i8"] * 3, "FullyConnected": ["i8"]}
    assert "4 layers in int8" in compiled.executable.notes[-1]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: Rounded(nn.Conv2d(16, 16, 3)), (2, 16, 9, 9)),
        (lambda: Rounded(nn.Conv2d(16, 16, 3), axis=None), (2, 16, 9, 9)),
        (lambda: Rounded(nn.Conv2d(16, 16, 3), limit=7), (2, 16, 9, 9)),
        (lambda: Rounded(nn.Conv2d(16, 16, 3, groups=4, bias=False)), (2, 16, 9, 9)),
        (lambda: Rounded(nn.Conv2d(16, 16, 3, groups=16)), (2, 16, 9, 9)),
        (lambda: Rounded(nn.Conv1d(16, 7, 3)), (2, 16, 9)),
        (lambda: Rounded(nn.Conv3d(16, 16, 3)), (1, 16, 5, 5, 6)),
        (lambda: Rounded(nn.ConvTranspose2d(16, 32, 3, 2), axis=1), (2, 16, 5, 5)),
        (lambda: Rounded(nn.Linear(16, 9)), (5, 16)),
        (lambda: Rounded(nn.Linear(16, 9)), (2, 5, 16)),
        (lambda: Rounded(nn.Linear(16, 9, bias=False)), (2, 5, 16)),
    ],
)
@pytest.mark.parametrize(
    "ends", [(0, 0, 255), (-3, -128, 127), (120, 0, 255), (3, 0, 15), (50, -56, 199)], ids=str
)
def test_a_layer_between_roundings(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], ends: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    inside = layer()
    scale = 5 / (ends[2] - ends[1])
    model = nn.Sequential(Round(scale, *ends), inside, nn.ReLU(), Round(0.02, 0))
    compiled = check(model, torch.randn(*shape), step=0.02)
    is_transposed = isinstance(inside.layer, nn.ConvTranspose2d)  # without zero points only
    if not is_transposed or ends[0] == 0:
        ((found,),) = layers(compiled).values()
        assert found == "i8"


def test_a_product_of_two_activations() -> None:
    inputs = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
    for zero_point in (0, 100):  # OpenVINO has no such product with zero points
        left, right = Round(0.02, zero_point), Round(0.03, 0, -128, 127)
        compiled = check(lambda a, b: left(a) @ right(b).mT, *inputs)  # noqa: B023
        assert layers(compiled) == {"MatMul": ["f32" if zero_point else "i8"]}


@pytest.mark.parametrize("group", [0, 8])
def test_weights_alone_are_rounded_and_nothing_else(group: int) -> None:
    torch.manual_seed(0)
    compiled = check(Rounded(nn.Linear(64, 48), group=group), torch.randn(2, 5, 64), bound=1e-6)
    assert layers(compiled) == {"FullyConnected": ["f32"]}
    assert "int8" not in compiled.executable.notes[-1]


@pytest.mark.parametrize(("zero_point", "qmin", "qmax"), [(200, 0, 1023), (-5, -32768, 32767)])
def test_ranges_of_more_than_8_bits(zero_point: int, qmin: int, qmax: int) -> None:
    check(Round(0.002, zero_point, qmin, qmax), torch.randn(3, 6) * 2)
    layer = Rounded(nn.Linear(6, 5))
    check(nn.Sequential(Round(0.002, zero_point, qmin, qmax), layer), torch.randn(3, 6) * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Round(), Rounded(nn.Linear(16, 8)), nn.ReLU(), Round(0.02, 0)).to(dtype)
    for one in (model[0], model[1], model[3]):
        one.scale = one.scale.float()
    check(model, torch.randn(4, 16, dtype=dtype), step=0.021, rare=0.08, bound=4e-3)


def test_float64_is_refused() -> None:
    with pytest.raises(fxopt.FxoptError, match="float64"):
        check(Round(), torch.randn(3, 4, dtype=torch.float64))


def test_a_tied_weight_and_what_is_returned() -> None:
    torch.manual_seed(0)
    first, layer, zero = Round(0.05, 3, 0, 15), Rounded(nn.Linear(16, 16)), torch.tensor(0).int()

    def function(x: torch.Tensor) -> Any:
        y = first(x)
        coarse = fake_quantize(layer.layer.weight, torch.tensor(0.1), zero, -2, 2)
        return x * 1, y, layer(y), F.linear(y, layer.layer.weight), F.linear(y, coarse), layer(y[0])

    check(function, torch.randn(2, 5, 16), rare=0.01)


def test_a_bias_beyond_an_int32() -> None:
    layer = Rounded(nn.Conv2d(3, 8, 3))
    with torch.no_grad():
        layer.layer.weight.mul_(1e-8)
        layer.scale.mul_(1e-8)
        layer.layer.bias.uniform_(1e4, 1e5)
    model = nn.Sequential(Round(), layer, nn.ReLU(), Round(500.0, 0))
    check(model, torch.randn(2, 3, 9, 9), step=500)


def test_a_dynamic_batch_and_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=1, max=64)
    model = nn.Sequential(Round(), Rounded(nn.Conv2d(16, 64, 3)), nn.ReLU(), Round(0.02, 0))
    x, other = torch.randn(2, 16, 9, 9), torch.randn(5, 16, 9, 9)
    compiled = check(model, x, more=[(other,)], shapes=({0: batch},), step=0.02)
    assert layers(compiled) == {"Convolution": ["i8"]}
    compiled.save(tmp_path / "model.ovx")
    with zipfile.ZipFile(tmp_path / "model.ovx") as archive:
        (weights,) = (one for one in archive.infolist() if one.filename.endswith(".bin"))
    assert weights.file_size < 1.2 * 16 * 64 * 9
    loaded = fxopt.load(tmp_path / "model.ovx")
    assert torch.equal(loaded(other), compiled(other))


def test_rounding_bounds_no_integer_inputs() -> None:
    first = Round()
    check(lambda x, n: (first(x), n + 1), torch.randn(3), torch.tensor([2**30]))


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("bias", [None, 0.0, 0.1])
def test_one_bias_for_all_outputs_in_front_of_a_relu(rows: int, bias: float | None) -> None:
    torch.manual_seed(0)
    first = nn.Linear(64, 64, bias=bias is not None)
    if bias is not None:
        nn.init.constant_(first.bias, bias)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(rows, 64)
    compiled = fxopt.compile(
        model, x, backend="openvino", precision="int8", calibration=[x], threads=1
    )
    agrees(compiled(x), compiled.graph(x), rare=1.0, bound=0.02)


def test_an_average_over_padding_and_a_mobile_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 4, 1)
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    compiled = fxopt.compile(
        model, x, backend="openvino", precision="int8", calibration=[x], threads=1
    )
    agrees(compiled(x), compiled.graph(x), rare=1.0, bound=0.02)
