"""fxopt.profile: totals, rows, modules, dimensions, times, tables, pictures and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxopt
from fxopt.cli import main
from fxopt.errors import ArtefactError, BackendUnavailable, OptionError, ShapeError
from fxopt.profile import Machine, Profile
from fxopt.profiling.measure import Timing, measure
from tests.models import ConvBnRelu, Counter, Residual, SharedLayer, Tokens

image = torch.randn(2, 3, 8, 8)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that needs no measuring."""
    fake = Machine("a machine", 1e11, 1e10)
    monkeypatch.setattr("fxopt.profiling.result.measure_machine", lambda device, dtype: fake)
    return fake


def counted(model: Any, x: Any = image, **options: Any) -> Profile:
    return fxopt.profile(model, x, measure=False, **options)


# -- totals, rows, modules -------------------------------------------------------------------------


def test_totals() -> None:
    found = counted(ConvBnRelu())  # 2×8×8×8 outputs of 27 products; batch norm; relu
    assert found.macs == 1024 * 27
    assert found.flops == 2 * found.macs + (2 * 1024 + 40) + 1024
    assert found.params == 8 * 27 + 16
    assert found.bytes_moved == 4 * (384 + 216 + 1024 + 1024 + 32 + 1024 + 1024 + 1024)
    assert found.peak_activation_bytes == 4 * (384 + 2048)
    assert found.ms is None


def test_rows_are_calls_in_order_with_their_modules() -> None:
    rows = counted(Residual()).rows
    assert [row.op for row in rows] == [
        "conv2d", "batch_norm", "relu", "conv2d", "batch_norm", "add.Tensor", "relu",
    ]  # fmt: skip
    assert [row.path for row in rows] == ["stem.0", "stem.1", "stem.2", "conv", "norm", "", ""]
    assert rows[0].shapes == ((2, 8, 8, 8),)
    assert rows[0].dtype == "f32"
    assert rows[0].family == "convolution"


def test_modules_are_a_tree_of_sums() -> None:
    root = counted(Residual()).modules
    assert [module.path for module in root.walk()] == [
        "", "stem", "stem.0", "stem.1", "stem.2", "conv", "norm",
    ]  # fmt: skip
    stem = root.children[0]
    assert stem.kind.endswith("ConvBnRelu")
    assert stem.cost.macs == sum(child.cost.macs for child in stem.children)
    assert stem.shapes == ((2, 8, 8, 8),)
    assert root.cost == counted(Residual()).cost


def test_shared_parameters_count_once_in_totals() -> None:
    found = counted(SharedLayer(), torch.randn(2, 4))
    assert [row.cost.params for row in found.rows if row.op == "linear"] == [20, 20]
    assert found.params == found.modules.children[0].cost.params == 20


def test_graphs_and_compiled_models_are_profiled_as_they_are() -> None:
    model = ConvBnRelu()
    plain = fxopt.capture(model, image)
    compiled = fxopt.compile(model, image, passes=["fuse-conv-bn"], backend="onnx")
    assert counted(plain, None).cost == counted(model).cost
    found = counted(compiled, None)
    assert [row.op for row in found.rows] == ["conv2d", "relu"]
    assert "not the backend 'onnx'" in str(found)
    assert "not the backend" not in str(counted(fxopt.compile(model, image), None))


def test_a_model_without_inputs_infers_them() -> None:
    assert counted(fxopt.compile(ConvBnRelu()), None).macs > 0
    assert counted(ConvBnRelu(), None).rows


def test_integer_inputs_and_nested_outputs() -> None:
    found = counted(Tokens(), torch.tensor([[1, 2, 3]]))
    assert found.macs == 3 * 6 * 11
    assert found.dtype == torch.float32


def test_what_cannot_be_profiled_is_said(tmp_path: Path) -> None:
    compiled = fxopt.compile(ConvBnRelu(), image, backend="onnx")
    compiled.save(tmp_path / "a.onnx")
    with pytest.raises(OptionError, match="not the graph"):
        counted(fxopt.load(tmp_path / "a.onnx"), None)
    with pytest.raises(OptionError, match="compiled model"):
        counted(compiled, None, dynamic_shapes={0: "batch"})
    with pytest.raises(ShapeError):
        counted(fxopt.capture(ConvBnRelu(), image), torch.randn(2, 3, 9, 9))


def test_a_graph_from_a_file(tmp_path: Path) -> None:
    fxopt.compile(ConvBnRelu(), image).save(tmp_path / "a.fxopt")
    loaded = fxopt.load(tmp_path / "a.fxopt")
    assert fxopt.profile(loaded, rounds=1).macs == counted(ConvBnRelu()).macs


