"""How far a candidate's outputs lie from the baseline's, and how often both name the same class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.comparison.arguments import CallForm
from fxopt.comparison.candidate import Candidate
from fxopt.comparison.failure import reason_of
from fxopt.difference import relative_error
from fxopt.errors import FxoptError, OptionError
from fxopt.inputs import Inputs
from fxopt.provenance import user_frame

Logits = Callable[[Any], torch.Tensor]  # the output of a call to class scores, classes last


@dataclass
class Agreement:
    """What was found so far; nothing of the outputs themselves is kept."""

    max_error: float = 0.0  # max |Δ| over all floating-point outputs
    relative_error: float = 0.0  # max |Δ| / max |reference|, the worst output of the worst call
    all_zero: bool | None = None  # whether every reference was; None without any
    other_integers: bool = False  # whether integer or boolean outputs differ
    decisions: int = 0  # how many classes were named
    same: int = 0  # as often as not the baseline's
    labels: int = 0
    correct: int = 0

    def add_outputs(self, found: Any, expected: Any) -> None:
        """Take in the errors of one call."""
        ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
        if len(ours) != len(theirs):
            self.max_error = self.relative_error = math.inf
            return
        for a, b in zip(ours, theirs, strict=True):
            if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
                continue
            a = a.to(b.device)
            if not (b.is_floating_point() or b.is_complex()):
                self.other_integers |= not (a.shape == b.shape and bool((a == b).all()))
                continue
            wide = torch.complex128 if b.is_complex() else torch.float64
            a, b = a.detach().to(wide), b.detach().to(wide)
            self.all_zero = self.all_zero is not False and not bool(b.any())
            relative = relative_error(a, b)
            absolute = math.inf if relative == math.inf else _largest(a - b)
            self.relative_error = max(self.relative_error, relative)
            self.max_error = max(self.max_error, absolute)

    def add_classes(self, found: torch.Tensor, expected: torch.Tensor, label: Any) -> None:
        """Take in the classes of one call: indices, and labels of the same shape or None."""
        found = found.to(expected.device)
        if found.shape == expected.shape:
            self.same += int((found == expected).sum())
        self.decisions += expected.numel()
        if label is None:
            return
        try:
            labels = torch.as_tensor(label, device=found.device)
        except (TypeError, ValueError) as error:
            raise OptionError(f"A label of data= is no class index: {label!r} ({error}).") from None
        if labels.is_floating_point() or labels.numel() != found.numel():
            raise OptionError(
                f"A label of data= is {tuple(labels.shape)} of {labels.dtype}, and the model names "
                f"{found.numel()} classes, {tuple(found.shape)}. Give one class index for each."
            )
        counted = labels.reshape(found.shape) >= 0  # −1 and −100 are how "no label" is written
        self.labels += int(counted.sum())
        self.correct += int(((found == labels.reshape(found.shape)) & counted).sum())

    def forget_classes(self) -> None:
        """Give up on classes: not all of the data was seen."""
        self.decisions = self.same = self.labels = self.correct = 0

    @property
    def agreement(self) -> float | None:
        """The fraction of decisions that are the baseline's; None without any."""
        return self.same / self.decisions if self.decisions else None

    @property
    def accuracy(self) -> float | None:
        """The fraction of labels that were named; None without any."""
        return self.correct / self.labels if self.labels else None


def _largest(tensor: torch.Tensor) -> float:
    """Return the largest magnitude among the finite elements."""
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0


def first_scores(output: Any) -> torch.Tensor:
    """Return what is taken for the class scores: the first floating-point output with a batch."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim() >= 2:
            return leaf
    raise OptionError(
        "No output looks like class scores: a floating-point tensor of at least two dimensions. "
        "Say which they are with logits=, a function from the output to the scores."
    )


def first_outputs(
    candidates: Mapping[str, Candidate], example: Inputs
) -> tuple[dict[str, Agreement], dict[str, str]]:
    """Compare outputs on the example inputs with those of the first candidate, the baseline.

    Returns what was found, and in words why a candidate does not run. Raises what the baseline
    raises.
    """
    names = list(candidates)
    expected = _run(candidates[names[0]], example)
    found, failures = {names[0]: Agreement()}, {}
    found[names[0]].add_outputs(expected, expected)
    for name in names[1:]:
        try:
            output = _run(candidates[name], example)
        except Exception as error:  # whatever a backend's engine raises
            failures[name] = reason_of(error)
            continue
        found[name] = Agreement()
        found[name].add_outputs(output, expected)
    return found, failures


def agree(
    candidates: Mapping[str, Candidate],
    found: Mapping[str, Agreement],
    data: Iterable[Any],
    form: CallForm,
    logits: Logits | None = None,
) -> dict[str, str]:
    """Add to `found` what all of `data` says; one item of it is in memory at a time.

    An item is the inputs of one call, or a pair of those and the labels. Returns in words why a
    candidate could not run on the data; its agreement is then not known.
    """
    names = list(candidates)
    failures: dict[str, str] = {}
    items = iter(data)
    position = -1
    while (item := _users("data=", lambda: next(items, items))) is not items:
        position += 1
        inputs, label = form.split(item)
        try:
            expected = _run(candidates[names[0]], inputs)
        except Exception as error:  # whatever the model raises
            raise OptionError(
                f"Item {position} of data= does not fit the model: {reason_of(error)}"
            ) from error
        classes = _classes(expected, logits)
        for name in [name for name in names if name not in failures]:
            try:
                output = expected if name == names[0] else _run(candidates[name], inputs)
            except Exception as error:  # whatever a backend's engine raises
                failures[name] = reason_of(error)
                found[name].forget_classes()
                continue
            found[name].add_outputs(output, expected)
            found[name].add_classes(_classes(output, logits), classes, label)
    return failures


def _classes(output: Any, logits: Logits | None) -> torch.Tensor:
    """Return the class that each row of scores names."""
    if logits is None:
        return first_scores(output).argmax(-1)
    return _users("logits=", lambda: logits(output).argmax(-1))


def _users(what: str, action: Callable[[], Any]) -> Any:
    """Run a user's function; raise FxoptError with the user's line for whatever it raises."""
    try:
        return action()
    except FxoptError:
        raise
    except Exception as error:
        where = user_frame(error.__traceback__)
        at = f"\n  at {where}" if where else ""
        raise FxoptError(f"{what} failed with {type(error).__name__}: {error}{at}") from error


def _run(candidate: Candidate, inputs: Inputs) -> Any:
    """Return the output of one call; whatever is random in it is drawn from the same seed."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(0)
        return candidate.output(inputs)
