"""Why a candidate could not be built or run, in words for a table's footnote."""

from __future__ import annotations

import textwrap

from fxopt.errors import FxoptError

LONGEST = 400  # letters


def reason_of(error: BaseException) -> str:
    """Return what an error says: ours in full or nearly, of others the type and the first line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, FxoptError):
        return textwrap.shorten(" ".join(lines), LONGEST, placeholder=" …")
    text = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    return text if text.endswith(".") else f"{text}."
