"""What computes in half precision, what stays an island, and what has no room in float16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import dialect
from fxopt.errors import OptionError, VerifyError
from fxopt.graph_module import GraphModule
from fxopt.passes import LowerPrecision
from fxopt.testing import noisy

aten = torch.ops.aten
BOUND = {"bf16": 3e-2, "fp16": 4e-3}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def lowered(model: nn.Module, inputs: Any, dtype: str = "bf16", **options: Any) -> GraphModule:
    """The model in lower precision, checked against itself in float64."""
    model = noisy(model).eval()
    graph = fxopt.optimize(model, inputs, passes=[LowerPrecision(dtype, **options)])
    dialect.check(graph)
    flat = inputs if isinstance(inputs, tuple) else (inputs,)
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = wide(*(x.double() if x.is_floating_point() else x for x in flat))
        found = graph(*flat)
    for one, other in zip(*map(_listed, (found, expected)), strict=True):
        assert one.dtype == (torch.float32 if other.is_floating_point() else other.dtype)
        assert (one.double() - other).abs().max() <= BOUND[dtype] * other.abs().max()
    return graph


def _listed(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else list(value)


def dtypes(graph: GraphModule, *targets: Any) -> list[torch.dtype]:
    """The dtypes that calls return, in order."""
    return [node.meta["val"].dtype for node in graph.find(*targets)]


def casts(graph: GraphModule) -> int:
    return len(graph.find(aten.to.dtype))


class Function(nn.Module):
    """A layer, and a function behind it."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self.layer, *inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_layers_and_what_follows_them_are_low_with_one_cast_in_and_one_out(dtype: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    graph = lowered(model, torch.randn(2, 3, 12, 12), dtype)
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert casts(graph) == 2 and calls[-1].target == aten.to.dtype
    assert {node.meta["val"].dtype for node in calls[:-1]} == {DTYPES[dtype]}
    assert all(t.dtype == DTYPES[dtype] for t in graph.constants().values() if t.ndim)


def test_what_grows_errors_is_an_island() -> None:
    graph = lowered(
        Function(lambda layer, x: layer(F.relu(layer(x)).exp().log1p())), torch.randn(4, 6)
    )
    assert dtypes(graph, aten.linear.default, aten.relu.default) == [torch.bfloat16] * 3
    assert dtypes(graph, aten.exp.default, aten.log1p.default) == [torch.float32] * 2


def test_a_norm_in_pieces_is_an_island() -> None:
    def rms(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        return layer(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))

    graph = lowered(Function(rms), torch.randn(4, 6))
    kept = dtypes(graph, aten.pow.Tensor_Scalar, aten.mean.dim, aten.rsqrt.default)
    assert kept == [torch.float32] * 3


def test_what_comes_from_inputs_alone_stays() -> None:
    def positions(layer: nn.Module, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return layer(x) * torch.cos(at.float() * 100)[:, None]

    graph = lowered(Function(positions), (torch.randn(4, 6), torch.arange(4)))
    assert dtypes(graph, aten.cos.default, aten.mul.Tensor)[-1] == torch.float32
    assert dtypes(graph, aten.linear.default) == [torch.bfloat16]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("as_constant", [True, False])
def test_a_mask_of_the_lowest_float_hides_no_row_for_good(dtype: str, as_constant: bool) -> None:
    lowest = torch.finfo(torch.float32).min
    held = torch.full((4, 4), lowest).triu(1)
    held[2] = lowest  # a row that sees nothing sees everything alike, and is no NaN

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.register_buffer("mask", held.clone())

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, self.mask if as_constant else mask)

    graph = fxopt.optimize(
        Attention().eval(), (torch.randn(2, 4, 8), held),
        passes=[LowerPrecision(dtype, max_error=1.0)],  # float16 has no −10³⁸ that swallows scores
    )  # fmt: skip
    (attention,) = graph.find(aten.scaled_dot_product_attention.default)
    assert attention.meta["val"].dtype == DTYPES[dtype]
    assert attention.args[3].meta["val"].dtype == DTYPES[dtype]
    with torch.no_grad():
        assert graph(torch.randn(2, 4, 8), held).isfinite().all()
        hidden = torch.full((4, 4), -torch.inf)
        if not as_constant:  # infinities stay what they are
            q, k, v = torch.randn(2, 4, 24).chunk(3, -1)
            expected = F.scaled_dot_product_attention(q, k, v, hidden).isnan()
            assert torch.equal(graph(torch.randn(2, 4, 8), hidden).isnan(), expected)


