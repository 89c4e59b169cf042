"""Fake-quantized graphs on the eager backend: computed on bytes, and equal but for single steps."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends import Eager
from fxopt.backends.eager.cpu import cpu_passes
from fxopt.backends.eager.cpu.grids import multiplies_bytes
from fxopt.backends.eager.cpu.lower_quantized_layers import LowerQuantizedLayers
from fxopt.backends.eager.cpu.quantize_activations import QuantizeActivations
from fxopt.backends.eager.cpu.sink_dequantizations import SinkDequantizations
from fxopt.backends.eager.onednn import library
from fxopt.backends.eager.onednn.grids import Grid
from fxopt.backends.eager.onednn.library import Library
from fxopt.backends.eager.onednn.quantized import Dequantize, Quantize
from fxopt.backends.eager.program import program_of
from fxopt.graph_module import GraphModule
from fxopt.pipeline import legalize
from fxopt.quantization.operator import fake_quantize
from fxopt.text import target_text
from tests.backends.eager.conftest import without_library  # noqa: F401
from tests.backends.eager.lowered import LIBRARY, Always

needs_bytes = pytest.mark.skipif(not multiplies_bytes(), reason="no kernels for bytes here")
BYTES = [f"{name}, bytes" for name in LIBRARY]


class Quant(nn.Module):
    """Rounds an activation to the range that it is given."""

    def __init__(
        self, low: float, high: float, qmin: int = 0, qmax: int = 255, shape: Any = ()
    ) -> None:
        super().__init__()
        scale = (high - low) / (qmax - qmin)
        self.qmin, self.qmax, self.step = qmin, qmax, scale
        self.register_buffer("scale", torch.full(shape, scale))
        zero = torch.full(shape, round(qmin - low / scale), dtype=torch.int32)
        self.register_buffer("zero", zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fake_quantize(x, self.scale, self.zero, self.qmin, self.qmax)


class Weight(nn.Module):
    """Rounds a weight, with a scale for each output or for all."""

    def __init__(self, layer: nn.Module, per_channel: bool = True) -> None:
        super().__init__()
        self.layer = layer
        weight: Any = layer.weight
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        if layer.bias is not None:
            nn.init.uniform_(layer.bias, -0.4, 0.4)  # type: ignore[arg-type]
        dims = tuple(range(1, weight.dim()))
        largest = weight.abs().amax(dims, keepdim=True) if per_channel else weight.abs().max()
        self.register_buffer("scale", largest.detach() / 127)
        self.register_buffer("zero", torch.zeros_like(self.scale, dtype=torch.int32))
        self.bounds = (-127, 127)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer: Any = self.layer
        weight = fake_quantize(layer.weight, self.scale, self.zero, *self.bounds)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        return layer._conv_forward(x, weight, layer.bias)


class Calls(nn.Module):
    """A function of named parts as a model."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, **self.parts)


def conv(*args: Any, **options: Any) -> Weight:
    return Weight(nn.Conv2d(*args, **options))


def lowered(graph: GraphModule, timings: Any = None) -> GraphModule:
    """Return a graph as the backend computes it."""
    copy = graph.copy()
    legalize(copy, cpu_passes(timings))
    return copy


def calls(graph: GraphModule) -> Counter[str]:
    """Return how often each operator is called, but for what is computed once from constants."""
    program = program_of(graph)
    targets = {name: target_text(one) for name, one in program.operators.items()}
    names = [line.partition("= ")[2].partition("(")[0] for line in program.source.splitlines()]
    found = Counter(targets[name] for name in names if name in targets)
    return Counter({name.removeprefix("fxopt::").split(".")[0]: n for name, n in found.items()})


