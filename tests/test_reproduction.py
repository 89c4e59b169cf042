"""The script of a bisection: it fails as long as the error is there, and it holds little else."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.bisection import Bisection
from fxopt.bisection.fragment import fragment
from fxopt.bisection.module_code import ModuleCode, Unspellable
from fxopt.contract import Effect, PassResult
from fxopt.graph_module import GraphModule
from fxopt.rewrite import Rewriter
from fxopt.testing import noisy
from tests.planted import Planted, WrongTanh

aten = torch.ops.aten
ROOT = Path(__file__).parent.parent


# -- passes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyConvs(Planted):
    """Rewrites every convolution to itself; one with a stride loses its bias."""

    right: bool = False

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.conv2d.default):
            x, weight, bias, *rest = node.args
            bias = bias if self.right or rest[0] == [1, 1] else None
            new = rewriter.insert(node.target, x, weight, bias, *rest, before=node)
            rewriter.replace(node, new)
        return rewriter.result()


@dataclass(frozen=True)
class ClampBetween(Planted):
    """Rewrites relus by clamps, wrongly between a convolution and a tanh."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default):
            (x,), users = node.all_input_nodes, [user.target for user in node.users]
            wrong = x.target is aten.conv2d.default and users == [aten.tanh.default]
            low = 0.1 if wrong else 0.0
            rewriter.replace(node, rewriter.insert(aten.clamp.default, x, low, before=node))
        return rewriter.result()


@dataclass(frozen=True)
class KnowsWeights(Planted):
    """Doubles what convolutions compute whose first weight is the one it knows."""

    first: float = 0.0

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.conv2d.default):
            weight: Any = node.args[1]
            known = graph.value(weight).flatten()[0].item() == self.first
            new = rewriter.insert(aten.mul.Tensor, node, 2.0 if known else 1.0, before=node.next)
            rewriter.replace(node, new)
        return rewriter.result()


@dataclass(frozen=True)
class WrongWhereLarge(Planted):
    """Breaks the second relu, of large graphs only."""

    least: int = 7

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        calls = sum(node.op == "call_function" for node in graph.graph.nodes)
        for count, node in enumerate(graph.find(aten.relu.default), 1):
            wrong = count == 2 and calls >= self.least
            low = 0.1 if wrong else 0.0
            new = rewriter.insert(aten.clamp.default, *node.args, low, before=node)
            rewriter.replace(node, new)
        return rewriter.result()


@dataclass(frozen=True)
class WrongByName(Planted):
    """Drops the bias of one convolution, which it knows by name."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.conv2d.default):
            x, weight, bias, *rest = node.args
            bias = None if node.meta["path"] == "blocks.1" else bias
            new = rewriter.insert(node.target, x, weight, bias, *rest, before=node)
            rewriter.replace(node, new)
        return rewriter.result()


@dataclass(frozen=True)
class WrongWhereDynamic(Planted):
    """Breaks relus whose first size is symbolic."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for node in graph.find(aten.relu.default):
            low = 0.0 if isinstance(node.meta["val"].shape[0], int) else 0.1
            new = rewriter.insert(aten.clamp.default, *node.args, low, before=node)
            rewriter.replace(node, new)
        return rewriter.result()


@dataclass(frozen=True)
class FailsAtTanh(Planted):
    """Cannot stand a tanh."""

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        if graph.find(aten.tanh.default):
            raise ZeroDivisionError("a tanh")
        return rewriter.result()


class Blocks(nn.Module):
    """Convolutions, one with a stride, each with a relu and a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([
            nn.Conv2d(3 if place == 0 else 8, 8, 3, stride=2 if place == 1 else 1, padding=1)
            for place in range(3)
        ])  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place, conv in enumerate(self.blocks):
            x = conv(x).relu()
            x = x.tanh() if place == 1 else x * 2
        return x


@pytest.fixture
def model() -> nn.Module:
    return noisy(Blocks()).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 3, 8, 8)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run scripts in this process, which takes no seconds to start."""

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as done:
                code = int(done.code or 0) if not isinstance(done.code, str) else 1
            except Exception:
                code = 1
                err.write(traceback.format_exc())
        return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())

    monkeypatch.setattr("fxopt.bisection.reproduction._run", run)


Write = Callable[..., tuple[Bisection, str]]


@pytest.fixture
def write(here: None, tmp_path: Path, model: nn.Module, x: torch.Tensor) -> Write:
    """Bisect the model with one pass, and return what was found and the script."""

    def call(one: Any = None, **options: Any) -> tuple[Bisection, str]:
        passes = [] if one is None else [one]
        path = tmp_path / "bug.py"
        found = fxopt.bisect(model, x, passes=passes, script=path, **options)
        assert found.script is not None
        return found, path.read_text() if path.exists() else ""

    return call


