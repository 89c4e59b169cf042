"""Where a captured node comes from: its module's path and the user's source line."""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import fx

_TORCH = str(Path(torch.__file__).parent)
_FXOPT = str(Path(__file__).parent)
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]+\n\s*([^\n]*)')


@functools.lru_cache(maxsize=65536)
def source_line(stack_trace: str | None) -> str | None:
    """Return 'file.py:12: code' of the innermost frame that is not torch's own."""
    if not stack_trace:
        return None
    frames = _FRAME.findall(stack_trace)
    outside = [frame for frame in frames if not frame[0].startswith((_TORCH, "<"))] or frames
    if not outside:
        return None
    file, line, code = outside[-1]
    return f"{file}:{line}: {code.strip()}"


def module_of(meta: dict[str, Any]) -> tuple[str, str]:
    """Return the path and class name of the innermost module that a node was traced in."""
    stack = meta.get("nn_module_stack")
    return _path_and_class(*list(stack.values())[-1]) if stack else ("", "")


def classes_by_path(nodes: Iterable[fx.Node]) -> dict[str, str]:
    """Return the class name of every module that a node was traced in, outermost included."""
    stacks = (node.meta.get("nn_module_stack") or {} for node in nodes)
    entries = dict.fromkeys(entry for stack in stacks for entry in stack.values())
    return dict(_path_and_class(*entry) for entry in entries)


def _path_and_class(path: str, kind: Any) -> tuple[str, str]:
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return path.split("@")[0].removeprefix("L['self'].").removeprefix("L['self']"), name


def user_frame(trace: TracebackType | None) -> str | None:
    """Return 'file.py:12: code' of the innermost frame of an exception in the user's own code."""
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if not frame.filename.startswith((_TORCH, _FXOPT, "<"))
    ]
    if not frames:
        return None
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"
