"""The C++ compiler that Inductor calls: whether there is one, and what to install where not."""

from __future__ import annotations

import os
import shutil
import sys

_DEFAULT = {"darwin": "clang++", "win32": "cl"}  # g++ elsewhere
_INSTALL = {
    "linux": "apt-get install g++, or your distribution's package",
    "darwin": "xcode-select --install",
    "win32": "the Build Tools for Visual Studio; then start from their command prompt",
}


def missing_compiler() -> str | None:
    """Return None where the compiler that Inductor would call can be found, else what to install.

    Nothing is run. Inductor calls what `torch._inductor.config.cpp.cxx` names, which begins as the
    environment's CXX, or else g++.
    """
    wanted = _wanted()
    if any(shutil.which(name) for name in wanted):
        return None
    remedy = _INSTALL.get(sys.platform, "one such as g++")
    return f"It needs a C++ compiler, and finds no {' or '.join(wanted)}. Install: {remedy}."


def _wanted() -> list[str]:
    config = sys.modules.get("torch._inductor.config")  # not imported for a question
    if config is None:
        return [os.environ.get("CXX") or _DEFAULT.get(sys.platform, "g++")]
    names = config.cpp.cxx
    return [name for name in (names if isinstance(names, (list, tuple)) else [names]) if name]
