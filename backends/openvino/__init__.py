"""OpenVINO: the graph as OpenVINO's own model, compiled for this processor (or another device).

The graph goes there through our ONNX emitter, in memory and without its weights: OpenVINO reads
those where they lie. Its PyTorch front end has no rule for `aten.conv2d` or `aten.layer_norm` as
the dialect has them, so it would need an export of the graph, that is a second trace. On six
networks that took 4 to 20 times as long, for no gain in latency (docs/openvino.md).

`openvino` is imported when something is lowered or loaded, not before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fxopt.contract import Pass
from fxopt.errors import check_option
from fxopt.graph_module import GraphModule

if TYPE_CHECKING:
    from fxopt.backends.openvino.executable import OpenVinoExecutable

PRECISIONS = ("f32", "bf16", "f16")
PERFORMANCE = ("latency", "throughput")


_require = partial(check_option, "OpenVino")


@dataclass(frozen=True)
class OpenVino:
    """Lower to OpenVINO; often the fastest engine on Intel processors.

    `threads` and `streams`: of the CPU; None leaves them to OpenVINO, which takes every core.
    `performance`: "latency" answers one call as fast as it can, "throughput" many at once.
    `inference_precision`: what it computes in, "f32", "bf16" or "f16"; None: what the graph's
    layers compute in, so float32 even where the processor has bfloat16.
    `device`: "CPU", "GPU", "NPU", "AUTO", "HETERO:GPU,CPU".
    `properties`: further properties of OpenVINO by name, as in {"ENABLE_CPU_PINNING": False}.
    """

    threads: int | None = None
    inference_precision: str | None = None
    performance: str = "latency"
    streams: int | None = None
    device: str = "CPU"
    properties: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()  # kept as sorted pairs

    name: ClassVar[str] = "openvino"
    suffix: ClassVar[str] = ".ovx"
    quantization: ClassVar[str] = "openvino"  # whose kernels precision="int8" is for

    def __post_init__(self) -> None:
        for option in ("threads", "streams"):
            value = getattr(self, option)
            _require(
                value is None or (type(value) is int and 0 < value < 2**31),
                option,
                value,
                "a positive integer, or None to let OpenVINO choose",
            )
        if self.inference_precision is not None:
            _require_one_of(PRECISIONS, "inference_precision", self.inference_precision)
        _require_one_of(PERFORMANCE, "performance", self.performance)
        _require(
            isinstance(self.device, str) and bool(self.device.strip()),
            "device",
            self.device,
            "the name of one of OpenVINO's devices, such as 'CPU'",
        )
        object.__setattr__(self, "properties", _pairs(self.properties))

    @property
    def legalize(self) -> tuple[Pass, ...]:
        """What the onnx backend does, for the graph goes through ONNX."""
        from fxopt.backends.onnx import Onnx

        return Onnx(providers=("OpenVINOExecutionProvider",)).legalize

    def missing(self) -> str | None:
        """Return None where OpenVINO is installed, else what to install."""
        if importlib.util.find_spec("openvino") is None:
            return "pip install openvino"
        return None

    def lower(self, graph: GraphModule) -> OpenVinoExecutable:
        """Lower a graph; raise LoweringError, naming the node, for what OpenVINO cannot express.

        Raises OptionError for a device or a property that OpenVINO does not have here.
        """
        from fxopt.backends.openvino.lower import lower

        return lower(graph, self)

    def load(self, path: Path) -> tuple[OpenVinoExecutable, str]:
        """Read an .ovx file; return what runs it, compiled with these options, and the manifest."""
        from fxopt.backends.openvino.artefact import load

        return load(Path(path), self)


def _pairs(properties: Any) -> tuple[tuple[str, Any], ...]:
    """Return properties as sorted pairs, so that equal options are equal."""
    try:
        given = dict(properties)
    except (TypeError, ValueError):
        given = {None: None}
    good = all(
        isinstance(name, str) and name and isinstance(value, (str, int, float, bool))
        for name, value in given.items()
    )
    _require(
        good,
        "properties",
        properties,
        "a dict of OpenVINO's names for properties, and their values: text or numbers",
    )
    return tuple(sorted(given.items()))


def _require_one_of(allowed: tuple[str, ...], option: str, value: Any) -> None:
    known = isinstance(value, str) and value in allowed
    _require(known, option, value, "one of " + ", ".join(map(repr, allowed)))
