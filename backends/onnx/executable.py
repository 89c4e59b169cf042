"""A lowered graph: an ONNX model in memory, run by ONNX Runtime, saved and loaded as one file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxopt.errors import LoweringError, ShapeError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_LEVELS = {
    "off": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
# Rounds weights that are floats to 8 bits where the activations around a layer are quantized.
_ROUNDING = ("WeightBiasQuantization",)
STATE_KEY = "fxopt.state"
EMBEDDED = 1024  # constants of fewer bytes go inside the model that the runtime is given


@dataclass(frozen=True)
class RuntimeOptions:
    """How ONNX Runtime shall run a model."""

    threads: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    optimization: str = "all"


@dataclass(frozen=True)
class StateSlot:
    """One tensor that a run changes: where it comes in, and where its new value goes out.

    `initial` names the constant it starts from; None where it is one of the caller's inputs,
    which is then written to in place.
    """

    input: str
    output: str
    initial: bool


class OnnxExecutable:
    """An ONNX model that runs in ONNX Runtime; the session is made at the first run."""

    def __init__(
        self,
        model: ir.Model,
        options: RuntimeOptions,
        notes: tuple[str, ...] = (),
        state: Sequence[StateSlot] = (),
        external_data: bool | None = None,
    ) -> None:
        self.ir_model = model
        self.notes = notes
        self.options = options
        self.state = tuple(state)
        self.external_data = external_data
        self._session: Any = None
        self._has_bfloat16 = False  # in or out; known when there is a session
        self._kept: list[Any] = []  # what the session reads its constants from
        own = {slot.input for slot in self.state if slot.initial}
        self.input_names = [str(v.name) for v in model.graph.inputs if v.name not in own]
        self.output_names = [str(v.name) for v in model.graph.outputs]
        changed = {slot.output for slot in self.state}
        self.result_names = [name for name in self.output_names if name not in changed]
        self._values: dict[str, torch.Tensor] = {}
        self.reset_state()

    # -- looking at it --------------------------------------------------------------------------

    def model_proto(self) -> onnx.ModelProto:
        """Return the model as ONNX's own protobuf message."""
        import onnx_ir as ir

        return ir.to_proto(self.ir_model)

    def op_counts(self) -> dict[str, int]:
        """Return how many ONNX nodes there are of each type, in its own name order."""
        counts = Counter(node.op_type for node in self.ir_model.graph.all_nodes())
        return dict(sorted(counts.items()))

    # -- running --------------------------------------------------------------------------------

    def reset_state(self) -> None:
        """Give the tensors that runs change their initial values again."""
        initializers = self.ir_model.graph.initializers
        for slot in self.state:
            if slot.initial:
                constant = initializers[slot.input].const_value
                assert constant is not None
                self._values[slot.input] = torch_of(constant).clone()

    def run(self, *flat: Any) -> tuple[torch.Tensor, ...]:
        """Run on flat inputs, in the order of the graph's placeholders."""
        if len(flat) != len(self.input_names):
            raise ShapeError(f"Expected {len(self.input_names)} inputs, got {len(flat)}.")
        if not self.output_names:
            return ()  # the model returns Python values only
        given = dict(zip(self.input_names, flat, strict=True))
        try:
            results = self._run({**given, **self._values})
        except Exception as error:
            raise _failed_run(error, given) from error
        outputs = dict(zip(self.output_names, results, strict=True))
        for slot in self.state:
            if slot.initial:
                self._values[slot.input] = outputs[slot.output]
            else:
                given[slot.input].copy_(outputs[slot.output])
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        return tuple(outputs[name].to(device) for name in self.result_names)

    def _run(self, feeds: Mapping[str, Any]) -> list[torch.Tensor]:
        """Run on inputs by name.

        NumPy has no bfloat16, which ONNX Runtime's own values have; at each call it looks at those
        for ten times as long as it takes to start a small model.
        """
        session = self.session()
        if self._has_bfloat16:
            values = {name: ort_value(x) for name, x in feeds.items()}
            results = session.run_with_ort_values(self.output_names, values)
            return [torch_value(result) for result in results]
        arrays = {name: _array(x) for name, x in feeds.items()}
        return [torch.from_numpy(found) for found in session.run(self.output_names, arrays)]

    def session(self) -> Any:
        """Return the ONNX Runtime session, made at the first call."""
        if self._session is None:
            session = self._make_session()
            ports = (*session.get_inputs(), *session.get_outputs())
            self._has_bfloat16 = any(port.type == "tensor(bfloat16)" for port in ports)
            self._session = session
        return self._session

    def _make_session(self) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = getattr(
            onnxruntime.GraphOptimizationLevel, _LEVELS[self.options.optimization]
        )
        settings.log_severity_level = 4  # errors come as exceptions, with our words
        if self.options.threads is not None:
            settings.intra_op_num_threads = self.options.threads
            settings.inter_op_num_threads = 1
        small, weights = split_weights(self.ir_model)
        if weights:
            self._kept = [ort_value(torch_of(tensor)) for tensor in weights.values()]
            settings.add_external_initializers(list(weights), self._kept)
        try:
            return onnxruntime.InferenceSession(
                small.SerializeToString(),
                settings,
                providers=list(self.options.providers),
                disabled_optimizers=list(_ROUNDING),
            )
        except Exception as error:
            raise LoweringError(
                f"ONNX Runtime cannot run this model with {', '.join(self.options.providers)}: "
                f"{_first_line(error)} The model itself is valid ONNX and can be saved; run it "
                "with another provider (providers=…), or compile with precision='fp32'."
            ) from error

    # -- files ----------------------------------------------------------------------------------

    def save(self, path: Path, manifest: str) -> None:
        """Write one .onnx file that holds `manifest`, with its data beside it where it is large."""
        from fxopt.backends.onnx.artefact import save

        save(self, Path(path), manifest)


