"""CIFAR-10 and two networks trained on it, for measuring what pruning costs and training recovers.

    python tools/cifar.py [resnet56] [vgg16]     accuracy on the 10,000 test images

The networks saw the first 45,000 training images. The last 5,000 are clean: calibration, early
stopping and every decision use those. The test set decides nothing.

Images are floats from 0 to 1, [batch, 3, 32, 32], without mean and deviation taken out: that is how
the networks were trained. Alex Krizhevsky: Learning Multiple Layers of Features from Tiny Images,
2009; He et al.: Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2 (here with
1×1 convolutions as shortcuts); Simonyan and Zisserman: Very Deep Convolutional Networks, ICLR 2015.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import assets
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from fxopt.files import atomic_path

TRAINED_ON, TRAINING, TEST = 45_000, 50_000, 10_000


# -- images ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images with labels: uint8 [n, 3, 32, 32], and int64 [n]."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Images:
        """Return the first `count` images."""
        return Images(self.pixels[:count], self.labels[:count])

    def batches(self, size: int = 500) -> Batches:
        """Return all images in order, as batches of `size` and one with the rest."""
        return Batches(self, size)

    def training_batches(
        self, size: int = 128, views: Views | None = None, told: torch.Tensor | None = None
    ) -> Batches:
        """Return the images shuffled, shifted by up to 4 pixels and flipped, in whole batches.

        Random numbers come from torch's global generator: anew in every pass, the same for the
        same seed. With `views`, each image is shown in one of these, and targets are pairs of the
        labels and of what the teacher says of just this view. `told`, logits [images, 10], is what
        he says of each image in any view.
        """
        return Batches(self, size, training=True, views=views, told=told)


@dataclass(frozen=True)
class Views:
    """Some shifts of each image, and what a teacher says of them.

    Shifts as `random_shifts` makes them, [views, images, 3], and logits [views, images, 10].
    """

    shifts: torch.Tensor
    told: torch.Tensor


@dataclass(frozen=True)
class Batches:
    """Pairs (float images [size, 3, 32, 32] from 0 to 1, labels [size]), over and over."""

    images: Images
    size: int
    training: bool = False
    views: Views | None = None
    told: torch.Tensor | None = None

    def __len__(self) -> int:
        whole = len(self.images) / self.size
        return math.floor(whole) if self.training else math.ceil(whole)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, Any]]:
        count = len(self.images)
        order = torch.randperm(count) if self.training else torch.arange(count)
        for chosen in order.split(self.size)[: len(self)]:
            pixels, labels = self.images.pixels[chosen], self.images.labels[chosen]
            if self.views is not None:
                which = torch.randint(len(self.views.shifts), (len(chosen),))
                pixels = shifted(pixels, self.views.shifts[which, chosen])
                yield floats(pixels), (labels, self.views.told[which, chosen])
            elif self.training:
                images = floats(shifted(pixels, random_shifts(len(chosen))))
                yield images, labels if self.told is None else (labels, self.told[chosen])
            else:
                yield floats(pixels), labels


def floats(pixels: torch.Tensor) -> torch.Tensor:
    """Return bytes as the floats from 0 to 1 that the networks take."""
    return pixels.float() / 255


def random_shifts(*shape: int) -> torch.Tensor:
    """Return how far down and right, 0 to 8, windows lie on padded images, and whether to flip.

    int64 [*shape, 3].
    """
    return torch.cat([torch.randint(9, (*shape, 2)), torch.randint(2, (*shape, 1))], dim=-1)


def shifted(pixels: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Return images [n, 3, 32, 32] shifted by up to 4 pixels into black, and flipped, as told.

    `shifts` is [n, 3], see `random_shifts`.
    """
    down, right, flips = shifts.unbind(1)
    windows = F.pad(pixels, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # [n, 3, 9, 9, 32, 32]
    cropped = windows[torch.arange(len(pixels)), :, down, right]
    return torch.where(flips.bool()[:, None, None, None], cropped.flip(3), cropped)


@functools.cache
def training_set() -> Images:
    """Return the 45,000 images that the networks were trained on."""
    pixels, labels = _arrays("training")
    return Images(pixels[:TRAINED_ON], labels[:TRAINED_ON])


@functools.cache
def clean_set() -> Images:
    """Return the 5,000 training images that the networks have not seen."""
    pixels, labels = _arrays("training")
    return Images(pixels[TRAINED_ON:], labels[TRAINED_ON:])


@functools.cache
def test_set() -> Images:
    """Return the 10,000 test images: to report, never to decide."""
    return Images(*_arrays("test"))


@functools.cache
def _arrays(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    path = assets.cache_folder() / f"cifar10-{part}.safetensors"
    if not path.is_file():
        pixels, labels = _unpacked(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file({"pixels": pixels, "labels": labels}, temporary)
    held = load_file(path)
    return held["pixels"], held["labels"]


def _unpacked(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the PNG files: one row of 1,024 pixels per image."""
    from PIL import Image

    count = TRAINING if part == "training" else TEST
    files = ["test_batch.png"]
    if part == "training":
        files = [f"data_batch_{i}.png" for i in range(1, 6)]
    rows = []
    for file in files:
        with Image.open(io.BytesIO(assets.read("cifar10", f"package/{file}"))) as image:
            rows.append(np.asarray(image.convert("RGB")))
    pixels = np.concatenate(rows).reshape(count, 32, 32, 3).transpose(0, 3, 1, 2)
    spelled = "train" if part == "training" else "test"
    labels = json.loads(assets.read("cifar10", f"package/{spelled}_lables.json"))
    if len(labels) != count:
        raise assets.AssetError(f"CIFAR-10 has {len(labels)} labels for {count} {part} images.")
    return torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(labels)


# -- networks --------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The residual network for CIFAR-10 with 6n + 2 layers: [batch, 3, 32, 32] to [batch, 10]."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(n, 16, 16, 1)
        self.layer2 = self._stage(n, 16, 32, 2)
        self.layer3 = self._stage(n, 32, 64, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _stage(n: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = Block(inputs, outputs, stride)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(n - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class Vgg16(nn.Module):
    """VGG-16 for CIFAR-10, with batch norm and dropout: [batch, 3, 32, 32] to [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage, (width, depth) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
            for position in range(depth):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width)]
                layers.append(nn.ReLU())
                if position < depth - 1:
                    layers.append(nn.Dropout(0.3 if stage == 0 else 0.4))
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(512, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def resnet56() -> ResNet:
    """Return the trained ResNet-56, in evaluation mode: 93.20 % on the test set."""
    return _loaded(ResNet(9), "resnet56_cifar10_0.9320_45k")


def vgg16() -> Vgg16:
    """Return the trained VGG-16, in evaluation mode: 92.25 % on the test set."""
    return _loaded(Vgg16(), "vgg16_cifar10_0.9225_45k")


def _loaded(model: Any, file: str) -> Any:
    model.load_state_dict(assets.state_dict("cifar-models", f"torchopt/model/{file}.pth"))
    return model.eval()


NETWORKS = {"resnet56": resnet56, "vgg16": vgg16}


# -- accuracy --------------------------------------------------------------------------------------


def predictions(model: Any, images: Images, size: int = 500) -> torch.Tensor:
    """Return the class that the model says for each image: int64 [n]. Two of them can be paired."""
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch, _ in images.batches(size)])


def accuracy(model: Any, images: Images, size: int = 500) -> float:
    """Return the percentage of images that the model is right about."""
    return (predictions(model, images, size) == images.labels).double().mean().item() * 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=[*NETWORKS])
    for name in parser.parse_args().networks:
        start = time.perf_counter()
        found = accuracy(NETWORKS[name](), test_set())
        print(f"{name}: {found:.2f} % of {TEST:,} test images, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
