"""fold-affine: what folds, what must not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.capture import capture
from fxopt.passes.fold_affine import FoldAffine
from fxopt.passes.fuse_conv_bn import FuseConvBn
from fxopt.testing import check_pass, noisy, op_counts, relative_error

FOLDED = dict.fromkeys(("mul", "div", "add", "sub", "rsub", "neg"), 0)
ROWS, IMAGE = (2, 5, 4), (2, 4, 6, 6)
Call = Callable[..., Any]


class Parts(nn.Module):
    """Layers from 4 channels to 6, constants to go with them, and a function of all that."""

    def __init__(self, call: Call, **layers: nn.Module) -> None:
        super().__init__()
        self.call = call
        self.linear = nn.Linear(4, 6)
        self.bare = nn.Linear(4, 6, bias=False)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.unpadded = nn.Conv2d(4, 6, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.gamma = nn.Parameter(torch.randn(6))
        self.image_gamma = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.input_gamma = nn.Parameter(torch.randn(4))
        self.image_mean = nn.Parameter(torch.randn(4, 1, 1))
        self.heads = nn.Parameter(torch.randn(2, 1, 1))
        self.columns = nn.Parameter(torch.randn(2, 1, 3))
        self.positions = nn.Parameter(torch.randn(5, 1))
        self.pixels = nn.Parameter(torch.randn(6, 6))
        self.scalar = nn.Parameter(torch.randn(()))
        self.register_buffer("shift", torch.randn(6))
        self.register_buffer("image_shift", torch.randn(6, 1, 1))
        self.register_buffer("one", torch.randn(1))
        self.register_buffer("whole", torch.tensor([1, 2, 3, 4, 5, 6]))
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.call(self, *inputs)


# -- behind a layer -------------------------------------------------------------------------------

BEHIND: dict[str, tuple[Call, tuple[int, ...], int]] = {
    "mul by channel": (lambda m, x: m.linear(x) * m.gamma, ROWS, 1),
    "mul in the other order": (lambda m, x: m.gamma * m.linear(x), ROWS, 1),
    "mul by a number": (lambda m, x: m.linear(x) * 0.125, ROWS, 1),
    "mul by a tensor of no dimension": (lambda m, x: m.linear(x) * m.scalar, ROWS, 1),
    "mul by a tensor of one element": (lambda m, x: m.linear(x) * m.one, ROWS, 1),
    "mul by integers": (lambda m, x: m.linear(x) * m.whole, ROWS, 1),
    "mul without a bias": (lambda m, x: m.bare(x) * m.gamma, ROWS, 1),
    "div": (lambda m, x: m.linear(x) / m.gamma, ROWS, 1),
    "div by a number": (lambda m, x: m.linear(x) / 3, ROWS, 1),
    "add": (lambda m, x: m.linear(x) + m.shift, ROWS, 1),
    "add without a bias": (lambda m, x: m.bare(x) + m.shift, ROWS, 1),
    "add a number": (lambda m, x: m.linear(x) + 2, ROWS, 1),
    "add alpha times": (lambda m, x: torch.add(m.linear(x), m.shift, alpha=0.5), ROWS, 1),
    "add alpha times the layer": (
        lambda m, x: torch.add(m.shift, m.linear(x), alpha=0.5), ROWS, 1
    ),
    "sub": (lambda m, x: m.linear(x) - m.shift, ROWS, 1),
    "sub alpha times": (lambda m, x: torch.sub(m.linear(x), m.shift, alpha=3), ROWS, 1),
    "sub from a constant": (lambda m, x: m.shift - m.linear(x), ROWS, 1),
    "sub alpha times the layer": (
        lambda m, x: torch.sub(m.shift, m.bare(x), alpha=3), ROWS, 1
    ),
    "sub from a number": (lambda m, x: 1 - m.linear(x), ROWS, 1),
    "rsub alpha times": (lambda m, x: torch.rsub(m.linear(x), m.shift, alpha=2), ROWS, 1),
    "neg": (lambda m, x: -m.linear(x), ROWS, 1),
    "conv": (lambda m, x: m.conv(x) * m.image_gamma + m.image_shift, IMAGE, 2),
    "transposed conv of two groups": (
        lambda m, x: m.transposed(x) * m.image_gamma - m.image_gamma, IMAGE, 2
    ),
    "layer scale through permute": (
        lambda m, x: m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * m.image_gamma, IMAGE, 1
    ),
    "dropout in between": (lambda m, x: F.dropout(m.linear(x), 0.5, False) * m.gamma, ROWS, 1),
    "a factor per head": (
        lambda m, x: m.linear(x).reshape(2, 5, 2, 3).transpose(1, 2) * m.heads, ROWS, 1
    ),
    "a shift per column of each head": (
        lambda m, x: m.linear(x).reshape(2, 5, 2, 3).transpose(1, 2) + m.columns, ROWS, 1
    ),
    "the scale of attention": (
        lambda m, x: m.linear(x).reshape(2, 5, 2, 3).permute(0, 2, 1, 3) * 3**-0.5, ROWS, 1
    ),
    "a chain": (lambda m, x: ((m.bare(x) * m.gamma + m.shift) / 2 - 1) * m.gamma, ROWS, 5),
    "batch norm": (lambda m, x: m.norm(x) * m.image_mean + m.scalar, IMAGE, 2),
}


def split_heads(m: Parts, x: torch.Tensor) -> Any:
    q, k, v = m.wide(x).reshape(2, 5, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return q * 0.5, k * m.heads, v


def split_selects(m: Parts, x: torch.Tensor) -> Any:
    qkv = m.wide(x).reshape(2, 5, 3, 2, 3).permute(2, 0, 3, 1, 4)
    return qkv[0] * 0.5, qkv[1] + m.columns, qkv[2]


def split_chunks(m: Parts, x: torch.Tensor) -> Any:
    q, k, v = m.wide(x).chunk(3, dim=-1)
    return q * m.gamma, k.reshape(2, 5, 2, 3).transpose(1, 2) * m.heads, v - 1


PARTS = {split_heads: 2, split_selects: 2, split_chunks: 3}


@pytest.mark.parametrize("call", PARTS)
def test_folds_into_the_channels_that_a_part_takes(call: Call) -> None:
    model = Parts(call, wide=nn.Linear(4, 18))
    check_pass(
        FoldAffine(), model, torch.randn(ROWS), after=FOLDED, rewrites=PARTS[call], misses=[]
    )


def test_folds_into_every_layer_that_takes_a_part() -> None:
    def call(m: Parts, x: torch.Tensor) -> Any:
        a, b = (x * m.input_gamma + 1).chunk(2, -1)
        return m.left(a), m.right(b)

    model = Parts(call, left=nn.Linear(2, 3), right=nn.Linear(2, 3, bias=False))
    check_pass(
        FoldAffine(), model, torch.randn(ROWS), after=FOLDED, rewrites=2, misses=[]
    )


@pytest.mark.parametrize("case", BEHIND)
def test_folds_into_the_layer_before(case: str) -> None:
    call, shape, rewrites = BEHIND[case]
    check_pass(
        FoldAffine(), Parts(call), torch.randn(shape), after=FOLDED, rewrites=rewrites, misses=[]
    )


NOT_BEHIND: dict[str, tuple[Call, tuple[int, ...], str | None]] = {
    "a factor per position": (lambda m, x: m.linear(x) * m.positions, ROWS, "do not vary along"),
    "a factor per pixel": (lambda m, x: m.conv(x) * m.pixels, IMAGE, "do not vary along"),
    "as many rows as channels": (
        lambda m, x: m.conv(x) * m.gamma, IMAGE, "do not vary along the channels"
    ),
    "channels and positions in one axis": (
        lambda m, x: m.linear(x).reshape(2, 5, 3, 2).transpose(1, 2).reshape(2, 3, 10)[..., :6]
        * m.gamma, ROWS, "cannot be followed",
    ),
    "a factor from the input": (lambda m, x: m.linear(x) * x.mean(), ROWS, None),
    "two layers": (lambda m, x: m.linear(x) + m.bare(x), ROWS, None),
    "another user": (
        lambda m, x: [(y := m.linear(x)) * m.gamma, F.relu(y)], ROWS, "has another user"
    ),
    "another user of the part": (
        lambda m, x: [(y := m.linear(x).chunk(2, -1))[0] * 2, y[0] - y[1]], ROWS,
        "has another user",
    ),
    "another user of overlapping parts": (
        lambda m, x: [(y := m.linear(x))[..., :4] * 2, y[..., 3:].relu()], ROWS, "another user"
    ),
    "another user of other rows": (
        lambda m, x: [(y := m.linear(x))[:, 0] * 2, y[:, 1].relu()], ROWS, "another user"
    ),
    "a linear layer of one vector": (
        lambda m, x: F.linear(x, m.input_gamma) * m.positions[:, 0], ROWS, None
    ),
    "a linear layer of one vector times a number": (
        lambda m, x: F.linear(x, m.input_gamma) * 2, ROWS, None
    ),
    "an activation in between": (lambda m, x: F.relu(m.linear(x)) * m.gamma, ROWS, None),
    "a wider result": (lambda m, x: m.linear(x[0, :1])[0, :1] * m.gamma, ROWS, None),
    "division by the layer": (lambda m, x: m.gamma / m.linear(x), ROWS, None),
    "division by zero": (lambda m, x: (m.linear(x) / 0).sign(), ROWS, None),
    "an infinite number": (lambda m, x: (m.linear(x) * float("inf")).sign(), ROWS, None),
    "a result rounded": (
        lambda m, x: torch.div(m.linear(x), 2, rounding_mode="floor"), ROWS, None
    ),
}


@pytest.mark.parametrize("case", NOT_BEHIND)
def test_does_not_fold_into_the_layer_before(case: str) -> None:
    call, shape, reason = NOT_BEHIND[case]
    misses = [] if reason is None else [reason]
    check_pass(FoldAffine(), Parts(call), torch.randn(shape), rewrites=0, misses=misses)


def test_a_result_of_another_dtype_is_left_alone() -> None:
    model = Parts(lambda m, x: m.linear(x) * m.wide)
    model.register_buffer("wide", torch.randn(6, dtype=torch.float64))
    check_pass(FoldAffine(), model, torch.randn(ROWS), rewrites=0, double=False, tolerance=1e-6)


def test_integers_are_left_alone() -> None:
    model = Parts(lambda m, x: F.linear(x, m.matrix) * m.whole)
    model.register_buffer("matrix", torch.arange(24).reshape(6, 4))
    check_pass(FoldAffine(), model, torch.arange(40).reshape(2, 5, 4), rewrites=0, misses=[])


def test_dropout_in_training_mode_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(), Parts(lambda m, x: x * m.gamma))
    graph = capture(model, torch.randn(ROWS))
    graph.train()
    result = FoldAffine().run(graph)
    assert not result.modified
    assert "cannot be followed" in result.misses[0].reason


class Counts(nn.Module):
    """A linear layer times a buffer that every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("state", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * self.state
        self.state.add_(1)
        return y


def test_state_is_no_constant() -> None:
    check_pass(
        FoldAffine(), Counts(), torch.randn(ROWS), rewrites=0, misses=[], gradients=False
    )


def test_a_weight_that_is_computed_prevents_it() -> None:
    model = Parts(lambda m, x, w: F.linear(x, w) * m.gamma)
    inputs = (torch.randn(ROWS), torch.randn(6, 4))
    check_pass(FoldAffine(), model, inputs, rewrites=0, misses=["weight of linear is not a"])


# -- in front of a layer --------------------------------------------------------------------------

FRONT: dict[str, tuple[Call, tuple[int, ...], int]] = {
    "normalised input": (lambda m, x: m.unpadded((x - m.image_mean) / 0.3), IMAGE, 2),
    "normalised input by channel": (
        lambda m, x: m.unpadded((x - m.image_mean) / m.image_mean), IMAGE, 2
    ),
    "scale in front of padding": (lambda m, x: m.conv(x * m.image_mean), IMAGE, 1),
    "scale in front of a transposed conv": (
        lambda m, x: m.transposed(x * m.image_mean), IMAGE, 1
    ),
    "linear": (lambda m, x: m.linear(x * m.input_gamma + m.input_gamma), ROWS, 2),
    "linear without a bias": (lambda m, x: m.bare(1 - x), ROWS, 1),
    "two layers": (lambda m, x: [m.linear(y := x * m.input_gamma + 1), m.bare(y)], ROWS, 2),
    "a factor per head, merged": (
        lambda m, x: m.linear((x.reshape(2, 5, 2, 2).transpose(1, 2) * m.heads)
        .transpose(1, 2).flatten(2)), ROWS, 1,
    ),
    "a factor per position, flattened": (
        lambda m, x: m.head((x * m.positions).flatten(1)), ROWS, 1
    ),
    "a factor per channel, flattened behind positions": (
        lambda m, x: m.head((x + m.input_gamma).transpose(1, 2).flatten(1)), ROWS, 1
    ),
}


@pytest.mark.parametrize("case", FRONT)
def test_folds_into_the_layers_behind(case: str) -> None:
    call, shape, rewrites = FRONT[case]
    model = Parts(call, head=nn.Linear(20, 3))
    check_pass(
        FoldAffine(), model, torch.randn(shape), after=FOLDED, rewrites=rewrites, misses=[]
    )


def test_the_shift_of_an_input_stays_in_front_of_padding_and_the_scale_folds() -> None:
    model = Parts(lambda m, x: m.conv((x - m.image_mean) / m.image_mean))
    check_pass(
        FoldAffine(), model, torch.randn(IMAGE), before={"sub": 1, "div": 1},
        after={"sub": 1, "div": 0}, rewrites=1, misses=["pads with zeros"],
    )


NOT_FRONT: dict[str, tuple[Call, tuple[int, ...], str | None]] = {
    "shift in front of padding": (lambda m, x: m.conv(x + 1), IMAGE, "pads with zeros"),
    "shift in front of a transposed conv": (
        lambda m, x: m.transposed(x + 1), IMAGE, "is transposed"
    ),
    "a factor per position": (lambda m, x: m.linear(x * m.positions), ROWS, "do not vary along"),
    "another reader": (
        lambda m, x: [m.linear(y := x * m.input_gamma), y.relu()], ROWS, "uses it beside linear"
    ),
    "it is an output": (
        lambda m, x: [m.linear(y := x * m.input_gamma), y], ROWS, "output uses it beside linear"
    ),
    "an activation in between": (lambda m, x: m.linear(F.relu(x * 2)), ROWS, None),
    "it is the weight": (
        lambda m, x: F.linear(m.shift[:4].expand(1, 4), x[0] * m.input_gamma), ROWS, "uses it"
    ),
}


@pytest.mark.parametrize("case", NOT_FRONT)
def test_does_not_fold_into_the_layers_behind(case: str) -> None:
    call, shape, reason = NOT_FRONT[case]
    misses = [] if reason is None else [reason]
    check_pass(FoldAffine(), Parts(call), torch.randn(shape), rewrites=0, misses=misses)


# -- norms, chains --------------------------------------------------------------------------------


def normed(m: Parts, x: torch.Tensor) -> Any:
    y = m.before(x)
    return m.linear(y), m.bare(y)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.RMSNorm(4)])
