from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.finetuning.distillation import distillation_loss
from fxopt.objective import ObjectiveError
from tests.finetuning.subjects import graph, images, network, same, shuffled, tune, weights


def divergence(student: Any, teacher: Any) -> float:
    x, _ = images()
    with torch.no_grad():
        said, told = F.log_softmax(student(x), 1), F.log_softmax(teacher(x), 1)
    return F.kl_div(said, told, reduction="batchmean", log_target=True).item()


def test_the_loss_is_hintons_in_numbers() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    p = torch.softmax(teacher[0] / 2, 0)
    q = torch.softmax(student[0] / 2, 0)
    expected = 4 * (p[0] * (p[0] / q[0]).log() + p[1] * (p[1] / q[1]).log())
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), expected)
    assert distillation_loss(teacher, teacher, 2.0).item() == 0.0


def test_it_is_averaged_over_samples_and_places() -> None:
    student, teacher = torch.randn(3, 5, 2, 2), torch.randn(3, 5, 2, 2)
    each = [
        distillation_loss(student[i : i + 1, :, j, k], teacher[i : i + 1, :, j, k], 1.0)
        for i in range(3)
        for j in range(2)
        for k in range(2)
    ]
    torch.testing.assert_close(distillation_loss(student, teacher, 1.0), torch.stack(each).mean())


@pytest.mark.parametrize("kind", ["module", "graph"])
def test_a_teacher_is_followed_and_left_alone(kind: str) -> None:
    trained = tune(network(), shuffled(), epochs=6).model
    teacher = trained if kind == "module" else graph(trained)
    teacher.train()
    before = weights(teacher)
    student = network()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    result = tune(student, shuffled(), epochs=4, teacher=teacher, teacher_weight=1.0)
    assert teacher.training and same(weights(teacher), before)
    teacher.eval()
    assert divergence(result.model, teacher) < 0.5 * divergence(student, teacher)


def test_the_weight_of_the_teacher() -> None:
    data, teacher = [images(16)], network()
    teacher[9].weight.data *= 3
    student = network()
    student[8] = nn.Identity()

    def first_loss(**options: Any) -> float:
        return tune(student, data, epochs=1, teacher=teacher, **options).history[1].loss

    own, all_his = first_loss(teacher_weight=0.0), first_loss(teacher_weight=1.0)
    assert first_loss(teacher_weight=0.25) == pytest.approx(0.75 * own + 0.25 * all_his)
    x, y = data[0]
    with torch.no_grad():
        said, told = copy.deepcopy(student).train()(x), teacher.eval()(x)
    assert own == pytest.approx(F.cross_entropy(said, y).item())
    assert all_his == pytest.approx(distillation_loss(said, told, 4.0).item())


def test_a_teacher_of_other_classes_is_refused() -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ObjectiveError, match=r"\[16, 3\], the model's \[16, 2\].*batch 1"):
        tune(network(), shuffled(), teacher=other)


def test_a_teacher_without_logits_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [x, x]

    with pytest.raises(ObjectiveError, match="the teacher must return"):
        tune(network(), shuffled(), teacher=Pair())
    with pytest.raises(fxopt.CaptureError, match=r"Expected an nn\.Module"):
        tune(network(), shuffled(), teacher=F.relu)


def test_a_teacher_who_says_nan_is_found() -> None:
    teacher = network()
    with torch.no_grad():
        teacher[9].bias[0] = float("nan")
    with pytest.raises(ObjectiveError, match="distance to the teacher is nan.*batch 1 of epoch 1"):
        tune(network(), shuffled(), teacher=teacher)