def check(
    model: nn.Module,
    x: torch.Tensor,
    wanted: dict[str, int],
    *others: torch.Tensor,
    step: float = 0.0,
    timings: Any = None,
    **options: Any,
) -> GraphModule:
    """Lower a model; its program must make these calls and compute what its graph does.

    `step` is that of the output's grid; without one outputs are floats, and the steps inside may
    differ a little.
    """
    graph = fxopt.capture(model.eval(), x, **options)
    result = lowered(graph, timings)
    assert calls(result) == wanted
    function = program_of(result).function
    for inputs in (x, *others):
        before = inputs.clone()
        with torch.no_grad():
            expected = graph.run(inputs)
            for _ in range(2):
                for ours, theirs in zip(function(inputs), expected, strict=True):
                    check_close(ours, theirs, step)
        assert torch.equal(inputs, before)
    return result


def check_close(ours: torch.Tensor, theirs: torch.Tensor, step: float = 0.0) -> None:
    assert ours.shape == theirs.shape and ours.dtype is theirs.dtype
    error = (ours - theirs).abs()
    if theirs.numel() == 0:
        return
    assert theirs.std() > 0 or theirs.numel() == 1  # else there is nothing to compare
    if step:
        assert error.max() <= step * 1.001
        assert (error > step / 2).float().mean() <= 0.02  # numbers that lie between two steps
    else:
        assert error.max() <= 0.01 * theirs.abs().max()
        assert error.mean() <= 0.001 * theirs.abs().mean()


def chain(*middle: nn.Module, first: Quant | None = None, last: Quant | None = None) -> nn.Module:
    return nn.Sequential(first or Quant(-2, 2), *middle, last or Quant(0, 2))


X = torch.randn(2, 3, 12, 14)


# -- convolutions ----------------------------------------------------------------------------------


@needs_bytes
def test_a_chain_stays_in_bytes() -> None:
    model = chain(
        conv(3, 17, 3, padding=1), nn.ReLU(), Quant(0, 3), conv(17, 8, 1), nn.ReLU(),
        last=Quant(0, 2.5),
    )  # fmt: skip
    wanted = {"quantize": 1, "quantized_convolution": 2, "dequantize": 1}
    check(model, X, wanted, torch.randn(2, 3, 12, 14) * 9, step=2.5 / 255)


@needs_bytes
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 9, 3, groups=3, padding=1),
        nn.Conv2d(6, 16, 1), nn.Conv2d(6, 3, 5, stride=2, padding=2, bias=False),
        nn.Conv2d(6, 17, 3, dilation=2, padding=(2, 1)), nn.Conv2d(6, 32, (1, 3), stride=(2, 1)),
        nn.Conv2d(6, 12, 3, groups=6, padding=1, stride=2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    "first",
    [
        Quant(0, 2), Quant(-1.5, 2), Quant(-2, 2, -127, 127), Quant(-1, 2, -128, 127),
        Quant(-2, 2, 0, 15),
    ],
    ids=["z = 0", "affine", "symmetric", "signed", "4 bits"],
)  # fmt: skip
def test_convolutions(layer: nn.Module, per_channel: bool, first: Quant) -> None:
    torch.manual_seed(0)
    last = Quant(-2, 2, -128, 127)
    model = chain(Weight(layer, per_channel), first=first, last=last)
    x = torch.randn(2, 6, 9, 11)
    check(model, x, {"quantize": 1, "quantized_convolution": 1, "dequantize": 1}, step=last.step)


@needs_bytes
def test_images_of_three_dimensions() -> None:
    model = chain(Weight(nn.Conv3d(3, 5, 3, padding=1)), nn.ReLU())
    wanted = {"quantize": 1, "quantized_convolution": 1, "dequantize": 1}
    check(model, torch.randn(1, 3, 4, 5, 6), wanted, step=2 / 255)