def test_the_weights_of_norms_fold_on_request(norm: nn.Module) -> None:
    model = Parts(normed, before=norm)
    graph, _ = check_pass(FoldAffine(norms=True), model, torch.randn(ROWS), rewrites=1, misses=[])
    assert not any(name.startswith("before") for name in graph.constants())
    check_pass(FoldAffine(), model, torch.randn(ROWS), rewrites=0, misses=[])


def test_the_weights_of_a_norm_over_positions_fold_where_they_are_flattened() -> None:
    norm, head = nn.LayerNorm((5, 4)), nn.Linear(20, 3)
    flat = Parts(lambda m, x: m.head(m.before(x).flatten(1)), before=norm, head=head)
    check_pass(FoldAffine(norms=True), flat, torch.randn(ROWS), rewrites=1, misses=[])
    model = Parts(normed, before=norm)
    check_pass(
        FoldAffine(norms=True), model, torch.randn(ROWS), rewrites=0, misses=["do not vary along"]
    )


def test_the_weights_of_a_norm_that_others_read_stay() -> None:
    model = Parts(lambda m, x: [m.linear(y := m.before(x)), y + x], before=nn.LayerNorm(4))
    check_pass(
        FoldAffine(norms=True), model, torch.randn(ROWS), rewrites=0, misses=["uses it beside"]
    )


