"""torchvision beside a CPU-only torch: the one place that makes its models importable."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_library: torch.library.Library | None = None  # must outlive the import: it holds the declarations


def import_torchvision() -> ModuleType:
    """Import torchvision and return it, also where its C++ operators do not load.

    The package index's torchvision is built for CUDA. Beside a CPU-only torch its library of C++
    operators is not loaded, and then `import torchvision` fails, because it registers shapes for
    `torchvision::nms`, which nobody has declared. Its models do not need that operator. So after
    such a failure `nms` and `qnms` are declared (not implemented: calling them still raises), what
    was half imported is forgotten, and the import is tried again. Where the operators load, the
    first import succeeds and nothing is declared.

    Raises ModuleNotFoundError where torchvision is not installed.
    """
    global _library
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error) or _library is not None:
            raise
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")
