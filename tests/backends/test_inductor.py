"""The inductor backend: the same numbers at every size, and files that are checked before they run.

Compiling takes tens of seconds on a slow machine, so two models that hold many cases each are
compiled once for all tests.
"""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt.backends import Inductor
from fxopt.backends.inductor import compiler, processor
from fxopt.backends.inductor.flat import flatten
from fxopt.errors import ArtefactError, BackendUnavailable, LoweringError, OptionError, ShapeError
from tests.models import ConvBnRelu

missing = compiler.missing_compiler()
needs_compiler = pytest.mark.skipif(missing is not None, reason=f"no C++ compiler: {missing}")


class Open(nn.Module):
    """Open sizes, an integer, state, constants and inputs among the outputs, two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)
        self.positions = nn.Parameter(torch.randn(64, 2))
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, x: torch.Tensor, n: int) -> dict[str, Any]:
        before = self.calls[:1].clone()
        self.calls += 1
        y = self.head(F.relu(self.conv(x)).mean((2, 3)))
        low = y.to(torch.bfloat16)
        return {
            "y": y * n, "low": low @ low.transpose(0, 1), "calls": self.calls, "size": x.shape[0],
            "doubled": self.head.weight * 2, "row": self.head.weight[:1], "same": x, "none": None,
            "cut": self.positions[: x.shape[0]],
            "before": before,
        }  # fmt: skip


class Fixed(nn.Module):
    """Fixed sizes: channels last, random numbers, control flow, an input that is written to."""

    def forward(self, x: torch.Tensor, counter: torch.Tensor) -> tuple[Any, ...]:
        counter.add_(1)
        branch = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))
        noise = F.dropout(x, 0.5, True) + torch.randn_like(x) + torch.rand(3, 2, 4, 4)
        return F.max_pool2d(x, 2), noise, branch, x.half() * 2, counter, torch.arange(3)


def same(found: Any, expected: Any) -> None:
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, torch.Tensor):
            bound = 2e-2 if b.dtype is torch.bfloat16 else 1e-4
            torch.testing.assert_close(a, b, rtol=bound, atol=bound / 10)
        else:
            assert a == b and type(a) is type(b)


def images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Open, Any, Path]:
    """A model, what was compiled from it, and the file that was saved."""
    if missing is not None:
        pytest.skip(f"no C++ compiler: {missing}")
    torch.manual_seed(0)
    model = Open().eval()
    shapes = {"x": {0: "batch", 2: "height"}, "n": torch.export.Dim.DYNAMIC}
    graph = fxopt.capture(model, (images(4), 3), dynamic_shapes=shapes)
    before = str(graph), len(graph.info.fake_mode.shape_env.guards)
    compiled = fxopt.lower(graph, backend=Inductor(runners=2))
    assert (str(graph), len(graph.info.fake_mode.shape_env.guards)) == before  # it is not asked
    path = tmp_path_factory.mktemp("inductor") / "model.aoti"
    compiled.save(path)
    return model, compiled, path


# -- running ---------------------------------------------------------------------------------------


@needs_compiler
def test_any_size_and_layout(built: tuple[Open, Any, Path]) -> None:
    model, compiled, path = built
    loaded = fxopt.load(path, trust=True)
    wide = torch.randn(4, 8, 8, 6)
    inputs = [images(4), images(1), images(0), images(17), images(2)[:, :, :5]]
    inputs += [images(3).contiguous(memory_format=torch.channels_last), wide.transpose(1, 3)[:, :3]]
    for runner in (compiled, loaded):
        twin = Open().eval()
        twin.load_state_dict({**model.state_dict(), "calls": torch.zeros(2)})
        runner.executable.reset_state()
        for turn, x in enumerate(inputs):
            same(runner(x, turn + 2), twin(x, turn + 2))
    with pytest.raises(ShapeError, match="dimension 3 is 9"):
        compiled(torch.randn(4, 3, 8, 9), 3)
    with pytest.raises(ShapeError, match="Expected 2 inputs, got 1"):
        compiled.executable.run(images(2))


@needs_compiler
def test_outputs_are_the_callers_own(built: tuple[Open, Any, Path]) -> None:
    _, compiled, _ = built
    x = images(4)
    first = compiled(x, 2)
    kept = {k: v.clone() for k, v in first.items() if isinstance(v, torch.Tensor)}
    second = compiled(x, 2)
    for name in ("y", "low", "doubled", "row", "cut", "before"):
        assert torch.equal(first[name], kept[name])
        first[name].zero_()
        expected = kept[name] + (name == "before")
        assert torch.equal(second[name], expected)
        assert name == "before" or torch.equal(compiled(x, 2)[name], expected)
    assert second["calls"][0] == first["calls"][0] + 1


@needs_compiler
def test_autocast_and_gradients_around_a_call_change_nothing(built: tuple[Open, Any, Path]) -> None:
    _, compiled, _ = built
    x = images(4)
    expected = compiled(x, 2)["y"]
    with torch.autocast("cpu"), torch.enable_grad():
        found = compiled(x.requires_grad_(), 2)["y"]
    assert torch.equal(found, expected) and not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(compiled(x.detach(), 2)["y"], expected)


@needs_compiler
def test_threads(built: tuple[Open, Any, Path]) -> None:
    _, compiled, _ = built
    x = [images(batch) for batch in (2, 3, 4, 5)]
    expected = [compiled(one, 2)["y"] for one in x]
    start, failures = compiled(x[0], 2)["calls"][0], []

    def work(index: int) -> None:
        for _ in range(25):
            if not torch.equal(compiled(x[index], 2)["y"], expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert compiled(x[0], 2)["calls"][0] == start + 101  # no call is lost


@needs_compiler
@pytest.mark.slow
def test_what_is_static(tmp_path: Path) -> None:
    """Random numbers are PyTorch's; a written input is written; the settings stay as they were."""
    from torch._inductor import config

    model = Fixed()
    x = torch.randn(3, 2, 4, 4).contiguous(memory_format=torch.channels_last)
    before = config.get_config_copy()
    compiled = fxopt.compile(
        model, (x, torch.zeros(2)), backend="inductor", freezing=False, passes=[]
    )
    assert config.get_config_copy() == before
    assert "inductor backend" in str(compiled.report)
    for sign in (1, -1, 1):
        given = sign * x.abs()
        counters = torch.full((2,), 5.0), torch.full((2,), 5.0)
        torch.manual_seed(3)
        found, state = compiled(given.contiguous(), counters[0]), torch.get_rng_state()
        torch.manual_seed(3)
        same(found, model(given, counters[1]))
        assert torch.equal(torch.get_rng_state(), state)
        same(*counters)
    found[-1].zero_()
    assert compiled(x, torch.zeros(2))[-1].tolist() == [0, 1, 2]