CHAINS: dict[str, Call] = {
    "mul, add, norm": lambda m, x: m.after((m.conv(x) * m.image_gamma) + m.image_shift),
    "norm, mul, add": lambda m, x: m.after(m.conv(x)) * m.image_gamma + m.image_shift,
    "mul, norm, neg, norm": lambda m, x: m.last(-m.after(m.conv(x) * 3)),
}


@pytest.mark.parametrize("case", CHAINS)
def test_chains_with_batch_norms_fold_in_one_round_of_both_passes(case: str) -> None:
    layers = {"after": nn.BatchNorm2d(6), "last": nn.BatchNorm2d(6)}
    model = noisy(Parts(CHAINS[case], **layers)).double().eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    graph = capture(model, x)
    FoldAffine().run(graph)
    FuseConvBn().run(graph)
    assert op_counts(graph) == {"conv2d": 1}
    assert relative_error(graph(x), model(x)) < 1e-10


def test_a_batch_norm_that_took_in_a_factor_still_switches_with_train() -> None:
    model = noisy(Parts(lambda m, x: m.norm(x) * m.scalar)).double().eval()
    graph = capture(model, torch.randn(IMAGE, dtype=torch.float64))
    FoldAffine().run(graph)
    x = torch.randn(IMAGE, dtype=torch.float64)
    assert relative_error(graph.train()(x), model.train()(x)) < 1e-10
    assert relative_error(graph.eval()(x), model.eval()(x)) < 1e-10


