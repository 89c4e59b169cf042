"""The file `model.ovx`: a plain zip, whose model.xml and model.bin are OpenVINO's own format.

    manifest.json  how the model is called, and what was done to it (fxopt.manifest)
    lowering.json  the version of OpenVINO that wrote the model, its inputs, and notes
    model.xml      OpenVINO's intermediate representation: layers and how they are connected
    model.bin      its constants
    checksums      of the parts above

Nothing in it is code: layers are named, and OpenVINO knows their names or refuses the file; it
loads no extensions for it. Unpacked with any zip program, model.xml opens in OpenVINO's own tools.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.backends.openvino.engine import openvino
from fxopt.backends.openvino.executable import OpenVinoExecutable, core, reason
from fxopt.container import CHECKSUMS, MANIFEST, reading, write_container
from fxopt.errors import ArtefactError
from fxopt.files import atomic_path
from fxopt.manifest import FORMAT, check_format, dump, fxopt_version, parse_json

if TYPE_CHECKING:
    from fxopt.backends.openvino import OpenVino

LOWERING, XML, BIN = "lowering.json", "model.xml", "model.bin"
_PARTS = {MANIFEST, LOWERING, XML, BIN, CHECKSUMS}


def save(executable: OpenVinoExecutable, path: Path, manifest: str) -> None:
    """Write a model and its manifest, atomically.

    Raises ArtefactError where the path cannot be written.
    """
    content = {
        "format": FORMAT,
        "fxopt": fxopt_version(),
        "openvino": openvino.__version__,
        "inputs": list(executable.inputs),
        "largest_integer": executable.largest_integer,
        "notes": list(executable.lowering),
    }
    with atomic_path(path) as temporary:
        xml, constants = _representation(executable.model, temporary.parent, path.name)
        parts = {
            MANIFEST: manifest.encode(),
            LOWERING: dump(content).encode(),
            XML: xml,
            BIN: constants,
        }
        with open(temporary, "wb") as file:
            write_container(file, parts)


def _representation(model: Any, folder: Path, name: str) -> tuple[bytes, bytes]:
    """Return OpenVINO's two files of a model, made in a folder beside the target."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as place:
        xml, constants = Path(place) / XML, Path(place) / BIN
        openvino.serialize(model, str(xml), str(constants))
        content = xml.read_bytes(), constants.read_bytes()
    try:
        core().read_model(*content)  # OpenVINO does not say when a disk was full
    except Exception as error:
        raise ArtefactError(
            f"OpenVINO did not write the whole model: {reason(error)} Make room in '{folder}', "
            "or choose another path."
        ) from error
    return content


def load(path: Path, options: OpenVino) -> tuple[OpenVinoExecutable, str]:
    """Read a file that fxopt wrote; raise ArtefactError for one that is damaged or foreign."""
    with reading(path):
        parts = _parts(path)
        manifest = parts[MANIFEST].decode()
        lowering = parse_json(parts[LOWERING].decode())
        for text in (parse_json(manifest), lowering):
            check_format(text)
        inputs, notes = (tuple(map(str, lowering[key])) for key in ("inputs", "notes"))
        largest = int(lowering["largest_integer"])
        model = _read_model(parts[XML], parts[BIN], str(lowering["openvino"]))
        if any(len(port.get_names() & set(inputs)) != 1 for port in model.inputs):
            raise ArtefactError(f"Its parts '{LOWERING}' and '{XML}' do not belong together.")
    return OpenVinoExecutable(model, inputs, largest, options, notes), manifest


def _parts(path: Path) -> dict[str, bytes]:
    """Return the content of each part, whose checksums are right."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ArtefactError(
            f"It is not a whole .ovx file ({error}). It was cut off or damaged, or is something "
            "else. Get it again, or save the model again."
        ) from error
    with archive:
        members = archive.infolist()
        if sorted(info.filename for info in members) != sorted(_PARTS):
            raise ArtefactError(
                "It does not hold the parts of an .ovx file. Another program wrote it, or a newer "
                "fxopt. OpenVINO's own files (.xml, .onnx) are opened with openvino.Core()."
            )
        if any(info.compress_type != zipfile.ZIP_STORED for info in members):
            raise ArtefactError("Its parts are compressed, which fxopt never does. Save it again.")
        parts = {info.filename: archive.read(info) for info in members}
    sums = parts.pop(CHECKSUMS).decode().splitlines()
    for line in sums:
        digest, _, name = line.partition("  ")
        if hashlib.sha256(parts[name]).hexdigest() != digest:
            raise ArtefactError(f"Its part '{name}' is damaged: its checksum is wrong.")
    if len(sums) != len(parts):
        raise ArtefactError("Its checksums do not name its parts. Get the file again.")
    return parts


def _read_model(xml: bytes, constants: bytes, version: str) -> Any:
    # OpenVINO guesses what it is given: only this format is meant
    if not xml.lstrip().startswith(b"<?xml") or b"<net " not in xml[:4096]:
        raise ArtefactError(f"Its part '{XML}' is not OpenVINO's format. Save the model again.")
    try:
        return core().read_model(xml, constants)
    except Exception as error:
        here = openvino.__version__
        advice = "Save the model again."
        if version != here:
            advice = f"OpenVINO {version} wrote it, and this is {here}: install that version."
        raise ArtefactError(f"OpenVINO cannot read its model: {reason(error)} {advice}") from error
