"""The tool that measures pruning by the noise a network still removes from photographs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fxopt

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def restoration(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    import restoration

    return restoration


def photograph(height: int = 70, width: int = 90) -> torch.Tensor:
    """An image whose every pixel says where it is: [3, height, width], uint8."""
    place = torch.arange(height * width).reshape(height, width)
    return torch.stack([place % 251, place % 241, place // 251]).to(torch.uint8)


def test_psnr_is_ten_decibels_per_decade_of_squared_error(restoration: ModuleType) -> None:
    clean = torch.full((1, 3, 4, 4), 0.5)
    assert restoration.psnr(clean + 0.1, clean) == pytest.approx(20.0, abs=1e-4)
    assert restoration.psnr(clean + 0.01, clean) == pytest.approx(40.0, abs=1e-4)


def test_noise_is_that_of_training_clipped_and_the_same_every_time(
    restoration: ModuleType,
) -> None:
    images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    images[1] = 0
    first, again = list(restoration.pairs(images)), list(restoration.pairs(images))
    assert all(torch.equal(a, b) for a, b in zip(sum(first, ()), sum(again, ()), strict=True))
    noisy, clean = first[0]
    assert (noisy - clean).std().item() == pytest.approx(25 / 255, rel=0.02)
    assert first[1][0].min() == 0 and not torch.equal(noisy - clean, first[1][0])
    # in dB: 10 log₁₀ (255 / 25)², and what the mean over both images makes of it
    assert restoration.quality(lambda x: x, images[:1]) == pytest.approx(20.17, abs=0.1)


def test_crops_are_squares_of_photographs_in_all_eight_positions(restoration: ModuleType) -> None:
    image = photograph()
    side = restoration.CROP
    position = {}
    for top in range(image.shape[1] - side + 1):
        for left in range(image.shape[2] - side + 1):
            square = image[:, top : top + side, left : left + side]
            for turns in range(4):
                turned = square.rot90(turns, (1, 2))
                position[turned.numpy().tobytes()] = (turns, False)
                position[turned.flip(2).numpy().tobytes()] = (turns, True)
    torch.manual_seed(0)
    found = [restoration.crop(image).numpy().tobytes() for _ in range(100)]
    assert len(set(found)) > 80 and len({position[one] for one in found}) == 8
    middle = restoration.middle(image, side)
    assert torch.equal(middle, image[:, 3:67, 13:77])


def test_crops_follow_the_seed(restoration: ModuleType) -> None:
    crops = restoration.Crops((photograph(), photograph(64, 64)))
    assert len(crops) == restoration.EPOCH
    torch.manual_seed(0)
    first, second = next(iter(crops)), next(iter(crops))
    torch.manual_seed(0)
    again = next(iter(crops))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], second[1])
    noisy, clean = first
    assert noisy.shape == clean.shape == (restoration.BATCH, 3, restoration.CROP, restoration.CROP)
    assert noisy.min() == 0 and noisy.max() == 1 and clean.max() == 250 / 255


def test_a_pruned_network_takes_any_even_size(restoration: ModuleType) -> None:
    torch.manual_seed(0)
    model = restoration.Denoiser(16, 3).eval()
    graph = restoration.captured(model)
    pruned = fxopt.prune(graph, ratio=0.5, of="macs", overrides={"head.*": 0.0})
    stream, inner = restoration.widths(pruned)
    assert stream == 16 and len(inner) == 3 and max(inner) < 16
    ratio = restoration.multiplications(graph) / restoration.multiplications(pruned)
    assert 2.0 <= ratio < 2.3
    # of 3×3 convolutions at half the resolution, and 1×1 ones: per pixel
    inside = 9 * (12 * 16 * 2 + 16 * 16 + 3 * 2 * 16 * 16) / 4 + 2 * 9
    assert restoration.multiplications(graph) == inside
    for height, width in ((64, 96), (100, 30)):
        assert pruned(torch.rand(1, 3, height, width)).shape == (1, 3, height, width)


def test_finished_figures_are_not_measured_again(restoration: ModuleType, tmp_path: Path) -> None:
    key = f"{restoration.CHOSEN}, 7 CPU minutes"
    (tmp_path / "restoration.json").write_text(json.dumps({key: {"tuned": 31.5}}))
    assert restoration.run(7.0, tmp_path) == {"tuned": 31.5}


@pytest.mark.slow
def test_the_trained_network_removes_noise(restoration: ModuleType) -> None:
    import assets

    for asset in ("denoiser", "cats-and-dogs", "imagenet-images"):
        if not assets.is_fetched(asset):
            pytest.skip(f"not fetched: python tools/assets.py {asset}")
    assert restoration.reported().shape == (40, 3, 256, 256)
    images = restoration.validation()
    assert images.shape == (13, 3, 256, 256) and len(restoration.training()) == 200
    assert restoration.quality(lambda x: x, images) == pytest.approx(20.52, abs=0.05)
    assert restoration.quality(restoration.denoiser(), images) == pytest.approx(32.37, abs=0.05)