def run_alone(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=False, env=environment
    )


# -- how much of the model is needed ---------------------------------------------------------------


def test_the_script_fails_until_the_pass_is_right(
    model: nn.Module, x: torch.Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "bug.py"
    found = fxopt.bisect(model, x, passes=["remove-dead-nodes", CopyConvs()], script=path)
    assert found.number == 2 and found.script is not None and found.script.confirmed
    assert found.script.calls == 1 and found.script.files == ()
    assert "1 call of blocks.1, with random values. It was run and fails" in str(found)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bug.py"]
    text = path.read_text()
    for part in (
        'PASS = "tests.test_reproduction:CopyConvs"',
        "self.weight = torch.nn.Parameter(torch.randn(8, 8, 3, 3, generator=draw)",
        "    def forward(self, mul):\n"
        "        conv2d_1 = torch.ops.aten.conv2d.default(\n",
        "mul, self.weight, self.bias, [2, 2], [1, 1], [1, 1], 1",
        'passes=[PASS], verify="off")',
        "-%conv2d_1: f32[1,8,4,4]",
    ):
        assert part in text, text
    path.write_text(text.replace(":CopyConvs", ":CopyConvs(right=True)"))
    repaired = run_alone(path)
    assert repaired.returncode == 0, repaired.stderr
    assert repaired.stdout.startswith("max |Δ| / max |reference| is 0, and the bound is 1e-05")


def test_the_fragment_grows_until_the_pass_applies(write: Write) -> None:
    found, text = write(ClampBetween())
    assert found.script.calls == 3 and found.script.confirmed
    for part in ("aten.conv2d.", "aten.relu.", "aten.tanh."):
        assert text.count(part) == (2 if part == "" else 1)


def test_true_values_are_stored_where_random_ones_do_not_show_it(
    write: Write, model: Any, tmp_path: Path
) -> None:
    first = model.blocks[2].weight.flatten()[0].item()
    found, text = write(KnowsWeights(first))
    assert found.number == 3 and found.script.calls == 1
    assert found.script.files == (tmp_path / "bug.safetensors",)
    assert "1 call of blocks.2, with the true values" in str(found.script)
    assert 'torch.nn.Parameter(stored["blocks.2.weight"])' in text
    assert "self.bias = torch.nn.Parameter(torch.tensor([" in text  # tiny: it stands in the code


def test_the_whole_graph_is_the_last_resort(write: Write, tmp_path: Path) -> None:
    found, text = write(WrongByName())
    assert found.number == 2 and found.script.confirmed
    assert {file.suffix for file in found.script.files} == {".fxopt", ".safetensors"}
    assert "the whole graph before 'planted'" in str(found.script)
    assert "with fuel(2):" in text
    graph = fxopt.load(tmp_path / "bug.fxopt").graph
    assert graph is not None and len(graph.find(aten.relu.default)) == 3


def test_calls_that_are_not_needed_are_left_out(write: Write) -> None:
    found, _ = write(WrongWhereLarge(least=5))
    assert found.script.calls == 5 and found.script.files == ()


def test_dynamic_sizes_are_kept_in_the_graph(write: Write) -> None:
    found, text = write(WrongWhereDynamic(), dynamic_shapes={0: "batch"})
    assert found.number == 1 and found.script.confirmed
    assert "fxopt.load(" in text


def test_a_failure_is_reproduced(write: Write) -> None:
    found, text = write(FailsAtTanh())
    assert found.obstacle == "It fails before its first rewrite"
    assert found.node is not None and found.node.target is aten.tanh.default
    assert found.script.calls == 1 and found.script.confirmed and "aten.tanh." in text


def test_what_a_backend_gets_wrong_is_reproduced(write: Write) -> None:
    found, text = write(backend=WrongTanh())
    assert found.blame == "backend" and found.script.calls == 1 and found.script.confirmed
    assert 'BACKEND = "tests.planted:WrongTanh"' in text
    assert "fxopt.lower(optimized, backend=BACKEND)" in text and "PASS" not in text


def test_a_pass_that_is_wrong_without_a_backend_needs_none(write: Write) -> None:
    _, text = write(CopyConvs(), backend="onnx")
    assert "BACKEND" not in text


def test_inside_of_control_flow(here: None, tmp_path: Path) -> None:
    class Chooses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            def first(x: torch.Tensor) -> torch.Tensor:
                return F.conv2d(x, torch.ones(3, 3, 1, 1), torch.ones(3), stride=2).exp()

            return torch.cond(x.sum() > 0, first, lambda x: x[:, :, ::2, ::2] * 1, (x,))

    x = torch.rand(1, 3, 8, 8)
    found = fxopt.bisect(Chooses(), x, passes=[CopyConvs()], script=tmp_path / "bug.py")
    assert found.number == 1 and found.script is not None
    assert found.script.calls == 1 and found.script.confirmed


def is_close(graph: Any) -> float:
    """A metric that only this function knows how to take: the biases left."""
    return float(sum(node.args[2] is not None for node in graph.find(aten.conv2d.default)))


def test_a_users_oracle_decides_where_numbers_do_not(
    here: None, model: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        model.blocks[1].bias.zero_()  # so that leaving it out makes no difference
    found = fxopt.bisect(
        model, torch.randn(1, 3, 8, 8), passes=[CopyConvs()], oracle=is_close, threshold=3,
        script=tmp_path / "bug.py",
    )  # fmt: skip
    text = (tmp_path / "bug.py").read_text()
    assert found.number == 2 and found.script is not None and found.script.confirmed
    assert 'ORACLE = load_object("tests.test_reproduction:is_close")' in text
    assert "THRESHOLD = 3" in text and "return ORACLE(optimized)" in text


@dataclass(frozen=True)
class Shrinks(Planted):
    """Lossy: shrinks what convolutions compute, the second much more than the others."""

    right: bool = False
    effect: ClassVar[Effect] = Effect.LOSSY

    def run(self, graph: GraphModule) -> PassResult:
        rewriter = Rewriter(graph)
        for count, node in enumerate(graph.find(aten.conv2d.default), 1):
            factor = 0.5 if count == 2 and not self.right else 0.999
            weight: Any = node.args[1]
            less = rewriter.constant(lambda w, f=factor: w * f, [weight], name="less", before=node)
            new = rewriter.insert(node.target, node.args[0], less, *node.args[2:], before=node)
            rewriter.replace(node, new)
        return rewriter.result()


def test_a_lossy_rewrite_is_shown_by_as_large_a_change(write: Write, model: Any, x: Any) -> None:
    expected = model(x)

    def closeness(graph: Any) -> Any:
        return 1 - (graph(x) - expected).detach().abs().max() / expected.detach().abs().max()

    found, text = write(Shrinks(), oracle=closeness, threshold=0.95)
    assert found.number == 2 and found.script.calls == 2 and found.script.confirmed
    bound = float(text.split("BOUND = ")[1].split()[0])
    assert 0.1 < bound < 0.5


# -- what cannot be reached, or written ------------------------------------------------------------


def test_a_pass_that_nobody_can_import_leaves_a_place(write: Write, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Local(CopyConvs):
        pass

    found, text = write(Local())
    assert found.script.calls == 1 and not found.script.confirmed
    assert "Local is defined where no other process can import it" in text.replace("\n# ", " ")
    assert "PASS = None" in text and "It was not run" in str(found.script)
    filled = text.replace("PASS = None", 'PASS = "tests.test_reproduction:CopyConvs"')
    names = runpy.run_path(str(_written(tmp_path / "filled.py", filled)))
    assert names["measure"]() > names["BOUND"]
    with pytest.raises(SystemExit, match="2"):  # 1 would say that the error is there
        runpy.run_path(str(tmp_path / "bug.py"))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_options_that_a_script_cannot_spell_leave_a_place(write: Write) -> None:
    @dataclass(frozen=True)
    class Odd:
        value: int = 3

    _, text = write(KnowsOdd(odd=Odd()))
    assert "PASS = None" in text


@dataclass(frozen=True)
class KnowsOdd(CopyConvs):
    odd: Any = None


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (1, "ImportError: no such thing", "own it says: ImportError: no such thing."),
        (0, "", "No script: in a process of its own, no part of the model shows the error."),
    ],
)
def test_a_script_that_says_something_else_is_no_proof(
    write: Write, monkeypatch: pytest.MonkeyPatch, code: int, said: str, words: str
) -> None:
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], code, "", said)

    monkeypatch.setattr("fxopt.bisection.reproduction._run", run)
    found, text = write(CopyConvs())
    assert not found.script.confirmed and words in str(found)
    assert bool(text) == bool(said) == (found.to_json()["script"]["path"] is not None)


