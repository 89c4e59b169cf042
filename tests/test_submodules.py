"""Compiling the parts of a model that cannot be captured whole."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt.submodules import CompiledPart
from fxopt.testing import relative_error


class Backbone(nn.Module):
    """Two levels of features, and an attribute that its parent reads."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = F.relu(self.bn(self.conv(x)))
        return collections.OrderedDict(fine=y, coarse=F.max_pool2d(y, 2))


class Detector(nn.Module):
    """Images in a list, a head on every level, and a result whose size depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.heads = nn.ModuleDict({"score": nn.Conv2d(4, 2, 1)})
        self.same = self.heads["score"]
        self.unused = nn.Linear(2, 2)

    def forward(self, images: list[torch.Tensor], threshold: float = 0.5) -> dict[str, Any]:
        kept = []
        for level in self.backbone(torch.stack(images)).values():
            scores = self.same(level).sigmoid().flatten()
            if (scores > threshold).any():
                kept.append(scores[scores > threshold])
        return {"scores": torch.cat(kept), "channels": self.backbone.out_channels}


IMAGES = [torch.linspace(-1, 1, 192).reshape(3, 8, 8), torch.linspace(1, -1, 192).reshape(3, 8, 8)]


def detector() -> Detector:
    return Detector().eval()


@pytest.mark.parametrize("names", ["backbone", ["backbone"], ["backbone", "heads.score"], ["same"]])
def test_named_parts_are_compiled_and_the_rest_is_python(names: Any) -> None:
    model = detector()
    expected = model([*IMAGES])
    with pytest.raises(fxopt.CaptureError, match="# what cannot be captured|cannot be captured"):
        fxopt.capture(model, (IMAGES,))
    compiled = fxopt.compile(model, (IMAGES,), submodules=names)
    assert isinstance(compiled, Detector)
    assert relative_error(compiled(IMAGES), expected) < 1e-5
    for name in [names] if isinstance(names, str) else names:
        assert isinstance(compiled.get_submodule(name), CompiledPart)
        assert not isinstance(model.get_submodule(name), CompiledPart)


def test_a_part_of_two_names_is_compiled_under_both() -> None:
    compiled = fxopt.compile(detector(), (IMAGES,), submodules=["heads.score"])
    assert compiled.same is compiled.heads["score"] and isinstance(compiled.same, CompiledPart)


def test_the_original_model_is_untouched_and_other_weights_are_shared() -> None:
    model = detector().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = fxopt.compile(model, (IMAGES,), submodules=["backbone"])
    compiled(IMAGES)
    assert model.training and model.backbone.training and not compiled.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert compiled.same.weight is model.same.weight
    assert relative_error(copy.deepcopy(compiled)(IMAGES), compiled(IMAGES)) == 0


def test_another_size_needs_dynamic_shapes() -> None:
    model = detector()
    compiled = fxopt.compile(model, (IMAGES,), submodules=["backbone"])
    with pytest.raises(fxopt.ShapeError, match="dimension 0 is 1"):
        compiled(IMAGES[:1])
    dynamic = fxopt.compile(model, (IMAGES,), submodules=["backbone"], dynamic_shapes={0: "n"})
    assert relative_error(dynamic(IMAGES[:1]), model(IMAGES[:1])) < 1e-5


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["backbon"], "Did you mean 'backbone'?"),
        (["heads.scores"], "Did you mean 'heads.score'?"),
        ([""], "Unknown submodule ''"),
        ([3], "Unknown submodule '3'"),
        ([], "names no part"),
        (["unused"], "does not call 'unused'"),
        (["backbone", "backbone.conv"], "'backbone.conv' is a part of 'backbone'"),
    ],
)
def test_names_that_do_not_work(names: Any, part: str) -> None:
    with pytest.raises(fxopt.OptionError) as caught:
        fxopt.compile(detector(), (IMAGES,), submodules=names)
    assert part in str(caught.value)


def test_example_inputs_are_needed_and_must_fit() -> None:
    with pytest.raises(fxopt.OptionError, match="needs example_inputs="):
        fxopt.compile(detector(), submodules=["backbone"])
    with pytest.raises(fxopt.CaptureError, match="does not run on the example inputs"):
        fxopt.compile(detector(), ([IMAGES[0][:2]],), submodules=["backbone"])


def test_the_backbone_of_a_torchvision_detector() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)

    class Features(nn.Module):
        """The part of the detector that needs none of torchvision's compiled operators."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = model.backbone, model.rpn.head

        def forward(self, images: list[torch.Tensor]) -> Any:
            features = list(self.backbone(torch.stack(images)).values())
            return self.head(features), self.backbone.out_channels

    whole, images = Features().eval(), [torch.rand(3, 64, 64)]
    compiled = fxopt.compile(whole, (images,), submodules=["backbone"])
    assert relative_error(compiled(images), whole(images)) < 1e-4
