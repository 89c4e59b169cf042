"""The openvino backend: what it computes, what it refuses, its options, threads and memory."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.backends.openvino import OpenVino
from fxopt.cli import main
from fxopt.errors import BackendUnavailable, LoweringError, OptionError, ShapeError
from fxopt.testing import noisy

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)


class Calls(nn.Module):
    """A function as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def compiled(model: Any, *inputs: Any, **options: Any) -> Any:
    model = model if isinstance(model, nn.Module) else Calls(model)
    return fxopt.compile(model, inputs, backend="openvino", threads=1, **options)


def check(model: Any, *inputs: Any, more: Any = (), bound: float = 1e-5, **options: Any) -> Any:
    """Compile, and compare what is returned for the inputs, and for more of them."""
    module = model if isinstance(model, nn.Module) else Calls(model)
    one = compiled(module, *inputs, **options)
    for given in (inputs, *more):
        before = [x.clone() for x in given]
        with torch.no_grad():
            expected = module(*given)
        actual = one(*given)
        assert all(map(torch.equal, before, given)), "an input was changed"
        pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(actual), strict=True)
        for wanted, found in pairs:
            if not isinstance(wanted, torch.Tensor):
                assert wanted == found
                continue
            assert wanted.dtype == found.dtype and wanted.shape == found.shape
            if not torch.equal(wanted, found):
                assert wanted.is_floating_point()
                scale = max(1e-30, float(wanted.abs().max()))
                assert float((wanted.double() - found.double()).abs().max()) <= bound * scale
    return one


def mlp(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 3))


# -- what it computes -----------------------------------------------------------------------------


@needs_openvino
def test_a_small_network_and_what_the_report_says() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    one = check(noisy(model.eval()), torch.randn(1, 3, 16, 16))
    (note,) = one.executable.notes
    assert "computes in f32 on CPU with 1 thread in 1 stream." in note
    assert note in str(one.report)


@needs_openvino
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    check(model.to(dtype).eval(), torch.randn(2, 3, 8, 8).to(dtype), bound=2e-2)


@needs_openvino
def test_sizes_that_vary() -> None:
    layers = (
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    more = [[torch.randn(n, 3, h, 10)] for n, h in ((1, 8), (5, 12), (0, 8), (2, 8))]
    sizes = {"input": {0: "n", 2: "h", 3: "w"}}
    x = torch.randn(2, 3, 8, 8)
    check(noisy(nn.Sequential(*layers).eval()), x, more=more, dynamic_shapes=sizes)


@needs_openvino
def test_a_sequence_length_that_varies() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    more = [[torch.randn(1, 9, 16)], [torch.randn(4, 3, 16)]]
    check(model, torch.randn(2, 5, 16), more=more, dynamic_shapes={"src": {0: "n", 1: "s"}})


@needs_openvino
def test_structured_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.arange(4.0))

        def forward(self, x: torch.Tensor, unused: torch.Tensor, y: torch.Tensor) -> Any:
            last = (y.relu(), y.relu())
            return {"sum": x + 1, "constant": self.steps, "none": None, "seven": 7, "last": last}

    one = check(Model(), torch.randn(3), torch.randn(5), torch.randn(2))
    result = one(torch.randn(3), torch.randn(5), torch.randn(2))
    result["constant"].zero_()  # is the caller's own
    again = one(torch.randn(3), torch.randn(5), torch.randn(2))
    assert torch.equal(again["constant"], torch.arange(4.0))


@needs_openvino
def test_odd_inputs_and_outputs() -> None:
    check(lambda x: x.sum(), torch.randn(3, 4))
    check(lambda x, factor: x * factor, torch.randn(3), torch.tensor(2.0))
    check(lambda x: x, torch.tensor([1, 2]))
    check(lambda x, y: (y, x, x), torch.randn(3), torch.randn(4))
    check(lambda: torch.arange(5.0) * 2)
    check(lambda x: 3, torch.randn(3))
    check(lambda x: torch.cat([x, x], 1).relu(), torch.randn(0, 4))
    check(lambda x: x.sum(0), torch.randn(0, 4))
    check(lambda x: x.permute(7, 6, 5, 4, 3, 2, 1, 0) * 2, torch.randn(2, 2, 2, 2, 2, 2, 2, 2))


