"""A lowered graph: an OpenVINO model, compiled for one device, run by a pool of requests."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxopt.backends.openvino.engine import openvino
from fxopt.backends.openvino.tensors import openvino_tensor, torch_tensor
from fxopt.errors import LoweringError, OptionError, ShapeError, unknown_name

if TYPE_CHECKING:
    from fxopt.backends.openvino import OpenVino

_VIRTUAL = ("AUTO", "HETERO", "MULTI", "BATCH")  # devices that are made of others

_MULTIPLYING = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")  # when compiled
_LAYERS = {  # before
    "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData",
    "MatMul",
}  # fmt: skip


@functools.cache
def core() -> Any:
    """Return OpenVINO's entry point, which finds the devices; one serves the whole process."""
    return openvino.Core()


class OpenVinoExecutable:
    """An OpenVINO model, compiled. Any number of threads may run it at once.

    `model` is what is saved, `compiled` is what runs; both are OpenVINO's own objects. `inputs` are
    the names of the graph's placeholders, of which the model has those that it uses, and
    `largest_integer` bounds what these may hold. `lowering` says what the lowering did, `notes`
    also what OpenVINO made of the options on this machine.
    """

    def __init__(
        self,
        model: Any,
        inputs: Sequence[str],
        largest_integer: int,
        options: OpenVino,
        lowering: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.inputs = tuple(inputs)
        self.largest_integer = largest_integer
        self.options = options
        self.lowering = lowering
        settled = _settled(options, model)
        self.compiled = compile_model(model, settled)
        self.notes = (*lowering, _setting(self.compiled, settled))
        self._used = [self._place(port) for port in self.compiled.inputs]
        self._outputs = range(len(self.compiled.outputs))
        self._idle: list[Any] = []  # requests that nobody uses now; append and pop are atomic
        self._workers: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs, in the order of the graph's placeholders; the results are copies.

        Raises ShapeError for an input with integers that are too large for OpenVINO.
        """
        if len(flat) != len(self.inputs):
            raise ShapeError(f"Expected {len(self.inputs)} inputs, got {len(flat)}.")
        # held until the request is done with them
        tensors = [openvino_tensor(flat[place], self.largest_integer) for place in self._used]
        request = self._request()
        try:
            for index, tensor in enumerate(tensors):
                request.set_input_tensor(index, tensor)
            request.infer(share_outputs=True)
            # copies: the next run of this request writes to the same memory
            results = [torch_tensor(request.get_output_tensor(index)) for index in self._outputs]
        except Exception as error:
            raise _failed_run(error, flat) from error
        self._idle.append(request)
        device = next((x.device for x in flat if isinstance(x, torch.Tensor)), None)
        if device is None or device.type == "cpu":
            return tuple(results)
        return tuple(result.to(device) for result in results)

    def _place(self, port: Any) -> int:
        """Return which of the graph's inputs an input of the model is."""
        (place,) = (n for n, name in enumerate(self.inputs) if name in port.get_names())
        return place

    def _request(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:
            return self.compiled.create_infer_request()

    def start(self, *flat: Any) -> Future[tuple[torch.Tensor, ...]]:
        """Start a run and return at once; the future holds what `run` returns, or its error.

        As many runs go on at once as OpenVINO finds best (one per stream), the others wait in
        order. The inputs are read later, so leave them as they are until then.
        """
        # OpenVINO's own callbacks would do without threads, but are not called for failed runs.
        with self._lock:
            if self._workers is None:
                count = int(self.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))
                self._workers = ThreadPoolExecutor(max(count, 1), thread_name_prefix="openvino")
            return self._workers.submit(self.run, *flat)

    def save(self, path: Path, manifest: str) -> None:
        """Write one .ovx file: a zip of the manifest and OpenVINO's own model.xml and model.bin."""
        from fxopt.backends.openvino.artefact import save

        save(self, Path(path), manifest)


# -- what OpenVINO is told -------------------------------------------------------------------------


def compile_model(model: Any, options: OpenVino) -> Any:
    """Compile a model with options; raise OptionError or LoweringError where that is impossible."""
    properties = _properties(options)
    try:
        return core().compile_model(model, options.device, properties)
    except Exception as error:
        raise LoweringError(
            f"OpenVINO cannot compile this model for the device '{options.device}' with "
            f"{properties}: {reason(error)} Use another device, or backend='eager'."
        ) from error


def _settled(options: OpenVino, model: Any) -> OpenVino:
    """Return the options with the precision that the model's layers compute in, if left open.

    A device that does not multiply in that computes in float32.
    """
    if options.inference_precision is not None:
        return options
    found = {
        op.get_output_element_type(0).get_type_name()
        for op in model.get_ops()
        if op.get_type_name() in _LAYERS
    }
    able = [name.lower() for name in _told_by(options.device, "OPTIMIZATION_CAPABILITIES")]
    able = [name.replace("fp", "f") for name in able]
    half = next((one for one in ("bf16", "f16") if one in found and one in able), "f32")
    return replace(options, inference_precision=half)


def _told_by(device: str, name: str) -> list[str]:
    """Return a list that a device tells about itself; empty for one that has no such property."""
    known = _known_properties(device)
    return list(core().get_property(device, name)) if known is not None and name in known else []


def _properties(options: OpenVino) -> dict[str, Any]:
    """Return OpenVINO's properties for the options; what the user names has the last word."""
    exact = options.inference_precision == "f32"
    usual = {
        "PERFORMANCE_HINT": options.performance.upper(),
        "INFERENCE_PRECISION_HINT": options.inference_precision,
        # otherwise layers whose weights are stored as integers round their inputs, too
        "EXECUTION_MODE_HINT": "ACCURACY" if exact else "PERFORMANCE",
    }
    counts = {"INFERENCE_NUM_THREADS": options.threads, "NUM_STREAMS": options.streams}
    asked: dict[str, Any] = {name: count for name, count in counts.items() if count is not None}
    asked |= dict(options.properties)
    known = _known_properties(options.device)
    if known is None:
        return usual | asked
    for name in asked:
        if name not in known:
            raise unknown_name(f"property of OpenVINO's device '{options.device}':", name, known)
    return {name: value for name, value in usual.items() if name in known} | asked


def _known_properties(device: str) -> tuple[str, ...] | None:
    """Return the properties that a device has; None for one that is made of others.

    Raises OptionError for a device that is not here.
    """
    base = device.partition(":")[0].partition(".")[0]
    if base in _VIRTUAL:
        return None
    here = core().available_devices
    if device not in here and base not in {name.partition(".")[0] for name in here}:
        raise OptionError(
            f"OpenVINO finds no device '{device}' on this machine, only {', '.join(here)}. Choose "
            "one of these, or install the driver that the other one needs."
        )
    return tuple(core().get_property(device, "SUPPORTED_PROPERTIES"))


# -- what OpenVINO says ----------------------------------------------------------------------------


def _setting(compiled: Any, options: OpenVino) -> str:
    """Return a sentence about what OpenVINO made of the options on this machine."""
    version = openvino.__version__.partition("-")[0]
    precision = _told(compiled, "INFERENCE_PRECISION_HINT")
    precision = precision.get_type_name() if hasattr(precision, "get_type_name") else "?"
    threads, streams = (_told(compiled, n) for n in ("INFERENCE_NUM_THREADS", "NUM_STREAMS"))
    text = f"OpenVINO {version} computes in {precision} on {options.device}"
    if threads is not None and streams is not None:
        text += f" with {_counted(threads, 'thread')} in {_counted(streams, 'stream')}"
    if precision not in (options.inference_precision, "?"):
        text += f", which has no {options.inference_precision}"
    quantized = sum(map(_is_quantized, compiled.get_runtime_model().get_ops()))
    return text + (f"; {_counted(quantized, 'layer')} in int8." if quantized else ".")


def _is_quantized(layer: Any) -> bool:
    """Whether a layer of a compiled model multiplies integers of 8 bits, and not floats by them."""
    about = layer.get_rt_info()
    kind, precision, kernel = (
        str(about[key].value) if key in about else ""
        for key in ("layerType", "runtimePrecision", "primitiveType")
    )
    is_float = kernel.endswith(("f32", "f16", "bf16"))
    return kind in _MULTIPLYING and precision in ("i8", "u8") and not is_float


def _told(compiled: Any, name: str) -> Any:
    """Return a property of a compiled model, None where its device has no such property."""
    known = compiled.get_property("SUPPORTED_PROPERTIES")
    return compiled.get_property(name) if name in known else None


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" + ("s" if count != 1 else "")


def reason(error: Exception) -> str:
    """Return what an error of OpenVINO's says, without its own source lines."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    text = " ".join(said)[:600] or next(filter(None, lines), type(error).__name__)
    return text if text.endswith(".") else text + "."


def _failed_run(error: Exception, flat: tuple[Any, ...]) -> LoweringError:
    inputs = ", ".join(
        f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x) for x in flat
    )
    return LoweringError(
        f"OpenVINO failed while running the model on {inputs}: {reason(error)} Compile again with "
        "example inputs of these shapes, or use backend='eager'."
    )
