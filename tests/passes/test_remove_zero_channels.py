from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.contract import PassResult
from fxopt.dialect import retarget
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule
from fxopt.passes import RemoveZeroChannels, SparsifyWeights
from fxopt.pruning.zero_lines import may_have_any
from fxopt.rewrite import fuel
from fxopt.testing import check_pass, noisy
from fxopt.text import graph_text
from fxopt.vision import import_torchvision

PASS = RemoveZeroChannels()


def still(scale: Any, shift: Any, channels: Sequence[int], value: float = 0.0) -> None:
    """Make channels the constant `value`, whatever comes in."""
    with torch.no_grad():
        scale[list(channels)] = 0.0
        if shift is not None:
            shift[list(channels)] = value


def checked(
    model: nn.Module, inputs: Any, widths: dict[str, int] | None, **options: Any
) -> tuple[GraphModule, PassResult]:
    """Run the pass; the layers named must have this many outputs left. None: all must stay."""
    if widths is None:
        options.setdefault("rewrites", 0)
    graph, result = check_pass(PASS, model, inputs, add_noise=False, **options)
    for layer, width in (widths or {}).items():
        assert width_of(graph, layer) == width, layer
    return graph, result


def width_of(graph: GraphModule, layer: str) -> int:
    """Return how many outputs the weight of a layer has."""
    found = [
        tensor.shape[0]
        for name, tensor in graph.constants().items()
        if name in (f"{layer}.weight", f"{layer}.weight_pruned")
    ]
    assert len(found) == 1, f"{layer}: {sorted(graph.constants())}"
    return int(found[0])


class Stack(nn.Module):
    """conv → bn → activation → reader → mean; of eight channels."""

    def __init__(
        self, reader: nn.Module | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = activation or nn.ReLU()
        self.reader = reader or nn.Conv2d(8, 4, 3, padding=1)
        noisy(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.act(self.bn(self.conv(x))))


IMAGE = torch.randn(2, 3, 8, 8)


# -- batch norms whose scale is 0 --------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, -0.7])
def test_a_channel_that_is_zero_behind_relu_goes(shift: float) -> None:
    model = Stack()
    still(model.bn.weight, model.bn.bias, [0, 3, 7], shift)
    graph, result = checked(model, IMAGE, {"conv": 5}, rewrites=1, misses=[])
    assert graph.constant("reader.weight_pruned").shape == (4, 5, 3, 3)
    assert "reader.bias" in graph.constants(), "nothing was added"
    assert str(result.details).startswith("3 channels had no effect")
    assert "8 →      5" in str(result.details)


def test_one_channel_is_one_channel() -> None:
    model = Stack()
    still(model.bn.weight, model.bn.bias, [2])
    _, result = checked(model, IMAGE, {"conv": 7})
    assert str(result.details).startswith("1 channel had")


def test_a_constant_before_zero_padding_stays() -> None:
    model = Stack()
    still(model.bn.weight, model.bn.bias, [0, 3, 7], 0.7)
    checked(model, IMAGE, None, misses=["that it reads, 3 are constant, but not 0, and at"])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_a_bias_takes_constants_in(bias: bool, stride: int, dilation: int, groups: int) -> None:
    reader = nn.Conv2d(8, 4, 3, stride=stride, dilation=dilation, groups=groups, bias=bias)
    model = Stack(reader)
    still(model.bn.weight, model.bn.bias, [0, 3, 4, 7], 0.7)  # the same of each group
    graph, result = checked(model, IMAGE, {"conv": 4}, rewrites=1, misses=[])
    assert "reader.bias" not in graph.constants() or not bias
    assert "biases that took constants in: 1" in str(result.details)


@pytest.mark.parametrize("reader, goes", [
    (nn.Conv2d(8, 4, 1), True),
    (nn.Conv2d(8, 4, 1, padding=1), False),
    (nn.Conv2d(8, 4, 1, padding="same"), True),
    (nn.Conv2d(8, 4, 3, padding="same"), False),
    (nn.Conv2d(8, 4, 3, padding="valid"), True),
    (nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), True),
    (nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), True),
    (nn.Conv2d(8, 4, (3, 1), padding=(1, 0)), False),
    (nn.ConvTranspose2d(8, 4, 2, stride=2), False),
], ids=str)  # fmt: skip
def test_constants_go_where_every_output_sees_all_of_them(reader: nn.Module, goes: bool) -> None:
    model = Stack(copy.deepcopy(reader))
    still(model.bn.weight, model.bn.bias, [1, 2], 0.7)
    checked(model, IMAGE, {"conv": 6} if goes else None, misses=[] if goes else ["at its borders"])
    still(model.bn.weight, model.bn.bias, [1, 2])
    checked(model, IMAGE, {"conv": 6})