def torch_of(tensor: Any) -> torch.Tensor:
    """Return an ONNX constant as a torch tensor, over the same memory where that is possible."""
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw
    array = np.array(tensor.numpy())
    import onnx_ir as ir

    if tensor.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if tensor.dtype in (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2):
        kind = (
            torch.float8_e4m3fn if tensor.dtype == ir.DataType.FLOAT8E4M3FN else torch.float8_e5m2
        )
        return torch.from_numpy(array.view(np.uint8)).view(kind)
    return torch.from_numpy(array)


def split_weights(model: ir.Model) -> tuple[onnx.ModelProto, Mapping[str, Any]]:
    """Return the model as a message without its larger constants, and those constants by name.

    The runtime takes them as they lie in memory, so they are neither serialised nor limited to
    the 2 GB that a message holds.
    """
    import onnx_ir as ir

    inputs = {value.name for value in model.graph.inputs}
    weights = {
        str(name): value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= EMBEDDED
        and name not in inputs
    }
    values = model.graph.initializers
    try:
        for name, tensor in weights.items():
            values[name].const_value = ir.ExternalTensor(
                "memory",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )
        proto = ir.to_proto(model)
    finally:
        for name, tensor in weights.items():
            values[name].const_value = tensor
    for message in proto.graph.initializer:
        if message.name in weights:
            del message.external_data[1:]  # the place; ONNX Runtime wants the name alone
    return proto, weights


def ort_value(x: Any) -> Any:
    """Return a tensor or number as ONNX Runtime's value, over the same memory."""
    import onnxruntime

    if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16:
        array = _array(x.detach().view(torch.int16)).view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(_array(x))


def _array(x: Any) -> np.ndarray[Any, Any]:
    """Return a tensor or number as an array, over the same memory where that is possible."""
    if not isinstance(x, torch.Tensor):
        return np.array(x, dtype=np.float64 if isinstance(x, float) else np.int64)
    return x.detach().cpu().contiguous().numpy()


def torch_value(value: Any) -> torch.Tensor:
    """Return ONNX Runtime's value as a tensor."""
    if not all(value.shape()):  # DLPack has no agreed form for tensors without elements
        kind = value.data_type().removeprefix("tensor(").removesuffix(")")
        return torch.empty(value.shape(), dtype=_DTYPES_BY_NAME[kind])
    tensor: torch.Tensor = torch.from_dlpack(value._ortvalue)
    return tensor.bool() if value.data_type() == "tensor(bool)" else tensor


_DTYPES_BY_NAME = {
    "float": torch.float32,
    "double": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def state_text(state: Sequence[StateSlot]) -> str:
    """Return state slots as the text that a file keeps."""
    return json.dumps([[slot.input, slot.output, slot.initial] for slot in state])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if text.endswith(".") else text + "."


def _failed_run(error: Exception, given: Mapping[str, Any]) -> Exception:
    reason = _first_line(error)
    if "INVALID_ARGUMENT" not in reason:
        return LoweringError(
            f"ONNX Runtime failed while running the model: {reason} Run it with another provider "
            "(providers=…), with optimization='basic', or use backend='eager'."
        )
    shapes = ", ".join(
        f"{name} {tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else f"{name} {x!r}"
        for name, x in given.items()
    )
    return ShapeError(
        f"ONNX Runtime refused these inputs ({shapes}): {reason} Compile again with example "
        "inputs of this kind, or name the dimensions that vary in dynamic_shapes."
    )
