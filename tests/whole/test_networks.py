"""Real networks through the whole compiler: the operators that are left, and the numbers."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.inputs import as_inputs
from fxopt.testing import op_counts, relative_error
from fxopt.vision import import_torchvision

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from zoo_models import randomize, subjects

import_torchvision()

# What is left after the default passes: every operator call, and those that must be gone.
LEFT: dict[str, tuple[int, dict[str, int]]] = {
    "torchvision/resnet18": (48, {"batch_norm": 0, "conv2d": 20, "relu": 17, "add": 8}),
    "torchvision/mobilenet_v3_small": (120, {"batch_norm": 0, "dropout": 0, "conv2d": 51}),
    "torchvision/shufflenet_v2_x0_5": (141, {"batch_norm": 0, "conv2d": 56}),
    "torchvision/swin_t": (296, {"dropout": 0, "full": 0, "arange": 0, "index": 0, "mul": 0}),
    "timm/levit_128s": (210, {"batch_norm": 0, "linear": 47}),
    "timm/test_convnext": (93, {"batch_norm": 0, "mul": 0}),
    "timm/test_nfnet": (85, {"batch_norm": 0, "var": 0, "conv2d": 33}),
    "hf/bert": (50, {"dropout": 0, "full": 0}),
    "hf/gpt2": (51, {"dropout": 0, "full": 0}),
    "hf/t5_encoder": (42, {"dropout": 0, "log": 0, "where": 0}),
    "hf/segformer": (143, {"batch_norm": 0, "dropout": 0}),
}


@pytest.fixture(scope="module", autouse=True)
def _collect() -> Any:
    yield
    gc.collect()


@pytest.mark.parametrize("name", LEFT)
def test_network(name: str) -> None:
    subject = next(one for one in subjects(name) if one.name == name)
    model, inputs = subject.make()
    randomize(model)
    call = as_inputs(inputs)
    with torch.no_grad():
        expected = model(*call.args, **call.kwargs)

    compiled = fxopt.compile(model, inputs, backend="onnx")

    total, counts = LEFT[name]
    found = op_counts(compiled.graph)
    assert {op: found.get(op, 0) for op in counts} == counts
    assert sum(found.values()) == total
    assert compiled.executable.notes == ()
    assert relative_error(compiled(*call.args, **call.kwargs), expected) <= 1e-5
    assert relative_error(compiled.graph(*call.args, **call.kwargs), expected) <= 1e-5
