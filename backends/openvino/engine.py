"""OpenVINO itself. Its Python package reports each import to its makers; from here it does not."""

from __future__ import annotations

import sys

_TELEMETRY = "openvino_telemetry"  # OpenVINO does without it where it is not installed


def _import_without_telemetry() -> None:
    present = _TELEMETRY in sys.modules
    kept = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # whoever imports it: ImportError
    try:
        import openvino  # noqa: F401
    finally:
        del sys.modules[_TELEMETRY]
        if present:
            sys.modules[_TELEMETRY] = kept  # type: ignore[assignment]


_import_without_telemetry()

import openvino  # noqa: E402

__all__ = ["openvino"]