# -- files -----------------------------------------------------------------------------------------


@needs_compiler
def test_pytorchs_own_loader_reads_the_file(built: tuple[Open, Any, Path], tmp_path: Path) -> None:
    _, compiled, path = built
    copy, x = tmp_path / "model.pt2", images(4)
    shutil.copy(path, copy)
    package = torch._inductor.aoti_load_package(str(copy))
    found = package(x, torch.empty(2, 0), torch.zeros(2))
    torch.testing.assert_close(found[0], compiled(x, 2)["y"])


@needs_compiler
def test_a_file_asks_for_trust(built: tuple[Open, Any, Path]) -> None:
    with pytest.raises(ArtefactError, match=r"machine code.*trust=True"):
        fxopt.load(built[2])


@needs_compiler
def test_damage_is_found_before_anything_runs(
    built: tuple[Open, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", lambda *_: pytest.fail("ran"))
    content, bad = built[2].read_bytes(), tmp_path / "bad.aoti"
    for place in range(30, len(content), len(content) // 40):
        bad.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ArtefactError, match="bad.aoti"):
            fxopt.load(bad, trust=True)
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:length])
        with pytest.raises(ArtefactError, match=r"bad\.aoti.*Get the file again"):
            fxopt.load(bad, trust=True)


def rewritten(path: Path, to: Path, change: Any) -> Path:
    """Write the file again with another description."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("extra/fxopt.json"):
                description = json.loads(content)
                change(description)
                content = json.dumps(description).encode()
            new.writestr(name, content)
    return to


@needs_compiler
@pytest.mark.parametrize(("change", "words"), [
    (lambda d: d["machine"]["instructions"].append("avx9000"), "no avx9000, which"),
    (lambda d: d["machine"].update(architecture="vax"), "made for vax"),
    (lambda d: d.update(torch="1.0"), "PyTorch 1.0, and this is"),
    (lambda d: d.update(format=99), "format 99"),
    (lambda d: d["checksums"].popitem(), "parts are not those"),
    (lambda d: d.pop("plan"), "not a whole file"),
    (lambda d: d.update(checksums=dict.fromkeys(d["checksums"], "0")), "damaged"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(
    built: tuple[Open, Any, Path], tmp_path: Path, change: Any, words: str
) -> None:
    path = rewritten(built[2], tmp_path / "other.aoti", change)
    with pytest.raises(ArtefactError, match=words):
        fxopt.load(path, trust=True)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign.aoti"
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    shutil.copy(tmp_path / "program.pt2", path)
    if missing is None:
        with pytest.raises(ArtefactError, match="fxopt did not write it"):
            fxopt.load(path, trust=True)
        path.write_text("no zip")
        with pytest.raises(ArtefactError, match="not a whole file"):
            fxopt.load(path, trust=True)


@needs_compiler
def test_saving_is_atomic(built: tuple[Open, Any, Path], tmp_path: Path) -> None:
    _, compiled, _ = built
    with pytest.raises(ArtefactError, match="Cannot write"):
        compiled.save(tmp_path / "nowhere" / "model.aoti")
    with pytest.raises(ArtefactError, match=r"suffix of the backend 'onnx'"):
        compiled.save(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# -- what is refused -------------------------------------------------------------------------------


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_wanted", lambda: ["no-such-compiler"])
    with pytest.raises(BackendUnavailable, match=r"no-such-compiler.*Install: "):
        fxopt.compile(nn.ReLU(), torch.ones(2), backend="inductor")


@pytest.mark.parametrize("options", [
    {"threads": 0}, {"runners": 0}, {"freezing": "yes"}, {"max_autotune": 1}, {"trust": None},
    {"thread": 2},
], ids=str)  # fmt: skip
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        fxopt.lower(fxopt.capture(nn.ReLU(), torch.ones(2)), backend="inductor", **options)


def test_a_batch_norm_in_training_is_refused() -> None:
    graph = fxopt.capture(ConvBnRelu(), images(2))
    graph.train()
    graph.info.mutated = frozenset({"bn.running_mean"})
    with pytest.raises(LoweringError, match=r"bn.running_mean inside an operator.*eval\(\)"):
        flatten(graph)


@needs_compiler
def test_an_error_of_inductor_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor as inductor

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("NotImplementedError: no\n  target: aten.relu.default\n  args[0]: x")

    monkeypatch.setattr(inductor, "aot_compile", fail)
    graph = fxopt.capture(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.ones(2))
    with pytest.raises(LoweringError, match=r"node 'relu' \(from .*NotImplementedError"):
        fxopt.lower(graph, backend="inductor")


def test_instruction_sets() -> None:
    here = processor.this_machine()
    assert here["instructions"] and processor.unfit(here) is None
    assert "no sve2" in str(processor.unfit({**here, "instructions": ["sve2"]}))
