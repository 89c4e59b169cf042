"""Fake-quantized graphs in ONNX: the numbers, the kernels of ONNX Runtime, and what files hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.backends.onnx import Onnx
from fxopt.quantization.operator import fake_quantize
from tests.backends.onnx_check import expected, lowered, normal
from tests.backends.quantized import Residual, Round, Rounded, agrees, float_layers, kernels

Sequential = nn.Sequential
Case = tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]


def check(model: Any, *inputs: torch.Tensor, others: Any = (), **named: Any) -> Any:
    """Lower, run, and compare as `agrees` says; its own options come first."""
    torch.manual_seed(0)
    tolerance = {key: named.pop(key) for key in ("step", "rare", "steps", "bound") if key in named}
    model = model.eval() if isinstance(model, nn.Module) else model
    executable = lowered(model, inputs, **named)
    for given in (inputs, *others):
        agrees(executable.run(*given), tuple(expected(model, given)), **tolerance)
    return executable


def pictures(channels: int = 3, size: int = 11) -> torch.Tensor:
    return normal(2, channels, size, size)


def initializers(executable: Any) -> dict[str, Any]:
    found = executable.model_proto().graph.initializer
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in found}


def dtypes_of_large(executable: Any, size: int = 64) -> set[str]:
    return {str(array.dtype) for array in initializers(executable).values() if array.size >= size}


# -- which kernels compute -------------------------------------------------------------------------


def test_a_residual_network_computes_with_integers(tmp_path: Path) -> None:
    executable = check(Residual(), pictures(), rare=1.0, bound=0.02)
    counts = kernels(executable, tmp_path)
    assert not float_layers(counts), counts
    assert (counts["QLinearConv"], counts["QLinearAdd"], counts["QGemm"]) == (3, 1, 1)
    assert counts["QLinearGlobalAveragePool"] == 1 and counts["QuantizeLinear"] == 1
    assert "Relu" not in counts and "DequantizeLinear" not in counts
    assert dtypes_of_large(executable) == {"int8"}


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor], str]] = {
    "conv": (lambda: Rounded(nn.Conv2d(3, 8, 3, 2, 1)), pictures, "QLinearConv"),
    "conv without bias": (
        lambda: Rounded(nn.Conv2d(3, 8, (3, 1), bias=False)), pictures, "QLinearConv"
    ),
    "conv in one scale": (
        lambda: Rounded(nn.Conv2d(3, 8, 3), axis=None), pictures, "QLinearConv"
    ),
    "conv of 4 bits": (lambda: Rounded(nn.Conv2d(3, 8, 3), limit=7), pictures, "QLinearConv"),
    "conv of groups": (
        lambda: Rounded(nn.Conv2d(8, 8, 3, groups=4)), lambda: pictures(8), "QLinearConv"
    ),
    "conv depthwise": (
        lambda: Rounded(nn.Conv2d(8, 16, 3, groups=8)), lambda: pictures(8), "QLinearConv"
    ),
    "conv padded": (
        lambda: Rounded(nn.Conv2d(3, 8, 3, padding="same")), pictures, "QLinearConv"
    ),
    "conv1d": (lambda: Rounded(nn.Conv1d(3, 7, 3, 2)), lambda: normal(2, 3, 13), "QLinearConv"),
    "conv3d": (
        lambda: Rounded(nn.Conv3d(3, 5, 3)), lambda: normal(1, 3, 5, 6, 7), "QLinearConv"
    ),
    "linear": (lambda: Rounded(nn.Linear(7, 9)), lambda: normal(5, 7), "QGemm"),
    "linear in one scale": (
        lambda: Rounded(nn.Linear(7, 9), axis=None), lambda: normal(5, 7), "QGemm"
    ),
    "linear on tokens": (lambda: Rounded(nn.Linear(7, 9)), lambda: normal(2, 5, 7), "QGemm"),
    "linear without bias": (
        lambda: Rounded(nn.Linear(7, 9, bias=False)), lambda: normal(2, 5, 7), "QLinearMatMul"
    ),
    "linear on a vector": (
        lambda: Rounded(nn.Linear(7, 9, bias=False)), lambda: normal(7), "QLinearMatMul"
    ),
}  # fmt: skip


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_between_roundings(name: str, signed: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    layer, inputs, kernel = LAYERS[name]
    ends = (-128, 127) if signed else (0, 255)
    model = Sequential(Round(0.02, -7 if signed else 120, *ends), layer(), Round(0.03, 9, *ends))
    executable = check(model, inputs(), step=0.03)
    counts = kernels(executable, tmp_path)
    assert counts[kernel] == 1 and not float_layers(counts), counts
    if name != "linear on a vector":
        assert "float32" not in dtypes_of_large(executable, 32)


def test_layers_without_a_rounding_behind_them(tmp_path: Path) -> None:
    tokens = normal(2, 5, 16)
    one = check(Sequential(Round(), Rounded(nn.Linear(16, 8))), tokens, rare=1.0, bound=1e-4)
    assert kernels(one, tmp_path)["QGemm"] == 1
    bare = Sequential(Round(), Rounded(nn.Linear(16, 8, bias=False)))
    assert kernels(check(bare, tokens), tmp_path)["MatMulIntegerToFloat"] == 1


def test_a_product_of_two_activations(tmp_path: Path) -> None:
    left, right = Round(0.02, 100), Round(0.03, 0, -128, 127)
    executable = check(
        lambda a, b: left(a) @ right(b).transpose(1, 2), normal(2, 5, 7), normal(2, 6, 7)
    )
    counts = kernels(executable, tmp_path)
    assert counts["MatMulIntegerToFloat"] == 1 and not float_layers(counts)


def test_linear_layers_on_tokens_become_matrices_like_others() -> None:
    model = Sequential(
        Round(), Rounded(nn.Linear(16, 32)), nn.GELU(), Round(0.01, 20), Rounded(nn.Linear(32, 16))
    )
    executable = check(model, normal(2, 5, 16), rare=1.0, bound=1e-2)
    assert executable.op_counts()["Gemm"] == 2 and "MatMul" not in executable.op_counts()


# -- narrow and wide ranges ------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [20, 22])
@pytest.mark.parametrize(
    ("zero_point", "qmin", "qmax"),
    [(3, 0, 15), (-2, -8, 7), (0, -127, 127), (50, -56, 199), (5, 0, 100), (0, 0, 255), (0, 0, 1)],
)
def test_a_narrow_range_stays_in_integers(
    zero_point: int, qmin: int, qmax: int, opset: int, tmp_path: Path
) -> None:
    scale = 6 / (qmax - qmin)
    model = Sequential(Round(), Rounded(nn.Conv2d(3, 4, 3)), Round(scale, zero_point, qmin, qmax))
    executable = check(model, pictures() * 3, step=scale, rare=0.03, opset=opset)
    assert kernels(executable, tmp_path)["QLinearConv"] == 1


@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize(("zero_point", "qmin", "qmax"), [(200, 0, 1023), (-5, -32768, 32767)])
def test_ranges_of_more_than_8_bits(zero_point: int, qmin: int, qmax: int, opset: int) -> None:
    model = Sequential(Round(0.002, zero_point, qmin, qmax), Rounded(nn.Linear(6, 5)), nn.ReLU())
    executable = check(model, normal(3, 6) * 2, opset=opset)
    assert ("QuantizeLinear" in executable.op_counts()) == (opset >= 21)
    assert bool(executable.notes) == (opset < 21)
    whole = check(Round(0.5, 0, -(2**20), 2**20), normal(3, 6) * 2**20, opset=opset)
    assert "Round" in whole.op_counts()


def test_wide_weights_are_integers_of_16_bits() -> None:
    executable = check(Sequential(Round(), Rounded(nn.Linear(16, 8), limit=2047)), normal(3, 16))
    assert dtypes_of_large(executable) == {"int16"}


def test_weights_with_zero_points() -> None:
    class Asymmetric(nn.Module):
        def __init__(self, low: int, high: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.ends = low, high
            self.register_buffer("scale", torch.rand(4, 1, 1, 1) * 0.001 + 0.001)
            zero_point = torch.tensor([100, 128, 150, 90], dtype=torch.int32) + low
            self.register_buffer("zero_point", zero_point.view(4, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = fake_quantize(self.conv.weight, self.scale, self.zero_point, *self.ends)
            return F.conv2d(x, w, self.conv.bias)

    for low, high in ((0, 255), (-128, 127), (-60, 195)):
        for x in (Round(), nn.Identity()):
            check(Sequential(x, Asymmetric(low, high), Round()), pictures(), step=0.02)


# -- other layers and groups -----------------------------------------------------------------------


@pytest.mark.parametrize("opset", [20, 22])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("limit", [127, 7])
def test_groups_of_a_linear_layer(limit: int, rounded: bool, opset: int) -> None:
    layer = Rounded(nn.Linear(32, 12), limit=limit, group=8)
    model = Sequential(Round() if rounded else nn.Identity(), layer)
    for x in (normal(3, 32), normal(2, 3, 32)):
        executable = check(model, x, opset=opset)
        assert dtypes_of_large(executable) == {"int8"}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution(groups: int) -> None:
    layer = Rounded(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=groups), axis=1)
    executable = check(Sequential(Round(), layer, Round(0.01)), pictures(4), step=0.01)
    assert dtypes_of_large(executable) == {"int8"}
    check(Sequential(layer, nn.ReLU()), pictures(4))
    one = Rounded(nn.ConvTranspose1d(4, 6, 3, 2), axis=1)
    check(Sequential(Round(), one, Round(0.01)), normal(2, 4, 7), step=0.01)


def test_a_convolution_without_a_batch() -> None:
    check(Sequential(Round(), Rounded(nn.Conv2d(3, 4, 3)), Round()), normal(3, 9, 9), step=0.02)


def test_weights_alone_are_rounded_and_nothing_else(tmp_path: Path) -> None:
    for layer, x in (
        (nn.Linear(64, 48, bias=False), normal(2, 5, 64)), (nn.Linear(64, 48), normal(5, 64)),
        (nn.Conv2d(3, 8, 3), pictures()),
    ):  # fmt: skip
        executable = check(Rounded(layer), x, bound=1e-6)
        counts = kernels(executable, tmp_path)
        assert sum(float_layers(counts).values()) == 1 and "DequantizeLinear" not in counts
        assert dtypes_of_large(executable) == {"int8"}


def test_scales_along_the_inputs_of_a_layer() -> None:
    for layer, x in (
        (nn.Conv2d(8, 8, 3), pictures(8)), (nn.Linear(8, 8), normal(5, 8)),
        (nn.Linear(8, 8), normal(2, 5, 8)),
    ):  # fmt: skip
        check(Sequential(Round(), Rounded(layer, axis=1), Round()), x, step=0.02)
    turned = Rounded(nn.ConvTranspose2d(8, 8, 3), axis=0)
    check(Sequential(Round(), turned, Round()), pictures(8), step=0.02)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_product_with_a_constant_matrix(axis: int | None, tmp_path: Path) -> None:
    matrix, left = Rounded(nn.Linear(8, 8, bias=False), axis=axis), Round()

    def function(x: torch.Tensor) -> Any:
        weight = matrix.layer.weight
        rounded = fake_quantize(weight, matrix.scale, matrix.zero_point, -127, 127)
        return left(x) @ rounded, rounded @ left(x)

    counts = kernels(check(function, normal(2, 8, 8)), tmp_path)
    assert counts.get("MatMulIntegerToFloat", 0) == (axis != 0)


def test_float_weights_between_roundings_stay_floats() -> None:
    x = pictures()
    model = Sequential(Round(), nn.Conv2d(3, 8, 3), Round(0.001, 120))
    with torch.no_grad():
        model[1].weight.mul_(torch.logspace(-3, 0, 8)[:, None, None, None])
    check(model, x, step=0.001, rare=0.001)


# -- biases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(3, 8, 3), normal(2, 3, 9, 9)), (nn.Conv1d(3, 8, 3), normal(2, 3, 9)),
        (nn.ConvTranspose2d(3, 8, 3), normal(2, 3, 9, 9)), (nn.Linear(16, 8), normal(4, 16)),
        (nn.Linear(16, 8), normal(2, 4, 16)), (nn.Conv2d(3, 8, 3), normal(3, 9, 9)),
    ],
)  # fmt: skip
def test_a_bias_beyond_an_int32(layer: nn.Module, x: torch.Tensor) -> None:
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    with torch.no_grad():
        layer.weight.mul_(1e-8)  # type: ignore[operator]
        layer.bias.uniform_(1e4, 1e5)  # type: ignore[operator]
    check(Sequential(Round(), Rounded(layer, axis=axis), nn.ReLU(), Round(500.0, 0)), x, step=500)


def test_a_dead_channel() -> None:
    model = Sequential(Round(), Rounded(nn.Conv2d(3, 4, 3)), Round())
    with torch.no_grad():
        model[1].layer.weight[1] = 0
        model[1].scale[1] = 1e-12
    check(model, pictures(), step=0.02)


def test_a_bias_is_what_the_kernels_want() -> None:
    executable = lowered(Sequential(Round(), Rounded(nn.Conv2d(3, 8, 3)), Round()), (pictures(),))
    assert initializers(executable)["1.layer.bias.int32"].dtype == "int32"
    alone = lowered(Sequential(Rounded(nn.Conv2d(3, 8, 3))), (pictures(),))
    assert initializers(alone)["0.layer.bias"].dtype == "float32"
    other = lowered(
        Sequential(Round(), Rounded(nn.Conv2d(3, 8, 3)), Round()), (pictures(),),
        providers=("OpenVINOExecutionProvider",),
    )  # fmt: skip
    assert initializers(other)["1.layer.bias"].dtype == "float32"


# -- constants that several calls read -------------------------------------------------------------


def test_a_tied_weight_and_two_scales_of_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Round(), Rounded(nn.Linear(12, 12))
            self.register_buffer("coarse", torch.tensor(0.1))
            self.register_buffer("zero", torch.tensor(0, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> Any:
            weight = self.b.layer.weight
            x = self.a(x)
            two = [fake_quantize(weight, self.coarse, self.zero, -m, m) for m in (127, 2)]
            table = fake_quantize(weight, self.coarse, self.zero, -3, 3)
            rows = F.embedding(torch.tensor([3, 1]), table)
            return (
                self.b(x), self.b(x[0]), F.linear(x, weight), *(F.linear(x, w) for w in two),
                F.linear(x[0], two[1]), F.linear(x, table), rows, two[0].sum(),
            )  # fmt: skip

    check(Tied(), normal(2, 4, 12), rare=1.0, bound=1e-4)


def test_one_rounded_value_for_layers_on_matrices_and_on_more() -> None:
    layer = Rounded(nn.Linear(12, 12, bias=False))
    check(lambda x, y: (layer(x), layer(y), layer(y[:1])), normal(2, 4, 12), normal(3, 12))


def test_state_is_no_constant() -> None:
    class Adapts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.02))
            self.register_buffer("zero_point", torch.tensor(7, dtype=torch.int32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = fake_quantize(x, self.scale, self.zero_point, 0, 255)
            self.scale.mul_(2)
            return y

    x = normal(3, 4)
    executable = lowered(Adapts(), (x,), state="io")
    model = Adapts()
    for _ in range(3):
        agrees(executable.run(x)[0], model(x))


def test_scales_that_are_computed_or_vary_along_several_dimensions() -> None:
    zero = torch.tensor(7, dtype=torch.int32)
    check(lambda x: fake_quantize(x, x.abs().amax() / 100, zero, 0, 255), normal(3, 4))
    table = torch.rand(3, 1, 4) + 0.1
    many = torch.arange(12, dtype=torch.int32).view(3, 1, 4)
    check(lambda x: fake_quantize(x, table, many, 0, 15), normal(3, 5, 4))
    row = torch.rand(4, 1) + 0.1
    check(lambda x: fake_quantize(x, row, many[0, 0][:, None], 0, 15), normal(3, 4, 5))
    check(lambda x: fake_quantize(x, row, zero, 0, 255), normal(3, 4, 5))
    check(lambda x: fake_quantize(x, row, zero, 0, 255), normal(3, 1, 5))
    check(lambda x: fake_quantize(x, row, zero, 0, 255), normal(4))


# -- dtypes, shapes, files -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 16), (2, 4, 16)])
def test_other_dtypes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = Sequential(Round(), Rounded(nn.Linear(16, 8)), nn.ReLU(), Round(0.02, 0)).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("scale"):
            buffer.data = buffer.data.float()
    executable = check(model, normal(*shape, dtype=dtype), step=0.021, rare=0.08, bound=4e-3)
    assert dtypes_of_large(executable) == {"int8"}


def test_float64_rounds_in_float64() -> None:
    x = normal(1000, dtype=torch.float64)
    check(lambda y: fake_quantize(y, torch.tensor(1e-12), torch.tensor(0).int(), -(2**50), 2**50),
          x, bound=1e-15)  # fmt: skip


def test_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    model = Sequential(Round(), Rounded(nn.Linear(16, 8)), nn.ReLU(), Round(0.02, 0))
    check(
        model, normal(2, 5, 16), others=[(normal(7, 5, 16),), (normal(1, 5, 16),)],
        dynamic_shapes=({0: batch},), step=0.02,
    )  # fmt: skip
    conv = Sequential(Round(), Rounded(nn.Conv2d(3, 4, 3)), Round())
    check(conv, pictures(), others=[(normal(5, 3, 11, 11),)], dynamic_shapes=({0: batch},),
          step=0.02)  # fmt: skip


def test_what_is_rounded_may_be_returned() -> None:
    first, second = Round(0.05, 3, 0, 15), Rounded(nn.Conv2d(3, 4, 3))

    def function(x: torch.Tensor) -> Any:
        y = first(x)
        return x, y, second(y), y.flatten(1), second.scale * 1

    check(function, pictures(), rare=1.0, bound=1e-3)


def test_a_file_holds_a_quarter_and_computes_the_same(tmp_path: Path) -> None:
    model = Sequential(
        Round(), Rounded(nn.Linear(64, 256)), nn.ReLU(), Round(0.02, 0), Rounded(nn.Linear(256, 64))
    )
    x = normal(2, 3, 64)
    compiled = fxopt.lower(fxopt.capture(model.eval(), (x,)), backend=Onnx(threads=1))
    path = tmp_path / "model.onnx"
    compiled.save(path)
    floats = sum(4 * one.layer.weight.numel() for one in model if isinstance(one, Rounded))
    assert path.stat().st_size < 0.4 * floats
    loaded = fxopt.load(path)
    assert torch.equal(pytree.tree_leaves(loaded(x))[0], pytree.tree_leaves(compiled(x))[0])
    agrees(loaded(x), model(x), rare=1.0, bound=1e-3)


def test_group_norms_and_attention_beside_roundings() -> None:
    norm, conv, project = nn.GroupNorm(2, 4), Rounded(nn.Conv2d(4, 4, 1)), Rounded(nn.Linear(8, 8))
    nn.init.uniform_(norm.weight)
    check(Sequential(norm, conv, nn.ReLU(), Round(0.02, 0)), pictures(4), step=0.02)
    check(Sequential(norm, Round(), conv), pictures(4), step=0.02, rare=1.0, bound=1e-3)
    rounds = [Round(0.02, 100 + n) for n in range(3)]

    def attend(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (one(project(x)).unflatten(-1, (2, 4)).transpose(1, 2) for one in rounds)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    check(attend, normal(2, 5, 8), rare=1.0, bound=0.02)


def test_linear_layers_over_pictures() -> None:
    inner, outer = Rounded(nn.Linear(4, 8)), Rounded(nn.Linear(8, 4))
    first, second = Round(), Round(0.02, 20)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = second(F.gelu(inner(first(x).permute(0, 2, 3, 1))))
        return outer(y).permute(0, 3, 1, 2) + x

    check(block, pictures(4), rare=1.0, bound=0.02)


@pytest.mark.parametrize("resize", [
    nn.Upsample(scale_factor=2), nn.Upsample(size=(20, 21)),
    nn.Upsample(scale_factor=1.5, mode="bilinear"),
])  # fmt: skip
def test_upsampling_between_layers_of_integers(resize: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), resize, nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 3, 16, 16)
    compiled = fxopt.compile(
        model, x, backend="onnx", precision="int8", calibration=[x], threads=1
    )
    with torch.no_grad():
        off = (compiled(x) - compiled.graph(x)).abs().max()
    assert off <= 0.02 * compiled.graph(x).abs().max()