def test_a_batch_norm_in_training_mode_is_left_alone() -> None:
    graph = capture(Parts(lambda m, x: m.norm(x) * m.scalar), torch.randn(IMAGE))
    assert not FoldAffine().run(graph.train()).modified


# -- dtypes, shapes, training ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_wide_and_stored_half(dtype: torch.dtype) -> None:
    model = Parts(lambda m, x: (m.linear(x) * m.gamma + m.shift) * 0.3).to(dtype)
    graph, _ = check_pass(
        FoldAffine(), model, torch.randn(ROWS).to(dtype), after=FOLDED, rewrites=3,
        double=False, tolerance=0.03, gradients=False,
    )
    assert {tensor.dtype for tensor in graph.constants().values()} == {dtype}


def test_complex_weights_fold() -> None:
    model = Parts(lambda m, x: F.linear(x, m.matrix) * m.factor)
    model.register_buffer("matrix", torch.randn(6, 4, dtype=torch.complex128))
    model.register_buffer("factor", torch.randn(6, dtype=torch.complex128))
    check_pass(
        FoldAffine(), model, torch.randn(ROWS, dtype=torch.complex128), after=FOLDED, rewrites=1,
        double=False, add_noise=False, gradients=False,
    )


@pytest.mark.parametrize(
    "case", ["layer scale through permute", "conv", "transposed conv of two groups"]
)
def test_folds_with_dynamic_sizes(case: str) -> None:
    call, shape, rewrites = BEHIND[case]
    graph, _ = check_pass(
        FoldAffine(), Parts(call), torch.randn(shape), dynamic_shapes={0: "n", 2: "h"},
        after=FOLDED, rewrites=rewrites,
    )
    assert len(graph(torch.randn(3, 4, 9, 6, dtype=torch.float64))) == 3