@needs_bytes
@pytest.mark.parametrize(
    "activation",
    [
        F.relu, F.relu6, F.hardswish, F.silu, F.gelu, torch.sigmoid, torch.tanh,
        F.hardsigmoid, lambda y: F.leaky_relu(y, 0.1), lambda y: F.gelu(y, approximate="tanh"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "last", [Quant(-0.5, 2), Quant(-1, 1, -127, 127), Quant(-0.3, 1, 0, 15), Quant(0, 1, -8, 7)]
)
def test_activations(activation: Callable[..., torch.Tensor], last: Quant) -> None:
    torch.manual_seed(0)
    model = Calls(
        lambda x, a, c, q: q(activation(c(a(x)))), a=Quant(-2, 2), c=conv(3, 8, 3), q=last
    )
    wanted = {"quantize": 1, "quantized_convolution": 1, "dequantize": 1}
    check(model, X, wanted, step=last.step)


@needs_bytes
def test_another_activation_computes_on_floats() -> None:
    model = chain(conv(3, 8, 3), nn.Mish())
    wanted = {"quantize": 2, "quantized_convolution": 1, "mish": 1, "dequantize": 1}
    result = lowered(fxopt.capture(model.eval(), X))
    assert calls(result) - Counter({"mish_": 1}) <= Counter(wanted)
    assert calls(result)["quantize"] == 2


# -- residuals -------------------------------------------------------------------------------------


@needs_bytes
@pytest.mark.parametrize("after", [F.relu, lambda y: y], ids=["relu", "nothing"])
@pytest.mark.parametrize("result", ["bytes", "floats", "few"])
@pytest.mark.parametrize(
    "first", [Quant(-2, 2), Quant(-2, 2, -128, 127), Quant(-1, 3, 0, 63)], ids=["u8", "s8", "u6"]
)
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_added_may_be_bytes(
    after: Callable[..., torch.Tensor], result: str, first: Quant, bias: bool
) -> None:
    torch.manual_seed(0)
    last = {"bytes": Quant(-1, 3), "floats": nn.Identity(), "few": Quant(-1, 1.5, 0, 15)}[result]
    layer = conv(6, 6, 3, padding=1, bias=bias)

    def block(x: torch.Tensor, a: Any, c: Any, q: Any) -> torch.Tensor:
        y = a(x)
        return q(after(c(y) + y))

    wanted = {"quantize": 1, "quantized_convolution_add": 1, "dequantize": 1}
    if result == "floats":
        del wanted["dequantize"]
    step = getattr(last, "step", 0.0)
    check(Calls(block, a=first, c=layer, q=last), torch.randn(2, 6, 9, 9), wanted, step=step)


@needs_bytes
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_added_may_be_floats(turned: bool) -> None:
    def block(x: torch.Tensor, a: Any, c: Any, q: Any) -> torch.Tensor:
        y, other = c(a(x)), x * 0.5
        return q(F.relu(other + y if turned else y + other))

    wanted = {"quantize": 1, "quantized_convolution_add": 1, "mul": 1, "dequantize": 1}
    model = Calls(block, a=Quant(-2, 2), c=conv(6, 6, 3, padding=1), q=Quant(0, 3))
    check(model, torch.randn(2, 6, 9, 9), wanted, step=3 / 255)


@needs_bytes
def test_two_convolutions_that_are_added() -> None:
    def block(x: torch.Tensor, a: Any, c: Any, d: Any, q: Any) -> torch.Tensor:
        y = a(x)
        return q(F.relu(c(y) + d(y)))

    wanted = {
        "quantize": 1, "quantized_convolution_add": 1, "quantized_convolution": 1, "dequantize": 1
    }  # fmt: skip
    model = Calls(block, a=Quant(-2, 2), c=conv(3, 6, 3, padding=1), d=conv(3, 6, 1), q=Quant(0, 3))
    check(model, X, wanted, step=3 / 255)


@needs_bytes
def test_a_sum_with_a_row_is_no_residual() -> None:
    def block(x: torch.Tensor, a: Any, c: Any, q: Any) -> torch.Tensor:
        return q(c(a(x)) + x.mean())

    model = Calls(block, a=Quant(-2, 2), c=conv(3, 6, 3), q=Quant(-3, 3))
    wanted = {"quantize": 2, "quantized_convolution": 1, "mean": 1, "add_": 1, "dequantize": 1}
    check(model, X, wanted, step=6 / 255)


# -- linear layers ---------------------------------------------------------------------------------


@needs_bytes
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [Quant(-1.5, 2), Quant(-2, 2, -127, 127)], ids=["u8", "s8"])
def test_linear_layers(shape: Any, per_channel: bool, bias: bool, first: Quant) -> None:
    torch.manual_seed(0)
    layers = (nn.Linear(24, 17, bias=bias), nn.Linear(17, 3, bias=bias))
    a, b = (Weight(layer, per_channel) for layer in layers)
    last = Quant(-2, 2)
    model = chain(a, nn.GELU(), Quant(-0.2, 2), b, first=first, last=last)
    wanted = {"quantize": 1, "quantized_linear": 2, "dequantize": 1}
    check(model, torch.randn(shape), wanted, step=last.step)


@needs_bytes
def test_a_residual_of_a_linear_layer() -> None:
    def block(x: torch.Tensor, a: Any, c: Any) -> torch.Tensor:
        return F.relu(c(a(x)) + x)

    model = Calls(block, a=Quant(-2, 2), c=Weight(nn.Linear(8, 8)))
    check(model, torch.randn(4, 8), {"quantize": 1, "quantized_linear_add": 1})


# -- who reads bytes -------------------------------------------------------------------------------


@needs_bytes
def test_readers_of_bytes_and_of_floats() -> None:
    def both(x: torch.Tensor, a: Any, c: Any, q: Any, d: Any) -> Any:
        y = q(F.relu(c(a(x))))
        return d(y), torch.exp(-y)

    model = Calls(both, a=Quant(-2, 2), c=conv(3, 6, 3), q=Quant(0, 2), d=conv(6, 6, 1))
    wanted = {"quantize": 1, "quantized_convolution": 2, "dequantize": 1, "neg": 1, "exp_": 1}
    check(model, X, wanted)


@needs_bytes
def test_a_result_that_is_read_before_it_is_rounded_is_floats() -> None:
    def both(x: torch.Tensor, a: Any, c: Any, q: Any, d: Any) -> Any:
        y = F.relu(c(a(x)))
        return d(q(y)), y

    model = Calls(both, a=Quant(-2, 2), c=conv(3, 6, 3), q=Quant(0, 2), d=conv(6, 6, 1))
    check(model, X, {"quantize": 2, "quantized_convolution": 2})


@needs_bytes
def test_an_output_is_floats_in_the_model_s_layout() -> None:
    model = chain(conv(3, 6, 3), nn.ReLU()).eval()
    compiled = fxopt.lower(fxopt.capture(model, X), backend=Eager(measure=False))
    assert compiled(X).stride() == model(X).stride()


MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "max pool": lambda y: F.max_pool2d(y, 3, 2, 1),
    "max pool, ceil": lambda y: F.max_pool2d(y, 2, 2, ceil_mode=True),
    "pad": lambda y: F.pad(y, (1, 2, 0, 1)),
    "reflect": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "slice": lambda y: y[:, :, 1:-1, ::2],
    "permute": lambda y: y.permute(0, 1, 3, 2),
    "shuffle": lambda y: F.channel_shuffle(y, 2),
    "reshape": lambda y: y.reshape(2, 4, 12, -1),
    "split": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "cat": lambda y: torch.cat([y, y.flip(1)], 1)[:, 2:6],
    "stack": lambda y: torch.stack([y, y.roll(1, 2)], 1).flatten(0, 1),
    "unbind": lambda y: torch.cat(y.unflatten(0, (2, 1)).unbind(0)),
    "enlarge": lambda y: F.interpolate(y, scale_factor=2),
    "pixel shuffle": lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
    "expand": lambda y: y[:1].expand(3, -1, -1, -1),
}


