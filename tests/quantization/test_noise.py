"""Which rounding hurts: measured one at a time, and named."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import OptionError, PreconditionError
from fxopt.passes import InsertFakeQuant
from fxopt.quantization.fitting import unrounded
from fxopt.quantization.operator import fake_quantize
from fxopt.testing import noisy


def model() -> nn.Module:
    return noisy(nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1),
    )).eval()  # fmt: skip


def images(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def test_the_coarsest_rounding_hurts_most_and_is_named() -> None:
    insert = InsertFakeQuant(images(), overrides={"2": "w2a8"})
    graph = fxopt.optimize(model(), images()[0], passes=["default", insert])
    noise = fxopt.quantization_noise(graph, images(), samples=8, progress=False)
    assert len(noise.rows) == len(graph.find(fake_quantize)) == 6
    worst, *others = noise.rows
    assert worst.value == "2.weight" and worst.readers == ("2",)
    assert worst.alone < min(row.alone for row in others) - 10
    assert worst.alone == pytest.approx(noise.total, abs=1)
    assert "2.weight" in noise.table(1) and str(noise).startswith("with all 6 roundings")
    first = next(row for row in noise.rows if row.value == "0.weight")
    assert first.here > worst.here  # the first layer does not suffer from the second


def test_it_is_measured_on_what_the_model_returns() -> None:
    graph = fxopt.optimize(
        model(), images()[0], passes=["default", InsertFakeQuant(images(), bits="w4a8")]
    )
    noise = fxopt.quantization_noise(graph, images(), samples=8, progress=False)
    floats = unrounded(graph)
    assert not floats.find(fake_quantize)
    with torch.no_grad():
        wanted = torch.cat([floats(x) for x in images()])
        assert torch.allclose(wanted, torch.cat([model()(x) for x in images()]), atol=1e-5)
        found = torch.cat([graph(x) for x in images()])
        row = noise.rows[0]
        alone = torch.cat([unrounded(graph, keep=row.node)(x) for x in images()])
    for one, dB in ((found, noise.total), (alone, row.alone)):
        ratio = wanted.square().sum() / (one - wanted).square().sum()
        assert 10 * math.log10(ratio) == pytest.approx(dB, abs=1e-3)


def test_it_needs_roundings_and_data() -> None:
    graph = fxopt.optimize(model(), images()[0])
    with pytest.raises(PreconditionError, match="InsertFakeQuant"):
        fxopt.quantization_noise(graph, images())
    graph = fxopt.quantize(model(), images()[0], calibration=images())
    with pytest.raises(OptionError, match="needs data"):
        fxopt.quantization_noise(graph, None)


def test_quantize_is_the_passes_in_one_call() -> None:
    data = images(32)
    names = [
        [step.name for step in fxopt.quantize(model(), data[0], calibration=data, bits=bits,
                                              together=together, target=target).story.steps]
        for bits, together, target in (
            ("w8a8", None, "openvino"), ("w4a8", None, "eager"), ("w8a8", True, "onnx"),
            ("w4a8", False, "openvino"),
        )
    ]  # fmt: skip
    assert [steps[-1] for steps in names] == [
        "insert-fake-quant", "round-weights", "round-weights", "insert-fake-quant"
    ]  # fmt: skip
    assert ["expand-attention" in steps for steps in names] == [True, False, True, True]
    graph = fxopt.quantize(model(), data[0], calibration=data, keep=("4",), together=True)
    assert len(graph.find(fake_quantize)) == 4
    with pytest.raises(TypeError, match="wrong"):
        fxopt.quantize(model(), data[0], calibration=data, wrong=1)
