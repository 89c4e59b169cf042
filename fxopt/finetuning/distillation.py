"""Learn from a teacher: the distance between what two classifiers say, softened."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxopt.objective import ObjectiveError


def distillation_loss(student: Any, teacher: Any, temperature: float) -> torch.Tensor:
    """Return T² · KL(softmax(teacher / T) ‖ softmax(student / T)), averaged over the samples.

    Hinton, Vinyals and Dean: Distilling the Knowledge in a Neural Network, 2015, section 2. Classes
    stand along the second dimension of the logits, [batch, classes, …], as cross entropy has them,
    or along the last of a language model's `.logits`.
    """
    told, said = _logits(teacher, "teacher"), _logits(student, "model")
    told = told.to(said.device)
    if told.shape != said.shape:
        raise ObjectiveError(
            f"The teacher's logits have the shape {list(told.shape)}, the model's "
            f"{list(said.shape)}: they must be the same."
        )
    dim = 1 if isinstance(student, torch.Tensor) else -1
    target = F.log_softmax(told.float() / temperature, dim)
    found = F.log_softmax(said.float() / temperature, dim)
    divergence = F.kl_div(found, target, reduction="none", log_target=True).sum(dim)
    return divergence.mean() * temperature**2


def _logits(outputs: Any, whose: str) -> torch.Tensor:
    if isinstance(outputs, dict):
        outputs = outputs.get("logits")
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, torch.Tensor) or outputs.dim() < 2:
        raise ObjectiveError(
            f"Learning from a teacher needs logits, [batch, classes, …]: the {whose} must return "
            f"them, or an object with `.logits`; it returned {type(outputs).__name__}."
        )
    return outputs
