"""fuse-conv-bn: what folds, what must not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.capture import capture
from fxopt.passes.fuse_conv_bn import FuseConvBn
from fxopt.rewrite import fuel
from fxopt.testing import check_pass, noisy, op_counts, relative_error

FOLDED = {"batch_norm": 0, "instance_norm": 0}


class Calls(nn.Module):
    """A model made of named layers and a function of them and the input."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def image(channels: int = 4, size: int = 6) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


# -- behind a layer -------------------------------------------------------------------------------

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "conv2d without bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "conv2d, norm without weights": (
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 6, 6)
    ),
    "conv2d, large epsilon": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5), (2, 4, 6, 6)),
    "conv2d of two groups": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 6, 6)),
    "depthwise conv2d": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 6, 6)),
    "conv2d of one channel": (nn.Conv2d(4, 1, 3), nn.BatchNorm2d(1), (2, 4, 6, 6)),
    "conv2d, same padding": (
        nn.Conv2d(4, 6, (4, 3), padding="same"), nn.BatchNorm2d(6), (2, 4, 6, 6)
    ),
    "conv2d, reflected": (
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 6, 6)
    ),
    "conv3d": (nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6), (2, 2, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(6), (2, 4, 5, 5),
    ),
    "transposed 2d of two groups": (
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)
    ),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6), (1, 4, 3, 3, 3)),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "linear without bias": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
    "synchronized": (nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6), (2, 4, 6, 6)),
    "instance norm": (
        nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        (2, 4, 6, 6),
    ),
    "instance norm without weights": (
        nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, track_running_stats=True), (2, 4, 6)
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_folds_into_the_layer_before(case: str) -> None:
    layer, norm, shape = LAYERS[case]
    model = nn.Sequential(layer, norm)
    check_pass(FuseConvBn(), model, torch.randn(shape), after=FOLDED, rewrites=1, misses=[])


def test_the_new_graph_reads_as_expected() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    check_pass(FuseConvBn(), model, torch.randn(1, 3, 2, 2), text="""
%input_1: f64[1,3,2,2] = input
%_0_weight_folded: f64[4,3,1,1] = constant '0.weight_folded'
%_0_bias_folded: f64[4] = constant '0.bias_folded'
%conv2d_1: f64[1,4,2,2] = conv2d(%input_1, %_0_weight_folded, %_0_bias_folded, [1, 1], [0, 0], [1, 1], 1)
%relu: f64[1,4,2,2] = relu(%conv2d_1)
return (%relu)
""")  # noqa: E501


# -- through calls in between ---------------------------------------------------------------------


def levit(m: Calls, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x)
    return m.norm(y.flatten(0, 1)).reshape_as(y)


def heads(m: Calls, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(x).reshape(2, 5, 2, 3).permute(0, 3, 2, 1)  # N, D, H, L
    return m.norm(y.permute(0, 2, 1, 3).flatten(1, 2))


PATHS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "dropout": (lambda m, x: m.norm(F.dropout(m.linear(x), 0.5, False)), (3, 4)),
    "flatten and reshape_as": (levit, (2, 5, 4)),
    "view": (lambda m, x: m.norm(m.linear(x).view(-1, 6)).view(2, 5, 6), (2, 5, 4)),
    "transpose": (lambda m, x: m.norm(m.linear(x).transpose(1, 2)), (2, 5, 4)),
    "permute and unflatten": (
        lambda m, x: m.norm(m.linear(x).permute(1, 0).unflatten(1, (2, 5)).permute(1, 0, 2)),
        (10, 4),
    ),
    "split into heads and merged": (heads, (2, 5, 4)),
    "squeeze and unsqueeze": (
        lambda m, x: m.norm(m.linear(x).unsqueeze(0).squeeze(0).contiguous()), (3, 4)
    ),
    "mean": (lambda m, x: m.norm(m.linear(x).mean(1)), (2, 5, 4)),
    "mean, kept": (lambda m, x: m.norm(m.linear(x).transpose(1, 2).mean(2, True)), (2, 5, 4)),
    "slice and select": (lambda m, x: m.norm(m.linear(x)[:, 1:][:, 0]), (2, 5, 4)),
    "channels sliced": (lambda m, x: m.norm(m.wide(x)[:, 2:8]), (3, 4)),
    "channels split": (
        lambda m, x: [m.norm((y := m.wide(x).split([2, 6, 4], 1))[1]), F.relu(y[0]), y[2]], (3, 4)
    ),
    "channels sliced apart": (
        lambda m, x: [m.norm((y := m.wide(x))[:, 6:]), F.relu(y[:, :6])], (3, 4)
    ),
    "average pool": (
        lambda m, x: m.norm(F.avg_pool1d(m.linear(x).transpose(1, 2), 2)), (2, 5, 4)
    ),
    "adaptive average pool": (
        lambda m, x: m.norm(F.adaptive_avg_pool1d(m.linear(x).transpose(1, 2), 2)), (2, 5, 4)
    ),
    "replicated padding": (
        lambda m, x: m.norm(F.pad(m.linear(x).transpose(1, 2), (1, 2), "replicate")), (2, 5, 4)
    ),
}


