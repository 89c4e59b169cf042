"""A run in a file: written whole or not at all, and read only by the run that it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fxopt.errors import ArtefactError, OptionError
from fxopt.files import atomic_path

_KIND = "fxopt fine-tuning 1"


class Checkpoint:
    """The file that a run is kept in; `identity` is what it must agree with to go on."""

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(path)
        self.identity = identity

    def read(self) -> dict[str, Any] | None:
        """Return the state in the file; None where there is no file yet.

        Raises ArtefactError for a file that is none of ours or damaged, and OptionError for one
        of another model, other data or other settings. Reading runs no code of the file.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ArtefactError(
                f"'{self.path}' is no checkpoint that can be read: {reason}"
            ) from error
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise ArtefactError(
                f"'{self.path}' is not a checkpoint of fxopt.finetune. It was left as it is; "
                "choose another path."
            )
        self._compare(content["identity"])
        state: dict[str, Any] = content["state"]
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Replace the file."""
        with atomic_path(self.path) as temporary:
            torch.save({"kind": _KIND, "identity": self.identity, "state": state}, temporary)

    def _compare(self, found: dict[str, Any]) -> None:
        differ = [
            f"{name} was {found.get(name)!r} and is {value!r}"
            for name, value in self.identity.items()
            if found.get(name) != value and name != "model"
        ]
        if found.get("model") != self.identity["model"]:
            differ.insert(0, "it began with another model, or other weights")
        if differ:
            raise OptionError(
                f"The run in '{self.path}' is not this one: {'; '.join(differ)}. Ask for the same "
                "again, or choose another path; to start anew, delete the file."
            )
