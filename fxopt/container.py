"""The file around an artefact: a zip of plain members, their checksums, and tensors in it.

Every member is stored uncompressed, so nothing can unfold into more than the file itself holds; the
names come from a fixed list, so none can lead elsewhere. The bytes depend on the content only.
Tensors are one member in the safetensors format, written and read one tensor at a time.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from fxopt.errors import ArtefactError

MANIFEST, GRAPH, CONSTANTS, EXAMPLES, CHECKSUMS = (
    "manifest.json", "graph.json", "constants.safetensors", "examples.safetensors", "checksums",
)  # fmt: skip
_MEMBERS = {MANIFEST, GRAPH, CONSTANTS, EXAMPLES, CHECKSUMS}
_CHUNK = 1 << 20
_LARGEST_TEXT = 1 << 30  # of graph.json, which is read as a whole
_LARGEST_HEADER = 100_000_000  # of a safetensors file, by its own definition

# What safetensors knows; other dtypes are stored as one of these (see `fxopt.artefact`).
STORED = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in STORED.items()}

Source = Path | bytes
Content = bytes | Mapping[str, torch.Tensor]


# -- writing --------------------------------------------------------------------------------------


def write_container(file: IO[bytes], members: Mapping[str, Content]) -> None:
    """Write members (bytes, or tensors by name), and the checksums of all."""
    sums = []
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in sorted(members):
            content = members[name]
            chunks = iter((content,)) if isinstance(content, bytes) else tensor_chunks(content)
            sums.append(f"{_write_member(archive, name, chunks)}  {name}\n")
        _write_member(archive, CHECKSUMS, iter(("".join(sums).encode(),)))


def _write_member(archive: zipfile.ZipFile, name: str, chunks: Iterator[Any]) -> str:
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    digest = hashlib.sha256()
    with archive.open(info, "w", force_zip64=True) as member:
        for chunk in chunks:
            digest.update(chunk)
            member.write(chunk)
    return digest.hexdigest()


def tensor_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """Yield a safetensors file: its header, then each tensor's bytes, the widest dtypes first."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        shape, dtype = list(tensor.shape), STORED[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, data.size, _CHUNK):
            yield data[start : start + _CHUNK].data


# -- reading --------------------------------------------------------------------------------------


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into an ArtefactError that says what to do."""
    name = f"'{source}'" if isinstance(source, Path) else "The saved graph"
    try:
        yield
    except ArtefactError as error:
        raise ArtefactError(f"{name}: {error}") from error
    except OSError as error:
        raise ArtefactError(f"{name} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise ArtefactError(f"{name} does not fit into memory.") from error
    except Exception as error:  # the content decides which part of torch refuses it, and how
        raise ArtefactError(
            f"{name} is damaged, or is not what fxopt wrote ({type(error).__name__}: "
            f"{error!s:.200}). Get the file again, or save the model again."
        ) from error


@contextmanager
def open_container(source: Source) -> Iterator[Container]:
    """Open a container and verify every member; raise ArtefactError where one is damaged."""
    with reading(source):
        file: Any = str(source) if isinstance(source, Path) else io.BytesIO(source)
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise ArtefactError(
                f"It is not a whole .fxopt file ({error}). It was cut off or damaged, or is "
                "something else. Get it again, or save the model again."
            ) from error
        with archive:
            container = Container(archive)
            container.verify()
            yield container


class Container:
    """An open container whose members' names and kinds are known to be right."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        members = archive.infolist()
        self.names = [info.filename for info in members]
        if GRAPH not in self.names or CHECKSUMS not in self.names:
            raise _foreign(self.names)
        for info in members:
            if info.filename not in _MEMBERS:
                raise ArtefactError(
                    f"It holds '{info.filename!s:.100}', which no fxopt artefact does. Do not "
                    "trust it; or upgrade fxopt, if a newer one wrote it."
                )
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
                raise _damaged(info.filename, "it is compressed or encrypted")
            if info.file_size != info.compress_size:
                raise _damaged(info.filename, "its size is wrong")
        if len(set(self.names)) != len(self.names):
            raise ArtefactError("It holds a part twice. Get the file again.")

    def verify(self) -> None:
        """Compare every member with its checksum."""
        lines = self.text(CHECKSUMS).splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        if set(expected) != set(self.names) - {CHECKSUMS}:
            raise _damaged(CHECKSUMS, "it does not name the file's parts")
        for name, digest in expected.items():
            found = hashlib.sha256()
            with self._open(name) as member:
                while chunk := _read(name, member, _CHUNK):
                    found.update(chunk)
            if found.hexdigest() != digest:
                raise _damaged(name, "its checksum is wrong")

    def text(self, name: str) -> str:
        """Return a member as text."""
        if self._archive.getinfo(name).file_size > _LARGEST_TEXT:
            raise _damaged(name, "it is too large")
        with self._open(name) as member:
            return _read(name, member, -1).decode()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a safetensors member, each in memory of its own."""
        with self._open(name) as member:
            size = int.from_bytes(member.read(8), "little")
            if size > _LARGEST_HEADER or size > self._archive.getinfo(name).file_size:
                raise _damaged(name, "its header is too large")
            header = json.loads(member.read(size))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            position, found = 0, {}
            left = self._archive.getinfo(name).file_size - 8 - size
            for key, entry in entries:
                start, end = entry["data_offsets"]
                if start != position or not start <= end <= left:
                    raise _damaged(name, "its header does not fit its content")
                found[key] = _read_tensor(name, member, entry, end - start)
                position = end
        return found

    def _open(self, name: str) -> IO[bytes]:
        if name not in self.names:
            raise ArtefactError(f"Its part '{name}' is missing. Get the file again.")
        try:
            return self._archive.open(name)
        except Exception as error:  # zipfile's own checks of the member's header
            raise _damaged(name, str(error)) from error


def _read(name: str, member: IO[bytes], size: int) -> bytes:
    try:
        return member.read(size)
    except (zipfile.BadZipFile, EOFError) as error:
        raise _damaged(name, str(error) or "it ends too early") from error


def _read_tensor(name: str, member: Any, entry: Any, size: int) -> torch.Tensor:
    dtype, shape = _BY_NAME[entry["dtype"]], entry["shape"]
    count = size // dtype.itemsize
    wanted = 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise _damaged(name, "a shape is wrong")
        wanted *= length
    if wanted != count or size % dtype.itemsize:
        raise _damaged(name, "a tensor's size is wrong")
    data = torch.empty(size, dtype=torch.uint8)
    view, position = data.numpy().data, 0
    while position < size:
        got = member.readinto(view[position : position + _CHUNK])
        if not got:
            raise _damaged(name, "it ends too early")
        position += got
    return data.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def _damaged(name: str, reason: str) -> ArtefactError:
    return ArtefactError(
        f"Its part '{name!s:.100}' is damaged: {reason}. Get the file again, or save the model "
        "again."
    )


def _foreign(names: list[str]) -> ArtefactError:
    kind = "another program's zip file"
    if any(name.endswith("/data.pkl") for name in names):
        kind = "a file of torch.save, or TorchScript"
    elif any("archive_format" in name or name.endswith(".pt2") for name in names):
        kind = "a .pt2 file of torch.export"
    return ArtefactError(
        f"It is {kind}, not an fxopt artefact. Load it with what wrote it, or save the model with "
        "CompiledModel.save."
    )
