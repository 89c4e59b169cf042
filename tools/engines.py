"""The engines that `bench.py engines` races: ours, and those that people use today.

Each is built from the same model and the same input, and is then a call without arguments. The
peers are given what makes them fast: channels last where it helps, frozen weights, the number of
threads, all graph optimizations.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fxopt

Call = Callable[[], Any]
ENGINES: dict[str, Callable[[Task], Call]] = {}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALIBRATED_ON = 8  # random batches: for times, not for accuracy


@dataclass(frozen=True)
class Task:
    """What an engine is to run: a model in evaluation mode, one input, and how."""

    model: torch.nn.Module
    x: torch.Tensor
    precision: str = "fp32"
    threads: int = 2

    def typed(self) -> tuple[torch.nn.Module, torch.Tensor]:
        """Return a copy of the model, and the input, in the precision."""
        if self.precision not in DTYPES:
            raise NotOffered("not as it is: see the engines that quantize")
        dtype = DTYPES[self.precision]
        x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        return copy.deepcopy(self.model).to(dtype), x


    def calibration(self) -> list[torch.Tensor]:
        """Return inputs like the one to run, to calibrate on."""
        generator = torch.Generator().manual_seed(0)
        if not self.x.is_floating_point():
            largest = int(self.x.max()) + 1
            return [
                torch.randint(largest, self.x.shape, generator=generator).to(self.x.dtype)
                for _ in range(CALIBRATED_ON)
            ]
        return [torch.randn(self.x.shape, generator=generator) for _ in range(CALIBRATED_ON)]


class NotOffered(Exception):
    """An engine has no such precision, or is not installed."""


def engine(name: str) -> Callable[[Callable[[Task], Call]], Callable[[Task], Call]]:
    """Register what builds an engine's call."""

    def register(build: Callable[[Task], Call]) -> Callable[[Task], Call]:
        ENGINES[name] = build
        return build

    return register


# -- PyTorch ------------------------------------------------------------------------------------


@engine("eager")
def eager(task: Task) -> Call:
    """The model as it is; in float32 beside those that are quantized."""
    model, x = (task.model, task.x) if task.precision == "int8" else task.typed()
    return lambda: model(x)


@engine("eager, channels last")
def eager_channels_last(task: Task) -> Call:
    """The model and its image channels last."""
    model, x = task.typed()
    if x.dim() != 4:
        raise NotOffered("its input is no image")
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    return lambda: model(x)


@engine("torch.jit")
def torchscript(task: Task) -> Call:
    """Traced, frozen, and optimized for inference."""
    model, x = task.typed()
    traced = torch.jit.freeze(torch.jit.trace(model, x, strict=False))
    module = torch.jit.optimize_for_inference(traced)
    return lambda: module(x)


@engine("Inductor")
def inductor(task: Task) -> Call:
    """torch.compile with frozen weights."""
    import torch._inductor.config

    model, x = task.typed()
    torch._dynamo.reset()
    module = torch.compile(model)

    def call() -> Any:
        return module(x)

    with torch._inductor.config.patch(freezing=True):
        call()
    return call


# -- other engines ------------------------------------------------------------------------------


def _exported(task: Task) -> bytes:
    """Return torch's own ONNX export of the model, optimized, as everybody gets it."""
    if task.precision != "fp32":
        raise NotOffered("torch's export is raced in float32")
    program = torch.onnx.export(task.model, (task.x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


@engine("torch.onnx in ONNX Runtime")
def onnx_runtime(task: Task) -> Call:
    """torch's ONNX export in ONNX Runtime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = task.threads
    session = onnxruntime.InferenceSession(
        _exported(task), settings, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: task.x.numpy()}
    return lambda: session.run(None, feed)


@engine("OpenVINO")
def openvino(task: Task) -> Call:
    """torch's ONNX export in OpenVINO; bfloat16 is a hint that it takes for a float32 model."""
    try:
        import openvino as ov
    except ImportError:
        raise NotOffered("openvino is not installed") from None
    if task.precision == "int8":
        raise NotOffered("see NNCF")
    hints = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
    core = ov.Core()
    content = _exported(Task(task.model, task.x, "fp32", task.threads))
    compiled = core.compile_model(core.read_model(content, b""), "CPU", {
        "INFERENCE_PRECISION_HINT": hints[task.precision],
        "INFERENCE_NUM_THREADS": task.threads, "PERFORMANCE_HINT": "LATENCY",
    })  # fmt: skip
    request, x = compiled.create_infer_request(), task.x.numpy()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)


# -- others that quantize -----------------------------------------------------------------------


def _quantized(how: str) -> Callable[[Task], Call]:
    def build(task: Task) -> Call:
        import quantizers

        if task.precision != "int8":
            raise NotOffered("it quantizes")
        call = getattr(quantizers, how)(task.model, task.calibration(), task.threads)
        return lambda: call(task.x)

    return build


ENGINES["ONNX Runtime, quantize_static"] = _quantized("onnx_runtime")
ENGINES["OpenVINO, NNCF"] = _quantized("nncf")
ENGINES["Inductor, torchao PT2E"] = _quantized("torchao")


# -- ours ---------------------------------------------------------------------------------------


def _ours(backend: str) -> Callable[[Task], Call]:
    def build(task: Task) -> Call:
        if task.precision not in ("fp32", "int8") and backend != "eager":
            raise NotOffered(f"fxopt {backend} is raced in float32 and int8")
        if task.precision == "int8" and backend == "auto":
            raise NotOffered("each engine rounds elsewhere")
        options: dict[str, Any] = {} if backend == "eager" else {"threads": task.threads}
        precision = None if task.precision == "fp32" else task.precision
        if precision == "int8":
            options["calibration"] = task.calibration()
        compiled = fxopt.compile(
            task.model, task.x, backend=backend, precision=precision, verify="off", **options
        )
        return lambda: compiled(task.x)

    return build


for _backend in ("eager", "onnx", "openvino", "auto"):
    ENGINES[f"fxopt {_backend}"] = _ours(_backend)


# -- one engine on one model --------------------------------------------------------------------


def built(name: str, task: Task) -> tuple[Call, float]:
    """Build an engine, run it once without gradients, and return its call and the seconds."""
    started = time.perf_counter()
    with torch.no_grad():
        call = ENGINES[name](task)
        call()
    return call, time.perf_counter() - started


def first_output(result: Any) -> torch.Tensor:
    """Return the first tensor of whatever an engine returns, in float64."""
    while not isinstance(result, (torch.Tensor, np.ndarray)):
        values = result.values() if hasattr(result, "values") else result
        result = next(iter(values))
    return torch.as_tensor(result).double()


def peak_memory(subject: str, name: str, precision: str, batch: int, threads: int) -> float:
    """Return by how many MiB a fresh process grows, at most, that builds and runs an engine."""
    command = [sys.executable, __file__, subject, name, precision, str(batch), str(threads)]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return float(json.loads(done.stdout.splitlines()[-1]))


def _probe(subject_name: str, name: str, precision: str, batch: int, threads: int) -> None:
    from subjects import subject

    from fxopt.comparison.probe import forget_peak, resident

    torch.set_num_threads(threads)
    model, x = subject(subject_name)
    task = Task(model, x.repeat(batch, *[1] * (x.dim() - 1)), precision, threads)
    forget_peak()
    before, _ = resident()
    call, _ = built(name, task)
    with torch.no_grad():
        for _ in range(3):
            call()
    print(json.dumps((resident()[1] - before) / 2**20))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _probe(*sys.argv[1:4], *map(int, sys.argv[4:]))