@pytest.mark.parametrize("activation, constant", [
    (nn.SiLU(), 0.7), (nn.GELU(), -0.7), (nn.Hardswish(), 0.7), (nn.PReLU(8), -0.7),
    (nn.Sequential(nn.Sigmoid(), nn.Dropout()), 0.0), (nn.LeakyReLU(0.1), -0.7),
    (nn.MaxPool2d(2, padding=1), 0.7), (nn.AvgPool2d(2), 0.7), (nn.AvgPool2d(2, ceil_mode=True), 1),
    (nn.AvgPool2d(3, padding=1, count_include_pad=False), 0.7), (nn.Upsample(scale_factor=2), 0.7),
    (nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh()), 0.7),
    (nn.AdaptiveAvgPool2d(3), 0.7), (nn.ReflectionPad2d(1), 0.7), (nn.ConstantPad2d(1, 0.5), 0.5),
    (nn.Conv2d(8, 8, 3, groups=8), 0.7), (nn.ChannelShuffle(2), 0.7), (nn.Identity(), 0.7),
], ids=str)  # fmt: skip
def test_constants_are_followed(activation: nn.Module, constant: float) -> None:
    model = Stack(nn.Conv2d(8, 4, 1), copy.deepcopy(activation))
    still(model.bn.weight, model.bn.bias, [1, 5], constant)
    checked(model, IMAGE, {"conv": 6}, misses=[])


@pytest.mark.parametrize("activation", [
    nn.AvgPool2d(3, padding=1), nn.ConstantPad2d(1, 0.0), nn.Conv2d(8, 8, 3, padding=1, groups=8),
    nn.AvgPool2d(2, divisor_override=3),
], ids=str)  # fmt: skip
def test_what_zeros_at_the_border_change_is_not_constant(activation: nn.Module) -> None:
    model = Stack(nn.Conv2d(8, 4, 1), copy.deepcopy(activation))
    still(model.bn.weight, model.bn.bias, [1, 5], 0.7)
    checked(model, IMAGE, None)
    still(model.bn.weight, model.bn.bias, [1, 5])
    checked(model, IMAGE, {"conv": 6})


def test_a_flattened_image_is_followed_into_a_linear_layer() -> None:
    model = Stack(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5, bias=False)))
    still(model.bn.weight, model.bn.bias, [0, 6], 0.7)
    graph, _ = checked(model, IMAGE, {"conv": 6})
    assert graph.constant("reader.2.weight_pruned").shape == (5, 54)
    assert graph.constant("reader.2.bias").shape == (5,)


def test_batch_statistics_are_left_alone() -> None:
    model = Stack()
    still(model.bn.weight, model.bn.bias, [0, 3])
    model.bn.running_mean = model.bn.running_var = None
    checked(model, IMAGE, None, misses=[])


def test_in_training_nothing_goes() -> None:
    model = Stack()
    still(model.bn.weight, model.bn.bias, [0, 3])
    graph = fxopt.capture(model.eval(), IMAGE).train()
    assert not PASS.run(graph).modified
    assert PASS.run(graph.eval()).modified


def test_an_infinite_precision_is_no_constant() -> None:
    model = Stack(nn.Conv2d(8, 4, 1))
    still(model.bn.weight, model.bn.bias, [0, 3], 0.5)
    model.bn.eps = 0.0
    model.bn.running_var[0] = 0.0
    graph = fxopt.capture(model.eval(), IMAGE)
    PASS.run(graph)
    assert width_of(graph, "conv") == 7


