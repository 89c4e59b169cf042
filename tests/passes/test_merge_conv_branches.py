"""merge-conv-branches: which sums become one layer, which do not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.passes.merge_conv_branches import MergeConvBranches
from fxopt.testing import check_pass, noisy, relative_error

ONE = {"conv2d": 1, "batch_norm": 0, "add": 0, "sub": 0, "mul": 0}


class Calls(nn.Module):
    """A model made of named layers and a function of them and the input."""

    def __init__(self, call: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.call = call
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


def image(channels: int = 4, size: int = 7) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def conv(kernel: Any = 3, bias: bool = True, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", "same" if isinstance(kernel, tuple) else kernel // 2)
    return nn.Conv2d(4, options.pop("outputs", 4), kernel, bias=bias, **options)


def normed(kernel: int = 3, **options: Any) -> nn.Module:
    layer = conv(kernel, bias=False, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels))


def scale(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def total(m: Calls, x: torch.Tensor) -> torch.Tensor:
    """The sum of all layers of one input."""
    first, *others = (layer(x) for layer in m.children())
    return sum(others, first)


def layers(*branches: nn.Module) -> Calls:
    return Calls(total, **{f"branch{n}": branch for n, branch in enumerate(branches)})


# -- what merges -----------------------------------------------------------------------------------

MERGED: dict[str, nn.Module] = {
    "two sizes": layers(conv(3), conv(1)),
    "the smaller first": layers(conv(1), conv(3)),
    "no bias": layers(conv(3, bias=False), conv(1, bias=False)),
    "one bias": layers(conv(3, bias=False), conv(1)),
    "three sizes": layers(conv(7), conv(5), conv(3)),
    "batch norms": layers(normed(3), normed(1), nn.BatchNorm2d(4)),
    "batch norm without weights": layers(conv(3), nn.BatchNorm2d(4, affine=False)),
    "the input": layers(conv(3), nn.Identity()),
    "the input first, 1×1": layers(nn.Identity(), conv(1)),
    "strided": layers(conv(3, stride=2, outputs=6), conv(1, stride=2, outputs=6)),
    "strides that differ": layers(conv(3, stride=(1, 2)), conv(1, stride=(1, 2))),
    "grouped": layers(conv(3, groups=2, outputs=6), conv(1, groups=2, outputs=6)),
    "grouped, and the input": layers(conv(3, groups=2), nn.BatchNorm2d(4)),
    "depthwise": layers(
        *(normed(3, groups=4) for _ in range(3)), normed(1, groups=4), nn.BatchNorm2d(4)
    ),
    "depthwise, more outputs": layers(
        conv(7, groups=4, outputs=8), conv(3, groups=4, outputs=8)
    ),
    "one row, one column": layers(conv(3), conv((1, 3)), conv((3, 1))),
    "dilated": layers(conv(7), conv(3, dilation=2, padding=2), conv(3, dilation=3, padding=3)),
    "both dilated": layers(
        conv(5, dilation=2, padding=4), conv(3, dilation=4, padding=4),
        conv(3, dilation=2, padding=2), conv(1),
    ),
    "not centred": layers(conv(4, padding=2), conv(2, padding=1)),
    "unpadded": layers(conv(3, padding=0), conv(3, padding=0)),
    "of words": layers(conv(3, padding="same"), conv(1, padding="valid")),
    "difference": Calls(lambda m, x: m.a(x) - m.b(x) - x, a=conv(3), b=conv(1)),
    "multiple": Calls(lambda m, x: torch.add(m.a(x), m.b(x), alpha=3) * 2, a=conv(3), b=conv(1)),
    "scaled by a parameter": Calls(
        lambda m, x: m.a(x) * m.s + m.t * x, a=conv(3), s=scale(4, 1, 1), t=scale(1, 4, 1, 1)
    ),
    "scaled by one number": Calls(lambda m, x: 0.5 * m.a(x) + x * 3, a=conv(3)),
    "sums in any order": Calls(
        lambda m, x: (x + m.a(x)) + (m.n(x) - (m.b(x) + m.c(x))),
        a=conv(1), b=conv(3), c=conv(1), n=nn.BatchNorm2d(4),
    ),
    "a scaled sum inside of a sum": Calls(
        lambda m, x: x + m.s * (m.a(x) + m.b(x) - m.n(x)),
        a=conv(3), b=conv(1), n=nn.BatchNorm2d(4), s=scale(4, 1, 1),
    ),
    "the smaller one behind a 1×1": layers(conv(3), nn.Sequential(conv(1, bias=False), conv(3))),
    "a wide one between": layers(
        nn.Sequential(conv(3, outputs=8), nn.Conv2d(8, 4, 1)), conv(1)
    ),
    "behind a batch norm": layers(nn.Sequential(nn.BatchNorm2d(4), conv(1)), conv(3)),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_merges_into_one_convolution(case: str) -> None:
    after = ONE if case != "multiple" else {**ONE, "mul": 1}
    _, result = check_pass(MergeConvBranches(), MERGED[case], image(), after=after, misses=[])
    assert result.rewrites == (2 if "inside" in case else 1)


def adapted(m: Calls, x: torch.Tensor) -> torch.Tensor:
    return m.layer(x) + m.up(m.down(x)) * 0.25  # type: ignore[no-any-return, operator]


OTHERS: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "1d": (
        layers(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
        (2, 4, 7), "conv1d",
    ),
    "3d": (layers(nn.Conv3d(2, 2, 3, padding=1), nn.Conv3d(2, 2, 1)), (2, 2, 3, 4, 5), "conv3d"),
    "not batched": (layers(conv(3), conv(1), nn.Identity()), (4, 5, 6), "conv2d"),
    "linear": (layers(nn.Linear(4, 6), nn.Linear(4, 6, bias=False)), (2, 3, 4), "linear"),
    "linear and its input": (layers(nn.Linear(4, 4), nn.Identity()), (3, 4), "linear"),
    "linear and a batch norm": (layers(nn.Linear(4, 4), nn.BatchNorm1d(4)), (3, 4), "linear"),
    "linear and its adapter": (
        Calls(
            adapted, layer=nn.Linear(6, 6), down=nn.Linear(6, 2, bias=False), up=nn.Linear(2, 6)
        ),
        (3, 6), "linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_merges_into_one_layer(case: str) -> None:
    model, shape, layer = OTHERS[case]
    after = {layer: 1, "add": 0, "mul": 0, "batch_norm": 0}
    check_pass(MergeConvBranches(), model, torch.randn(shape), after=after, rewrites=1, misses=[])


def test_the_new_graph_reads_as_expected() -> None:
    model = Calls(lambda m, x: m.a(x) + m.b(x), a=conv(3), b=conv(1, bias=False))
    check_pass(MergeConvBranches(), model, image(4, 2), text="""