@pytest.mark.parametrize("case", PATHS)
def test_folds_through(case: str) -> None:
    call, shape = PATHS[case]
    model = Calls(
        call, linear=nn.Linear(4, 6), wide=nn.Linear(4, 12), norm=nn.BatchNorm1d(6)
    )
    check_pass(FuseConvBn(), model, torch.randn(shape), after=FOLDED, rewrites=1, misses=[])


NOT_THROUGH: dict[str, tuple[Callable[..., Any], tuple[int, ...], str]] = {
    "positions, as many as channels": (
        lambda m, x: m.norm(m.linear(x)), (2, 6, 4), "do not vary along the channels"
    ),
    "channels and positions in one axis": (
        lambda m, x: m.norm(m.linear(x).reshape(2, 6, 2)), (2, 2, 4), "do not vary along"
    ),
    "padded average pool": (
        lambda m, x: m.norm(F.avg_pool1d(m.linear(x).transpose(1, 2), 3, 1, 1)), (2, 5, 4),
        "cannot be followed",
    ),
    "average over channels": (
        lambda m, x: m.norm(m.linear(x).mean(2)), (2, 6, 4), "cannot be followed"
    ),
    "zero padding": (
        lambda m, x: m.norm(F.pad(m.linear(x).transpose(1, 2), (1, 0))), (2, 5, 4),
        "cannot be followed",
    ),
    "every second channel": (
        lambda m, x: m.norm(m.wide(x)[:, ::2]), (2, 4), "cannot be followed"
    ),
    "overlapping channels": (
        lambda m, x: [m.norm((y := m.wide(x))[:, :6]), F.relu(y[:, 5:])], (2, 4),
        "has another user",
    ),
    "channels among every second one": (
        lambda m, x: [m.norm((y := m.wide(x))[:, :6]), F.relu(y[:, ::2])], (2, 4),
        "has another user",
    ),
    "rows, read elsewhere too": (
        lambda m, x: [m.norm((y := m.linear(x))[:1]), F.relu(y[1:])], (2, 4), "has another user"
    ),
}


@pytest.mark.parametrize("case", NOT_THROUGH)
def test_does_not_fold_through(case: str) -> None:
    call, shape, reason = NOT_THROUGH[case]
    model = Calls(
        call, linear=nn.Linear(4, 6), wide=nn.Linear(4, 12), norm=nn.BatchNorm1d(6)
    )
    check_pass(FuseConvBn(), model, torch.randn(shape), rewrites=0, misses=[reason])


# -- in front of a layer --------------------------------------------------------------------------

FORWARD: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "unpadded conv": (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "unpadded conv of two groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "unpadded depthwise conv": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 6, 6)),
    "reflected conv": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "linear behind flatten": (nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), (2, 4, 3, 3)),
    "linear behind pooling": (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 5)),
        (2, 4, 3, 3),
    ),
}


@pytest.mark.parametrize("case", FORWARD)
def test_folds_into_the_layer_behind(case: str) -> None:
    layer, shape = FORWARD[case]
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), layer)
    check_pass(FuseConvBn(), model, torch.randn(shape), after=FOLDED, rewrites=1, misses=[])


NOT_FORWARD: dict[str, tuple[nn.Module, str]] = {
    "zero padding": (nn.Conv2d(4, 6, 3, padding=1), "pads with zeros"),
    "same padding": (nn.Conv2d(4, 6, (2, 3), padding="same"), "pads with zeros"),
    "padded 1×1": (nn.Conv2d(4, 6, 1, padding=1), "pads with zeros"),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), "transposed"),
    "linear along the width": (nn.Linear(6, 5), "do not vary along the channels"),
    "zero pad, then conv": (
        nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)), "cannot be followed"
    ),
}


@pytest.mark.parametrize("case", NOT_FORWARD)
def test_does_not_fold_into_the_layer_behind(case: str) -> None:
    layer, reason = NOT_FORWARD[case]
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), layer)
    check_pass(FuseConvBn(), model, image(), rewrites=0, misses=[reason])


def test_folds_into_every_layer_behind() -> None:
    def call(m: Calls, x: torch.Tensor) -> Any:
        y = m.norm(F.relu(x))
        return m.a(y), m.b(y)

    model = Calls(
        call, norm=nn.BatchNorm2d(4), a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(4, 3, 2, bias=False)
    )
    check_pass(FuseConvBn(), model, image(), after=FOLDED, rewrites=1, misses=[])