# -- weights -----------------------------------------------------------------------------------


class Perceptron(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(6, 10, bias=bias)
        self.two = nn.Linear(10, 9, bias=bias)
        self.three = nn.Linear(9, 4, bias=bias)
        noisy(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x).relu()).relu())


ROWS = torch.randn(5, 6)


def test_dead_units() -> None:
    model = Perceptron()
    still(model.one.weight, model.one.bias, [0, 1], -1.0)
    still(model.one.weight, model.one.bias, [2, 3], 0.3)
    still(model.two.weight, model.two.bias, [8])
    graph, _ = checked(model, ROWS, {"one": 6, "two": 8})
    assert graph.constant("two.bias_absorbed").shape == (8,)
    assert "two.bias_pruned" not in graph.constants()


def test_without_biases() -> None:
    model = Perceptron(bias=False)
    still(model.one.weight, None, [9])
    checked(model, ROWS, {"one": 9, "two": 9})


def test_units_that_nobody_listens_to() -> None:
    model = Perceptron()
    with torch.no_grad():
        model.two.weight[:, [1, 4, 5]] = 0
    checked(model, ROWS, {"one": 7, "two": 9})


def test_what_has_gone_leaves_others_without_a_listener() -> None:
    model = Perceptron()
    with torch.no_grad():
        model.three.weight[:, 2] = 0  # so unit 2 of two goes,
        model.two.weight[:, 7] = 0
        model.two.weight[2, 7] = 1.0  # to which alone unit 7 of one was of use
        model.two.weight[:, 8] = 0
        model.two.weight[3, 8] = 1.0
    checked(model, ROWS, {"one": 9, "two": 8})


def test_constant_inputs_make_constants() -> None:
    """A unit that reads nothing but dead units is one itself."""
    model = Perceptron()
    still(model.one.weight, model.one.bias, [0, 1], 0.4)
    with torch.no_grad():
        model.two.weight[5, 2:] = 0
    checked(model, ROWS, {"one": 8, "two": 8})


def test_one_weight_is_enough_to_stay() -> None:
    model = Perceptron()
    with torch.no_grad():
        model.two.weight[:, 1] = 0
        model.two.weight[8, 1] = 1e-3
        model.one.weight[4] = 0
        model.one.weight[4, 5] = 1e-3
    checked(model, ROWS, None, misses=[])


def test_a_mask_in_the_model() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)
            self.register_buffer("mask", torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1]))
            self.register_buffer("kill", torch.tensor([0, 0, 0, 0, 1, 0, 0, 0]).bool())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two((self.one(x) * self.mask).masked_fill(self.kill, 0.0))

    checked(Masked(), ROWS, {"one": 5})


def test_after_sparsify_weights() -> None:
    model = Perceptron()
    with torch.no_grad():
        model.one.weight[[0, 4]] *= 1e-6
        model.one.bias[[0, 4]] = -0.1
    sparse = fxopt.optimize(model, ROWS, passes=[SparsifyWeights(0.2)])
    before = graph_text(sparse)
    result = PASS.run(sparse)
    assert result.details.count >= 2
    assert graph_text(sparse) != before


# -- several readers, branches -----------------------------------------------------------------