%inputs_0: f64[2,4,2,2] = input
%a_weight_merged: f64[4,4,3,3] = constant 'a.weight_merged'
%a_bias_merged: f64[4] = constant 'a.bias_merged'
%conv2d_2: f64[2,4,2,2] = conv2d(%inputs_0, %a_weight_merged, %a_bias_merged, [1, 1], [1, 1], [1, 1], 1)
return (%conv2d_2)
""")  # noqa: E501


def test_other_terms_stay() -> None:
    def call(m: Calls, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y.relu() - m.a(x) + m.c(y) + 2 * y.sin() + m.b(x)  # type: ignore[operator]

    model = Calls(call, a=conv(3), b=conv(1), c=conv(3))
    after = {"conv2d": 2, "add": 3, "sub": 0}
    check_pass(MergeConvBranches(), model, (image(), image()), after=after, rewrites=1)


def test_two_inputs_give_two_layers() -> None:
    def call(m: Calls, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return m.a(x) + m.b(y) - m.c(x) + y  # type: ignore[operator, no-any-return]

    model = Calls(call, a=conv(3), b=conv(3), c=conv(3))
    after = {"conv2d": 2, "add": 1, "sub": 0}
    check_pass(MergeConvBranches(), model, (image(), image()), after=after, rewrites=1, misses=[])


def test_chains_of_blocks_merge_in_one_run() -> None:
    blocks = []
    for _ in range(3):
        blocks += [layers(normed(3), normed(1), nn.BatchNorm2d(4)), nn.ReLU()]
    after = {"conv2d": 3, "relu": 3, "batch_norm": 0, "add": 0}
    check_pass(MergeConvBranches(), nn.Sequential(*blocks), image(), after=after, rewrites=3)


def test_blocks_without_activation_merge_each_by_itself() -> None:
    def call(m: Calls, x: torch.Tensor) -> torch.Tensor:
        y = x + m.a(x)  # type: ignore[operator]
        return y + m.b(y)  # type: ignore[operator, no-any-return]

    model = Calls(call, a=conv(3), b=conv(3))
    check_pass(MergeConvBranches(), model, image(), after={"conv2d": 2, "add": 0}, rewrites=2)


def test_the_size_may_be_symbolic() -> None:
    sizes = {0: "batch", 2: "height"}
    for case in ("strided", "a scaled sum inside of a sum", "of words"):
        check_pass(MergeConvBranches(), MERGED[case], image(), dynamic_shapes=sizes, after=ONE)


def test_a_layer_called_twice_gets_two_weights() -> None:
    def call(m: Calls, x: torch.Tensor, y: torch.Tensor) -> Any:
        return m.a(x) + x, m.a(y) + m.b(y)  # type: ignore[operator]

    model = Calls(call, a=conv(3), b=conv(1))
    graph, _ = check_pass(
        MergeConvBranches(), model, (image(), image()), after={"conv2d": 2, "add": 0}, rewrites=2
    )
    assert {"a.weight_merged", "a.weight_merged_2"} <= set(graph.constants())


def test_new_weights_go_through_the_same_computation() -> None:
    model = noisy(MERGED["a scaled sum inside of a sum"]).double().eval()
    x = image().double()
    graph = capture(model, x)
    MergeConvBranches().run(graph)
    names = {recipe.name for recipe in graph.info.recipes}
    assert names >= {"b.weight_merged", "a.weight_merged"} or len(names) == 4
    assert relative_error(graph(x), model(x)) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = MERGED["batch norms"].to(dtype)
    tolerance = 30 * torch.finfo(dtype).eps
    check_pass(
        MergeConvBranches(), model, image().to(dtype), after=ONE, double=False,
        tolerance=tolerance, gradients=False,
    )
    model.float()


# -- what does not ---------------------------------------------------------------------------------

REACH = "it has taps that"
APART: dict[str, tuple[nn.Module, str]] = {
    "a row and a column": (layers(conv((1, 3)), conv((3, 1))), REACH),
    "dilated beyond": (layers(conv(3), conv(3, dilation=2, padding=2)), REACH),
    "between the taps": (layers(conv(3, dilation=2, padding=2), conv(3)), REACH),
    "other groups": (layers(conv(3, groups=4), conv(1)), REACH),
    "no tap in the middle": (layers(conv(2, dilation=2, padding=1), nn.Identity()), REACH),
    "a layer that others read": (
        Calls(lambda m, x: ((y := m.a(x)) + m.b(x), y.relu()), a=conv(1), b=conv(3)),
        "is used elsewhere too",
    ),
    "a batch norm that others read": (
        Calls(lambda m, x: ((y := m.a(x)) + m.b(x), y.relu()), a=nn.BatchNorm2d(4), b=conv(3)),
        "is used elsewhere too",
    ),
    "batch statistics": (
        layers(conv(3), nn.BatchNorm2d(4, track_running_stats=False)), "batch statistics"
    ),
    "a bottleneck": (
        layers(nn.Sequential(conv(3, outputs=1), nn.Conv2d(1, 4, 1)), conv(1)), REACH
    ),
    "a bias under zeros": (layers(nn.Sequential(conv(1), conv(3)), conv(3)), ""),
    "a channel that is a row": (
        Calls(lambda m, x: m.a(x) * m.s + x, a=conv(3), s=scale(7)), ""
    ),
    "a factor of each place": (
        Calls(lambda m, x: m.a(x) + x * m.s, a=conv(3), s=scale(4, 7, 7)), "other axes"
    ),
    "an activation": (
        Calls(lambda m, x: m.a(x).relu() + m.b(x), a=conv(3), b=conv(1)), ""
    ),
    "twice the same": (Calls(lambda m, x: (y := m.a(x)) + y, a=conv(3)), ""),
    "one layer": (Calls(lambda m, x: m.a(x) + 1, a=conv(3)), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", APART)
def test_stays_apart(case: str) -> None:
    model, reason = APART[case]
    check_pass(MergeConvBranches(), model, image(), rewrites=0, misses=[reason] if reason else [])


def test_terms_that_are_broadcast_stay() -> None:
    def call(m: Calls, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return m.a(x) + m.b(y)  # type: ignore[operator, no-any-return]

    inputs = (image(), image()[:1])
    model = Calls(call, a=conv(3), b=conv(3))
    check_pass(MergeConvBranches(), model, inputs, rewrites=0, misses=[])


def test_weights_that_are_computed_prevent_it() -> None:
    def call(m: Calls, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(x, w, padding=1) + m.b(x)  # type: ignore[operator, no-any-return]

    inputs = (image(), torch.randn(4, 4, 3, 3))
    model = Calls(call, b=conv(1))
    check_pass(MergeConvBranches(), model, inputs, rewrites=0, misses=["weight of conv2d is not a"])


def test_training_prevents_it() -> None:
    graph = capture(MERGED["batch norm without weights"], image())
    graph.train()
    result = MergeConvBranches().run(graph)
    assert not result.modified
    assert "batch statistics" in result.misses[0].reason


def test_an_infinite_scale_prevents_it() -> None:
    model = layers(conv(3), nn.BatchNorm2d(4, eps=0.0))
    graph = capture(model.eval(), image())
    graph.constant("branch1.running_var").zero_()
    result = MergeConvBranches().run(graph)
    assert not result.modified
    assert "not finite" in result.misses[0].reason


def test_a_hundred_factors_in_a_row_are_no_branch() -> None:
    def call(m: Calls, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(100):
            y = y * 1.001
        return m.a(x) + y  # type: ignore[operator, no-any-return]

    graph = capture(Calls(call, a=conv(3)), image())
    assert not MergeConvBranches().run(graph).modified


def test_a_sum_of_a_sum_many_times_over_is_read_once() -> None:
    def call(m: Calls, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        for _ in range(60):
            y = y + y
        return y  # type: ignore[no-any-return]

    graph = capture(Calls(call, a=conv(3)), image())
    assert not MergeConvBranches().run(graph).modified