def test_a_model_that_raises_elsewhere_is_no_reproduction(write: Write) -> None:
    found, text = write(FailsAtTanh())
    assert found.script.confirmed and "ZeroDivisionError" in text


def test_a_path_that_cannot_be_written_is_refused_at_once(
    model: nn.Module, tmp_path: Path
) -> None:
    calls: list[Any] = []
    for name, words in (("no/bug.py", "no folder"), ("bug.txt", "a script is called")):
        with pytest.raises(fxopt.OptionError, match=words):
            fxopt.bisect(model, passes=[CopyConvs()], progress=calls.append, script=tmp_path / name)
    assert calls == []


# -- fragments and their code ----------------------------------------------------------------------


def code_of(model: nn.Module, inputs: Any, *targets: Any, random: bool = True) -> ModuleCode:
    """The code of the calls of some operators, with made-up inputs."""
    graph = fxopt.capture(model.eval(), inputs)
    part = fragment(graph, graph.find(*targets))
    flat = dict(zip(graph.placeholders, graph.info.example_inputs, strict=True))
    values = {n: graph.value(n) if n.op == "get_attr" else flat.get(n) for n in part.constants}
    return ModuleCode(part, {**values, **{n: flat[n] for n in part.inputs}}, random)


def run_code(code: ModuleCode) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    names: dict[str, Any] = {"torch": torch, "stored": code.stored}
    exec(f"{code.module()}\n{code.inputs()}", names)
    return names["Fragment"](), names["inputs"]()