def test_what_float16_has_no_room_for_stays() -> None:
    def large(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer((layer(x) * 3e4).relu() * 1e-4)

    graph = lowered(Function(large), torch.randn(4, 6), "fp16")
    assert dtypes(graph, aten.linear.default) == [torch.float16] * 2
    assert dtypes(graph, aten.relu.default) == [torch.float32]
    (step,) = graph.story.steps
    assert any("on the example inputs" in miss.reason for miss in step.misses)
    assert dtypes(lowered(Function(large), torch.randn(4, 6)), aten.relu.default) == [
        torch.bfloat16
    ]


def test_a_number_that_the_dtype_does_not_have_stays() -> None:
    def masked(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x).masked_fill(x > 0, torch.finfo(torch.float32).min).softmax(-1)

    graph = lowered(Function(masked), torch.randn(4, 6))
    assert dtypes(graph, aten.softmax.int) == [torch.float32]


def test_parts_and_joins_follow() -> None:
    def parts(layer: nn.Module, x: torch.Tensor) -> Any:
        a, b = layer(x).split(3, -1)
        return torch.cat([F.gelu(a), b], -1), a.sum(), x.argmax(-1)

    graph = lowered(Function(parts), torch.randn(4, 6))
    assert dtypes(graph, aten.cat.default) == [torch.bfloat16]
    assert dtypes(graph, aten.sum.default) == [torch.float32]
    assert casts(graph) == 3  # in, the joined, and one part


def test_a_sum_of_a_low_and_a_high_value_is_high() -> None:
    graph = lowered(Function(lambda layer, x: F.relu(layer(x) + x)), torch.randn(4, 6))
    assert dtypes(graph, aten.add.Tensor, aten.relu.default) == [torch.float32] * 2


def test_constants_that_both_read_are_there_twice_and_others_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(F.linear(x, self.weight), self.weight) + self.weight.exp().sum()

    graph = lowered(Shared(), torch.randn(4, 6))
    assert {t.dtype for t in graph.constants().values()} == {torch.float32, torch.bfloat16}
    assert len(graph.constants()) == 2


def test_state_is_read_as_it_is_at_each_call() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(6))
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x.mean(0))
            return self.layer(self.total[None])

    torch.manual_seed(0)
    model = Counting().eval()
    x = torch.randn(4, 6)
    graph = fxopt.optimize(copy.deepcopy(model), x, passes=[LowerPrecision()])
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(graph(x), model(x), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("keep", ["1", "linear_1"])
def test_layers_are_kept_by_path_or_node(keep: str) -> None:
    graph = lowered(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(4, 6), keep=(keep,)
    )
    assert dtypes(graph, aten.linear.default) == [torch.bfloat16, torch.float32]


def test_a_second_run_changes_nothing() -> None:
    graph = lowered(
        Function(lambda layer, x: layer(F.relu(layer(x)).exp()) + x), torch.randn(4, 6)
    )
    again = graph.copy()
    assert not LowerPrecision().run(again).modified


def test_new_weights_are_rounded_like_the_old() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(4, 6)
    compiled = fxopt.compile(model, x, precision="bf16")
    other = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    compiled.update(other.state_dict())
    assert torch.equal(compiled(x), fxopt.compile(other, x, precision="bf16")(x))


def test_the_model_stays_and_a_model_in_half_precision_has_nothing_to_lower() -> None:
    model = nn.Linear(6, 6).eval()
    fxopt.optimize(model, torch.randn(4, 6), passes=[LowerPrecision()])
    assert model.weight.dtype == torch.float32
    half = fxopt.optimize(
        nn.Linear(6, 6).bfloat16(), torch.randn(4, 6).bfloat16(), passes=[LowerPrecision()]
    )
    assert half.story.steps[0].rewrites == 0


def test_float64_and_the_other_half_are_lowered_and_come_back() -> None:
    for wide in (torch.float64, torch.float16):
        x = torch.randn(4, 6).to(wide)
        graph = fxopt.optimize(nn.Linear(6, 6).to(wide), x, passes=[LowerPrecision()])
        assert graph(x).dtype == wide
        assert dtypes(graph, aten.linear.default) == [torch.bfloat16]


def test_the_bodies_of_control_flow_stay() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return torch.cond(x.sum() > 0, lambda x: self.second(x), lambda x: x * 2, (x,))

    graph = lowered(Branch(), torch.randn(4, 6))
    assert dtypes(graph, aten.linear.default) == [torch.bfloat16]
    bodies = [dtypes(body, aten.linear.default) for body in graph.subgraphs()]
    assert sorted(map(len, bodies)) == [0, 1] and [torch.float32] in bodies


def test_random_calls_and_dynamic_sizes() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(F.dropout(self.layer(x), 0.5, training=True)).flatten(1)

    graph = fxopt.optimize(
        Random(), torch.randn(4, 2, 6), passes=[LowerPrecision()],
        dynamic_shapes={"x": {0: "batch"}},
    )  # fmt: skip
    assert dtypes(graph, aten.linear.default) == [torch.bfloat16] * 2
    assert dtypes(graph, aten.dropout.default) == [torch.float32]
    assert graph(torch.randn(7, 2, 6)).shape == (7, 12)


def test_the_error_is_said_and_bounded() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64).eval(), torch.randn(4, 64)
    graph = fxopt.optimize(model, x, passes=[LowerPrecision()])
    assert "Calls that compute in bf16: 1. On the example inputs" in str(graph.report)
    with pytest.raises(VerifyError, match=r"moves the outputs by .* max_error is 1e-06"):
        fxopt.optimize(model, x, passes=[LowerPrecision(max_error=1e-6)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "dtype must be one of 'bf16', 'fp16'"),
        ({"keep": "head"}, "write keep="),
        ({"max_error": -1.0}, "a number, at least 0"),
        ({"max_error": True}, "a number, at least 0"),
        ({"dtype": ["bf16"]}, "dtype must be one of 'bf16', 'fp16'"),
        ({"keep": None}, "a tuple of patterns"),
        ({"keep": (3,)}, "a tuple of patterns"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        LowerPrecision(**options)


def test_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(OptionError, match="Did you mean 'layer'"):
        fxopt.optimize(
            Function(lambda layer, x: layer(x)), torch.randn(4, 6),
            passes=[LowerPrecision(keep=("layers",))],
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["eager", "onnx", "openvino", "torchscript"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_backend_computes_it_or_says_that_it_cannot(backend: str, dtype: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                          nn.Linear(8 * 36, 4)).eval()  # fmt: skip
    x = torch.randn(1, 3, 8, 8)
    try:
        compiled = fxopt.compile(model, x, backend=backend, precision=dtype)
    except fxopt.LoweringError as error:
        assert backend == "onnx" and dtype == "bf16", error
        return
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=3e-2, atol=3e-2)


def test_what_is_finite_no_more_is_an_error() -> None:
    def logit(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        p = torch.sigmoid((layer(x) * 9).clamp(-9, 9))
        return torch.log(p / (1 - p))

    torch.manual_seed(0)
    model, x = Function(logit).eval(), torch.randn(8, 6) * 3
    assert model(x).isfinite().all()
    with pytest.raises(VerifyError, match="moves the outputs by"):
        fxopt.compile(model, x, precision="bf16")


def test_tolerance_and_acceptance_judge_what_it_makes() -> None:
    model, x = nn.Linear(64, 64).eval(), torch.randn(4, 64)
    with pytest.raises(VerifyError, match="max_error is 1e-07"):
        fxopt.compile(model, x, precision="bf16", tolerance=1e-7)
    asked = []

    def refuses(graph: Any) -> bool:
        asked.append(graph)
        return bool((graph(x) - model(x)).abs().max() < 1e-6)

    with pytest.raises(VerifyError, match="acceptance refused what the pass 'lower-precision'"):
        fxopt.optimize(model, x, precision="bf16", verify=refuses)
    assert asked


def test_training_still_switches_dropout_and_norms() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)).eval()
    x = torch.randn(8, 6)
    graph = fxopt.optimize(model, x, passes=[LowerPrecision()])
    assert torch.equal(graph(x), graph(x))
    graph.train()
    assert not torch.equal(graph(x), graph(x))


def test_sizes_and_places_are_no_numbers_that_float16_would_have_to_hold() -> None:
    graph = lowered(
        Function(lambda layer, x: F.relu(layer(x)[:, 1:]).narrow(1, 0, 3)), torch.randn(4, 6),
        "fp16",
    )  # fmt: skip
    assert dtypes(graph, aten.relu.default) == [torch.float16]


def test_small_numbers_and_integers_keep_float16_away() -> None:
    def scaled(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(layer(x) - 9)
        return y / (y.amax(-1, keepdim=True) + 1e-8)

    graph = fxopt.optimize(Function(scaled).eval(), torch.randn(4, 6),
                           passes=[LowerPrecision("fp16")])  # fmt: skip
    assert dtypes(graph, aten.add.Tensor, aten.div.Tensor) == [torch.float32] * 2
    assert graph(torch.randn(4, 6)).isfinite().all()

    graph = lowered(
        Function(lambda layer, x, n: layer(x) * 1e-3 * n),
        (torch.randn(4, 6), torch.arange(6) * 20_000), "fp16",
    )  # fmt: skip
    assert dtypes(graph, aten.mul.Tensor)[-1] == torch.float32


def test_a_mask_that_a_layer_reads_as_well() -> None:
    def both(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> Any:
        y = layer(mask)
        q = layer(x)
        return F.scaled_dot_product_attention(q, q, q, mask), y[0]

    mask = torch.zeros(6, 6)
    mask[2] = torch.finfo(torch.float32).min
    model, x = Function(both).eval(), torch.randn(6, 6)
    graph = fxopt.optimize(model, (x, mask), passes=[LowerPrecision()])
    with torch.no_grad():
        torch.testing.assert_close(graph(x, mask)[0], model(x, mask)[0], rtol=3e-2, atol=3e-2)


def test_a_weight_that_no_longer_fits_into_float16_is_refused() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6).eval(), torch.randn(4, 6)
    compiled = fxopt.compile(model, x, precision="fp16")
    before = compiled(x)
    with pytest.raises(VerifyError, match="does not fit into torch.float16"):
        compiled.update({name: value * 1e6 for name, value in model.state_dict().items()})
    assert torch.equal(compiled(x), before)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_pools_have_kernels(dtype: str) -> None:
    pools = [nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(2)]
    model = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), *pools).eval()
    lowered(model, torch.randn(1, 1, 16, 16, 16), dtype)
