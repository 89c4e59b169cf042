"""`fxopt.finetune`: a small, dependable loop that recovers accuracy."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import OptionError
from fxopt.finetuning import weights
from fxopt.finetuning.checkpoint import Checkpoint
from fxopt.finetuning.display import Display
from fxopt.finetuning.history import FineTuned, Model
from fxopt.finetuning.position import Budget
from fxopt.finetuning.run import Run
from fxopt.finetuning.settings import (
    Evaluate,
    MakeOptimizer,
    MakeScheduler,
    Settings,
    spelled,
)
from fxopt.finetuning.step import Step
from fxopt.graph_module import GraphModule
from fxopt.inputs import check_ready, evaluation
from fxopt.objective import Batches, Loss, check_loss


def finetune(
    model: Model,
    data: Batches,
    *,
    loss: Loss | None,
    epochs: int | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    cpu_minutes: float | None = None,
    optimizer: str | MakeOptimizer = "sgd",
    lr: float | None = None,
    weight_decay: float | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    schedule: str | MakeScheduler = "cosine",
    schedule_every: str = "epoch",
    warmup: float = 0.05,
    precision: str | None = None,
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    patience: int | None = None,
    teacher: torch.nn.Module | None = None,
    temperature: float = 4.0,
    teacher_weight: float = 0.5,
    ema: float | None = None,
    clip_grad: float | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    seed: int = 0,
    channels_last: bool = False,
    progress: bool = True,
) -> FineTuned[Model]:
    """Train a copy of a graph or of any module, and return it with the history of its training.

    `model` itself stays as it is. `data` is an iterable of batches, each a pair (inputs, targets)
    for `loss(outputs, targets)`; with `loss=None` each is a dict for a model that returns its own
    `.loss`. Batches are moved to the device of the weights. A single sample behind larger batches
    is skipped where the model has batch norms: its statistics would mean nothing.

    How long: one of `epochs`, `steps`, `minutes` or `cpu_minutes` (of processor time, over all
    threads of this process). Minutes are of training; evaluating and saving do not count.

    How: `optimizer` is "sgd" (lr 0.01, momentum 0.9, nesterov, weight_decay 5e-4), "adamw" (lr
    1e-4, weight_decay 0.01) or a function from a list of parameters to an optimizer. `schedule` is
    "cosine", "linear" or "constant", after a rise over the part `warmup` of the budget: all of them
    follow the budget and end with it. Or it is a function from an optimizer to a scheduler of
    PyTorch, which steps after every epoch, or with `schedule_every="step"` after every batch.
    `precision` is "bf16" or, on a GPU, "fp16" (automatic mixed precision). `ema` is the decay of a
    moving average of the weights, which is then what is evaluated and returned; `clip_grad` the
    largest norm of the gradient.

    Which weights: `evaluate(model)` returns a score, higher is better; it is called before the
    first step, after every `evaluate_every` epochs and at the end, in evaluation mode and without
    gradients, and the weights of the best score are returned. `patience` ends training after this
    many evaluations without a better one.

    From whom: a `teacher`, often the model before pruning, is asked about every batch, and
    `(1 - teacher_weight) · loss + teacher_weight · distillation_loss` is minimized.

    `checkpoint` names a file that the run is kept in: after every epoch, every `checkpoint_minutes`
    minutes, and at Ctrl-C. The same call goes on from there, bit for bit as if it had not been
    stopped (on the CPU, where the data follows from torch's, numpy's and Python's random numbers or
    from a DataLoader's generator). `seed` starts these; they are put back afterwards.

    Raises OptionError for a setting that cannot be, or a checkpoint of another model or other
    settings; ObjectiveError for batches or a loss that cannot be used, such as nan; ArtefactError
    for a checkpoint that cannot be read or written.
    """
    settings = Settings(
        epochs, steps, minutes, cpu_minutes, optimizer, lr, weight_decay, momentum, nesterov,
        schedule, schedule_every, warmup, precision, evaluate_every, patience, temperature,
        teacher_weight, ema, clip_grad, seed, channels_last,
    )  # fmt: skip
    _check(loss, evaluate, patience, checkpoint_minutes)
    student = weights.copy_of(model)
    file = None
    if checkpoint is not None:
        functions = {"loss": spelled(loss), "evaluate": spelled(evaluate)}
        whose = None if teacher is None else type(teacher).__name__
        file = Checkpoint(checkpoint, {
            "model": weights.fingerprint(student), **settings.plain(), **functions,
            "teacher": whose, **_about(data),
        })  # fmt: skip
    teaching = _teaching(teacher)
    step = Step(student, loss, teaching, settings)
    display = Display(Budget.of(settings), shown=progress)
    run = Run(student, step, data, evaluate, settings, display, file, checkpoint_minutes)
    with nullcontext() if teaching is None else evaluation(teaching):
        return run.train()


def _check(loss: Any, evaluate: Any, patience: int | None, checkpoint_minutes: float) -> None:
    check_loss(loss)
    if not checkpoint_minutes >= 0:
        raise OptionError(f"`checkpoint_minutes` must not be negative, got {checkpoint_minutes!r}.")
    if evaluate is not None and not callable(evaluate):
        raise OptionError("`evaluate` must be a function from a model to a score.")
    if patience is not None and evaluate is None:
        raise OptionError("`patience` needs a score to wait for: pass evaluate=.")


def _teaching(teacher: Any) -> torch.nn.Module | None:
    """Return the teacher so that it can be put into evaluation mode without changing the user's."""
    if teacher is None:
        return None
    check_ready(teacher)
    assert isinstance(teacher, torch.nn.Module)
    return teacher.copy().eval() if isinstance(teacher, GraphModule) else teacher


def _about(data: Any) -> dict[str, Any]:
    """Return what a checkpoint can know the data by."""
    return {
        "batches": len(data) if hasattr(data, "__len__") else None,
        "batch size": getattr(data, "batch_size", None),
    }