def test_a_norm_that_others_read_too_is_left_alone() -> None:
    def call(m: Calls, x: torch.Tensor) -> Any:
        y = m.norm(F.relu(x))
        return m.a(y), F.relu(y)

    model = Calls(call, norm=nn.BatchNorm2d(4), a=nn.Conv2d(4, 6, 1))
    check_pass(FuseConvBn(), model, image(), rewrites=0, misses=["uses it beside"])


def test_a_norm_with_no_layer_near_is_no_miss() -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    check_pass(FuseConvBn(), model, image(), rewrites=0, misses=[])


# -- chains, sharing ------------------------------------------------------------------------------


def test_folds_chains_of_norms_in_one_run() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), *(nn.BatchNorm2d(6) for _ in range(3)))
    check_pass(FuseConvBn(), model, image(), after=FOLDED, rewrites=3)
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(3)), nn.Conv2d(4, 6, 3))
    check_pass(FuseConvBn(), model, image(), after=FOLDED, rewrites=3)


def test_a_conv_called_twice_gets_two_weights() -> None:
    def call(m: Calls, x: torch.Tensor, y: torch.Tensor) -> Any:
        return m.first(m.conv(x)), m.second(m.conv(y)), m.conv(x + y)

    model = Calls(
        call, conv=nn.Conv2d(4, 6, 3), first=nn.BatchNorm2d(6), second=nn.BatchNorm2d(6)
    )
    graph, _ = check_pass(FuseConvBn(), model, (image(), image()), after=FOLDED, rewrites=2)
    assert {"conv.weight", "conv.weight_folded", "conv.weight_folded_2"} <= set(graph.constants())


def test_one_conv_with_two_norms_is_left_alone() -> None:
    def call(m: Calls, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return m.first(y), m.second(y)

    model = Calls(
        call, conv=nn.Conv2d(4, 6, 3), first=nn.BatchNorm2d(6), second=nn.BatchNorm2d(6)
    )
    _, result = check_pass(FuseConvBn(), model, image(), rewrites=0, misses=["has another user"])
    assert len(result.misses) == 2


@pytest.mark.parametrize("where", ["conv", "flatten"])
def test_another_user_on_the_way_prevents_it(where: str) -> None:
    def call(m: Calls, x: torch.Tensor) -> Any:
        y = m.linear(x)
        z = y.flatten(0, 1)
        return m.norm(z), F.relu(y if where == "conv" else z)

    model = Calls(call, linear=nn.Linear(4, 6), norm=nn.BatchNorm1d(6))
    check_pass(
        FuseConvBn(), model, torch.randn(2, 5, 4), rewrites=0, misses=["has another user"]
    )


# -- what is no constant --------------------------------------------------------------------------


def test_batch_statistics_prevent_it() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    check_pass(FuseConvBn(), model, image(), rewrites=0, misses=["batch statistics"])
    behind = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 6, 3))
    check_pass(FuseConvBn(), behind, image(), rewrites=0, misses=["batch statistics"])
    instance = nn.Sequential(nn.Conv2d(4, 6, 3), nn.InstanceNorm2d(6))
    check_pass(FuseConvBn(), instance, image(), rewrites=0, misses=["batch statistics"])


def test_training_mode_prevents_it_and_evaluation_mode_allows_it_again() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), image())
    graph.train()
    result = FuseConvBn().run(graph)
    assert not result.modified
    assert "batch statistics" in result.misses[0].reason
    graph.eval()
    assert FuseConvBn().run(graph).rewrites == 1


def test_a_weight_that_is_computed_prevents_it() -> None:
    def call(m: Calls, x: torch.Tensor, w: torch.Tensor) -> Any:
        return m.norm(F.conv2d(x, w))

    model = Calls(call, norm=nn.BatchNorm2d(6))
    inputs = (image(), torch.randn(6, 4, 3, 3))
    check_pass(FuseConvBn(), model, inputs, rewrites=0, misses=["weight of conv2d is not a"])


def test_statistics_that_are_computed_prevent_it() -> None:
    def call(m: Calls, x: torch.Tensor, mean: torch.Tensor) -> Any:
        return F.batch_norm(m.conv(x), mean, torch.ones_like(mean))

    inputs = (image(), torch.randn(6))
    model = Calls(call, conv=nn.Conv2d(4, 6, 3))
    check_pass(
        FuseConvBn(), model, inputs, rewrites=0, misses=["running mean is not a constant"],
        gradients=False,
    )


