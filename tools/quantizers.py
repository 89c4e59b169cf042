"""Other projects' ways from a float model to an int8 one, as their documentation shows them.

Each takes a float model, batches to calibrate on and a number of threads, and returns a function of
the input. Raises NotOffered where it is not installed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from engines import NotOffered

import fxopt

Model = Callable[[torch.Tensor], Any]


def float_file(model: torch.nn.Module, x: torch.Tensor, folder: str) -> str:
    """Write fxopt's ONNX file of a float model, which both peers read; return its path."""
    path = Path(folder) / "float.onnx"
    fxopt.compile(model, x, backend="onnx").save(path)
    return str(path)


def onnx_runtime(
    model: torch.nn.Module, batches: Sequence[torch.Tensor], threads: int
) -> Model:
    """`quantize_static` of ONNX Runtime: QDQ, weights per channel, otherwise as it comes."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = iter([{name: batch.numpy()} for batch in batches])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        path = float_file(model, batches[0], folder)
        prepared, done = f"{folder}/prepared.onnx", f"{folder}/quantized.onnx"
        quant_pre_process(path, prepared)
        name = onnxruntime.InferenceSession(path).get_inputs()[0].name
        quantize_static(
            prepared, done, Reader(name), quant_format=QuantFormat.QDQ, per_channel=True
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(done, options)
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def nncf(
    model: torch.nn.Module, batches: Sequence[torch.Tensor], threads: int
) -> Model:
    """`nncf.quantize`, run by OpenVINO; a model with layer norms is a transformer to it."""
    try:
        import nncf
        import openvino
    except ImportError:
        raise NotOffered("pip install nncf") from None
    is_transformer = any(isinstance(part, torch.nn.LayerNorm) for part in model.modules())
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        read = core.read_model(float_file(model, batches[0], folder))
        data = nncf.Dataset([batch.numpy() for batch in batches])
        quantized = nncf.quantize(read, data, subset_size=len(batches), model_type=kind)
        compiled = core.compile_model(quantized, "CPU", {
            "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        })  # fmt: skip
    request = compiled.create_infer_request()

    def call(x: torch.Tensor) -> torch.Tensor:
        found = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(next(iter(found.values())))

    return call


def torchao(
    model: torch.nn.Module, batches: Sequence[torch.Tensor], threads: int
) -> Model:
    """PyTorch's own way, PT2E with the quantizer for x86, compiled by Inductor, weights frozen."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError:
        raise NotOffered("pip install torchao") from None
    import torch._inductor.config

    exported = torch.export.export(copy.deepcopy(model), (batches[0],)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for batch in batches:
        prepared(batch)
    torch._dynamo.reset()
    compiled: Model = torch.compile(convert_pt2e(prepared))
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled(batches[0])
    return compiled
