"""Import torchvision where its compiled operators cannot be loaded.

The torchvision that a package index serves is built for CUDA. Beside a torch built for the CPU
alone its compiled library does not load, and `import torchvision` fails: "operator torchvision::nms
does not exist". Only the detectors need those operators, and only when they run.

`import_torchvision` declares the two operators that torchvision's Python code registers shapes for
(`nms` and `qnms`), without an implementation, and imports again. Where the compiled operators load,
nothing is declared. Calling a declared operator raises NotImplementedError.

A user in that state can do the same, or install a torchvision that was built for the same torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType

import torch

from fxopt.errors import FxoptError

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Import torchvision and return it; raise FxoptError where it is not installed."""
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise FxoptError("torchvision is not installed. pip install 'fxopt[vision]'") from None
    except RuntimeError as error:
        if not lacks_operators(error):
            raise
    _declare_operators()
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    return importlib.import_module("torchvision")


def lacks_operators(error: BaseException) -> bool:
    """Whether an import failed because torchvision's compiled operators did not load."""
    return "operator torchvision::" in str(error) and "does not exist" in str(error)


@functools.cache
def _declare_operators() -> torch.library.Library:
    """Declare what the compiled library would; the declarations live as long as the result."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _NMS)
    return library


def is_installed() -> bool:
    """Whether there is a torchvision to import."""
    return importlib.util.find_spec("torchvision") is not None
