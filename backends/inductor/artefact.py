"""Saving and loading: a package of AOTInductor with the manifest of a compiled model in it.

The file is a .pt2 archive, which PyTorch's own loaders read from C++ and Python, with two parts
more: `extra/fxopt.json` holds the manifest, how the code is called, what it was made for, and a
checksum of every other part; `extra/fxopt.states` what calls change, as safetensors.

The file holds machine code. Checksums find damage, not malice: whom to trust the user must know.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from fxopt.backends.inductor.executable import CallPlan, InductorExecutable
from fxopt.backends.inductor.flat import Slot
from fxopt.backends.inductor.processor import this_machine, unfit
from fxopt.errors import ArtefactError
from fxopt.files import atomic_path
from fxopt.manifest import parse_json

if TYPE_CHECKING:
    from fxopt.backends.inductor import Inductor

FORMAT = 1
_DESCRIPTION, _STATES = "extra/fxopt.json", "extra/fxopt.states"
_CHUNK = 1 << 20
_AGAIN = "Get the file again, or save the model again."


# -- writing --------------------------------------------------------------------------------------


def save(executable: InductorExecutable, path: Path, manifest: str) -> None:
    """Write one file, whole or not at all; raise ArtefactError where that is not possible."""
    plan = executable.plan
    initial = [slot.initial for slot in plan.slots if slot.initial is not None]
    states = safetensors.torch.save({str(i): t.contiguous() for i, t in enumerate(initial)})
    with atomic_path(path) as temporary:
        shutil.copyfile(executable.package, temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            root = _root(archive.namelist())
            archive.writestr(f"{root}/{_STATES}", states)
            description = {
                "format": FORMAT,
                "torch": torch.__version__,
                "machine": this_machine(),
                "plan": {
                    "layouts": plan.layouts,
                    "slots": [[slot.output, slot.input] for slot in plan.slots],
                    "results": plan.results,
                    "constant": sorted(plan.constant),
                },
                "manifest": manifest,
                "checksums": {name: _checksum(archive, name) for name in archive.namelist()},
            }
            archive.writestr(f"{root}/{_DESCRIPTION}", json.dumps(description))


def _checksum(archive: zipfile.ZipFile, name: str) -> str:
    found = hashlib.sha256()
    with archive.open(name) as member:
        while chunk := member.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


# -- reading --------------------------------------------------------------------------------------


def load(path: Path, options: Inductor) -> tuple[InductorExecutable, str]:
    """Verify a file, then load its code; raise ArtefactError before that for what is not right."""
    folder = tempfile.TemporaryDirectory(prefix="fxopt-inductor-")
    try:
        package = Path(folder.name) / "model.pt2"
        shutil.copyfile(path, package)  # what is verified is what is loaded, whatever happens to it
        description, states = _verified(package)
        _check_fit(description)
        if not options.trust:
            raise ArtefactError(
                "It holds machine code, which runs with all your rights and cannot be checked. If "
                "you know who made the file, load it with fxopt.load(path, trust=True)."
            )
        plan = _plan(description["plan"], states)
        executable = InductorExecutable(folder, package, plan, options.runners)
    except ArtefactError as error:
        folder.cleanup()
        raise ArtefactError(f"'{path}': {error}") from error
    except OSError as error:
        folder.cleanup()
        raise ArtefactError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # zipfile, safetensors and the loader each have errors of their own
        folder.cleanup()
        raise ArtefactError(
            f"'{path}' is not a whole file of the backend 'inductor' ({type(error).__name__}: "
            f"{error!s:.200}). {_AGAIN}"
        ) from error
    return executable, description["manifest"]


def _verified(package: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the description and the states, once every part is known to be as it was written."""
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        root = _root(names)
        own = f"{root}/{_DESCRIPTION}"
        if own not in names:
            raise ArtefactError(_foreign(names))
        description = parse_json(archive.read(own).decode())
        if description.get("format") != FORMAT:
            raise ArtefactError(
                f"It has format {description.get('format')!s:.20}, and this fxopt reads {FORMAT}. "
                "Upgrade fxopt, or compile the model again."
            )
        expected = description["checksums"]
        if {*expected, own} != set(names) or len(names) != len(set(names)):
            raise ArtefactError(f"Its parts are not those that it was written with. {_AGAIN}")
        for name, checksum in expected.items():
            if _checksum(archive, name) != checksum:
                raise ArtefactError(f"Its part '{name!s:.100}' is damaged. {_AGAIN}")
        return description, safetensors.torch.load(archive.read(f"{root}/{_STATES}"))


def _root(names: list[str]) -> str:
    """Return the folder in the archive that holds everything; its first name says which."""
    return names[0].partition("/")[0] if names else ""


def _foreign(names: list[str]) -> str:
    if any("/data/aotinductor/" in name for name in names):
        return (
            "It is a package of AOTInductor that fxopt did not write. Load it with "
            "torch._inductor.aoti_load_package."
        )
    return "fxopt did not write it. Load it with what wrote it, or save with CompiledModel.save."


def _check_fit(description: Mapping[str, Any]) -> None:
    """Raise ArtefactError where the code was made for another PyTorch or another processor."""
    if description["torch"] != torch.__version__:
        raise ArtefactError(
            f"It was compiled for PyTorch {description['torch']!s:.40}, and this is "
            f"{torch.__version__}: machine code and packed weights belong to one version. Compile "
            "the model again."
        )
    reason = unfit(description["machine"])
    if reason is not None:
        raise ArtefactError(
            f"Its machine code does not run here: {reason}. Compile the model again on this "
            "machine, or on one like it."
        )


def _plan(written: Mapping[str, Any], states: Mapping[str, torch.Tensor]) -> CallPlan:
    slots: list[Slot] = []
    for output, given in written["slots"]:
        initial = states[str(sum(s.initial is not None for s in slots))] if given is None else None
        slots.append(Slot(output, given, initial))
    return CallPlan(
        tuple(written["layouts"]), tuple(slots), written["results"], frozenset(written["constant"])
    )
