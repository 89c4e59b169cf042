"""What an artefact says about itself: versions, signature, passes; as JSON text.

The text holds plain data only. Reading it never imports or runs anything it names: see
`fxopt.encode` for values and classes, `fxopt.expressions` for symbolic sizes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.backend import Backend
from fxopt.encode import decode, encode, malformed
from fxopt.encode_signature import decode_signature, encode_signature, plain_text
from fxopt.errors import ArtefactError
from fxopt.signature import Signature
from fxopt.story import Story

FORMAT = 1  # raised by every change that an older fxopt would misread
_LARGEST = 512 * 2**20  # characters


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read."""

    signature: Signature
    format: int = FORMAT
    fxopt: str = ""  # the versions that wrote it
    torch: str = ""
    backend: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "model"
    passes: tuple[Mapping[str, Any], ...] = ()  # name, options, rewrites, skipped
    verifications: tuple[Mapping[str, Any], ...] = ()  # what, error, bound


def write_manifest(signature: Signature, backend: Backend, story: Story | None) -> str:
    """Return the manifest of a compiled model.

    Raises ArtefactError where the signature holds values that cannot be saved.
    """
    content = {
        "format": FORMAT,
        "fxopt": fxopt_version(),
        "torch": torch.__version__,
        "backend": {"name": backend.name, "options": _options(backend)},
        "model": "model" if story is None else story.model_name,
        "passes": [] if story is None else [_step(step) for step in story.steps],
        "verifications": [] if story is None else [
            {"what": one.what, "error": encode(one.error), "bound": encode(one.bound)}
            for one in story.verifications
        ],
        "signature": encode_signature(signature),
    }  # fmt: skip
    return dump(content)


def read_manifest(text: str, source: Path) -> Manifest:
    """Read a manifest; raise ArtefactError where it is damaged or newer than this version."""
    try:
        content = parse_json(text)
        check_format(content)
        return Manifest(
            signature=decode_signature(content["signature"]),
            format=content["format"],
            fxopt=str(content["fxopt"]),
            torch=str(content["torch"]),
            backend=str(content["backend"]["name"]),
            options=decode(content["backend"]["options"]),
            model=str(content["model"]),
            passes=tuple(map(_read_step, content["passes"])),
            verifications=tuple(map(_read_verification, content["verifications"])),
        )
    except ArtefactError as error:
        raise ArtefactError(f"'{source}': {error}") from error
    except Exception as error:  # whatever else is not as it should be
        raise ArtefactError(
            f"'{source}' has a manifest that cannot be read ({type(error).__name__}: "
            f"{error!s:.200}). Get the file again, or save the model again."
        ) from error


def dump(content: Any) -> str:
    """Return JSON text, the same for the same content."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def parse_json(text: str) -> Any:
    """Return what a JSON object says; NaN and infinity are no numbers here."""
    if len(text) > _LARGEST:
        raise malformed("a text of more than 512 MiB")

    def refuse(name: str) -> Any:
        raise malformed(f"the number {name}")

    content = json.loads(text, parse_constant=refuse)
    if not isinstance(content, dict):
        raise malformed("the manifest")
    return content


def check_format(content: Mapping[str, Any]) -> None:
    """Raise ArtefactError for a format that a newer fxopt wrote."""
    version = content.get("format")
    if type(version) is not int or version < 1:
        raise malformed("the number of the format")
    if version > FORMAT:
        raise ArtefactError(
            f"It has format {version}, written by fxopt {content.get('fxopt')!s:.40}; this is "
            f"fxopt {fxopt_version()}, which reads formats up to {FORMAT}. Upgrade fxopt, or save "
            "the model with this version."
        )


def fxopt_version() -> str:
    """Return this version of fxopt."""
    from fxopt import __version__

    return __version__


def _options(one: Any) -> Any:
    """Return the fields of a backend as JSON; what has no such form, as its text."""
    values = {f.name: getattr(one, f.name) for f in fields(one)} if is_dataclass(one) else {}
    return encode({name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    try:
        encode(value)
    except ArtefactError:
        return plain_text(value)
    return value


def _step(step: Any) -> dict[str, Any]:
    options = encode({name: _plain(value) for name, value in step.options.items()})
    return {
        "name": step.name, "options": options, "rewrites": step.rewrites, "skipped": step.skipped,
    }  # fmt: skip


def _read_step(step: Mapping[str, Any]) -> dict[str, Any]:
    return {**step, "options": decode(step["options"])}


def _read_verification(one: Mapping[str, Any]) -> dict[str, Any]:
    return {**one, "error": decode(one["error"]), "bound": decode(one["bound"])}
