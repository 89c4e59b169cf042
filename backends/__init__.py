"""The backends, and which of them can be used here."""

from fxopt.backends.auto import Auto
from fxopt.backends.eager import Eager
from fxopt.backends.inductor import Inductor
from fxopt.backends.onnx import Onnx
from fxopt.backends.openvino import OpenVino
from fxopt.backends.torchscript import TorchScript
from fxopt.registry import classes


def available() -> dict[str, str | None]:
    """Return each backend's name, with None where it can be used, else what it needs."""
    return {name: cls().missing() for name, cls in classes("backends").items()}


__all__ = ["Auto", "Eager", "Inductor", "Onnx", "OpenVino", "TorchScript", "available"]
