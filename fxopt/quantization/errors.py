"""The error that calibration raises: what was seen cannot be described by a range."""

from __future__ import annotations

from fxopt.errors import FxoptError


class CalibrationError(FxoptError):
    """A value that is to be quantized was never seen, or is not finite, or is no float."""
