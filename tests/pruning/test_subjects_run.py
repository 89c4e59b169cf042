"""The subjects themselves: they run, are captured, and their claims name what matters."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch.utils import _pytree as pytree

from fxopt.difference import relative_error
from tests.pruning.subject import Subject, place_of
from tests.pruning.subjects import SUBJECTS, captured


def test_names_are_unique() -> None:
    assert [name for name, n in Counter(map(str, SUBJECTS)).items() if n > 1] == []
    assert len(SUBJECTS) > 150


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_runs_is_captured_and_its_claims_are_about_what_matters(subject: Subject) -> None:
    model = subject.model()
    places = {claim: place_of(model, claim) for claim in (*subject.shrinks, *subject.keeps)}
    assert not set(subject.shrinks) & set(subject.keeps)
    assert set(subject.groups) <= set(places)
    assert subject.about.strip().endswith("."), "every subject says what is special in it"

    graph = captured(subject.name)
    inputs = graph.info.example_inputs
    with torch.no_grad():
        found = copy.deepcopy(graph)(*inputs)  # a model may count its calls
        expected = model.to(inputs[0].dtype if inputs[0].is_floating_point() else torch.float64)(
            *inputs
        )
    assert relative_error(found, expected) < 1e-12
    assert sum(tensor.numel() for tensor in model.parameters()) < 10_000, "a subject is tiny"
    values = [node.meta.get("val") for node in graph.graph.nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    assert sum(tensor.numel() for tensor in tensors) < 100_000, "a subject is tiny"
    leaves = [out for out in pytree.tree_leaves(expected) if isinstance(out, torch.Tensor)]
    assert all(out.isfinite().all() for out in leaves)
    assert {place for place, _ in places.values()} <= set(graph.constants())
    if subject.name not in ("fourier_over_channels", "unknown_operator"):  # without gradients
        _weights_matter(model, inputs, {name for name, _ in places.values()})


def _weights_matter(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], names: set[str]
) -> None:
    """Every row and column of a weight that is spoken of has a gradient: errors there show."""
    result = model(*inputs)
    outputs = [out for out in pytree.tree_leaves(result) if isinstance(out, torch.Tensor)]
    sum((out.float() ** 2).sum() for out in outputs if out.requires_grad).backward()
    for name in names:
        gradient = model.get_parameter(name).grad
        assert gradient is not None and gradient.abs().amax() > 1e-6, name