# -- dimensions ------------------------------------------------------------------------------------


def test_dimensions_bear_the_users_names() -> None:
    found = counted(ConvBnRelu(), dynamic_shapes={0: "batch"})
    assert str(found.macs) == "13824*batch"
    assert found.sizes == {"batch": 2}
    assert found.at(batch=5).macs == 5 * 13824
    assert found.at({"batch": 5}).rows[0].shapes == ((5, 8, 8, 8),)
    assert str(found.rows[0].shapes[0][0]) == "batch"
    assert found.at(batch=5).sizes == {}


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": {0: "batch"}}, ({0: "batch"},), {"x": ["batch", None, None, None]},
        {"x": {0: torch.export.Dim("batch")}},
    ],
)  # fmt: skip
def test_every_way_to_name_a_dimension(shapes: Any) -> None:
    class Named(ConvBnRelu):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)

    assert list(counted(Named(), dynamic_shapes=shapes).sizes) == ["batch"]


def test_a_dimension_without_a_name_is_called_by_its_place() -> None:
    found = counted(nn.Linear(4, 4), torch.randn(3, 4), dynamic_shapes={0: True})
    assert found.sizes == {"input.shape[0]": 3}
    assert found.at({"input.shape[0]": 7}).macs == 7 * 16


@pytest.mark.parametrize("make", [fxopt.capture, fxopt.optimize])
def test_a_graph_remembers_the_names(make: Any) -> None:
    graph = make(ConvBnRelu(), image, dynamic_shapes={0: "batch"})
    assert counted(graph, None).sizes == {"batch": 2}


def test_the_sizes_are_those_of_the_inputs() -> None:
    assert counted(ConvBnRelu(), image[:1], dynamic_shapes={0: "batch"}).sizes == {"batch": 1}
    graph = fxopt.capture(ConvBnRelu(), image, dynamic_shapes={0: "batch"})
    assert list(counted(graph, torch.randn(6, 3, 8, 8)).sizes.values()) == [6]


def test_some_dimensions_may_stay_symbols() -> None:
    found = counted(ConvBnRelu(), dynamic_shapes={0: "batch", 2: "height"}).at(batch=1)
    assert list(found.sizes) == ["height"]
    assert found.at(height=8).macs == 13824


def test_wrong_sizes_are_refused() -> None:
    found = counted(ConvBnRelu(), dynamic_shapes={0: "batch"})
    with pytest.raises(OptionError, match="Did you mean 'batch'"):
        found.at(bach=2)
    for size in (-1, 2.0, True, "2"):
        with pytest.raises(OptionError, match="must be an int"):
            found.at(batch=size)


def test_times_go_where_they_were_not_measured() -> None:
    found = fxopt.profile(nn.Linear(4, 4), torch.randn(2, 4), dynamic_shapes={0: "n"}, rounds=1)
    assert found.at(n=2).ms == found.ms
    assert found.at(n=3).ms is None
    assert found.shown.ms == found.ms


# -- times -----------------------------------------------------------------------------------------


def test_every_call_is_measured() -> None:
    found = fxopt.profile(Residual(), image, rounds=3)
    assert all(row.timing is not None and row.ms > 0 for row in found.rows)
    assert found.ms == pytest.approx(sum(found.milliseconds_by_node.values()))
    assert found.modules.ms == pytest.approx(found.ms)


def test_median_and_quartiles() -> None:
    assert Timing.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Timing(3.0, 2.0)
    assert Timing.of([7.0]) == Timing(7.0, 0.0)


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True])
def test_rounds_must_be_a_number(rounds: Any) -> None:
    with pytest.raises(OptionError, match="rounds"):
        fxopt.profile(nn.Linear(4, 4), torch.randn(2, 4), rounds=rounds)


def test_the_model_stays_as_it_is() -> None:
    model = Counter().train()
    x = torch.ones(3)
    fxopt.profile(model, x, rounds=3)
    assert model.calls == 0
    assert model.training
    assert torch.equal(x, torch.ones(3))


def test_the_graph_and_its_state_stay_as_they_are() -> None:
    graph = fxopt.capture(Counter(), torch.ones(3))
    graph.run(torch.ones(3))
    fxopt.profile(graph, rounds=3)
    assert graph.constant("calls") == 1


