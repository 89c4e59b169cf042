"""The fresh process that measures memory: `python -m fxopt.comparison.probe JOB`.

`fxopt.comparison.memory` starts it and writes the job: what to load, and what to run it on.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fxopt.compiled import load
from fxopt.vision import import_torchvision

CALLS = 3


def main(path: str) -> None:
    """Do one job; write by how many bytes this process grew, or why it failed."""
    job = json.loads(Path(path).read_text())
    try:
        answer: dict[str, Any] = {"bytes": growth(job)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    Path(job["result"]).write_text(json.dumps(answer))


def growth(job: dict[str, Any]) -> int:
    """Return by how many bytes loading and running the model makes this process grow, at most."""
    torch.set_num_threads(job["threads"])
    for name in job["modules"]:
        if name == "torchvision":
            import_torchvision()  # which gets around operators that do not load
        importlib.import_module(name)
    run(job["tiny"], job["backend"], (torch.zeros(1, 2),), {})
    args, kwargs = torch.load(job["inputs"], weights_only=False)
    forget_peak()
    before, _ = resident()
    run(job["model"], job["backend"], args, kwargs)
    _, peak = resident()
    return max(peak - before, 0)


def run(path: str, backend: str | None, args: Any, kwargs: Any) -> None:
    """Load a model and call it."""
    if backend is None:  # unpickling can run code: whoever started this process wrote the file
        model = torch.load(path, weights_only=False)
    else:
        model = load(path, backend=backend)
    with torch.no_grad():
        for _ in range(CALLS):
            model(*args, **kwargs)


def forget_peak() -> None:
    """Let Linux count the peak from here on; elsewhere it counts from the start."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> tuple[int, int]:
    """Return the bytes that this process holds in memory now, and held at most."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return _bytes(sizes["VmRSS"]), _bytes(sizes["VmHWM"])
    if sys.platform == "darwin":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes
        return peak, peak
    raise OSError(f"nothing is known about the memory of a process on {sys.platform}")


def _bytes(text: str) -> int:
    """Read `1234 kB`."""
    return int(text.split()[0]) * 1024


if __name__ == "__main__":
    main(sys.argv[1])