def test_folds_through_dynamic_reshapes() -> None:
    def call(m: Parts, x: torch.Tensor) -> torch.Tensor:
        n, length, _ = x.shape
        heads = m.linear(x).reshape(n, length, 2, 3).transpose(1, 2) * m.heads
        return (heads.transpose(1, 2).reshape(n * length, 6) + m.shift).reshape(n, length, 6) / 2

    check_pass(
        FoldAffine(), Parts(call), torch.randn(ROWS), dynamic_shapes={0: "n", 1: "l"},
        after=FOLDED | {"mul": 1}, rewrites=3, misses=[],  # the mul left is n · length
    )


def test_only_what_comes_from_parameters_is_trained() -> None:
    model = Parts(lambda m, x: m.linear(x) * m.shift).eval()
    graph = capture(model, torch.randn(ROWS))
    FoldAffine().run(graph)
    names = {name for name, _ in graph.named_parameters()}
    assert names == {"linear.weight_folded", "linear.bias_folded"}
    graph = capture(model.requires_grad_(False), torch.randn(ROWS))
    FoldAffine().run(graph)
    assert not list(graph.parameters())


def test_new_weights_can_be_computed_again() -> None:
    model = Parts(lambda m, x: m.bare((x + m.input_gamma) / 3) * m.gamma).eval()
    graph = capture(model, torch.randn(ROWS))
    FoldAffine().run(graph)
    noisy(model.double(), seed=3)
    values: dict[str, torch.Tensor] = dict(model.state_dict())
    for recipe in graph.info.recipes:
        values[recipe.name] = recipe.compute(*(values[name] for name in recipe.sources))
    last = {recipe.name.split("_folded")[0]: values[recipe.name] for recipe in graph.info.recipes}
    x = torch.randn(ROWS, dtype=torch.float64)
    again = F.linear(x, last["bare.weight"], last["bare.bias"])
    assert relative_error(again, model(x)) < 1e-10