class Cache(nn.Module):
    """State that has room for four calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("kept", torch.zeros(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.copy_(self.kept.index_copy(0, self.place, x))
        self.place.add_(1)
        return self.kept.sum(0)


def test_each_round_starts_from_the_same_state() -> None:
    found = fxopt.profile(Cache(), torch.ones(1, 2), rounds=9)  # a tenth call would not fit
    assert len(found.milliseconds_by_node) == len(found.rows)


def test_an_input_that_the_model_writes_stays_as_it_is() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1) * 2

    x = torch.zeros(3)
    graph = fxopt.capture(Writes(), x)
    for model in (Writes(), graph):
        fxopt.profile(model, x, rounds=2)
        assert torch.equal(x, torch.zeros(3))
    assert torch.equal(graph.info.example_inputs[0], torch.zeros(3))


def test_random_numbers_go_on_as_if_nothing_had_been() -> None:
    class Draws(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    graph = fxopt.capture(Draws(), torch.zeros(3))
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    measure(graph, [torch.zeros(3)], rounds=2)
    assert torch.equal(torch.rand(2), expected)


def test_control_flow_is_measured() -> None:
    class Chooses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    found = fxopt.profile(Chooses(), torch.ones(3), rounds=1)
    assert [row.op for row in found.rows] == ["sum", "gt.Scalar", "cond"]
    assert found.ms > 0


def test_the_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.profiling import machine as subject

    monkeypatch.setattr(subject, "_best", lambda action, on_gpu: 0.5)
    subject._measured.cache_clear()
    try:
        found = subject.measure_machine(None, torch.int64)
        assert found.flops_per_second == 2 * 1024**3 / 0.5
        assert found.bytes_per_second == 2 * 4 * 2**25 / 0.5
        assert found.name.endswith("float32")
        assert subject.measure_machine() is found
        assert found.ridge == found.flops_per_second / found.bytes_per_second
    finally:
        subject._measured.cache_clear()


# -- tables and data -------------------------------------------------------------------------------


def test_the_table_says_which_column_is_which() -> None:
    text = str(counted(Residual()))
    for words in ("MACs", "FLOPs", "2 per MAC", "params", "FLOP/B", "Residual", "  stem", "    0"):
        assert words in text
    assert " ms " not in text


def test_tables_by_node_and_by_operator() -> None:
    found = fxopt.profile(Residual(), image, rounds=2)
    by_node = found.table(by="node", sort="macs")
    assert by_node.headings[:3] == ("node", "operator", "output")
    assert by_node.headings[-2:] == ("ms", "±")
    assert by_node.lines[0][:3] == ("conv2d_1", "conv2d", "2×8×8×8")
    by_op = found.table(by="op")
    assert [line[:2] for line in by_op.lines] == [
        ("conv2d", "2"), ("batch_norm", "2"), ("relu", "2"), ("add.Tensor", "1"),
    ]  # fmt: skip


def test_depth_and_order_of_modules() -> None:
    found = counted(Residual())
    names = [line[0].strip() for line in found.table(depth=1).lines]
    assert names == ["Residual", "stem", "conv", "norm"]
    assert [line[0].strip() for line in found.table(depth=0).lines] == ["Residual"]
    ordered = [line[0].strip() for line in found.table(sort="macs").lines]
    assert ordered == ["Residual", "conv", "stem", "0", "1", "2", "norm"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "nodes"}, "Did you mean 'node'"), ({"sort": "mac"}, "Did you mean 'macs'"),
        ({"sort": "ms"}, "no milliseconds"), ({"by": "op", "depth": 1}, "depth="),
        ({"depth": -1}, "0 or more"),
    ],
)  # fmt: skip
def test_a_table_refuses_what_it_does_not_know(options: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        counted(Residual()).table(**options)


def test_numbers_are_short() -> None:
    from fxopt.profiling.table import short

    numbers = (0, 7, 999, 1000, 1005, 12_345, 999_499, 999_999, 4_089_184_256, 10**21)
    assert [short(number) for number in numbers] == [
        "0", "7", "999", "1.00k", "1.00k", "12.3k", "999k", "1.00M", "4.09G", "1000E",
    ]  # fmt: skip


def test_a_table_in_a_notebook() -> None:
    assert "<td" in counted(Residual())._repr_html_()
    assert "2×8×8×8" in counted(Residual()).table(by="node")._repr_html_()


def test_json(machine: Machine) -> None:
    found = fxopt.profile(Residual(), image, rounds=2)
    document = json.loads(json.dumps(found.to_json()))
    assert document["totals"]["macs"] == found.macs
    assert document["nodes"][0]["shape"] == [2, 8, 8, 8]
    assert document["machine"] == vars(machine)
    assert [m["path"] for m in document["modules"]] == [m.path for m in found.modules.walk()]
    keys = {"name", "op", "path", "shape", "macs", "flops", "params", "read", "written",
            "intensity", "ms", "spread", "live"}  # fmt: skip
    assert keys <= document["nodes"][0].keys()
    assert counted(Residual()).to_json()["machine"] is None


def test_json_of_symbols_is_at_the_sizes_of_the_inputs() -> None:
    document = counted(ConvBnRelu(), dynamic_shapes={0: "batch"}).to_json()
    assert json.dumps(document)
    assert document["sizes"] == {"batch": 2}
    assert document["totals"]["macs"] == 2 * 13824
    assert document["symbolic"]["macs"] == "13824*batch"


# -- pictures --------------------------------------------------------------------------------------


def test_a_roofline_and_memory_over_time(tmp_path: Path, machine: Machine) -> None:
    pytest.importorskip("matplotlib")
    found = fxopt.profile(Residual(), image, rounds=2)
    found.roofline(tmp_path / "roofline.svg")
    found.memory(tmp_path / "memory.png")
    found.memory(tmp_path / "memory.pdf")
    assert "<svg" in (tmp_path / "roofline.svg").read_text()
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "memory.pdf").read_bytes().startswith(b"%PDF")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "memory.pdf", "memory.png", "roofline.svg",
    ]  # fmt: skip


def test_pictures_that_cannot_be_drawn(tmp_path: Path, machine: Machine) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match="needs milliseconds"):
        counted(Residual()).roofline(tmp_path / "a.svg")
    with pytest.raises(OptionError, match=r"\.svg, \.png, \.pdf"):
        counted(Residual()).memory(tmp_path / "a.gif")
    with pytest.raises(ArtefactError, match="Cannot write"):
        counted(Residual()).memory(tmp_path / "missing" / "a.svg")
    with pytest.raises(OptionError, match="nothing to draw"):
        counted(nn.Identity()).memory(tmp_path / "a.svg")
    with pytest.raises(OptionError, match="nothing to draw"):
        fxopt.profile(nn.Flatten(), image, rounds=1).roofline(tmp_path / "a.svg")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'fxopt\[plot\]'"):
        counted(Residual()).memory(tmp_path / "a.svg")


# -- the command -----------------------------------------------------------------------------------

SOURCE = """
import torch
def make():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
"""


def invoke(tmp_path: Path, *words: str) -> Any:
    (tmp_path / "mine.py").write_text(SOURCE)
    start = ["profile", f"{tmp_path}/mine.py:make", "--input", "1x3x8x8", "-q"]
    return CliRunner().invoke(main, [*start, *words])


def test_the_command_prints_a_table(tmp_path: Path) -> None:
    result = invoke(tmp_path, "--rounds", "1")
    assert result.exit_code == 0, result.output
    assert "Conv2d" in result.stdout and "BatchNorm2d" in result.stdout
    assert "3,888 MACs" in result.stdout


def test_the_command_runs_passes_only_when_asked(tmp_path: Path) -> None:
    plain = json.loads(invoke(tmp_path, "--no-measure", "--json").stdout)
    passed = json.loads(invoke(tmp_path, "--no-measure", "--json", "--passes", "default").stdout)
    assert [node["op"] for node in plain["nodes"]] == ["conv2d", "batch_norm", "relu"]
    assert [node["op"] for node in passed["nodes"]] == ["conv2d", "relu"]


def test_the_command_with_dynamic_dimensions(tmp_path: Path) -> None:
    for words in ((), ("--passes", "default")):
        result = invoke(tmp_path, "--no-measure", "--dynamic", "0", "--by", "op", *words)
        assert "MACs = 3888*size_0" in result.stdout


def test_the_command_draws(tmp_path: Path, machine: Machine) -> None:
    pytest.importorskip("matplotlib")
    roofline, memory = tmp_path / "a.svg", tmp_path / "b.png"
    words = ("--rounds", "1", "--plot", str(roofline), "--memory", str(memory))
    result = invoke(tmp_path, *words)
    assert result.exit_code == 0, result.output
    assert f"wrote {roofline}" in result.stdout
    assert roofline.is_file() and memory.is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--plot", "a.svg", "--no-measure"), 2, "needs milliseconds"),
        (("--plot", "a.gif"), 2, ".svg, .png, .pdf"),
        (("--memory", "missing/a.svg"), 1, "no folder"),
        (("--sort", "speed"), 2, "'speed' is not one of"),
        (("--sort", "ms", "--no-measure"), 2, "no milliseconds"),
        (("--by", "op", "--depth", "2"), 2, "depth="),
        (("--rounds", "0"), 2, "0 is not in the range"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    result = invoke(tmp_path, *words)
    assert result.exit_code == code
    assert message in result.output + result.stderr