class Branches(nn.Module):
    """x · a → bn → relu, read by two convolutions of one kind each."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.first, self.second = first, second
        noisy(self)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.bn(self.conv(x)).relu()
        return self.first(y), self.second(y)


def test_all_readers_must_agree() -> None:
    padded = nn.Conv2d(8, 4, 3, padding=1)
    model = Branches(nn.Conv2d(8, 4, 1), padded)
    still(model.bn.weight, model.bn.bias, [1, 2], 0.6)
    checked(model, IMAGE, None, misses=["of the channels that it reads, 2 are"])
    with torch.no_grad():
        padded.weight[:, 1] = 0  # one reads it as a constant, the other does not listen
    checked(model, IMAGE, {"conv": 7})


def test_all_readers_agree() -> None:
    model = Branches(nn.Conv2d(8, 4, 3, bias=False), nn.Conv2d(8, 6, 1))
    still(model.bn.weight, model.bn.bias, [1, 2], 0.6)
    _, result = checked(model, IMAGE, {"conv": 6})
    assert result.details.absorbing == ("first", "second")


class Residual(nn.Module):
    def __init__(self, join: str = "add") -> None:
        super().__init__()
        self.join = join
        self.a, self.bn_a = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.reader = nn.Conv2d(16 if join == "cat" else 8, 4, 3)
        noisy(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.bn_a(self.a(x)), self.bn_b(self.b(x))
        if self.join == "cat":
            return self.reader(torch.cat([a, b], 1).relu())
        return self.reader(a * b if self.join == "mul" else (a + b).relu())


def test_of_a_sum_all_terms_must_be_constant() -> None:
    model = Residual()
    still(model.bn_a.weight, model.bn_a.bias, [0, 1, 2], 0.5)
    checked(model, IMAGE, None)
    still(model.bn_b.weight, model.bn_b.bias, [2, 3], 0.25)
    checked(model, IMAGE, {"a": 7, "b": 7})


def test_of_a_product_one_factor_must_be_zero() -> None:
    model = Residual("mul")
    still(model.bn_a.weight, model.bn_a.bias, [0, 1])
    still(model.bn_a.weight, model.bn_a.bias, [4], 0.5)
    checked(model, IMAGE, {"a": 6, "b": 6})


def test_beside_one_another() -> None:
    model = Residual("cat")
    still(model.bn_a.weight, model.bn_a.bias, [0, 1], 0.5)
    still(model.bn_b.weight, model.bn_b.bias, [7], -0.5)
    checked(model, IMAGE, {"a": 6, "b": 7})


def test_a_residual_stream_keeps_what_its_other_writer_needs() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.up, self.down = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
            self.bn, self.head = nn.BatchNorm2d(16), nn.Linear(8, 5)
            noisy(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x).relu()
            x = x + self.down(self.bn(self.up(x)).relu())
            return self.head(x.mean((2, 3)))

    model = Block()
    still(model.down.weight, model.down.bias, [0, 1])
    still(model.bn.weight, model.bn.bias, [9, 10], -1.0)
    checked(model, IMAGE, {"stem": 8, "up": 14, "down": 8})
    still(model.stem.weight, model.stem.bias, [1], 0.3)
    words = ["of its channels, 1 is constant, but not wherever they are read"]
    checked(model, IMAGE, {"stem": 8, "up": 14, "down": 8}, misses=words)  # 0.3 is padded by up
    still(model.stem.weight, model.stem.bias, [1], -0.3)
    checked(model, IMAGE, {"stem": 7, "up": 14, "down": 7})


# -- depthwise, grouped, shuffled, gated -------------------------------------------------------


class Inverted(nn.Module):
    """Expand, depthwise, project, as in MobileNet; with a gate as in squeeze-excitation."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 4, 1, bias=False)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.gated = gated
        noisy(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.bn1(self.expand(x)))
        y = nn.functional.relu6(self.bn2(self.depth(y)))
        if self.gated:
            y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.project(y)


def test_a_depthwise_layer_goes_with_its_channels() -> None:
    model = Inverted()
    still(model.bn1.weight, model.bn1.bias, [0, 1], -0.5)  # then the next norm makes a constant
    still(model.bn2.weight, model.bn2.bias, [4], 0.5)  # whatever the depthwise layer pads
    graph, _ = checked(model, IMAGE, {"expand": 5, "depth": 5})
    assert graph.constant("project.bias").shape == (4,)


def test_a_gate_times_zero_is_zero() -> None:
    model = Inverted(gated=True)
    still(model.bn2.weight, model.bn2.bias, [3, 6], -0.5)
    checked(model, IMAGE, {"expand": 6, "depth": 6, "excite": 6})


def test_a_gate_times_a_constant_is_none() -> None:
    model = Inverted(gated=True)
    still(model.bn2.weight, model.bn2.bias, [3, 6], 0.5)
    checked(model, IMAGE, None)