@needs_bytes
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("first", [Quant(-1, 2), Quant(-1, 2, -128, 127)], ids=["u8", "s8"])
def test_numbers_move_as_bytes(move: str, first: Quant) -> None:
    torch.manual_seed(0)
    model = Calls(
        lambda x, a, c, q: q(F.relu(c(MOVES[move](a(x))))),
        a=first, c=conv(4, 6, 3, padding=1), q=Quant(0, 2),
    )  # fmt: skip
    graph = fxopt.capture(model.eval(), torch.randn(2, 4, 12, 12))
    result = lowered(graph)
    found = calls(result)
    in_bytes = move != "enlarge" or first.qmin == 0  # PyTorch enlarges no images of signed bytes
    assert found["quantized_convolution"] == in_bytes
    assert found["quantize"] == found["dequantize"] == (1 if in_bytes else 2)
    (x,) = graph.info.example_inputs
    check_close(program_of(result).function(x)[0], graph.run(x)[0], 2 / 255)


@needs_bytes
def test_moves_between_floats_stay_there() -> None:
    def both(x: torch.Tensor, a: Any, c: Any, q: Any) -> Any:
        y = q(F.relu(c(a(x))))
        return F.max_pool2d(y, 2)

    wanted = {"quantize": 1, "quantized_convolution": 1, "dequantize": 1, "max_pool": 1}
    result = check(Calls(both, a=Quant(-2, 2), c=conv(3, 6, 3), q=Quant(0, 2)), X, wanted)
    assert result.find(torch.ops.fxopt.max_pool.default)[0].meta["val"].dtype is torch.float32


