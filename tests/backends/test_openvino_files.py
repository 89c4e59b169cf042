"""The files of the openvino backend: one zip, whole or not at all, with a model of OpenVINO's."""

from __future__ import annotations

import errno
import json
import os
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.container import write_container
from fxopt.errors import ArtefactError, OptionError
from fxopt.testing import noisy

openvino = pytest.importorskip("openvino")


class Model(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: torch.Tensor, unused: torch.Tensor | None = None) -> Any:
        return {"scores": self.layers(x) * self.scale, "scale": self.scale, "nothing": None}


def compiled(width: int = 8) -> Any:
    x = torch.randn(2, 4)
    return fxopt.compile(
        noisy(Model(width).eval()), {"x": x, "unused": x}, backend="openvino", threads=1,
        dynamic_shapes={"x": {0: "n"}},
    )  # fmt: skip


def parts_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name != "checksums"]
        return {name: archive.read(name) for name in names}


def write(path: Path, parts: dict[str, bytes]) -> None:
    """Write parts with checksums that are right."""
    with open(path, "wb") as file:
        write_container(file, parts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("saved") / "model.ovx"
    with torch.random.fork_rng(devices=[]):
        compiled().save(path)
    return path


# -- writing and reading --------------------------------------------------------------------------


def test_what_is_loaded_computes_the_same(tmp_path: Path) -> None:
    model, path = compiled(), tmp_path / "model.ovx"
    model.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["model.ovx"]
    loaded = fxopt.load(path, threads=1)
    for n in (2, 5, 0):
        x, other = torch.randn(n, 4), torch.randn(2, 4)
        expected, found = model(x=x, unused=other), loaded(x=x, unused=other)
        assert torch.equal(expected["scores"], found["scores"]) and found["scores"].shape == (n, 3)
        assert torch.equal(expected["scale"], found["scale"])
        assert found["nothing"] is None
    assert loaded.executable.notes == model.executable.notes
    loaded.save(tmp_path / "again.ovx")
    x, other = torch.randn(3, 4), torch.randn(2, 4)
    again = fxopt.load(tmp_path / "again.ovx", threads=1)(x=x, unused=other)
    assert torch.equal(again["scores"], model(x=x, unused=other)["scores"])


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = compiled()
    for name in ("one.ovx", "two.ovx"):
        model.save(tmp_path / name)
    assert (tmp_path / "one.ovx").read_bytes() == (tmp_path / "two.ovx").read_bytes()


def test_options_are_those_given_at_load(saved: Path) -> None:
    loaded = fxopt.load(saved, threads=2, streams=1)
    assert "2 threads in 1 stream" in loaded.executable.notes[-1]
    with pytest.raises(OptionError, match="threads=0"):
        fxopt.load(saved, threads=0)
    with pytest.raises(OptionError, match="no device 'TPU'"):
        fxopt.load(saved, device="TPU")


def test_unpacked_it_is_a_plain_model_for_openvino(saved: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        archive.extractall(tmp_path)
    hint = {"INFERENCE_PRECISION_HINT": "f32"}  # bfloat16 where the processor has it, otherwise
    plain = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", hint)
    x = torch.randn(2, 4)
    expected = fxopt.load(saved)(x=x, unused=x)["scores"]
    (scores,) = [value for value in plain(x.numpy()).values() if value.shape == (2, 3)]
    assert torch.allclose(torch.from_numpy(scores), expected, atol=1e-6)


# -- files that are not right ---------------------------------------------------------------------


def test_a_file_that_was_cut_off_or_damaged(saved: Path, tmp_path: Path) -> None:
    content, path = saved.read_bytes(), tmp_path / "model.ovx"
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ArtefactError, match=r"model\.ovx"):
            fxopt.load(path)
    for name in (*parts_of(saved), "checksums"):
        with zipfile.ZipFile(saved) as archive:
            info = archive.getinfo(name)
            start = info.header_offset + len(info.FileHeader(zip64=True))
        damaged = bytearray(content)
        damaged[start + info.file_size // 2] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"model\.ovx"):
            fxopt.load(path)


@pytest.mark.parametrize("other", ["text", "zip", "fxopt", "xml"])
def test_a_file_of_something_else(other: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.ovx"
    if other == "text":
        path.write_text("hello")
    elif other == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    elif other == "fxopt":
        fxopt.lower(fxopt.capture(nn.Linear(2, 2), torch.randn(1, 2))).save(tmp_path / "a.fxopt")
        (tmp_path / "a.fxopt").rename(path)
    else:
        path.write_bytes(parts_of(saved)["model.xml"])
    with pytest.raises(ArtefactError, match=r"not a whole \.ovx file|the parts of an \.ovx file"):
        fxopt.load(path)


def test_parts_that_are_right_by_their_checksums_only(saved: Path, tmp_path: Path) -> None:
    path, good = tmp_path / "model.ovx", parts_of(saved)
    lowering = json.loads(good["lowering.json"])
    fewer = {**lowering, "inputs": ["elsewhere"]}
    older = {**lowering, "openvino": "1999.1"}
    cases = [
        ({"model.bin": good["model.bin"][:-8]}, "cannot read its model"),
        ({"model.xml": good["model.xml"][:400]}, "cannot read its model"),
        ({"model.xml": b"\x08\x0a\x12 an ONNX model"}, "not OpenVINO's format"),
        ({"model.xml": good["model.xml"].replace(b"MatMul", b"Unheard")}, "Unheard"),
        ({"lowering.json": b"[]"}, "damaged|malformed|not what fxopt wrote"),
        ({"lowering.json": b"{}"}, "format"),
        ({"lowering.json": json.dumps(fewer).encode()}, "do not belong together"),
        ({"manifest.json": b"\xff"}, "damaged"),
        ({"more.json": b"{}"}, "the parts of an .ovx file"),
        ({"model.xml": b"<?xml?><net ", "lowering.json": json.dumps(older).encode()},
         "OpenVINO 1999.1 wrote it.*install that version"),
    ]  # fmt: skip
    for changes, words in cases:
        write(path, {**good, **changes})
        with pytest.raises(ArtefactError, match=words):
            fxopt.load(path)
    write(path, good)
    fxopt.load(path)


@pytest.mark.parametrize("part", ["manifest.json", "lowering.json"])
def test_a_newer_format_is_refused(part: str, saved: Path, tmp_path: Path) -> None:
    path, parts = tmp_path / "model.ovx", parts_of(saved)
    parts[part] = json.dumps({**json.loads(parts[part]), "format": 99}).encode()
    write(path, parts)
    with pytest.raises(ArtefactError, match="format 99.*Upgrade fxopt"):
        fxopt.load(path)


def test_compressed_parts_are_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.ovx"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ArtefactError, match="compressed"):
        fxopt.load(path)


def test_the_suffix_tells_the_backend(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"Name the file \*\.ovx"):
        compiled().save(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# -- writing that fails ---------------------------------------------------------------------------


def test_whatever_fails_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = tmp_path / "model.ovx", compiled()
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def half(model: Any, xml: str, constants: str) -> None:
        serialize(model, xml, constants)  # OpenVINO says nothing when the disk is full
        Path(constants).write_bytes(Path(constants).read_bytes()[:-16])

    def nothing(model: Any, xml: str, constants: str) -> None:
        Path(xml).touch()
        Path(constants).touch()

    serialize = openvino.serialize
    for owner, name, failure, words in (
        (os, "fsync", full, "No space left"),
        (os, "replace", full, "No space left"),
        (openvino, "serialize", full, "No space left"),
        (openvino, "serialize", half, "did not write the whole model"),
        (openvino, "serialize", nothing, "did not write the whole model"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            with pytest.raises(ArtefactError, match=words):
                model.save(path)
        assert path.read_bytes() == b"old"
        assert [one.name for one in tmp_path.iterdir()] == ["model.ovx"]
    with pytest.raises(ArtefactError, match="nowhere"):
        model.save(tmp_path / "nowhere" / "model.ovx")


def test_two_savers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path, models = tmp_path / "model.ovx", [compiled(8), compiled(200)]
    failures: list[BaseException] = []

    def save(model: Any) -> None:
        try:
            for _ in range(4):
                model.save(path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and [one.name for one in tmp_path.iterdir()] == ["model.ovx"]
    x = torch.randn(2, 4)
    result = fxopt.load(path, threads=1)(x=x, unused=x)["scores"]
    assert any(torch.equal(result, model(x=x, unused=x)["scores"]) for model in models)