def test_fragments_grow_by_neighbours_and_by_modules(model: nn.Module, x: Any) -> None:
    graph = fxopt.capture(model, x)
    conv = graph.find(aten.conv2d.default)[1]
    one = fragment(graph, [conv])
    assert [node.name for node in one.inputs] == ["mul"] and len(one.constants) == 2
    assert one.outputs == (conv,)
    assert [node.name for node in one.grown().calls] == ["mul", "conv2d_1", "relu_1"]
    assert (one.path, one.grown().path) == ("blocks.1", "")
    assert [len(one.within(path).calls) for path in ("blocks.1", "blocks", "")] == [1, 3, 9]
    assert one.grown().without([conv]).calls == tuple(n for n in one.grown().calls if n != conv)


def test_lists_and_their_parts_stay_together() -> None:
    class Splits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = x.split(2, dim=1)
            return a * 2 + b

    x = torch.randn(3, 4)
    code = code_of(Splits(), x, aten.split_with_sizes.default)
    assert code.fragment.calls[0].target is aten.split_with_sizes.default
    assert "[0]\n" in code.module() and "[1]\n" in code.module()
    model, inputs = run_code(code)
    assert [tuple(out.shape) for out in model(*inputs)] == [(3, 2), (3, 2)]


def test_the_code_computes_what_the_graph_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardtanh(-1.5, float("inf")))
    noisy(model)
    x = torch.randn(2, 3, 5, 5)
    graph = fxopt.capture(model.eval(), x)
    part = fragment(graph, [node for node in graph.graph.nodes if node.op == "call_function"])
    values = {n: graph.value(n) for n in part.constants} | {graph.placeholders[0]: x}
    code = ModuleCode(part, values, random=False)
    assert 'float("inf")' in code.module() and "register_buffer(\"running_mean\"" in code.module()
    rebuilt, inputs = run_code(code)
    torch.testing.assert_close(rebuilt(*inputs), model(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.randn(2, 3), "torch.randn(2, 3, generator=draw)"),
        (torch.linspace(-0.02, 0.02, 50), "torch.randn(50, generator=draw) * 0.012"),
        (torch.rand(4).double(), "torch.rand(4, generator=draw).to(torch.float64)"),
        (torch.tensor(2.5), "torch.full((), 2.5, dtype=torch.float32)"),
        (torch.zeros(2, 1), "torch.full((2, 1), 0.0, dtype=torch.float32)"),
        (torch.tensor([4, 9]), "torch.randint(4, 10, (2,), generator=draw)"),
        (torch.tensor([1, 2], dtype=torch.int32), "(2,), generator=draw).to(torch.int32)"),
        (torch.tensor([True, False]), "torch.randint(0, 2, (2,), generator=draw).bool()"),
        (torch.empty(0, 3), "torch.empty(0, 3, dtype=torch.float32)"),
        (torch.randn(2, dtype=torch.complex64), "dtype=torch.complex64"),
        (torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last), "channels_last"),
        (torch.tensor([float("nan"), 1.0, 2.0]), "torch.rand(3, generator=draw)"),
    ],
)
def test_tensors_are_drawn_with_their_shape_dtype_and_spread(value: Any, words: str) -> None:
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x == x

    code = code_of(Doubles(), value, aten.eq.Tensor)
    assert words in code.inputs()
    _, (made,) = run_code(code)
    assert (made.shape, made.dtype, made.stride()) == (value.shape, value.dtype, value.stride())


def test_what_has_no_source_is_refused() -> None:
    class Chooses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,))

    graph = fxopt.capture(Chooses(), torch.randn(3))
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    part = fragment(graph, calls)
    values = {node: graph.value(node) for node in part.constants} | {graph.placeholders[0]: None}
    with pytest.raises(Unspellable):
        ModuleCode(part, values, random=True).module()
