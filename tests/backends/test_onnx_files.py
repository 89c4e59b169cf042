"""State, files and options of the onnx backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends.onnx import Onnx
from fxopt.errors import ArtefactError, LoweringError, OptionError
from tests.backends.onnx_check import check, difference, expected, lowered, mlp, noisy, normal


class Counter(nn.Module):
    """Keeps a sum and a count from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_(x.sum(0))
        self.calls += 1
        return x * self.total + self.calls


# -- state ----------------------------------------------------------------------------------------


def test_state_is_refused_unless_asked_for() -> None:
    with pytest.raises(LoweringError, match=r"changes 'total' at each run.*state='io'"):
        lowered(Counter(), (normal(2, 3),))


def test_state_goes_in_and_out(tmp_path: Path) -> None:
    model, x = Counter(), normal(2, 3)
    executable = lowered(model, (x,), state="io")
    executable.save(tmp_path / "counter.onnx", "{}")
    loaded, _ = Onnx().load(tmp_path / "counter.onnx")
    for one in (executable, loaded):
        twin = Counter()
        for _ in range(3):
            assert difference(one.run(x)[0], twin(x)) < 1e-6
        one.reset_state()
        assert difference(one.run(x)[0], Counter()(x)) < 1e-6


def test_inputs_that_the_model_changes() -> None:
    x = normal(2, 3)
    before = x.clone()
    executable = lowered(lambda x: x.add_(1) * 2, (x.clone(),), state="io")
    assert difference(executable.run(x)[0], (before + 1) * 2) < 1e-6
    assert difference(x, before + 1) < 1e-6


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("external", [None, True])
def test_saved_and_loaded(tmp_path: Path, external: bool | None) -> None:
    model, x, path = mlp(), normal(2, 64), tmp_path / "model.onnx"
    lowered(model, (x,), external_data=external).save(path, "the manifest")
    loaded, manifest = Onnx(threads=1).load(path)
    assert manifest == "the manifest"
    assert difference(loaded.run(x)[0], expected(model, (x,))[0]) < 1e-5
    onnx.checker.check_model(str(path), full_check=True)  # any other tool reads it, data and all
    assert len(list(tmp_path.iterdir())) == (2 if external else 1)
    loaded.save(tmp_path / "again.onnx", "the manifest")
    if not external:
        assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def run_python(script: str) -> str:
    """Run a script in another process, with other hashes of strings."""
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=120,
    )
    return done.stdout.strip()


ENCODER = """
import sys, torch
from pathlib import Path
from torch import nn
import fxopt
from fxopt.capture import capture
torch.manual_seed(0)
model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
graph = capture(model, (torch.zeros(2, 5, 8),), dynamic_shapes={"src": {0: "b", 1: "s"}})
fxopt.lower(graph, backend="onnx").executable.save(Path(target), "manifest")
"""


def test_the_file_is_deterministic(tmp_path: Path) -> None:
    here, there = tmp_path / "here.onnx", tmp_path / "there.onnx"
    exec(ENCODER, {"target": here})
    run_python(ENCODER.replace("Path(target)", f"Path({str(there)!r})"))
    assert here.read_bytes() == there.read_bytes()


@pytest.mark.parametrize("damage", ["garbage", "nothing", "half", "end"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "model.onnx"
    lowered(mlp(), (normal(2, 64),)).save(path, "manifest")
    content = path.read_bytes()
    path.write_bytes(
        {
            "garbage": b"garbage" * 9,
            "nothing": b"",
            "half": content[: len(content) // 2],
            "end": content[:-3],
        }[damage]
    )
    with pytest.raises(ArtefactError, match=r"not a whole ONNX file|not made by fxopt, or its end"):
        Onnx().load(path)


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    onnx.save(lowered(mlp(), (normal(2, 64),)).model_proto(), path)
    with pytest.raises(ArtefactError, match="not made by fxopt"):
        Onnx().load(path)
    with pytest.raises(ArtefactError, match="Cannot read"):
        Onnx().load(tmp_path / "nowhere.onnx")


def test_external_data_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    lowered(mlp(), (normal(2, 64),), external_data=True).save(path, "manifest")
    (data,) = tmp_path.glob("*.data")
    content = data.read_bytes()
    data.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="is damaged"):
        Onnx().load(path)
    data.unlink()
    with pytest.raises(ArtefactError, match="Keep both files together"):
        Onnx().load(path)


def test_data_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    lowered(mlp(), (normal(2, 64),), external_data=True).save(path, "manifest")
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "/etc/passwd"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ArtefactError, match="one file beside it"):
        Onnx().load(path)


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"opset": 7},
        {"threads": 0},
        {"providers": ()},
        {"state": "keep"},
        {"optimization": "max"},
        {"external_data": 3},
    ],
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Onnx(**wrong)


def test_optimization_levels_agree() -> None:
    for level in ("off", "basic", "extended", "layout", "all"):
        check(
            noisy(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())),
            (normal(1, 3, 6, 6),),
            optimization=level,
        )


def test_importing_it_imports_no_engine() -> None:
    engines = "{'onnx', 'onnx_ir', 'onnxruntime'}"
    script = f"import sys, fxopt.backends.onnx; print({engines} & set(sys.modules))"
    assert run_python(script) == "set()"
    assert Onnx().missing() is None


def test_dynamic_sizes_bear_the_names_that_the_user_gave(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(3, 4, 3, stride=2).eval()
    names = {0: "batch", 2: "height"}
    compiled = fxopt.compile(model, torch.randn(2, 3, 9, 9), dynamic_shapes=names, backend="onnx")
    compiled.save(tmp_path / "named.onnx")
    graph = onnx.load(tmp_path / "named.onnx").graph
    sizes = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ["batch", 3, "height", 9]
    out = [d.dim_param or d.dim_value for d in graph.output[0].type.tensor_type.shape.dim]
    assert out[0] == "batch" and out[1] == 4 and "height" in str(out[2])
    assert compiled(torch.randn(5, 3, 17, 9)).shape == (5, 4, 8, 4)