@needs_bytes
def test_only_bytes_of_one_grid_are_joined() -> None:
    def joined(x: torch.Tensor, a: Any, b: Any, c: Any) -> torch.Tensor:
        return c(torch.cat([a(x), b(x)], 1))

    def model(second: Quant) -> nn.Module:
        return Calls(joined, a=Quant(-2, 2), b=second, c=conv(6, 4, 3)).eval()

    wanted = {"quantize": 2, "cat": 1, "quantized_convolution": 1}
    check(model(Quant(-2, 2)), X, wanted)
    fewer = Quant(-2, 2)
    fewer.qmax = 200
    for other in (Quant(-2, 2.1), Quant(-2, 2, -128, 127), Quant(-2, 2, 0, 254), fewer):
        found = calls(check_floats(model(other)))
        assert found["quantized_convolution"] == 0 and found["dequantize"] == 2


@needs_bytes
@pytest.mark.parametrize("turned", [False, True])
def test_bytes_are_not_joined_with_floats(turned: bool) -> None:
    def joined(x: torch.Tensor, a: Any, c: Any) -> torch.Tensor:
        return c(torch.cat([x, a(x)] if turned else [a(x), x], 1))

    model = Calls(joined, a=Quant(-2, 2), c=conv(6, 4, 3))
    assert calls(check_floats(model))["quantized_convolution"] == 0


def check_floats(model: nn.Module) -> GraphModule:
    """Lower a model; its program must compute what its graph does."""
    graph = fxopt.capture(model.eval(), X)
    result = lowered(graph)
    check_close(program_of(result).function(X)[0], graph.run(X)[0])
    return result


@needs_bytes
def test_padding_with_another_number_computes_on_floats() -> None:
    pad = partial(F.pad, pad=(1, 1), value=7.0)
    model = Calls(lambda x, a, c: c(pad(a(x))), a=Quant(-2, 2), c=conv(3, 4, 3))
    assert calls(check_floats(model))["quantized_convolution"] == 0


@needs_bytes
@pytest.mark.parametrize(
    ("bounds", "left"), [((0, 255), 1), ((0, 50), 2), ((-128, 127), 2), ((0, 100), 1)]
)
def test_what_is_rounded_twice_alike_is_rounded_once(bounds: Any, left: int) -> None:
    """The second time changes nothing, unless it has fewer steps, or signed bytes."""
    first, second = Quant(0, 2, 0, 100), Quant(0, 2, 0, 100)
    second.qmin, second.qmax = bounds
    model = Calls(
        lambda x, a, b, c: c(b(F.max_pool2d(a(x), 2))), a=first, b=second, c=conv(3, 4, 3)
    )
    assert calls(check_floats(model))["quantize"] == left


# -- what is left to floats ------------------------------------------------------------------------