@needs_openvino
def test_inputs_that_do_not_lie_densely() -> None:
    model = compiled(lambda x: x.relu() + 1, torch.randn(4, 6))
    for x in (torch.randn(6, 4).t(), torch.randn(8, 12)[::2, ::2], torch.randn(1, 6).expand(4, 6),
              torch.randn(25)[1:].view(4, 6), torch.randn(4, 6, requires_grad=True)):  # fmt: skip
        before = x.detach().clone()
        assert torch.equal(model(x), before.relu() + 1) and torch.equal(x, before)


@needs_openvino
def test_integers_and_booleans() -> None:
    whole = torch.tensor([1, -5, 2**24 - 1])
    check(lambda x: (x * 2 + 1, x // 3, x % 3, x > 0, x.float(), x.sum(), x.clamp(-3, 7)), whole)
    check(lambda x: (x * 2 + 1, x > 2**29, x.sort(), x.abs(), -x), whole * 60)
    check(lambda x: x * x, torch.tensor([1, 500], dtype=torch.int32))
    check(lambda x: x.float() / 255, torch.tensor([1, 200], dtype=torch.uint8))
    image = torch.randint(0, 255, (3, 4), dtype=torch.uint8)
    check(lambda x: (torch.maximum(x, x.flip(0)).t(), x.clamp(10, 100), x.long() * 300), image)
    yes, no = torch.tensor([True, False]), torch.tensor([True, True])
    check(lambda x, y: (x & ~y, x | y, x ^ y, torch.where(x, 1.0, 2.0)), yes, no)
    check(nn.Embedding(10, 4), torch.tensor([[1, 2, 9]]))


@needs_openvino
def test_control_flow_and_sizes_that_depend_on_data() -> None:
    def either(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    check(either, torch.ones(3), more=[[-torch.ones(3)]])
    check(lambda x: torch.nonzero(x > 0), torch.randn(9), more=[[torch.randn(9)]])


@needs_openvino
@pytest.mark.parametrize("name", ["bert", "gpt2", "timm", "lstm"])
def test_networks(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm")
    small = {"vocab_size": 100, "num_hidden_layers": 2}
    ids = torch.randint(0, 100, (2, 16))
    if name == "bert":
        config = transformers.BertConfig(
            **small, hidden_size=32, num_attention_heads=2, intermediate_size=64
        )
        model, x = transformers.BertModel(config), ids
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=100, n_layer=2, n_embd=32, n_head=2, use_cache=False
        )
        model, x = transformers.GPT2Model(config), ids
    elif name == "timm":
        model, x = timm.create_model("mobilevitv2_050"), torch.randn(1, 3, 64, 64)
    else:
        model, x = nn.LSTM(4, 8, 2, batch_first=True, bidirectional=True), torch.randn(2, 5, 4)
    check(noisy(model.eval()), x, bound=1e-4)


@needs_openvino
@pytest.mark.parametrize("order", [[0, 3, 1, 4, 2, 5], [1, 2, 3, 4, 5, 0], [5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("groups", [1, 6])
def test_reordered_channels_before_a_convolution(order: list[int], groups: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("order", torch.tensor(order))
            self.conv = nn.Conv2d(6, 6, 3, groups=groups)

        def forward(self, x: torch.Tensor) -> Any:
            y = x.index_select(1, self.order)
            return self.conv(y).relu(), y

    check(Model(), torch.randn(1, 6, 8, 8), passes=[])
    conv = nn.Conv2d(6, 6, 3, groups=groups)
    last = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ChannelShuffle(3), conv)
    sizes = {"input": {0: "n"}}
    check(last, torch.randn(2, 2, 8, 8), more=[[torch.randn(3, 2, 8, 8)]], dynamic_shapes=sizes)

    def stacked(x: torch.Tensor) -> torch.Tensor:
        parts = x.unbind(1)
        return conv(torch.stack([parts[place] for place in order], 1))

    check(stacked, torch.randn(1, 6, 8, 8), passes=[])


@needs_openvino
def test_quantized_layers_stay_int8() -> None:
    import torch.ao.quantization.fx._decomposed  # registers the operators

    quantized = torch.ops.quantized_decomposed
    eighth = (0.02, 128, 0, 255, torch.uint8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.randint(-127, 127, (16, 8, 3, 3), dtype=torch.int8)
            self.register_buffer("weight", weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = quantized.quantize_per_tensor(x, *eighth)
            x = quantized.dequantize_per_tensor(x, *eighth)
            weight = quantized.dequantize_per_tensor(self.weight, 0.01, 0, -128, 127, torch.int8)
            return nn.functional.conv2d(x, weight, padding=1).relu()

    one = check(Model(), torch.randn(1, 8, 16, 16), passes=[], bound=1e-2, tolerance=1e-2)
    assert one.executable.notes[-1].endswith("; 1 layer in int8.")
    layers = [op.get_rt_info() for op in one.executable.compiled.get_runtime_model().get_ops()]
    convolutions = [about for about in layers if about["layerType"].value == "Convolution"]
    assert [about["runtimePrecision"].value for about in convolutions] == ["u8"]


# -- memory and threads ---------------------------------------------------------------------------


@needs_openvino
def test_results_belong_to_the_caller() -> None:
    model = compiled(lambda x: (x, x.relu(), x.reshape(-1)), torch.randn(2, 3))
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    first = model(x)
    kept = [result.clone() for result in first]
    model(y)
    assert all(map(torch.equal, first, kept))
    given = x.clone()
    for result in first:
        result.fill_(7)
    assert torch.equal(x, given)
    assert torch.equal(model(x)[1], x.relu())


@needs_openvino
def test_it_owns_its_constants() -> None:
    model, x = mlp().eval(), torch.randn(2, 4)
    one = compiled(model, x)
    before = one(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(one(x), before)
    one.update(model.state_dict())
    assert torch.equal(one(x), torch.zeros(2, 3))


@needs_openvino
@pytest.mark.parametrize("dynamic", [False, True])
def test_many_threads_at_once(dynamic: bool) -> None:
    model = mlp(64).eval()
    sizes = {"input": {0: "n"}} if dynamic else None
    one = compiled(model, torch.randn(3, 4), dynamic_shapes=sizes)
    inputs = [torch.randn(3 + (n % 4 if dynamic else 0), 4) for n in range(24)]
    expected = [one(x) for x in inputs]
    wrong: list[int] = []
    start = threading.Barrier(8)

    def call(offset: int) -> None:
        start.wait()
        for turn in range(40):
            n = (offset + turn) % len(inputs)
            if not torch.equal(one(inputs[n]), expected[n]):
                wrong.append(n)

    threads = [threading.Thread(target=call, args=(3 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(one.executable._idle) <= 9  # as many requests as there were threads at most


@needs_openvino
@pytest.mark.parametrize("performance", ["latency", "throughput"])
def test_started_runs_end_in_futures(performance: str) -> None:
    model = mlp().eval()
    one = fxopt.compile(
        model, torch.randn(3, 4), backend="openvino", performance=performance, streams=2
    )
    inputs = [torch.randn(3, 4) for _ in range(20)]
    futures = [one.executable.start(x) for x in inputs]
    for x, future in zip(inputs, futures, strict=True):
        (result,) = future.result(timeout=60)
        assert torch.equal(result, one(x))
    with pytest.raises(ShapeError, match="Expected 1 inputs, got 2"):
        one.executable.start(inputs[0], inputs[1]).result(timeout=60)


@needs_openvino
def test_a_run_that_fails_is_an_error_and_the_next_one_is_right() -> None:
    one = compiled(mlp().eval(), torch.randn(3, 4))
    for _ in range(2):
        with pytest.raises(LoweringError, match=r"failed while running.*float32 \(3, 5\)"):
            one.executable.run(torch.randn(3, 5))
        x = torch.randn(3, 4)
        assert torch.equal(one(x), one(x))


# -- what it refuses ------------------------------------------------------------------------------


def refused(model: Any, *inputs: Any) -> str:
    graph = fxopt.capture(model if isinstance(model, nn.Module) else Calls(model), inputs)
    with pytest.raises(LoweringError) as caught:
        fxopt.lower(graph, backend="openvino")
    return str(caught.value)


@needs_openvino
def test_types_that_openvino_would_compute_differently() -> None:
    small = torch.tensor([1, 100])
    assert "float64 in float32" in refused(nn.Linear(4, 4).double(), torch.randn(2, 4).double())
    assert "node 'to'" in refused(lambda x: (x.double() * 3).float(), torch.randn(3))
    for dtype in (torch.uint8, torch.int8, torch.int16):
        text = refused(lambda x: x + x, small.to(dtype))
        assert "does not wrap around" in text and "aten.add.Tensor" in text
        assert "test_openvino.py" in text  # the user's own line
    assert "int32" in refused(lambda x: x.long(), small.to(torch.uint32))
    assert "64 in" not in refused(lambda x: x + torch.tensor([2**40]), small)
    assert "more than OpenVINO's 32 bits" in refused(lambda x: x + torch.tensor([2**40]), small)
    assert "more than OpenVINO's 32 bits" in refused(lambda x: x + 2**40, small)


@needs_openvino
def test_narrow_types_are_refused_inside_of_branches_too() -> None:
    def either(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + x, lambda x: x.clone(), (x,))

    assert "does not wrap around" in refused(either, torch.ones(3, dtype=torch.uint8))


@needs_openvino
def test_large_integers_at_a_call(tmp_path: Path) -> None:
    one = compiled(lambda x: x + 1, torch.tensor([1, 2]))
    assert one(torch.tensor([2**31 - 2, -(2**31) + 1])).tolist() == [2**31 - 1, -(2**31) + 2]
    rounding = compiled(lambda x: x // 3, torch.tensor([1, 2]))
    assert rounding(torch.tensor([2**24, -(2**24)])).tolist() == [5592405, -5592406]
    rounding.save(tmp_path / "model.ovx")
    loaded = fxopt.load(tmp_path / "model.ovx")
    for model, values in (
        (one, (2**31, -(2**31) - 1, 2**62)),
        (rounding, (2**24 + 1, -(2**24) - 1)),
        (loaded, (2**24 + 1,)),
    ):
        for value in values:
            with pytest.raises(ShapeError, match=f"holds the integer {value},.*exact up to"):
                model(torch.tensor([1, value]))


@needs_openvino
def test_state_and_what_onnx_cannot_say() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    assert "changes 'calls' at each run" in refused(Counter(), torch.randn(3))
    assert "backend='onnx' with state='io'" in refused(lambda x: x.add_(1), torch.randn(3))
    text = refused(lambda x: torch.view_as_real(torch.fft.fft(x)), torch.randn(8))
    assert "gets graphs as ONNX" in text and "fft_fft" in text


@needs_openvino
def test_an_operator_that_openvino_does_not_know_is_named() -> None:
    import onnx_ir as ir

    from fxopt.backends.openvino.lower import read_onnx

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 2]))
    node = ir.Node("", "Unheard", [x], outputs=[ir.Value(name="y")])
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}, name="graph")
    with pytest.raises(LoweringError, match=r"cannot read the graph.*Unheard.*backend='eager'"):
        read_onnx(ir.Model(graph, ir_version=10))


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, "threads=0"),
        ({"threads": True}, "threads=True"),
        ({"threads": 2**40}, "positive integer"),
        ({"streams": -1}, "streams=-1"),
        ({"inference_precision": "int8"}, "'f32', 'bf16', 'f16'"),
        ({"performance": "LATENCY"}, "'latency', 'throughput'"),
        ({"device": ""}, "device=''"),
        ({"device": 3}, "device=3"),
        ({"properties": "NUM_STREAMS"}, "a dict of OpenVINO's names"),
        ({"properties": {"NUM_STREAMS": [1]}}, "text or numbers"),
        ({"properties": 5}, "properties=5"),
        ({"properties": [("NUM_STREAMS",)]}, "properties="),
    ],
)
def test_options_that_are_not_possible(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match="OpenVino option") as caught:
        OpenVino(**options)
    assert words in str(caught.value)


def test_equal_options_are_equal() -> None:
    pairs = (("A", 1), ("B", "x"))
    assert OpenVino(properties=pairs) == OpenVino(properties={"B": "x", "A": 1})
    assert hash(OpenVino(properties={"A": 1})) == hash(OpenVino(properties=(("A", 1),)))


@needs_openvino
def test_options_reach_openvino() -> None:
    graph = fxopt.capture(mlp(), torch.randn(2, 4))
    properties = {"ENABLE_CPU_PINNING": False}
    one = fxopt.lower(graph, backend="openvino", threads=2, streams=2, properties=properties)
    told = one.executable.compiled.get_property
    assert told("INFERENCE_NUM_THREADS") == 2 and told("NUM_STREAMS") == 2
    assert told("ENABLE_CPU_PINNING") is False
    assert told("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert "2 threads in 2 streams" in one.executable.notes[0]
    one = fxopt.lower(graph, backend="openvino", performance="throughput")
    assert one.executable.compiled.get_property("PERFORMANCE_HINT") == "THROUGHPUT"


@needs_openvino
@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_a_precision_that_was_asked_for_is_used_or_said_to_be_missing(precision: str) -> None:
    graph = fxopt.capture(mlp(), torch.randn(2, 4))
    one = fxopt.lower(graph, backend="openvino", inference_precision=precision)
    (note,) = one.executable.notes
    hint = one.executable.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    assert f"computes in {hint} " in note
    assert (f"which has no {precision}" in note) == (hint != precision)


@needs_openvino
@pytest.mark.parametrize(("precision", "hint"), [("bf16", "bf16"), ("fp16", "f16")])
def test_it_computes_in_the_precision_of_the_graph(
    precision: str, hint: str, tmp_path: Path
) -> None:
    from fxopt.backends.openvino.executable import core

    x = torch.randn(2, 4)
    one = fxopt.compile(mlp(), x, backend="openvino", precision=precision)
    wanted = one.executable.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    (note,) = one.executable.notes
    able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert wanted == (hint if precision.upper() in able else "f32") and f" in {wanted} " in note
    one.save(tmp_path / "half.ovx")
    assert fxopt.load(tmp_path / "half.ovx").executable.notes == (note,)
    assert one(x).dtype == torch.float32


@needs_openvino
def test_devices_and_properties_that_are_not_here() -> None:
    graph = fxopt.capture(mlp(), torch.randn(2, 4))
    with pytest.raises(OptionError, match=r"no device 'TPU'.*only .*CPU"):
        fxopt.lower(graph, backend="openvino", device="TPU")
    with pytest.raises(OptionError, match=r"ENABLE_CPU_PINING.*ENABLE_CPU_PINNING"):
        fxopt.lower(graph, backend="openvino", properties={"ENABLE_CPU_PINING": False})
    with pytest.raises(LoweringError, match="cannot compile this model.*SCHEDULING_CORE_TYPE"):
        fxopt.lower(graph, backend="openvino", properties={"SCHEDULING_CORE_TYPE": "none"})


def test_without_openvino_the_command_that_installs_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name)
    )
    with pytest.raises(BackendUnavailable, match=r"'openvino' is not installed\. pip install"):
        fxopt.compile(mlp(), torch.randn(2, 4), backend="openvino")


def test_the_command_line_lists_it() -> None:
    result = CliRunner().invoke(main, ["backends", "--json"])
    assert '"name": "openvino"' in result.output and '".ovx"' in result.output


@needs_openvino
def test_its_telemetry_stays_out() -> None:
    program = """
import sys, torch, fxopt
fxopt.compile(torch.nn.Linear(2, 2), torch.ones(1, 2), backend="openvino", verify="off")
assert "openvino.tools.ovc.telemetry_stub" in sys.modules
print([name for name in sys.modules if name.startswith("openvino_telemetry")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
