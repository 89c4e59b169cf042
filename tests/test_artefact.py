"""fxopt's own artefact: what is written comes back, and nothing that a file says is trusted."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fxopt
from fxopt import dialect, operators
from fxopt.artefact import graph_from_bytes, graph_to_bytes, read_artefact, write_artefact
from fxopt.container import CHECKSUMS, CONSTANTS, GRAPH, MANIFEST
from fxopt.errors import ArtefactError, FxoptError
from fxopt.graph_module import GraphModule
from fxopt.manifest import FORMAT
from fxopt.text import graph_text
from tests.models import ConvBnRelu, Counter, Residual, SharedLayer

MANIFEST_TEXT = json.dumps({"format": FORMAT})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.fxopt"


def capture(model: nn.Module, inputs: Any, **options: Any) -> GraphModule:
    return fxopt.capture(model.eval(), inputs, **options)


def round_trip(graph: GraphModule, path: Path) -> GraphModule:
    write_artefact(path, graph, MANIFEST_TEXT)
    loaded, manifest = read_artefact(path)
    assert manifest == MANIFEST_TEXT
    return loaded


# -- what comes back -------------------------------------------------------------------------------


def test_a_graph_comes_back_whole(path: Path) -> None:
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    graph = fxopt.optimize(model, x)
    loaded = round_trip(graph, path)
    dialect.check(loaded)
    assert graph_text(loaded) == graph_text(graph)
    assert torch.equal(loaded(x), graph(x))
    names = graph.constants()
    assert list(loaded.constants()) == list(names)
    for name, constant in loaded.constants().items():
        assert type(constant) is type(names[name]) and torch.equal(constant, names[name])
        assert constant.requires_grad == names[name].requires_grad
        assert loaded.is_persistent(name) == graph.is_persistent(name)
    before, after = graph.info, loaded.info
    assert (after.state, after.sources, after.ties) == (before.state, before.sources, before.ties)
    assert after.modules == before.modules and "stem" in after.modules
    for old, new in zip(graph.graph.nodes, loaded.graph.nodes, strict=True):
        for key in ("path", "module", "source", "rule", "replaces", "switch"):
            assert new.meta.get(key) == old.meta.get(key)


def test_a_loaded_graph_can_be_optimized_lowered_and_saved_again(path: Path) -> None:
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    loaded = round_trip(capture(model, x), path)
    for backend in ("eager", "torchscript"):
        compiled = fxopt.lower(fxopt.optimize(loaded), backend=backend)
        torch.testing.assert_close(compiled(x), model(x))
    content = path.read_bytes()
    write_artefact(path, loaded, MANIFEST_TEXT)
    loaded.info.example_inputs = (x,)
    write_artefact(path, loaded, MANIFEST_TEXT)
    assert len(path.read_bytes()) == len(content)


class Casts(nn.Module):
    """Constants of every dtype, in memory layouts of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        for index, dtype in enumerate((
            torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8,
            torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128,
            torch.float8_e4m3fn, torch.float8_e5m2,
        )):  # fmt: skip
            self.register_buffer(f"b{index}", torch.tensor([[0.0, 1.0, 2.0]]).to(dtype))
        self.register_buffer("scalar", torch.tensor(3.5))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("transposed", torch.arange(6.0).view(2, 3).t())
        images = torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last)
        self.register_buffer("images", images)
        self.register_buffer("expanded", torch.tensor([1.0, 2.0]).expand(3, 2))
        self.register_buffer("conjugated", torch.tensor([1 + 2j]).conj())
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.odd = nn.Parameter(torch.ones(2, dtype=torch.float64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        wide = [b.to(torch.float32) if _is_float8(b) else b * 1 for b in self.buffers()]
        return [x, self.odd + 1, *wide]


def _is_float8(tensor: torch.Tensor) -> bool:
    return tensor.dtype.itemsize == 1 and tensor.is_floating_point()


def test_constants_of_every_dtype_come_back(path: Path) -> None:
    model, x = Casts(), torch.randn(2)
    loaded = round_trip(capture(model, x), path)
    for found, expected in zip(loaded(x), model(x), strict=True):
        assert found.dtype is expected.dtype and torch.equal(found, expected)
    constants = loaded.constants()
    assert constants["images"].is_contiguous(memory_format=torch.channels_last)
    assert constants["transposed"].stride() == (1, 3)
    assert not loaded.is_persistent("hidden") and not constants["odd"].requires_grad


def test_the_constants_are_a_safetensors_file(path: Path) -> None:
    write_artefact(path, capture(nn.Linear(3, 2), torch.randn(1, 3)), MANIFEST_TEXT)
    found = safetensors.torch.load(members(path)[CONSTANTS])
    assert {name: tuple(t.shape) for name, t in found.items()} == {"weight": (2, 3), "bias": (2,)}


def test_a_constant_that_cannot_be_stored_is_named() -> None:
    graph = capture(nn.Linear(2, 2), torch.randn(1, 2))
    graph.set_constant("odd", torch.eye(2).to_sparse())
    with pytest.raises(ArtefactError, match=r"Constant 'odd' is torch.sparse_coo"):
        graph_to_bytes(graph)


def test_a_name_that_would_be_refused_cannot_be_saved() -> None:
    graph = capture(nn.Linear(2, 2), torch.randn(1, 2))
    graph.set_constant('a"b', torch.ones(1))
    with pytest.raises(ArtefactError, match="Rename its module"):
        graph_to_bytes(graph)


class Tied(nn.Module):
    """One weight under two names, and two buffers over one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 20)
        self.head = nn.Linear(20, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


def test_tied_weights_are_stored_once_and_stay_tied(path: Path) -> None:
    model, ids = Tied(), torch.tensor([[1, 2]])
    graph = capture(model, ids)
    ((name, weight),) = graph.constants().items()
    graph.set_constant("another", weight)
    graph.set_constant("view", weight.detach())
    loaded = round_trip(graph, path)
    assert path.stat().st_size < 1.6 * weight.numel() * 4 + 6000
    assert loaded.constant("another") is loaded.constant(name)
    assert loaded.constant("view").data_ptr() == loaded.constant("another").data_ptr()
    assert torch.equal(loaded(ids), model(ids)) and loaded.info.ties == graph.info.ties


class Dynamic(nn.Module):
    """Sizes that follow from others, an integer input, and an output that depends on data."""

    def forward(self, x: torch.Tensor, n: int) -> tuple[Any, ...]:
        half = x[: x.shape[0] // 2 * 2].reshape(2, -1, 4)
        return half * n, torch.ones(n + 2, x.shape[0]), (x > 0).nonzero() + 1, n * x.shape[0]


def test_dynamic_sizes_come_back(path: Path) -> None:
    model = Dynamic()
    options = {"dynamic_shapes": {"x": {0: "rows"}, "n": torch.export.Dim.DYNAMIC}}
    graph = capture(model, (torch.randn(6, 4), 7), **options)
    loaded = round_trip(graph, path)
    signature = loaded.info.signature
    assert signature is not None
    assert loaded.info.dimensions == {str(signature.tensors[0].shape[0]): "rows"}
    sizes = {s for leaf in signature.tensors for s in (*leaf.shape, leaf.symbol) if s is not None}
    known = {str(s) for s in loaded.info.fake_mode.shape_env.backed_var_to_val}
    assert signature.guards == tuple(g for g in signature.guards if g.free_symbols <= sizes)
    assert {str(s) for s in sizes if not isinstance(s, int)} == known <= set(signature.ranges)
    for one in (loaded, fxopt.lower(fxopt.optimize(loaded))):
        for rows, n in ((6, 7), (9, 3), (2, 5)):
            x = torch.randn(rows, 4)
            for found, expected in zip(one(x, n), model(x, n), strict=True):
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_a_dynamic_size_of_one_is_still_allowed(path: Path) -> None:
    model = ConvBnRelu()
    graph = capture(model, torch.randn(4, 3, 8, 8), dynamic_shapes={0: "batch"})
    loaded = round_trip(graph, path)
    for batch in (1, 4, 7):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(loaded(x), graph(x))


class Choice(nn.Module):
    """Control flow inside the graph, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def small(x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > -5, lambda x: self.layer(x), lambda x: x - 1, (x,))

        return torch.cond(x.sum() > 0, lambda x: x * 2, small, (x,))


def test_control_flow_comes_back(path: Path) -> None:
    model = Choice()
    graph = capture(model, torch.randn(3, 4))
    loaded = round_trip(graph, path)
    assert len(list(loaded.subgraphs())) == len(list(graph.subgraphs())) == 4
    for shift in (1.0, -0.1, -9.0):
        x = torch.full((3, 4), shift)
        assert torch.equal(loaded(x), model(x))


def test_state_comes_back_and_goes_on(path: Path) -> None:
    x = torch.zeros(2)
    graph = capture(Counter(), x)
    assert graph(x)[0] == 1 and graph(x)[0] == 2
    loaded = round_trip(graph, path)
    assert loaded.info.mutated == {"calls"}
    assert loaded(x)[0] == 3 and graph(x)[0] == 3


def test_example_inputs_are_made_up_within_the_range_of_the_originals(path: Path) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.embedding(ids) * mask[..., None] + x.log()

    secret = torch.rand(1, 4) + 1
    inputs = (torch.tensor([[3, 8, 5]]), torch.ones(1, 3, dtype=torch.bool), secret)
    loaded = round_trip(capture(Looks(), inputs), path)
    ids, mask, x = loaded.info.example_inputs
    assert ids.shape == (1, 3) and ids.min() >= 3 and ids.max() <= 8 and ids.dtype == torch.int64
    assert mask.all() and mask.dtype is torch.bool
    assert x.min() >= secret.min() and x.max() <= secret.max()
    assert not torch.equal(x, secret)
    assert torch.isfinite(loaded(*loaded.info.example_inputs)).all()


def test_weights_that_a_pass_computed_cannot_be_replayed_from_a_file(path: Path) -> None:
    model, x = ConvBnRelu(), torch.randn(1, 3, 8, 8)
    compiled = fxopt.compile(model, x)
    assert compiled.graph.info.recipes
    loaded = fxopt.lower(round_trip(compiled.graph, path))
    before = loaded(x)
    with pytest.raises(FxoptError, match="Compile the model again"):
        loaded.update(ConvBnRelu().state_dict())
    assert torch.equal(loaded(x), before)


def test_the_same_graph_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    graph = fxopt.optimize(Residual(), torch.randn(1, 3, 8, 8), passes=["fuse-conv-bn"])
    write_artefact(path, graph, MANIFEST_TEXT)
    write_artefact(tmp_path / "other.fxopt", graph.copy(), MANIFEST_TEXT)
    assert path.read_bytes() == (tmp_path / "other.fxopt").read_bytes()


# -- pickle and deepcopy ---------------------------------------------------------------------------


def saved(graph: GraphModule) -> GraphModule:
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    assert isinstance(found, GraphModule)
    return found


@pytest.mark.parametrize("twin_of", [saved, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_a_pickled_graph_trains_as_the_graph_itself(
    twin_of: Callable[[GraphModule], GraphModule],
) -> None:
    x = torch.randn(4, 3, 8, 8)
    graph = fxopt.optimize(Residual(), x, passes=["merge-duplicates"])
    twin = twin_of(graph)
    losses = []
    for one in (graph, twin):
        one.train()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = one(x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        one.eval()
    assert losses[0] == losses[1]
    assert torch.equal(graph(x), twin(x))
    assert torch.equal(twin.info.example_inputs[0], x)
    for name, tensor in graph.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)


def test_a_graph_pickled_in_training_mode_stays_in_it() -> None:
    graph = capture(ConvBnRelu(), torch.randn(2, 3, 8, 8)).train()
    twin = saved(graph)
    assert twin.training and all(module.training for module in twin.modules())
    assert graph_text(twin) == graph_text(graph)
    assert graph_text(twin.eval()) == graph_text(graph.eval())


def test_bytes_without_examples_hold_no_example() -> None:
    graph = capture(SharedLayer(), torch.randn(2, 4))
    assert len(graph_to_bytes(graph, with_examples=False)) < len(graph_to_bytes(graph))
    found = graph_from_bytes(graph_to_bytes(graph, with_examples=False))
    assert not torch.equal(found.info.example_inputs[0], graph.info.example_inputs[0])


# -- files that are damaged ------------------------------------------------------------------------


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def forge(path: Path, parts: dict[str, bytes], **options: Any) -> None:
    """Write a container whose checksums are right, whatever the parts say."""
    parts = {name: content for name, content in parts.items() if name != CHECKSUMS}
    lines = [f"{hashlib.sha256(c).hexdigest()}  {name}\n" for name, c in sorted(parts.items())]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in {**parts, CHECKSUMS: "".join(lines).encode()}.items():
            archive.writestr(name, content)


@pytest.fixture
def whole(path: Path) -> bytes:
    write_artefact(path, capture(nn.Linear(3, 2), torch.randn(1, 3)), MANIFEST_TEXT)
    return path.read_bytes()


def test_a_cut_file_is_refused_wherever_it_ends(whole: bytes, path: Path) -> None:
    for end in range(0, len(whole), 13):
        path.write_bytes(whole[:end])
        with pytest.raises(ArtefactError, match=r"model\.fxopt"):
            read_artefact(path)


def test_a_flipped_bit_is_refused_or_does_no_harm(whole: bytes, path: Path) -> None:
    expected = read_artefact(path)[0](torch.ones(1, 3))
    generator = random.Random(0)
    refused = 0
    for _ in range(400):
        content = bytearray(whole)
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            loaded, _ = read_artefact(path)
        except ArtefactError as error:
            refused += 1
            assert "again" in str(error) or "fxopt" in str(error)
        else:
            assert torch.equal(loaded(torch.ones(1, 3)), expected)
    assert refused > 300


@pytest.mark.parametrize("name", [MANIFEST, GRAPH, CONSTANTS])
def test_a_damaged_part_is_named(whole: bytes, path: Path, name: str) -> None:
    content = bytearray(whole)
    content[whole.index(members(path)[name]) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"part '{name}' is damaged"):
        read_artefact(path)


def test_a_part_that_was_exchanged_is_refused(whole: bytes, path: Path) -> None:
    parts = members(path)
    forge(path, {**parts, GRAPH: parts[GRAPH].replace(b"3", b"4")})
    with zipfile.ZipFile(path, "r") as archive:
        others = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:  # each member's own CRC is right
        for name, content in {**others, GRAPH: parts[GRAPH]}.items():
            archive.writestr(name, content)
    with pytest.raises(ArtefactError, match=r"part 'graph\.json' is damaged: its checksum"):
        read_artefact(path)


def test_files_of_other_programs_are_told_apart(path: Path) -> None:
    for content, words in ((b"", "not a whole"), (b"text" * 99, "not a whole")):
        path.write_bytes(content)
        with pytest.raises(ArtefactError, match=words):
            read_artefact(path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ArtefactError, match=r"torch\.save"):
        read_artefact(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ArtefactError, match="another program"):
        read_artefact(path)


def test_a_newer_format_names_the_versions(whole: bytes, path: Path) -> None:
    parts = members(path)
    for name in (GRAPH, MANIFEST):
        content = {**json.loads(parts[name]), "format": FORMAT + 1, "fxopt": "9.9"}
        forge(path, {**parts, name: json.dumps(content).encode()})
        with pytest.raises(ArtefactError, match=rf"format {FORMAT + 1}.*9\.9.*Upgrade"):
            read_artefact(path)


def test_bytes_that_are_no_graph_are_refused() -> None:
    for content in (b"", b"abc", graph_to_bytes(capture(nn.ReLU(), torch.ones(1)))[:-30]):
        with pytest.raises(ArtefactError):
            graph_from_bytes(content)


# -- files that are malicious ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "../evil", "/etc/passwd", "..\\evil", "graph.json/../../evil", "data.pkl", "archive/data.pkl",
    "code.py", "graph.json ",
])  # fmt: skip
def test_a_member_that_does_not_belong_there_is_refused(
    whole: bytes, path: Path, name: str
) -> None:
    before = sorted(path.parent.iterdir())
    forge(path, {**members(path), name: pickle.dumps(Exception)})
    with pytest.raises(ArtefactError, match="no fxopt artefact does"):
        read_artefact(path)
    assert sorted(path.parent.iterdir()) == before


def test_a_compressed_member_is_refused_so_nothing_unfolds(whole: bytes, path: Path) -> None:
    bomb = b" " * 50_000_000
    forge(path, {**members(path), GRAPH: bomb}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    with pytest.raises(ArtefactError, match="it is compressed"):
        read_artefact(path)


def test_a_member_that_stands_there_twice_is_refused(whole: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(GRAPH, "{}")
    with pytest.raises(ArtefactError, match="twice"):
        read_artefact(path)


@pytest.mark.parametrize("name", [
    "os::system", "builtins::eval", "python::eval", "python::os.system", "python::operator.call",
    "python::operator.attrgetter", "python::operator.methodcaller", "python::builtins.exec",
    "python::torch.load", "aten::from_file.default", "aten::save.default", "aten::nothing.default",
    "aten::relu.nothing", "aten::relu", "aten::relu_.default", "aten::__class__.default",
    "higher_order::wrap", "higher_order::triton_kernel_wrapper_mutation", "higher_order::print",
    "image::write_file.default", "debugprims::load_tensor.default", "c10d::send.default",
    "nothing::at.all", "torch.ops.aten.relu.default", "", "a" * 10_000, None, 3, ["aten"],
], ids=lambda name: str(name)[:40])  # fmt: skip
def test_an_operator_that_may_not_run_is_refused(name: Any) -> None:
    with pytest.raises(ArtefactError):
        operators.resolve(name)


def test_a_library_that_is_not_imported_is_named() -> None:
    with pytest.raises(ArtefactError, match="library of yours, import it"):
        operators.resolve("mylibrary::custom.default")


def edits(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield forged graphs, with what each tries."""
    graph = content["graph"]

    def with_node(**changes: Any) -> dict[str, Any]:
        nodes = [{**n, **changes} if n["op"] == "call_function" else n for n in graph["nodes"]]
        return {**content, "graph": {**graph, "nodes": nodes}}

    def with_constant(**changes: Any) -> dict[str, Any]:
        return {**content, "constants": [{**c, **changes} for c in content["constants"][:1]]}

    def renamed(old: str, new: str) -> dict[str, Any]:
        found = json.loads(json.dumps(content).replace(json.dumps(old), json.dumps(new)))
        assert found != content
        return dict(found)

    evil = "x); __import__('os').system('touch hacked'); ("
    yield "an operator outside", with_node(target="os::system")
    yield "a function", with_node(target="python::operator.pow", args={"tuple": [10, 10**9]})
    yield "a long text", with_node(target="python::operator.mul", args={"tuple": ["a", 10**10]})
    for name in (evil, "import", "a b", ""):
        yield f"the node {name!r}", renamed("linear", name)
    yield "a call in another spelling", with_node(
        target="aten::t.default", args={"tuple": [{"node": "weight"}]}
    )
    yield "code as an argument's name", with_node(kwargs={evil: 1})
    yield "a node that is not there", with_node(args={"tuple": [{"node": "nothing"}]})
    yield "a value of its own", with_node(val={"dtype": "float32", "device": "cpu",
                                               "shape": [1], "stride": [1]})  # fmt: skip
    yield "another kind of node", with_node(op="call_module", target="weight")
    yield "a method", with_node(op="call_method", target="__reduce__")
    yield "too few arguments", with_node(args={"tuple": []})
    yield "no arguments", with_node(args=None)
    yield "an attribute", with_node(op="get_attr", target="__class__.__init__.__globals__")
    yield "a method as attribute", with_node(op="get_attr", target="run")
    for name in ('a"); evil("', "a\nb", "a\\", "", ".", "forward", "graph", "__class__", "a..b"):
        constants = [
            {**c, "name": name, "same": name} if c["name"] == "bias" else c
            for c in content["constants"]
        ]
        nodes = [{**n, "target": name} if n.get("target") == "bias" else n for n in graph["nodes"]]
        yield f"the constant {name!r}", {
            **content, "constants": constants, "graph": {**graph, "nodes": nodes},
        }  # fmt: skip
    yield "a constant without data", with_constant(data="nothing")
    yield "a constant of another dtype", with_constant(dtype="float64")
    yield "an order of no dimensions", with_constant(order=[0, 0])
    yield "a device", with_constant(device="cuda:77")
    yield "an expression", {**content, "graph": {**graph, "nodes": [
        {**n, "val": {**n["val"], "shape": ["__import__('os')", 3]}} if "val" in n else n
        for n in graph["nodes"]]}}  # fmt: skip
    yield "a huge symbol", {**content, "symbols": [
        {"name": "s0", "hint": 10**400, "positive": True, "low": None, "high": None}]}  # fmt: skip
    yield "a symbol out of range", {**content, "symbols": [
        {"name": "s0", "hint": 5, "positive": True, "low": 7, "high": 9}]}  # fmt: skip
    signature = content["signature"]
    yield "an output that is not there", {**content, "signature": {
        **signature, "output": {**signature["output"], "leaves": [1]}}}  # fmt: skip
    yield "no example", {**content, "examples": []}
    yield "no output", {**content, "graph": {**graph, "nodes": graph["nodes"][:-1]}}
    yield "no nodes", {**content, "graph": {**graph, "nodes": []}}
    yield "nodes twice", {**content, "graph": {**graph, "nodes": graph["nodes"] * 2}}
    for key in content:
        if key not in ("name", "fxopt", "training"):
            yield f"no {key}", {k: v for k, v in content.items() if k != key}
            yield f"another {key}", {**content, key: [[1]]}


def test_a_forged_graph_is_refused(
    whole: bytes, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    parts = members(path)
    for what, content in edits(json.loads(parts[GRAPH])):
        forge(path, {**parts, GRAPH: json.dumps(content).encode()})
        with pytest.raises(ArtefactError):
            loaded, _ = read_artefact(path)
            pytest.fail(f"{what} was accepted: {loaded.code}")
        assert not (path.parent / "hacked").exists(), what


def test_json_that_would_exhaust_the_reader_is_refused(whole: bytes, path: Path) -> None:
    parts = members(path)
    deep = b'{"format":1,"graph":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    for content in (deep, b"[]", b"null", b'{"format":' + b"9" * 10_000 + b"}", b"\xff\xfe"):
        forge(path, {**parts, GRAPH: content})
        with pytest.raises(ArtefactError):
            read_artefact(path)


def test_forged_constants_are_refused(whole: bytes, path: Path) -> None:
    parts = members(path)
    size = int.from_bytes(parts[CONSTANTS][:8], "little")
    header, data = json.loads(parts[CONSTANTS][8 : 8 + size]), parts[CONSTANTS][8 + size :]

    def stored(entry: dict[str, Any]) -> bytes:
        text = json.dumps({**header, "weight": {**header["weight"], **entry}}).encode()
        return len(text).to_bytes(8, "little") + text + data

    forged = [
        b"", b"\xff" * 8, b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}",
        stored({"shape": [2, 3, 10**9]}), stored({"shape": [-2, -3]}), stored({"shape": [6.0]}),
        stored({"shape": [2**62, 0]}), stored({"data_offsets": [0, 10**12]}),
        stored({"data_offsets": [4, 28]}), stored({"data_offsets": [0, -4]}),
        stored({"dtype": "F99"}), stored({"dtype": "F64"}), stored({"shape": None}),
    ]  # fmt: skip
    for content in forged:
        forge(path, {**parts, CONSTANTS: content})
        with pytest.raises(ArtefactError):
            read_artefact(path)