def test_of_a_grouped_convolution_the_same_of_each_group_go() -> None:
    model = Stack(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    still(model.bn.weight, model.bn.bias, [0, 3], -1.0)
    checked(model, IMAGE, None)
    still(model.bn.weight, model.bn.bias, [4], -1.0)
    checked(model, IMAGE, {"conv": 6})


def test_shuffles_are_followed() -> None:
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
            self.other, self.reader = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)
            noisy(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([self.bn(self.conv(x)).relu(), self.other(x)], 1)
            n, c, h, w = y.shape
            y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.reader(y.chunk(2, 1)[0]) + self.reader(y.chunk(2, 1)[1])

    model = Shuffled()
    still(model.bn.weight, model.bn.bias, [1, 5], 0.5)  # their places in both halves
    still(model.other.weight, model.other.bias, [1, 5])
    graph, _ = checked(model, IMAGE, {"conv": 6, "other": 6})
    assert graph.constant("reader.weight_pruned").shape == (4, 6, 3, 3)


def test_a_shared_module_absorbs_different_constants() -> None:
    class Shared(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
            self.reader = nn.Linear(8, 4, bias=bias)
            noisy(self)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.reader(self.a(x).relu()) * self.reader(self.b(x).relu())

    for bias in (True, False):
        model = Shared(bias)
        still(model.a.weight, model.a.bias, [1], 0.5)
        checked(model, ROWS, None)
        still(model.b.weight, model.b.bias, [1], 0.25)
        graph, _ = checked(model, ROWS, {"a": 7, "b": 7}, rewrites=2 if bias else 1)
        assert sum("bias" in name and "reader" in name for name in graph.constants()) == 2


# -- attention ---------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, flash: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.out = nn.Linear(12, 12)
        self.flash = flash
        noisy(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [
            layer(x).reshape(x.shape[0], x.shape[1], 3, 4).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        ]
        if self.flash:
            y = nn.functional.scaled_dot_product_attention(*heads)
        else:
            y = (heads[0] @ heads[1].transpose(-1, -2)).softmax(-1) @ heads[2]
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], 12))


TOKENS = torch.randn(2, 5, 12)


@pytest.mark.parametrize("flash", [True, False])
def test_a_head_whose_values_are_zero_goes(flash: bool) -> None:
    model = Attention(flash)
    still(model.v.weight, model.v.bias, range(4, 8))
    checked(model, TOKENS, {"q": 8, "k": 8, "v": 8})
    still(model.v.weight, model.v.bias, range(4, 7), 0.3)
    checked(model, TOKENS, {"v": 8} if flash else None)


def test_a_head_that_nobody_listens_to_goes() -> None:
    model = Attention()
    with torch.no_grad():
        model.out.weight[:, :4] = 0
    checked(model, TOKENS, {"q": 8, "k": 8, "v": 8})


def test_behind_a_mask_only_zeros_are_sure() -> None:
    """Where a mask hides all keys of a query, attention gives 0 and not the mean of the values."""
    class Masked(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).unsqueeze(1) for layer in (self.q, self.k, self.v))
            seen = x[:, None, :, :1] < 9
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v, seen).squeeze(1))

    model = Masked()
    still(model.v.weight, model.v.bias, [1, 2], 0.3)
    checked(model, TOKENS, None)
    still(model.v.weight, model.v.bias, [1, 2])
    checked(model, TOKENS, {"v": 10})


def test_part_of_a_head_stays() -> None:
    model = Attention()
    still(model.v.weight, model.v.bias, range(4, 7))
    checked(model, TOKENS, None)


# -- what stays, and why -----------------------------------------------------------------------


def test_nothing_dead_changes_nothing() -> None:
    model = Stack()
    graph = fxopt.capture(model.eval(), IMAGE)
    nodes, text = list(graph.graph.nodes), graph_text(graph)
    assert not may_have_any(graph)
    assert PASS.run(graph) == PassResult()
    assert list(graph.graph.nodes) == nodes and graph_text(graph) == text


