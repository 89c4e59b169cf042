"""With oneDNN's own library and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fxopt.backends.eager.onednn import library


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let there be no library of oneDNN's beside PyTorch's."""
    monkeypatch.setenv("FXOPT_ONEDNN", "")
    library.cache_clear()
    yield
    library.cache_clear()
