"""fuse-norms: every spelling fires, every guard holds, weights of the right shape are taken in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fxopt
from fxopt import dialect
from fxopt.capture import capture
from fxopt.contract import PassResult
from fxopt.graph_module import GraphModule
from fxopt.passes.fuse_norms import RULES, FuseNorms
from fxopt.testing import check_pass, op_counts, relative_error
from fxopt.text import graph_text

aten = torch.ops.aten
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 8, 4, 3, generator=torch.Generator().manual_seed(1))
WIDE = torch.randn(2, 64, 3, 2, generator=torch.Generator().manual_seed(2))


class Function(torch.nn.Module):
    """A function of one tensor, and of weights of these shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.weights)


def run(
    function: Callable[..., Any], x: torch.Tensor, *shapes: tuple[int, ...], **options: Any
) -> tuple[GraphModule, PassResult]:
    """Run the pass on the function as it is, without doubling, and check the dialect."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    graph = capture(Function(function, *shapes).to(dtype).eval(), x, **options)
    result = FuseNorms().run(graph)
    dialect.check(graph)
    return graph, result


Dims = int | tuple[int, ...]


def mean(x: torch.Tensor, dims: Dims) -> torch.Tensor:
    return x.mean(dims, keepdim=True)


def var(x: torch.Tensor, dims: Dims, correction: int = 0) -> torch.Tensor:
    return torch.var(x, dim=dims, correction=correction, keepdim=True)


def standard(x: torch.Tensor, dims: Dims = -1, eps: float = 1e-5) -> torch.Tensor:
    return (x - mean(x, dims)) / torch.sqrt(var(x, dims) + eps)


def standard_of_squares(x: torch.Tensor, dims: Dims = -1) -> torch.Tensor:
    d = x - x.mean(dims, keepdim=True)
    return d * torch.rsqrt(torch.mean(d * d, dims, keepdim=True) + 1e-3)


def standard_of_both(x: torch.Tensor, **options: Any) -> torch.Tensor:
    variance, average = torch.var_mean(x, -1, keepdim=True, **options)
    return (x - average) / (variance + 1e-5).sqrt()


def rms(x: torch.Tensor, dims: Dims = -1, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)


# Each norm, what it is given, and the one call that is left.
CORES: list[tuple[Callable[[Any], Any], torch.Tensor, str]] = [
    (standard, TOKENS, "layer_norm"),
    (standard_of_squares, TOKENS, "layer_norm"),
    (lambda x: standard_of_both(x, correction=0), TOKENS, "layer_norm"),
    (lambda x: standard_of_both(x, unbiased=False), TOKENS, "layer_norm"),
    (lambda x: (x - mean(x, 2)) / (x.var(2, False, True) + 1e-5) ** 0.5, TOKENS, "layer_norm"),
    (lambda x: (x - mean(x, 2)) * (var(x, -1) + 1e-5).pow(-0.5), TOKENS, "layer_norm"),
    (lambda x: (x - mean(x, 2)) * (1e-5 + var(x, -1)).sqrt().reciprocal(), TOKENS, "layer_norm"),
    (
        lambda x: torch.sub(x, mean(x, 2)).div(
            ((x - mean(x, 2)) ** 2).mean(dim=-1, keepdim=True).add(1e-5).sqrt()
        ),
        TOKENS,
        "layer_norm",
    ),
    (
        lambda x: (x - mean(x, 2)) / ((x - mean(x, 2)).square().mean(2, True) + 0.1).sqrt(),
        TOKENS,
        "layer_norm",
    ),
    (lambda x: standard(x, (1, 2)), TOKENS, "layer_norm"),
    (lambda x: standard(x, (-1, -2)), TOKENS, "layer_norm"),
    (lambda x: standard(x, (0, 1, 2)), TOKENS, "layer_norm"),
    (lambda x: standard(x, 0), TOKENS[0, 0], "layer_norm"),
    (lambda x: standard(x, (1, 2, 3)), IMAGE, "layer_norm"),
    (lambda x: standard(x, 3), IMAGE, "layer_norm"),
    (lambda x: standard(x, (2, 3)), IMAGE, "group_norm"),
    (lambda x: standard(x.view(2, 4, -1)).view(x.shape), IMAGE, "group_norm"),
    (lambda x: standard(x.reshape(2, 4, 2, 4, 3), (2, 3, 4)).reshape(x.shape), IMAGE, "group_norm"),
    (lambda x: standard(x.unflatten(1, (4, 2)), (2, 3, 4)).flatten(1, 2), IMAGE, "group_norm"),
    (rms, TOKENS, "rms_norm"),
    (lambda x: x / torch.sqrt((x * x).mean(-1, True) + 1e-6), TOKENS, "rms_norm"),
    (lambda x: x * (x.square().mean(2, True) + 1e-6) ** -0.5, TOKENS, "rms_norm"),
    (lambda x: rms(x, (1, 2)), TOKENS, "rms_norm"),
    (rms, IMAGE, "rms_norm"),
]


@pytest.mark.parametrize(("function", "x", "left"), CORES)
def test_norms_without_weights(
    function: Callable[[Any], Any], x: torch.Tensor, left: str
) -> None:
    graph, _ = check_pass(FuseNorms(), Function(function), x, misses=[])
    counts = op_counts(graph)
    counts.pop("getitem", None)
    assert counts == {left: 1}, graph_text(graph)


# The whole norm with its weights, the shapes of these, and what is left.
WHOLE: list[tuple[Callable[..., Any], torch.Tensor, list[tuple[int, ...]], dict[str, int]]] = [
    (lambda x, w, b: standard(x) * w + b, TOKENS, [(6,), (6,)], {"layer_norm": 1}),
    (lambda x, w, b: b + w * standard_of_squares(x), TOKENS, [(6,), (6,)], {"layer_norm": 1}),
    (lambda x, w: w * standard(x), TOKENS, [(1, 1, 6)], {"layer_norm": 1}),
    (lambda x, b: standard(x) + b, TOKENS, [(6,)], {"layer_norm": 1}),
    (lambda x, w, b: standard(x, (1, 2)) * w + b, TOKENS, [(5, 6), (5, 6)], {"layer_norm": 1}),
    (lambda x, w, b: F.layer_norm(x, (6,)) * w + b, TOKENS, [(6,), (6,)], {"layer_norm": 1}),
    (lambda x, w, b: F.layer_norm(x, (6,), w) + b, TOKENS, [(6,), (6,)], {"layer_norm": 1}),
    (
        lambda x, w, b: standard(x, (1, 2, 3)) * w + b,
        IMAGE, [(8, 1, 1), (1, 8, 1, 1)], {"group_norm": 1},
    ),
    (lambda x, w, b: standard(x, (2, 3)) * w + b, IMAGE, [(8, 1, 1)] * 2, {"group_norm": 1}),
    (lambda x, w: standard(x, -1) * w, TOKENS, [(5, 1)], {"group_norm": 1}),
    (lambda x, b: standard(x, (1, 2)) + b, TOKENS, [(5, 1)], {"layer_norm": 1, "add": 1}),
    (
        lambda x, w, b: standard(x.view(2, 4, -1)).view(x.shape) * w + b,
        IMAGE, [(1, 8, 1, 1)] * 2, {"group_norm": 1},
    ),
    (lambda x, w, b: F.group_norm(x, 2) * w + b, IMAGE, [(8, 1, 1)] * 2, {"group_norm": 1}),
    (lambda x, w: w * rms(x), TOKENS, [(6,)], {"rms_norm": 1}),
    (lambda x, w: rms(x, (1, 2)) * w, TOKENS, [(5, 6)], {"rms_norm": 1}),
    (
        lambda x, w, b: standard(x, 1) * w + b,
        WIDE, [(64, 1, 1), (1, 64, 1, 1)], {"permute": 2, "layer_norm": 1},
    ),
    (
        lambda x, w, b: standard(x, 1) * w + b,
        WIDE[..., 0], [(64, 1), (64, 1)], {"permute": 2, "layer_norm": 1},
    ),
    (lambda x, w: standard(x, 1) * w, WIDE[..., 0, 0], [(64,)], {"layer_norm": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "x", "shapes", "left"), WHOLE)
def test_norms_with_weights(
    function: Callable[..., Any], x: torch.Tensor, shapes: list[tuple[int, ...]],
    left: dict[str, int],
) -> None:  # fmt: skip
    graph, _ = check_pass(FuseNorms(), Function(function, *shapes), x, misses=[])
    assert op_counts(graph) == left, graph_text(graph)


def test_every_rule_has_a_test() -> None:
    assert {one.name for one in RULES} == {
        "fuse_layer_norm", "keep_norm_of_other_eps", "keep_norm_of_difference", "fuse_rms_norm",
        "fuse_group_norm", "replace_layer_norm_by_group_norm", "fuse_weight", "fuse_bias",
        "remove_casts_around_norm",
    }  # fmt: skip


# -- guards ----------------------------------------------------------------------------------------

STAYS: list[tuple[Callable[..., Any], torch.Tensor, list[str]]] = [
    (lambda x: (x - mean(x, -1)) / torch.sqrt(var(x, -1, 1) + 1e-5), TOKENS, ["by n − 1"]),
    (lambda x: (x - mean(x, -1)) / torch.sqrt(x.var(2, keepdim=True) + 1), TOKENS, ["by n − 1"]),
    (lambda x: standard_of_both(x), TOKENS, ["by n − 1"]),
    (
        lambda x: (x - mean(x, -1)) / (x.std(-1, keepdim=True) + 1e-5), TOKENS,
        ["it does not add ε to its variance, and its variance divides by n − 1"],
    ),
    (
        lambda x: (x - mean(x, -1)) / (x.std(-1, False, True) + 1e-5), TOKENS,
        ["it does not add ε to its variance"],
    ),
    (lambda x: (x - mean(x, 2)) / (var(x, 2).sqrt() + 1e-5), TOKENS, ["does not add ε"]),
    (lambda x: (x - mean(x, 2)) / torch.sqrt(var(x, 2)), TOKENS, ["does not add ε"]),
    (
        lambda x: (x - mean(x, 2)) / ((x * x).mean(2, True) - mean(x, 2) ** 2 + 1e-5).sqrt(),
        TOKENS, ["loses the digits"],
    ),
    (lambda x: (x - mean(x, 1)) / torch.sqrt(var(x, 2) + 1e-5), TOKENS, []),
    (lambda x: (x - mean(x, 2)) / torch.sqrt(var(x.sin(), 2) + 1e-5), TOKENS, []),
    (lambda x: (x - x.sin().mean(2, True)) / torch.sqrt(var(x, 2) + 1e-5), TOKENS, []),
    (lambda x: (x - mean(x, 2)) * torch.sqrt(var(x, 2) + 1e-5), TOKENS, []),
    (lambda x: (x - mean(x, 2)) / torch.sqrt(var(x, 2) - 1e-5), TOKENS, []),
    (lambda x: (x + mean(x, 2)) / torch.sqrt(var(x, 2) + 1e-5), TOKENS, []),
    (lambda x: standard(x, 1), TOKENS, ["few channels"]),
    (lambda x: standard(x, (0, 2, 3)), IMAGE, ["it goes over dimensions [0, 2, 3]"]),
    (lambda x: standard(x, 2), IMAGE, ["it goes over dimensions [2]"]),
    (
        lambda x: ((v := var(x, 2)), (x - mean(x, 2)) / torch.sqrt(v + 1e-5)), TOKENS,
        ["var is used elsewhere too"],
    ),
    (lambda x: rms(x, 1), WIDE, ["over the channels of an image"]),
    (lambda x: rms(x, (0, 2)), TOKENS, ["it goes over dimensions [0, 2]"]),
    (lambda x: x * torch.rsqrt(x.sin().pow(2).mean(-1, True) + 1e-6), TOKENS, []),
    (lambda x: x * torch.rsqrt(x.pow(2).sum(-1, True) + 1e-6), TOKENS, []),
    (lambda x: x * torch.rsqrt(x.pow(4).mean(-1, True) + 1e-6), TOKENS, []),
    (lambda x: x / (x.pow(2).mean(-1, True).sqrt() + 1e-6), TOKENS, []),
    (
        lambda x: ((r := torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)), x * r), TOKENS,
        ["rsqrt is used elsewhere too"],
    ),
    (lambda x: F.normalize(x, dim=-1), TOKENS, []),
    (lambda x: F.layer_norm(x.view(4, 5, 3), (3,)).view(x.shape), TOKENS, []),
    (lambda x: F.layer_norm(x.view(2, 6, 5), (5,)).view(x.shape), TOKENS, []),
    (lambda x: F.layer_norm(x.view(2, 3, 10), (10,)).view(x.shape), TOKENS, []),
    (lambda x: F.layer_norm(x.view(2, 4, 24), (24,)).view(2, 4, 2, 12), IMAGE, []),
    (lambda x: F.layer_norm(x.view(2, 4, 2, 12), (12,)).view(x.shape), IMAGE, []),
    (lambda x: F.group_norm(x.view(2, 4, 24), 2).view(x.shape), IMAGE, []),
    (lambda x: ((y := F.layer_norm(x.view(2, 4, -1), (24,))), y.view(x.shape)), IMAGE,
     ["layer_norm is used elsewhere too"]),
]  # fmt: skip


@pytest.mark.parametrize(("function", "x", "reasons"), STAYS)
def test_guards_hold(
    function: Callable[..., Any], x: torch.Tensor, reasons: list[str]
) -> None:
    graph, result = run(function, x)
    assert result.rewrites == 0, graph_text(graph)
    found = [miss.reason for miss in result.misses]
    assert len(found) == len(reasons), found
    for reason in reasons:
        assert any(reason in one for one in found), found


# Weights that a norm does not take.
OUTSIDE: list[tuple[Callable[..., Any], torch.Tensor, tuple[int, ...]]] = [
    (lambda x, w: F.layer_norm(x, (6,)) * w, TOKENS, (5, 6)),
    (lambda x, w: F.layer_norm(x, (6,)) * w, TOKENS, (1,)),
    (lambda x, w: F.layer_norm(x, (6,)) * w, TOKENS, (2, 1, 6)),
    (lambda x, w: F.layer_norm(x, (5, 6)) * w, TOKENS, (6,)),
    (lambda x, w: F.layer_norm(x, (4, 3)) * w, IMAGE, (3,)),
    (lambda x, w: F.group_norm(x, 2) * w, IMAGE, (3,)),
    (lambda x, w: F.group_norm(x, 2) + w, IMAGE, (8, 4, 3)),
    (lambda x, w: F.rms_norm(x, (6,)) * w, TOKENS, (5, 1)),
    (lambda x, w: F.rms_norm(x, (6,)) + w, TOKENS, (6,)),
    (lambda x, w: F.layer_norm(x, (6,), None, w) * w, TOKENS, (6,)),
    (lambda x, w: F.layer_norm(x, (6,), w) * w, TOKENS, (6,)),
    (lambda x, w: torch.add(F.layer_norm(x, (6,)), w, alpha=2), TOKENS, (6,)),
    (lambda x, w: F.layer_norm(x, (6,)) - w, TOKENS, (6,)),
    (lambda x, w: F.layer_norm(x, (6,)) * w.sin(), TOKENS, (6,)),
    (lambda x, w: F.layer_norm(x, (3,)).permute(0, 3, 1, 2) * w, IMAGE, (4,)),
    (lambda x, w: F.layer_norm(x, (6,)) * w, TOKENS[:, :1], (1, 1)),
]


@pytest.mark.parametrize(("function", "x", "shape"), OUTSIDE)
def test_weights_of_another_shape_stay(
    function: Callable[..., Any], x: torch.Tensor, shape: tuple[int, ...]
) -> None:
    check_pass(FuseNorms(), Function(function, shape), x, rewrites=0, misses=[])


def test_a_norm_that_others_use_keeps_its_weight_outside() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> Any:
        return (y := F.layer_norm(x, (6,))), y * w

    model = Function(function, (6,))
    check_pass(FuseNorms(), model, TOKENS, rewrites=0, misses=["layer_norm is used elsewhere too"])


def test_tied_weights() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return standard(standard(x) * w + b + x) * w + b

    check_pass(FuseNorms(), Function(function, (6,), (6,)), TOKENS, after={"layer_norm": 2})


def test_an_eps_that_is_learned_is_left() -> None:
    def function(x: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return (x - mean(x, -1)) / torch.sqrt(var(x, -1) + eps * eps)

    check_pass(FuseNorms(), Function(function, (1,)), TOKENS, rewrites=0)


def test_a_weight_in_training_keeps_its_gradient() -> None:
    model = Function(lambda x, w, b: standard(x, (2, 3)) * w + b, (8, 1, 1), (8, 1, 1))
    graph = capture(model, IMAGE)
    FuseNorms().run(graph)
    trained = [p for _, p in graph.named_parameters()]
    graph(IMAGE).square().sum().backward()
    assert any(p.grad is not None and p.shape == (8,) for p in trained)


# -- dtypes ----------------------------------------------------------------------------------------


def llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.to(torch.float32)
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def t5(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-6)).to(w.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [llama, t5])
def test_rms_norm_in_half_precision(function: Callable[..., Any], dtype: torch.dtype) -> None:
    """The weight stays outside: on a CPU, PyTorch would multiply by it in float32."""
    x = (TOKENS * 300).to(dtype)
    model = Function(function, (6,)).to(dtype)
    graph = capture(model, x)
    result = FuseNorms().run(graph)
    assert op_counts(graph) == {"mul": 1, "rms_norm": 1}, graph_text(graph)
    assert "on a CPU" in result.misses[0].reason
    assert relative_error(graph(x), model(x)) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("function", [llama, t5])
def test_casts_to_the_same_dtype_are_gone_before(function: Callable[..., Any]) -> None:
    compiled = fxopt.compile(Function(function, (6,)), TOKENS)
    assert op_counts(compiled.graph) == {"rms_norm": 1}, graph_text(compiled.graph)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_in_half_precision(dtype: torch.dtype) -> None:
    def upcast(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return standard(x.float()).to(x.dtype) * w

    x = TOKENS.to(dtype)
    for function in (upcast, lambda x, w: standard_of_squares(x) * w):
        graph, result = run(function, x, (6,))
        assert op_counts(graph) == {"layer_norm": 1} and not result.misses
        exact = Function(function).double()
        exact.weights.append(graph.constants()["weights.0"].double())
        assert relative_error(graph(x).double(), exact(x.double())) <= 4 * torch.finfo(dtype).eps


def test_rms_norm_that_is_written_in_half_precision_is_left() -> None:
    _, result = run(rms, TOKENS.half())
    assert not result.modified and "on a CPU" in result.misses[0].reason


def test_an_eps_that_vanishes_in_half_precision() -> None:
    _, result = run(lambda x: standard(x, -1, 1e-12), TOKENS.half())
    assert not result.modified and "1e-12 is zero in torch.float16" in result.misses[0].reason


@pytest.mark.parametrize(
    ("dtype", "middle", "last"),
    [
        (torch.float32, torch.float64, torch.float32),
        (torch.float16, torch.float64, torch.float16),
        (torch.float16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float64),
    ],
)
def test_casts_that_a_norm_does_not_do_by_itself(
    dtype: torch.dtype, middle: torch.dtype, last: torch.dtype
) -> None:
    graph, result = run(lambda x: F.layer_norm(x.to(middle), (6,)).to(last), TOKENS.to(dtype))
    assert op_counts(graph) == {"layer_norm": 1, "to": 2} and not result.misses


def test_complex_numbers_are_left() -> None:
    _, result = run(lambda x: x / torch.sqrt((x * x).mean(-1, True) + 1e-5), torch.ones(3, 4) * 1j)
    assert not result.modified and "do not take torch.complex64" in result.misses[0].reason


def test_a_bias_of_a_group_norm_without_a_weight_stays() -> None:
    model = Function(lambda x, b: standard(x, (2, 3)) + b, (8, 1, 1))
    after = {"group_norm": 1, "add": 1}
    check_pass(FuseNorms(), model, IMAGE, after=after, misses=["a bias and no weight"])


INF, NAN = float("inf"), float("nan")
ROWS = [
    [INF, 1, 2, 3], [NAN, 1, 2, 3], [0.0] * 4, [1.0] * 4, [-0.0, 0.0, 0.0, 1e-20],
    [1e-30, 0, 0, 0], [1e3, 1e3 + 1, 1e3, 1e3], [-1e15, 1e15, 0, 1],
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("function", [standard, standard_of_squares, rms])
def test_special_rows(row: list[float], function: Callable[[Any], Any]) -> None:
    for x in (torch.tensor([row, [1.0, 2, 3, 4]]), torch.tensor([row * 8])):
        graph, result = run(function, x)
        assert result.rewrites == 1
        found, expected = graph(x), function(x)
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6), (1, 1), (3, 1, 7), (1, 2, 3, 5, 4)])
def test_empty_tensors_and_odd_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for function in (standard, rms):
        graph, result = run(function, x)
        assert result.rewrites == 1
        assert relative_error(graph(x), function(x)) < 1e-6


# -- symbolic sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "x", "dims", "after"),
    [
        (standard, TOKENS, {0: "n", 1: "t"}, {"layer_norm": 1}),
        (rms, TOKENS, {0: "n", 1: "t"}, {"rms_norm": 1}),
        (lambda x: standard(x, (2, 3)), IMAGE, {0: "n", 2: "h"}, {"group_norm": 1}),
        (lambda x: standard(x, (1, 2, 3)), IMAGE, {3: "w"}, {"group_norm": 1}),
        (
            lambda x: standard(x.reshape(x.shape[0], 4, -1)).reshape(x.shape), IMAGE,
            {0: "n", 2: "h"}, {"group_norm": 1, "reshape": 0},
        ),
        (lambda x: standard(x, 1), WIDE, {0: "n", 2: "h"}, {"layer_norm": 1, "permute": 2}),
    ],
)  # fmt: skip
def test_symbolic_sizes(
    function: Callable[[Any], Any], x: torch.Tensor, dims: dict[int, str], after: dict[str, int]
) -> None:
    graph, _ = run(function, x, dynamic_shapes=dims)
    counts = op_counts(graph)
    assert {op: counts.get(op, 0) for op in after} == after, graph_text(graph)
    for extra in (0, 1, 3):
        sizes = [size + extra * (axis in dims) for axis, size in enumerate(x.shape)]
        other = torch.randn(sizes)
        assert relative_error(graph(other), function(other)) < 1e-5


@pytest.mark.parametrize("function", [standard, rms])
def test_symbolic_sizes_that_a_norm_would_need(function: Callable[[Any], Any]) -> None:
    for x in (torch.randn(3, 5), torch.randn(2, 3, 5)):
        _, result = run(function, x, dynamic_shapes={x.dim() - 1: "n", 1: "t"})
        assert not result.modified
        assert "a norm needs numbers" in result.misses[0].reason


# -- a whole block ---------------------------------------------------------------------------------


def test_a_block_with_norms_by_hand() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(6))
            self.bias = torch.nn.Parameter(torch.zeros(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            u = x.mean(-1, keepdim=True)
            s = (x - u).pow(2).mean(-1, keepdim=True)
            return self.weight * ((x - u) / torch.sqrt(s + 1e-12)) + self.bias

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = Norm(), torch.nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.linear(self.norm(x))
            return self.norm(x)

    check_pass(
        FuseNorms(), Block(), TOKENS, rewrites=6, misses=[],
        after={"layer_norm": 2, "linear": 1, "add": 1, "mean": 0, "sub": 0, "mul": 0},
    )  # fmt: skip