def test_a_computed_weight_takes_nothing_in() -> None:
    class Scaled(Perceptron):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.one(x).relu(), self.two.weight * 2, self.two.bias)

    model = Scaled()
    still(model.one.weight, model.one.bias, [0, 1], 0.5)
    checked(model, ROWS, None, misses=["weight or bias is not a constant to change"])
    still(model.one.weight, model.one.bias, [0, 1], -0.5)
    checked(model, ROWS, {"one": 8})


def test_outputs_stay() -> None:
    model = Stack()
    still(model.reader.weight, model.reader.bias, [0, 2], 0.4)
    checked(model, IMAGE, None, misses=["2 channels stay, though constant: the model returns them"])


def test_channels_that_a_norm_reduces_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    noisy(model)
    still(model[0].weight, model[0].bias, [0, 1])
    checked(model, ROWS, None, misses=["2 channels stay, though constant: a layer norm"])


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_of_a_dead_layer_one_channel_stays(value: float) -> None:
    model = Stack(nn.Conv2d(8, 4, 1))
    still(model.bn.weight, model.bn.bias, range(8), value)
    checked(model, IMAGE, {"conv": 1}, gradients=False, misses=["one has to stay"])


def test_a_dead_chain_is_as_narrow_as_can_be() -> None:
    model = Perceptron()
    still(model.one.weight, model.one.bias, range(10), -1.0)
    checked(model, ROWS, {"one": 1, "two": 1}, gradients=False)


def test_state_is_not_constant() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)
            self.register_buffer("gate", torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.two(self.one(x) * self.gate)
            self.gate.add_(1)
            return y

    checked(Counting(), ROWS, None, gradients=False)


def test_zero_times_an_infinite_constant_is_not_zero() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 4)
            self.register_buffer("huge", torch.full((8,), float("inf")))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two((self.one(x) * self.huge).clamp(0, 1))

    model = Infinite()
    still(model.one.weight, model.one.bias, [3])
    graph = fxopt.capture(model.eval(), ROWS)
    assert not PASS.run(graph).modified


# -- dtypes, sizes, weights --------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(dtype: torch.dtype, bound: float) -> None:
    model = Stack(nn.Conv2d(8, 4, 3), nn.SiLU()).to(dtype)
    still(model.bn.weight, model.bn.bias, [0, 3, 7], 0.7)
    graph, _ = checked(
        model, IMAGE.to(dtype), {"conv": 5}, double=False, tolerance=bound, gradients=False
    )
    assert graph.constant("reader.bias_absorbed").dtype == dtype