class Remembers(nn.Module):
    """A convolution whose bias is a buffer that every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.register_buffer("state", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(F.conv2d(x, self.conv.weight, self.state))
        self.state.add_(1)
        return y


def test_state_is_no_constant() -> None:
    check_pass(FuseConvBn(), Remembers(), image(), rewrites=0, misses=["bias of conv2d is not"])


# -- dtypes, shapes, training ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_wide_and_stored_half(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(dtype)
    graph, _ = check_pass(
        FuseConvBn(), model, image().to(dtype), after=FOLDED, rewrites=1,
        double=False, tolerance=0.03, gradients=False,
    )
    conv, norm = noisy(model)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    expected = (conv.weight.double() * scale.reshape(-1, 1, 1, 1)).to(dtype)
    assert torch.equal(graph.constants()["0.weight_folded"], expected)
    assert {tensor.dtype for tensor in graph.constants().values()} == {dtype}


def test_a_norm_of_wider_weights_than_the_conv_folds() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3).bfloat16(), nn.BatchNorm2d(6))
    graph, _ = check_pass(
        FuseConvBn(), model, image().bfloat16(), after=FOLDED, rewrites=1,
        double=False, tolerance=0.03, gradients=False,
    )
    assert {tensor.dtype for tensor in graph.constants().values()} == {torch.bfloat16}


@pytest.mark.parametrize("cast", [
    lambda y: y.float(), lambda y: y.mean((2, 3), keepdim=True, dtype=torch.float32)
])
def test_a_cast_in_between_is_left_alone(cast: Callable[..., Any]) -> None:
    model = Calls(
        lambda m, x: m.norm(cast(m.conv(x))),
        conv=nn.Conv2d(4, 6, 3).bfloat16(), norm=nn.BatchNorm2d(6),
    )
    check_pass(
        FuseConvBn(), model, image().bfloat16(), rewrites=0, misses=[],
        double=False, tolerance=0.0, gradients=False,
    )


def test_float32_keeps_the_precision_of_float32() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    check_pass(FuseConvBn(), model, image(), rewrites=1, double=False, tolerance=1e-6)


def sliced(m: Calls, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.linear(x)[:, 1:].transpose(1, 2))


def last(m: Calls, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.linear(x)[:, -1])


@pytest.mark.parametrize("call", [levit, PATHS["transpose"][0], PATHS["mean"][0], sliced, last])
def test_folds_with_dynamic_sizes(call: Callable[..., Any]) -> None:
    model = Calls(call, linear=nn.Linear(4, 6), norm=nn.BatchNorm1d(6))
    graph, _ = check_pass(
        FuseConvBn(), model, torch.randn(2, 5, 4), dynamic_shapes={0: "n", 1: "l"},
        after=FOLDED, rewrites=1,
    )
    assert graph(torch.randn(3, 7, 4, dtype=torch.float64)).shape[0] == 3


def test_a_use_of_the_shape_is_no_use_of_the_values() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval(), image())
    (conv,) = graph.find(torch.ops.aten.conv2d.default)
    with graph.graph.inserting_after(conv):
        size = graph.graph.call_function(torch.ops.aten.sym_size.int, (conv, 0))
    size.meta["val"] = 2
    assert FuseConvBn().run(graph).rewrites == 1
    assert op_counts(graph) == {"conv2d": 1, "sym_size": 1}
    assert conv not in graph.graph.nodes


def test_new_weights_train_and_can_be_computed_again() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    graph = capture(model, image())
    FuseConvBn().run(graph)
    assert {name for name, _ in graph.named_parameters()} == {"0.weight_folded", "0.bias_folded"}
    noisy(model.double(), seed=3)
    values: dict[str, torch.Tensor] = dict(model.state_dict())
    for recipe in graph.info.recipes:
        values[recipe.name] = recipe.compute(*(values[name] for name in recipe.sources))
    x = image().double()
    again = F.conv2d(x, values["0.weight_folded"], values["0.bias_folded"])
    assert relative_error(again, model(x)) < 1e-10


def test_frozen_weights_stay_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval().requires_grad_(False)
    graph = capture(model, image())
    FuseConvBn().run(graph)
    assert not list(graph.parameters())


def test_a_norm_of_zero_scale_folds_like_any_other() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    nn.init.zeros_(model[1].weight)
    check_pass(FuseConvBn(), model, image(), after=FOLDED, rewrites=1, add_noise=False)


def test_fuel_stops_after_whole_rewrites() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
    )
    noisy(model).eval()
    graph = capture(model, image())
    with fuel(1):
        assert FuseConvBn().run(graph).rewrites == 1
    assert op_counts(graph)["batch_norm"] == 1
    x = image()
    assert relative_error(graph(x), model(x)) < 1e-5
