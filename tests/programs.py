"""Programs that tests need and that no Python package holds; `make test` installs them."""

from __future__ import annotations

import os
import shutil

import pytest

IN_CI = bool(os.environ.get("CI"))  # there nothing may be skipped in silence


def _needs(program: str, package: str) -> pytest.MarkDecorator:
    missing = shutil.which(program) is None and not IN_CI
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


needs_dot = _needs("dot", "Graphviz")
needs_chromium = _needs("chromium", "Chromium")