def test_dynamic_batch() -> None:
    model = Stack(nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5)))
    still(model.bn.weight, model.bn.bias, [0, 6], 0.7)
    graph, _ = checked(model, IMAGE, {"conv": 6}, dynamic_shapes=({0: "batch"},))
    x = torch.randn(7, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(graph(x), copy.deepcopy(model).double().eval()(x), atol=1e-12)


def test_dynamic_attention() -> None:
    model = Attention()
    still(model.v.weight, model.v.bias, range(4, 8), 0.4)
    graph, _ = checked(
        model, TOKENS, {"q": 8, "v": 8}, dynamic_shapes=({0: "batch", 1: "length"},)
    )
    x = torch.randn(3, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(graph(x), copy.deepcopy(model).double().eval()(x), atol=1e-12)


def compiled(model: nn.Module) -> Any:
    return fxopt.compile(model, IMAGE, passes=[PASS])


@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_new_weights_with_the_same_dead_channels_are_taken(shift: float) -> None:
    model = Stack(nn.Conv2d(8, 4, 3)).eval()
    still(model.bn.weight, model.bn.bias, [0, 3], shift)
    ready = compiled(model)
    fresh = noisy(copy.deepcopy(model), seed=5)
    still(fresh.bn.weight, fresh.bn.bias, [0, 3], shift)
    ready.update(fresh.state_dict())
    with torch.no_grad():
        assert torch.allclose(ready(IMAGE), fresh(IMAGE), atol=1e-5)


@pytest.mark.parametrize("change", ["scale", "constant"])
def test_other_weights_are_refused(change: str) -> None:
    model = Stack(nn.Conv2d(8, 4, 3)).eval()
    still(model.bn.weight, model.bn.bias, [0, 3], 0.5)
    ready = compiled(model)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        (fresh.bn.weight if change == "scale" else fresh.bn.bias)[3] = 0.125
    with pytest.raises(OptionError, match="remove-zero-channels"):
        ready.update(fresh.state_dict())


def test_new_weights_after_the_default_passes() -> None:
    model = Residual("cat").eval()
    still(model.bn_a.weight, model.bn_a.bias, [0, 1], 0.5)
    ready = fxopt.compile(model, IMAGE, passes=[*fxopt.default_passes(), PASS])
    assert ready.story.steps[-1].details.count == 2
    fresh = noisy(copy.deepcopy(model), seed=5)
    still(fresh.bn_a.weight, fresh.bn_a.bias, [0, 1], 0.5)
    ready.update(fresh.state_dict())
    with torch.no_grad():
        assert torch.allclose(ready(IMAGE), fresh(IMAGE), atol=1e-5)
        fresh.bn_a.weight[1] = 0.1
    with pytest.raises(OptionError, match="remove-zero-channels"):
        ready.update(fresh.state_dict())


def test_a_listener_that_returns_is_refused() -> None:
    model = Stack().eval()
    with torch.no_grad():
        model.reader.weight[:, 2] = 0
    ready = compiled(model)
    fresh = noisy(copy.deepcopy(model), seed=5)
    with pytest.raises(OptionError, match="remove-zero-channels"):
        ready.update(fresh.state_dict())
    with torch.no_grad():
        fresh.reader.weight[:, 2] = 0
    with torch.no_grad():
        ready.update(fresh.state_dict())
        assert torch.allclose(ready(IMAGE), fresh(IMAGE), atol=1e-5)


def test_without_fuel_nothing_changes() -> None:
    model = Stack(nn.Conv2d(8, 4, 3)).eval()
    still(model.bn.weight, model.bn.bias, [0, 3], 0.5)
    graph = fxopt.capture(model, IMAGE)
    before, names = graph_text(graph), set(graph.constants())
    with fuel(0):
        assert not PASS.run(graph).modified
    assert graph_text(graph) == before and set(graph.constants()) == names
    assert not graph.info.recipes and not graph.info.looked_at


def test_the_users_model_is_not_changed() -> None:
    model = Stack(nn.Conv2d(8, 4, 3)).eval()
    still(model.bn.weight, model.bn.bias, [0, 3], 0.5)
    before = copy.deepcopy(model.state_dict())
    graph = fxopt.capture(model, IMAGE)
    PASS.run(graph)
    graph.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- whole networks ----------------------------------------------------------------------------


def slimmed(model: nn.Module, share: float, shifts: bool) -> nn.Module:
    """Set that share of all scales to 0, and of the shifts beside them, as slimming leaves them."""
    noisy(model)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            dead = torch.rand(module.num_features, generator=generator) < share
            with torch.no_grad():
                module.weight[dead] = 0
                module.bias[dead] *= float(shifts)
    return model.eval()


@pytest.mark.parametrize("name, shifts, least", [
    ("resnet18", False, 500), ("resnet18", True, 250), ("mobilenet_v2", True, 3000),
    ("mobilenet_v3_small", True, 200), ("shufflenet_v2_x0_5", False, 600),
])  # fmt: skip
def test_slimmed_networks(name: str, shifts: bool, least: int) -> None:
    model = slimmed(getattr(import_torchvision().models, name)(weights=None), 0.3, shifts)
    graph = retarget(fxopt.capture(model, torch.randn(1, 3, 64, 64)), dtype=torch.float64)
    original = graph.copy()
    result = PASS.run(graph)
    fxopt.dialect.check(graph)
    assert result.details.count >= least
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        (expected,), (found,) = original.run(x), graph.run(x)
    assert (expected - found).abs().max() <= 1e-10 * expected.abs().max()
    assert not PASS.run(graph).modified