@needs_bytes
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (conv(3, 4, 3), "its input is not quantized"),
        (chain(nn.Conv2d(3, 4, 3)), ""),
        (chain(conv(3, 4, 2, padding="same")), ""),
        (chain(conv(3, 4, 3), first=Quant(-2, 2, 0, 1023)), "are no bytes"),
        (chain(conv(3, 4, 3), first=Quant(-2, 2, shape=(3, 1, 1))), "more than one scale"),
    ],
)
def test_layers_of_floats(model: nn.Module, reason: str) -> None:
    graph = fxopt.capture(model.eval(), X)
    passes = (QuantizeActivations(), SinkDequantizations(), LowerQuantizedLayers())
    copy = graph.copy()
    misses = [miss.reason for one in passes for miss in one.run(copy).misses]
    assert not reason or any(reason in one for one in misses)
    found = calls(check_floats(model))
    assert found["quantized_convolution"] == 0


class Given(nn.Module):
    """A convolution of which one part is an input."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.first, self.layer = which, Quant(-2, 2), conv(3, 4, 3)

    def forward(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        parts = {
            "scale": self.first.scale, "weight": self.layer.layer.weight,
            "bias": self.layer.layer.bias, "weight_scale": self.layer.scale,
        }  # fmt: skip
        parts[self.which] = given
        first, zero = self.first, self.layer.zero
        y = fake_quantize(x, parts["scale"], first.zero, first.qmin, first.qmax)
        weight = fake_quantize(parts["weight"], parts["weight_scale"], zero, -127, 127)
        return F.conv2d(y, weight, parts["bias"])


@needs_bytes
@pytest.mark.parametrize(
    ("which", "given", "reason"),
    [
        ("scale", torch.tensor(0.02), "scale or zero point is not constant"),
        ("weight", torch.randn(4, 3, 3, 3), "weight is not constant"),
        ("weight_scale", torch.full((4, 1, 1, 1), 0.01), "weight is not constant"),
        ("bias", torch.randn(4), "bias is not constant"),
    ],
)
def test_what_is_given_by_the_caller(which: str, given: torch.Tensor, reason: str) -> None:
    model = Given(which).eval()
    graph = fxopt.capture(model, (X, given))
    copy = graph.copy()
    misses = [*QuantizeActivations().run(copy).misses, *LowerQuantizedLayers().run(copy).misses]
    assert any(reason in one.reason for one in misses)
    found = program_of(lowered(graph)).function(X, given * 1.5)[0]
    check_close(found, graph.run(X, given * 1.5)[0])


@needs_bytes
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (chain(conv(3, 4, 3)), torch.randn(3, 9, 9)),
        (chain(Weight(nn.Linear(6, 4))), torch.randn(6)),
        (chain(conv(3, 4, 3)).double(), torch.randn(2, 3, 9, 9).double()),
        (Calls(lambda x, a, c: c(F.max_pool2d(a(x), 2)[None]), a=Quant(-2, 2), c=conv(3, 4, 3)),
         torch.randn(3, 9, 9)),
    ],
    ids=["an image", "a row", "float64", "a pool of an image"],
)  # fmt: skip
def test_inputs_without_kernels(model: nn.Module, x: torch.Tensor) -> None:
    graph = fxopt.capture(model.eval(), x)
    check_close(program_of(lowered(graph)).function(x)[0], graph.run(x)[0], 2 / 255)


@needs_bytes
def test_nothing_in_nothing_out() -> None:
    graph = fxopt.capture(network(), X, dynamic_shapes={0: "batch"})
    function = program_of(lowered(graph)).function
    for x in (X, X[:0]):
        (found,) = function(x)
        assert found.shape == (len(x), 5) and found.dtype is torch.float32


@needs_bytes
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.zero.fill_(3), "a zero point"),
        (lambda w: setattr(w, "scale", torch.rand(1, 3, 1, 1) + 0.1), "other scales"),
        (lambda w: setattr(w, "bounds", (0, 255)), "no signed bytes"),
        (lambda w: setattr(w, "bounds", (-511, 511)), "no signed bytes"),
    ],
)
def test_weights_that_are_left(change: Callable[[Any], Any], reason: str) -> None:
    layer = conv(3, 4, 3)
    change(layer)
    graph = fxopt.capture(chain(layer).eval(), X)
    QuantizeActivations().run(graph)
    result = LowerQuantizedLayers().run(graph)
    assert not result.modified and reason in result.misses[0].reason


@needs_bytes
def test_a_layer_without_outputs() -> None:
    layer: Any = Weight(nn.Linear(6, 4))
    layer.layer.weight, layer.layer.bias = nn.Parameter(torch.empty(0, 6)), None
    layer.scale, layer.zero = torch.empty(0, 1), torch.empty(0, 1, dtype=torch.int32)
    model, x = nn.Sequential(Quant(-2, 2), layer).eval(), torch.randn(3, 6)
    assert program_of(lowered(fxopt.capture(model, x))).function(x)[0].shape == (3, 0)


@needs_bytes
def test_half_precision() -> None:
    graph = fxopt.capture(chain(conv(3, 4, 3)).bfloat16().eval(), X.bfloat16())
    result = QuantizeActivations().run(graph.copy())
    assert not result.modified and "it rounds torch.bfloat16" in result.misses[0].reason
    (found,) = program_of(lowered(graph)).function(X.bfloat16())
    assert (found - graph.run(X.bfloat16())[0]).abs().max() <= 0.1


def test_weights_are_rounded_once_where_layers_compute_on_floats() -> None:
    result = lowered(fxopt.capture(nn.Sequential(conv(3, 4, 3), nn.ReLU()).eval(), X))
    assert calls(result)["fake_quantize"] == 0 and not result.find(fake_quantize)


@pytest.mark.usefixtures("without_library")
def test_without_the_library() -> None:
    found = calls(check_floats(chain(conv(3, 8, 3), nn.ReLU())))
    assert found["fake_quantize"] == 2 and found["quantize"] == 0


@needs_bytes
def test_without_exact_sums_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "multiplies_bytes", False)
    found = calls(check_floats(chain(conv(3, 8, 3), nn.ReLU())))
    assert found["fake_quantize"] == 2 and found["quantize"] == 0


@needs_bytes
def test_the_way_by_floats_computes_the_same() -> None:
    model = chain(conv(3, 8, 3), nn.ReLU())
    wanted = {"quantize": 2, "dequantize": 2, "convolution": 1}
    check(model, X, wanted, step=2 / 255, timings=Always(LIBRARY[0]))
    wanted = {"quantize": 1, "dequantize": 1, "quantized_convolution": 1}
    check(model, X, wanted, step=2 / 255, timings=Always(BYTES[0]))


@needs_bytes
def test_both_ways_take_part_where_they_are_timed() -> None:
    asked: list[set[str]] = []

    class Asked(Always):
        def known(self, question: str) -> str | None:
            return None

        def fastest(self, question: str, ways: Any) -> str:
            asked.append(set(ways))
            for way in ways.values():
                assert way()[0][0, 0].float().std() > 1  # the inputs were bytes of all kinds
            return BYTES[0]

    def block(x: torch.Tensor, a: Any, c: Any, q: Any) -> torch.Tensor:
        y = a(x)
        return q(F.relu(c(y) + y))

    model = Calls(block, a=Quant(-2, 2), c=conv(3, 3, 1), q=Quant(0, 3))
    lowered(fxopt.capture(model.eval(), X), Asked(BYTES[0]))
    assert asked == [{BYTES[0], LIBRARY[0]}]


# -- the program as a whole ------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return chain(
        conv(3, 8, 3, stride=2, padding=1), nn.Hardswish(), Quant(-0.4, 2), conv(8, 8, 3, groups=8),
        nn.ReLU(), Quant(0, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Quant(0, 2),
        Weight(nn.Linear(8, 5)), last=Quant(-1, 1),
    ).eval()  # fmt: skip


@needs_bytes
@pytest.mark.parametrize("measure", [False, True])
def test_a_dynamic_batch(measure: bool) -> None:
    graph = fxopt.capture(network(), X, dynamic_shapes={0: "batch"})
    compiled = fxopt.lower(graph, backend=Eager(measure=measure))
    for batch in (2, 1, 7):
        x = torch.randn(batch, 3, 12, 14)
        check_close(compiled(x), graph(x), 2 / 255)


@needs_bytes
def test_a_file_holds_the_graph_before_lowering(tmp_path: Path) -> None:
    compiled = fxopt.lower(fxopt.capture(network(), X), backend=Eager(measure=False))
    compiled.save(tmp_path / "model.fxopt")
    assert torch.equal(fxopt.load(tmp_path / "model.fxopt")(X), compiled(X))
    assert len(compiled.executable.graph.find(fake_quantize)) == 8


def notes(model: nn.Module) -> str:
    lowered = fxopt.lower(fxopt.capture(model.eval(), X), backend=Eager(measure=False))
    return " ".join(lowered.executable.notes)


@needs_bytes
def test_the_report_says_how_many_layers_multiply_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(conv(3, 4, 3), Quant(-2, 2), conv(4, 4, 1), nn.Conv2d(4, 4, 1))
    assert "1 of 2 layers with rounded weights multiply bytes." in notes(model)
    assert "bytes" not in notes(nn.Conv2d(3, 4, 3))
    monkeypatch.setattr(Library, "multiplies_bytes", False)
    assert "0 of 2 layers with rounded weights multiply bytes: for that it needs" in notes(model)


@needs_bytes
def test_many_threads_call_one_program() -> None:
    graph = fxopt.capture(network(), X, dynamic_shapes={0: "batch"})
    compiled = fxopt.lower(graph, backend=Eager(measure=False))
    inputs = [torch.randn(batch, 3, 12, 14) for batch in (1, 2, 3) for _ in range(4)]
    expected = [compiled(x) for x in inputs]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(
                1 for x, y in zip(inputs, expected, strict=True) if not torch.equal(compiled(x), y)
            )

    workers = [threading.Thread(target=work) for _ in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not wrong


@needs_bytes
def test_inputs_that_are_no_plain_memory() -> None:
    compiled = fxopt.lower(fxopt.capture(network(), X), backend=Eager(measure=False))
    with torch.no_grad():
        assert torch.equal(compiled(torch._neg_view(X)), network()(-X))
        assert torch.equal(torch.func.functionalize(compiled)(X), network()(X))


# -- rounding --------------------------------------------------------------------------------------


@needs_bytes
@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (0, 15), (-7, 7)])
@pytest.mark.parametrize("zero", [0, 6])
def test_rounding(low: int, high: int, zero: int) -> None:
    api = library()
    assert api is not None
    grid = Grid.of(torch.tensor(0.25), torch.tensor(zero), low, high)
    quantize, dequantize = Quantize(api, grid), Dequantize(api, grid)
    # halves are exact here and go to the even number, which an even zero point leaves even
    x = torch.cat([torch.arange(-600, 601) * 0.125, torch.tensor([torch.inf, -torch.inf, 1e30])])
    expected = (x / 0.25).round().add(zero).clamp(low, high)
    for value, wanted in (
        (x, expected), (x[::2], expected[::2]), (x[:1200].reshape(30, 40).t(), None),
        (x[:5].expand(3, 5), None), (x[0], expected[0]), (x[:0], expected[:0]),
    ):  # fmt: skip
        if wanted is None:
            wanted = (value / 0.25).round().add(zero).clamp(low, high)
        found = quantize(value)
        assert found.dtype is grid.dtype and torch.equal(found.float(), wanted)
        assert torch.equal(dequantize(found), (wanted - zero) * 0.25)


@needs_bytes
def test_numbers_lie_as_before() -> None:
    """Bytes keep the layout of the floats, also where the sizes were seen in another one before."""
    api = library()
    assert api is not None
    quantize = Quantize(api, Grid.of(torch.tensor(0.25), torch.tensor(0), 0, 255))
    for x in (torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)):
        assert quantize(x).stride() == x.stride()
        assert quantize(x[:, :2]).is_contiguous() == x.is_contiguous()
