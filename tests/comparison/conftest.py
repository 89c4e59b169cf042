"""No pauses between turns: what is tested here is never a time."""

from __future__ import annotations

import pytest

from fxopt.comparison import race


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "PAUSE", 0.0)
    monkeypatch.setattr(race, "LAP", 0.0)
