"""Where values are rounded, by which ranges, and what bad data gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import dialect
from fxopt.errors import FxoptError, OptionError, PreconditionError, ShapeError
from fxopt.graph_module import GraphModule
from fxopt.objective import ObjectiveError
from fxopt.passes import InsertFakeQuant
from fxopt.quantization.errors import CalibrationError
from fxopt.quantization.operator import fake_quantize
from fxopt.quantization.policy import POLICIES
from fxopt.testing import noisy
from fxopt.verify import compare
from tests.models import Function

aten = torch.ops.aten
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images(count: int = 4, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def rounded(model: nn.Module, inputs: Any = X, data: Any = None, **options: Any) -> GraphModule:
    """The model with fake-quants, after the default passes."""
    insert = InsertFakeQuant(images() if data is None else data, **options)
    graph = fxopt.optimize(noisy(model).eval(), inputs, passes=["default", insert])
    dialect.check(graph)
    return graph


def values(graph: GraphModule) -> dict[str, list[str]]:
    """The names of the operators that compute what is rounded, with those of the readers."""
    found: dict[str, list[str]] = {}
    for node in graph.find(fake_quantize):
        source = node.all_input_nodes[0]
        if source.op != "get_attr":
            found[source.name] = [user.name for user in node.users]
    return found


def weights(graph: GraphModule) -> int:
    return sum(n.all_input_nodes[0].op == "get_attr" for n in graph.find(fake_quantize))


def sqnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    noise = (found - expected).double().square().mean()
    return float(10 * (expected.double().square().mean() / noise).log10())


def convolutions(*between: nn.Module) -> nn.Sequential:
    """Two convolutions; layers between them keep them from being folded into one."""
    middle = between or (nn.ReLU(),)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *middle, nn.Conv2d(8, 4, 1), nn.ReLU())


class Wide(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.outer = nn.Sequential(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return F.relu(self.outer(self.inner(y)) + y)


# -- numbers --------------------------------------------------------------------------------------


def by_hand(x: torch.Tensor, low: Any, high: Any, qmin: int, qmax: int) -> torch.Tensor:
    """Round to integers as the textbook says, in float64; `low` and `high` hold 0."""
    symmetric = qmin == -qmax
    scale = torch.maximum(-low, high) / qmax if symmetric else (high - low) / (qmax - qmin)
    scale = scale.float().double()
    zero = torch.zeros(()) if symmetric else (qmin - low / scale).round()
    return ((x / scale).round() + zero).clamp(qmin, qmax).sub(zero) * scale


def test_it_computes_what_rounding_by_hand_gives() -> None:
    model = noisy(convolutions(nn.BatchNorm2d(8), nn.ReLU())).eval()
    data = images()
    folded = fxopt.optimize(model, X)
    graph = fxopt.optimize(folded, passes=[InsertFakeQuant(data, method="minmax", target="onnx")])
    first, second = folded.find(aten.conv2d.default)
    w1, b1, w2, b2 = (
        folded.value(node).detach().double()
        for layer in (first, second) for node in layer.args[1:3]
    )  # fmt: skip

    def channels(weight: torch.Tensor) -> torch.Tensor:
        largest = weight.abs().amax((1, 2, 3), keepdim=True)
        return by_hand(weight, -largest, largest, -127, 127)

    seen = torch.cat(data).double()
    hidden = F.conv2d(seen, w1, b1, padding=1).relu()
    final = F.conv2d(hidden, w2, b2).relu()
    zero = torch.zeros((), dtype=torch.float64)
    x = by_hand(X.double(), seen.min(), seen.max(), 0, 255)
    y = F.conv2d(x, channels(w1), b1, padding=1).relu()
    y = by_hand(y, zero, hidden.max(), 0, 255)
    y = F.conv2d(y, channels(w2), b2).relu()
    expected = by_hand(y, zero, final.max(), 0, 255)  # onnx: a convolution writes integers
    found = graph(X).double()
    step = float(final.max()) / 255
    off = (found - expected).abs()
    assert off.max() < 1.01 * step and (off > 1e-4 * step).double().mean() < 0.01
    assert (found - folded(X)).abs().max() > 0.1 * step


def test_a_range_comes_from_all_the_data_and_the_weights_keep_their_channels() -> None:
    data = images()
    data[2][0, 0, 0, 0] = 50.0
    record = rounded(convolutions(), data=data, method="minmax").story.steps[-1].details
    assert record.values[0].high == pytest.approx(50, rel=0.01)
    assert record.samples == 8
    assert "2 weights and 2 activations" in str(record) and "49.9" in record.table()


def test_it_stops_after_as_many_samples_as_were_asked_for() -> None:
    seen = []

    def endless() -> Any:
        for image in images(1000):
            seen.append(image)
            yield image

    record = rounded(convolutions(), data=endless(), samples=5).story.steps[-1].details
    assert record.samples == 6 and len(seen) == 3


# -- placement ------------------------------------------------------------------------------------


def test_what_the_kernels_take_in_is_rounded_once_behind_it() -> None:
    for activation in (nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.GELU()):
        found = values(rounded(convolutions(activation), target="openvino"))
        assert list(found.values()) == [["conv2d"], ["conv2d_1"]]
    # ONNX Runtime's convolutions return integers, and it has no SiLU of these
    found = values(rounded(convolutions(nn.SiLU()), target="onnx"))
    assert list(found) == ["input_1", "conv2d", "silu", "relu"]


def test_a_residual_sum() -> None:
    # the input, the stem's, which the sum reads as well, the inner convolution's
    found = values(rounded(Wide(), target="eager"))
    assert [len(readers) for readers in found.values()] == [1, 2, 1]
    # and what ONNX Runtime adds, and returns, are integers, too
    found = values(rounded(Wide(), target="onnx"))
    assert [len(readers) for readers in found.values()] == [1, 2, 1, 1, 1]


def test_moves_pass_a_scale_through() -> None:
    between = (nn.ReLU(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.PixelShuffle(1))
    found = values(rounded(convolutions(*between)))
    assert len(found) == 2 and "relu" in found
    # another number than 0 might lie outside of the range
    found = values(rounded(convolutions(nn.ReLU(), nn.ConstantPad2d(1, 3.0))))
    assert len(found) == 2 and "relu" not in found


def test_what_is_concatenated_shares_a_scale() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
            self.c = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x).relu(), 9 * self.b(x).relu()], 1))

    graph = rounded(Model(), method="minmax")
    record = graph.story.steps[-1].details
    groups = [value.group for value in record.values]
    assert len(groups) == 3 and groups[1] == groups[2] != groups[0]
    assert record.values[1].scale == record.values[2].scale
    (joined,) = graph.find(aten.cat.default)
    assert [node.target for node in joined.args[0]] == [fake_quantize] * 2
    assert {n.args[1] for n in joined.args[0]} == {joined.args[0][0].args[1]}  # one constant


def test_parts_of_a_split_share_the_scale_of_the_whole() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.a(x).relu().chunk(2, 1)
            return self.b(left) + self.c(right)

    assert list(values(rounded(Model(), target="eager"))) == ["x", "relu"]


def test_what_is_computed_in_floats_stays_float_for_others() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return self.norm(y + self.down(F.gelu(self.up(y))))

    x = torch.randn(2, 5, 8)
    for target in POLICIES:
        graph = rounded(Block(), x, [x], target=target)
        (inner, hidden) = values(graph).items()
        assert inner[0].startswith("layer_norm") and inner[1] == ["linear"]
        assert hidden[1] == ["linear_1"]
        (total,) = graph.find(aten.add.Tensor)
        assert not any(node.target is fake_quantize for node in total.args[:2])


def test_products_of_activations() -> None:
    model = Function(lambda x: torch.matmul(x.softmax(-1), x.transpose(-1, -2)))
    x = torch.randn(2, 5, 6)
    graph = rounded(model, x, [x], target="openvino")
    # OpenVINO multiplies integers around 0
    assert [(n.args[3], n.args[4]) for n in graph.find(fake_quantize)] == [(-127, 127), (0, 255)]
    assert all(int(graph.value(n.args[2])) == 0 for n in graph.find(fake_quantize))
    graph = rounded(model, x, [x], target="onnx")
    assert [n.args[3] for n in graph.find(fake_quantize)] == [0, 0]
    graph = fxopt.optimize(model, x, passes=[InsertFakeQuant(target="eager")])  # nothing to round
    assert not graph.find(fake_quantize) and graph.story.steps[-1].details is None


def test_a_shared_layer_and_a_tied_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(x).relu()) + self.head(self.words(x).sigmoid())

    x = torch.randint(7, (2, 3))
    graph = rounded(Tied(), x, [x])
    assert weights(graph) == 1
    assert all(n.args[0].op == "get_attr" for n in graph.find(aten.embedding.default))


def test_no_weights_no_data_are_needed_where_nothing_is_rounded() -> None:
    graph = fxopt.optimize(nn.ReLU(), X, passes=[InsertFakeQuant()])
    assert graph.story.steps[-1].rewrites == 0


# -- what is asked for ----------------------------------------------------------------------------


def test_bits_of_layers_and_what_stays_float() -> None:
    graph = rounded(
        convolutions(nn.ReLU()), overrides={"0": "w4a6", "2": "w3a8"}, target="openvino"
    )
    steps = [(node.args[3], node.args[4]) for node in graph.find(fake_quantize)]
    assert sorted(steps) == [(-7, 7), (-3, 3), (0, 63), (0, 255)]
    pooled = convolutions(nn.ReLU(), nn.MaxPool2d(2))
    graph = rounded(pooled, bits="w8a4", overrides={"3": "w8a8"}, target="openvino")
    assert sorted(node.args[4] for node in graph.find(fake_quantize)) == [15, 127, 127, 255]
    for options in ({"keep": ("0",)}, {"overrides": {"0": "float"}}, {"keep": ("conv2d",)}):
        graph = rounded(convolutions(nn.ReLU()), **options)
        assert list(values(graph)) == ["relu"] and weights(graph) == 1
        (miss,) = graph.story.steps[-1].misses
        assert miss.node == "conv2d" and "to be kept" in miss.reason
    graph = rounded(convolutions(nn.ReLU()), keep=("aten.conv2d",))
    assert not graph.find(fake_quantize)


def test_weights_alone_need_no_data() -> None:
    model = noisy(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))).eval()
    graph = fxopt.optimize(model, X, passes=["default", InsertFakeQuant(bits="w4")])
    assert weights(graph) == 2 and not values(graph)
    assert [(n.args[3], n.args[4]) for n in graph.find(fake_quantize)] == [(-7, 7)] * 2
    assert graph.story.steps[-1].details.samples == 0
    half = InsertFakeQuant(images(), bits="w8", overrides={"2": "w8a8"}, target="eager")
    graph = fxopt.optimize(model, X, passes=["default", half])
    assert values(graph) == {"relu": ["conv2d_1"]} and weights(graph) == 2


@pytest.mark.parametrize("backend", ["eager", "onnx", "openvino", "torchscript"])
def test_groups_of_weights_with_a_scale_of_their_own(backend: str) -> None:
    if backend in ("onnx", "openvino"):
        pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5), nn.Linear(5, 6)).eval()
    with torch.no_grad():
        model[0].weight[:, ::7] *= 10  # one scale for all would leave the others nothing
    x = torch.randn(3, 64)
    graphs = {
        group: fxopt.optimize(model, x, passes=[InsertFakeQuant(bits="w4", group=group)])
        for group in (None, 8)
    }
    assert sqnr(graphs[8](x), model(x)) > sqnr(graphs[None](x), model(x)) + 3
    weight = model[0].weight.detach().view(32, 8, 8)
    scale = weight.abs().amax(-1, keepdim=True) / 7
    first = graphs[8].find(aten.linear.default)[0]
    with torch.no_grad():
        by_hand = F.linear(x, ((weight / scale).round() * scale).view(32, 64), model[0].bias)
    found = fxopt.optimize(nn.Sequential(model[0]), x, passes=[InsertFakeQuant(bits="w4", group=8)])
    torch.testing.assert_close(found(x), by_hand)
    assert first.args[1].target is not fake_quantize  # which is behind a reshape
    record = graphs[8].story.steps[-1].details
    assert ["groups of 8" in one.scheme for one in record.weights] == [True, True, False]
    compiled = fxopt.compile(graphs[8], backend=backend, passes=[])
    if backend == "eager":  # nothing is rounded anew at each call
        called = " ".join(map(str, compiled.executable.program.operators.values()))
        assert not any(name in called for name in ("fake_quantize", "reshape", "view"))
    torch.testing.assert_close(compiled(x), graphs[8](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "tpu"}, "Did you mean"),
        ({"target": "onxx"}, "Did you mean 'onnx'"),
        ({"bits": "8"}, "'w8a8'"),
        ({"bits": "w1a8"}, "2 to 16"),
        ({"overrides": {"0": "w8a17"}}, "2 to 16"),
        ({"keep": "head"}, "('head',)"),
        ({"keep": None}, "in a tuple"),
        ({"keep": (3,)}, "texts"),
        ({"overrides": "0"}, "maps patterns"),
        ({"overrides": {3: "w4a8"}}, "texts"),
        ({"learn": "no"}, "True or False"),
        ({"samples": 0}, "above 0"),
        ({"group": 0}, "above 0"),
        ({"method": "median"}, "calibration method"),
        ({"weight_method": "median"}, "'minmax'"),
    ],
)
def test_options_that_cannot_be(options: Any, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        InsertFakeQuant([X], **options)
    if words != "Did you mean":
        assert words in str(caught.value)


def test_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(OptionError, match="nothing_like_it"):
        rounded(convolutions(), keep=("nothing_like_it",))


# -- data -----------------------------------------------------------------------------------------


def refused(data: Any, error: type[FxoptError], model: nn.Module | None = None) -> str:
    model = noisy(model or convolutions()).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error) as caught:
        fxopt.optimize(model, X, passes=[InsertFakeQuant(data)])
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    return str(caught.value)


def test_bad_data_gets_an_error() -> None:
    assert "needs data" in refused(None, OptionError)
    assert "no batches" in refused([], ObjectiveError)
    assert "iterable" in refused(7, ObjectiveError)
    assert "'random'" in refused("noise", OptionError)
    assert "input" in refused([torch.randn(2, 4, 8, 8)], ShapeError)
    assert "input" in refused([torch.randn(2, 3, 9, 8)], ShapeError)
    assert "input" in refused([torch.randn(2, 3, 8, 8).double()], ShapeError)
    wrong = images()
    wrong[1][0, 0, 0, 0] = float("nan")
    words = refused(wrong, CalibrationError)
    assert "batch 1" in words and "input" in words
    wrong[1][0, 0, 0, 0] = float("inf")
    assert "batch 1" in refused(wrong, CalibrationError)


def test_an_activation_that_overflows_is_named() -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner((100 * x).exp())

    words = refused([X], CalibrationError, Grows())
    assert "'exp'" in words


def test_batches_of_other_sizes_are_cut_and_filled_up() -> None:
    whole = torch.cat(images(8))
    expected = rounded(convolutions(), data=list(whole.split(2)), method="minmax")
    for size in (1, 3, 5, 16):
        found = rounded(convolutions(), data=list(whole.split(size)), method="minmax")
        for name, tensor in expected.constants().items():
            assert torch.equal(tensor, found.constants()[name]), (size, name)
        assert found.story.steps[-1].details.samples == 16


def test_batches_in_every_form() -> None:
    expected = rounded(convolutions(), data=images())
    labels = torch.zeros(2, dtype=torch.int64)
    forms: list[Callable[[torch.Tensor], Any]] = [
        lambda x: (x, labels), lambda x: [x], lambda x: {"input": x}, lambda x: [x, labels],
    ]  # fmt: skip
    for form in forms:
        found = rounded(convolutions(), data=[form(x) for x in images()])
        for name, tensor in expected.constants().items():
            assert torch.equal(tensor, found.constants()[name])


def test_dynamic_batches() -> None:
    model = noisy(convolutions(nn.ReLU())).eval()
    data = [torch.cat(images())]
    graph = fxopt.optimize(
        model, X, dynamic_shapes={"input": {0: "n"}}, passes=[InsertFakeQuant(data)]
    )
    fixed = fxopt.optimize(model, X, passes=[InsertFakeQuant(images())])
    y = torch.randn(5, 3, 8, 8)
    assert torch.equal(graph(y)[:2], fixed(y[:2]))


def test_constant_activations() -> None:
    for constant in (0.0, 3.0, -2.0):
        graph = rounded(convolutions(), data=[torch.full((2, 3, 8, 8), constant)])
        x = torch.full_like(X, constant)
        rough = fxopt.optimize(noisy(convolutions()).eval(), X)(x)
        assert torch.isfinite(graph(x)).all()
        assert (graph(x) - rough).abs().max() <= 0.05 * rough.abs().max()


def test_random_data_are_asked_for_by_name() -> None:
    one, other = (rounded(convolutions(), data="random") for _ in range(2))
    assert all(map(torch.equal, one.constants().values(), other.constants().values()))


def test_data_are_not_written_to_nor_shown() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2)
            return self.layer(x)

    data = [torch.ones(2, 4)]
    graph = fxopt.optimize(Doubles().eval(), torch.ones(2, 4), passes=[InsertFakeQuant(data)])
    assert torch.equal(data[0], torch.ones(2, 4))
    assert "tensor" not in f"{graph.report} {graph.report.to_json()}"
    assert InsertFakeQuant(data) == InsertFakeQuant("random")
    hash(InsertFakeQuant(data, overrides={"0": "w4a8"}))


def test_data_for_a_model_are_not_those_for_its_parts() -> None:
    with pytest.raises(OptionError, match="submodules"):
        fxopt.compile(
            convolutions(), X, precision="int8", calibration=images(), submodules=["2"]
        )


def test_what_a_pool_drops_does_not_widen_the_range() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.pad(self.a(x).relu(), (1, 1, 1, 1), value=-1e4)
            return self.b(F.max_pool2d(y, 3))

    record = rounded(Padded()).story.steps[-1].details
    assert [value.node for value in record.values] == ["x", "max_pool2d"]
    assert record.values[1].high < 100


def test_layers_without_a_kernel_of_integers_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3))
    graph = rounded(model, target="onnx")
    assert graph.story.steps[-1].details.floats == (
        ("2", "onnx has no kernel of integers for it"),
    )
    assert not rounded(model, target="openvino").story.steps[-1].details.floats


def test_the_bound_for_engines_does_not_grow_without_end() -> None:
    graph = rounded(convolutions(), bits="w2a2")
    verdict = compare(
        "zeros", lambda flat: [torch.zeros_like(graph(*flat))], lambda flat: graph.run(*flat),
        graph, [(X,)], None,
    )  # fmt: skip
    assert not verdict.passed and verdict.bound <= 0.5


# -- preconditions --------------------------------------------------------------------------------


def test_a_graph_is_quantized_once() -> None:
    graph = rounded(convolutions())
    with pytest.raises(PreconditionError, match="float model"):
        fxopt.optimize(graph, passes=[InsertFakeQuant(images())])


def test_batch_norms_are_folded_first() -> None:
    model = noisy(convolutions(nn.BatchNorm2d(8))).eval()
    with pytest.raises(PreconditionError, match="default_passes"):
        fxopt.optimize(model, X, passes=[InsertFakeQuant(images())])
    first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="zeros"))
    fxopt.optimize(first.eval(), X, passes=[InsertFakeQuant(images())])  # nothing to fold into


# -- afterwards -----------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", [False, True])
def test_it_trains(learn: bool) -> None:
    graph = rounded(convolutions(nn.ReLU()), learn=learn, bits="w4a8")
    reference = fxopt.optimize(noisy(convolutions(nn.ReLU())).eval(), X)
    scales = [name for name, _ in graph.named_parameters() if name.endswith("_scale")]
    assert len(scales) == (4 if learn else 0)
    x = torch.cat(images(8, seed=3))
    with torch.no_grad():
        wanted = torch.cat([1.5 * reference(part) for part in x.split(2)])
    optimizer = torch.optim.Adam(graph.parameters(), lr=5e-3)

    def loss() -> torch.Tensor:
        found = torch.cat([graph(part) for part in x.split(2)])
        return F.mse_loss(found, wanted)

    before = loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        assert all(p.grad is not None for p in graph.parameters())
        optimizer.step()
    assert loss().item() < 0.5 * before


def test_new_weights_ask_for_new_data() -> None:
    model = noisy(convolutions()).eval()
    compiled = fxopt.compile(model, X, passes=["default", InsertFakeQuant(images())])
    with pytest.raises(OptionError, match="calibrated"):
        compiled.update(model.state_dict())


def test_half_precision_and_float64() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        model = noisy(convolutions(nn.ReLU())).eval().to(dtype)
        insert = InsertFakeQuant([x.to(dtype) for x in images()])
        graph = fxopt.optimize(model, X.to(dtype), passes=["default", insert])
        found, expected = graph(X.to(dtype)).double(), model(X.to(dtype)).double()
        assert graph(X.to(dtype)).dtype == dtype
        assert (found - expected).abs().max() <= 0.1 * expected.abs().max()


def test_two_runs_give_the_same_graph() -> None:
    one, other = (rounded(Wide(), target="onnx") for _ in range(2))
    assert str(one.graph) == str(other.graph)
    assert all(map(torch.equal, one.constants().values(), other.constants().values()))
    assert one.story.steps[-1].details == other.story.steps[-1].details


def test_one_call_for_all() -> None:
    model = noisy(Wide()).eval()
    for backend in ("eager", "torchscript"):
        compiled = fxopt.compile(
            model, X, precision="int8", calibration=images(), backend=backend
        )
        assert sqnr(compiled(X), model(X)) > 20
        assert not torch.equal(compiled(X), model(X))
    with pytest.raises(OptionError, match="calibration='random'"):
        fxopt.compile(model, X, precision="int8")
    with pytest.raises(OptionError, match="goes with precision='int8'"):
        fxopt.compile(model, X, calibration=images())
    with pytest.raises(OptionError, match="name it"):
        fxopt.compile(model, X, precision="int8", calibration=images(), backend="auto")
