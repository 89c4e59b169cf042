"""Peak memory of a candidate, measured in a fresh process where nothing else runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.comparison.candidate import Artefact
from fxopt.compile import compile
from fxopt.errors import FxoptError
from fxopt.inputs import Inputs
from fxopt.report import spec_of

TIMEOUT = 600.0  # seconds


def peak_memory(artefact: Artefact, inputs: Inputs, threads: int) -> int:
    """Return by how many bytes a fresh process grows, at most, that loads and runs an artefact.

    A tiny model runs there before, so that the engine's own memory does not count. A pickled model
    is read back by that process alone. Raises FxoptError with the reason where nothing can be
    measured.
    """
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    if any(isinstance(leaf, torch.Tensor) and leaf.device.type != "cpu" for leaf in leaves):
        raise FxoptError("It is measured for models on the CPU only.")
    folder = artefact.path.parent
    given = folder / "inputs.pickle"
    _pickle("The inputs", (inputs.args, inputs.kwargs), given)
    tiny = torch.nn.Linear(2, 2).eval()
    backend = artefact.backend
    if artefact.model is not None:
        model, small = folder / "model.pickle", folder / "tiny.pickle"
        _check_importable(artefact.model)
        _pickle("The model", artefact.model, model)
        _pickle("The model", tiny, small)
    else:
        assert backend is not None
        model, small = artefact.path, folder / f"tiny{artefact.path.suffix}"
        compile(tiny, torch.zeros(1, 2), backend=backend, verify="off").save(small)
    job = {
        "model": str(model),
        "tiny": str(small),
        "backend": spec_of(backend) if backend is not None else None,
        "inputs": str(given),
        "threads": threads,
        "modules": _modules(artefact.model),
        "result": str(folder / "result.json"),
    }
    return _run(job, folder / "job.json")


def _check_importable(model: torch.nn.Module) -> None:
    for module in model.modules():
        if type(module).__module__ == "__main__":
            raise FxoptError(
                f"The class {type(module).__name__} is defined in the script itself, where another "
                "process does not find it; put it into a module."
            )


def _modules(model: torch.nn.Module | None) -> list[str]:
    """Return the Python modules that unpickling a model imports, torchvision first."""
    if model is None:
        return []
    values = [value for part in model.modules() for value in (part, *vars(part).values())]
    names = sorted({type(value).__module__ for value in values})
    return ["torchvision", *names] if "torchvision" in sys.modules else names


def _pickle(what: str, value: Any, path: Path) -> None:
    try:
        torch.save(value, path)
    except Exception as error:  # any class may refuse in any way
        raise FxoptError(f"{what} cannot be pickled: {error}") from error


def _run(job: dict[str, Any], path: Path) -> int:
    """Start the fresh process; return the bytes that it reports."""
    path.write_text(json.dumps(job))
    search = os.pathsep.join(folder for folder in sys.path if folder)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fxopt.comparison.probe", str(path)],
            env={**os.environ, "PYTHONPATH": search}, capture_output=True, text=True,
            timeout=TIMEOUT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FxoptError(f"The process that measures took more than {TIMEOUT:.0f} s.") from None
    except OSError as error:
        raise FxoptError(f"No process could be started: {error}.") from error
    result = Path(job["result"])
    if not result.is_file():
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise FxoptError(f"The process that measures ended with {done.returncode}: {lines[-1]}")
    answer = json.loads(result.read_text())
    if "error" in answer:
        raise FxoptError(f"The process that measures failed: {answer['error']}")
    return int(answer["bytes"])
