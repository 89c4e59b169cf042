"""Half of the channels of every subject are pruned: the numbers are right, and so is what went."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import fxopt
from fxopt.dialect import retarget
from fxopt.graph_module import GraphModule
from fxopt.passes import PruneChannels
from fxopt.testing import random_inputs_like
from tests.pruning.oracle_by_hand import judge, removed_entries
from tests.pruning.subject import Subject, place_of
from tests.pruning.subjects import BY_NAME, SUBJECTS, captured

each_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


def graphs(subject: Subject, **options: object) -> tuple[GraphModule, GraphModule]:
    """Return the captured graph and the pruned one."""
    original = captured(subject.name)
    pruned = original.copy()
    PruneChannels(**{"ratio": 0.5, **options}).run(pruned)  # type: ignore[arg-type]
    fxopt.dialect.check(pruned)
    return original, pruned


def lost_rows(gone: torch.Tensor, dim: int) -> list[int]:
    """Return the indices along a dimension of which all entries are gone."""
    return gone.movedim(dim, 0).flatten(1).all(1).nonzero().flatten().tolist()


def expect_the_numbers(
    original: GraphModule, pruned: GraphModule, inputs: Sequence[torch.Tensor]
) -> None:
    """The pruned graph computes what the original does without what is gone."""
    flat = [x.double() if x.is_floating_point() else x for x in inputs]
    verdict = judge(original, removed_entries(original, pruned), flat)
    assert not verdict.leaks
    assert not verdict.disagreements
    with torch.no_grad():
        found = retarget(pruned, dtype=torch.float64).run(*flat)
    assert verdict.error(found) < 1e-10


@each_subject
def test_half_of_the_channels(subject: Subject) -> None:
    original, pruned = graphs(subject)
    expect_the_numbers(original, pruned, original.info.example_inputs)

    gone = removed_entries(original, pruned)
    model = subject.model()
    for claim in subject.shrinks:
        name, dim = place_of(model, claim)
        rows = lost_rows(gone[name], dim) if name in gone else []
        assert rows, f"{claim} has all its {original.constant(name).shape[dim]} channels"
        size = subject.groups.get(claim, 1)
        for start in {row // size * size for row in rows}:
            assert set(range(start, start + size)) <= set(rows), f"{claim} lost part of a group"
    for claim, reason in subject.keeps.items():
        name, dim = place_of(model, claim)
        assert name not in gone or not lost_rows(gone[name], dim), f"{claim} must stay: {reason}"


@each_subject
def test_other_channels_on_other_inputs(subject: Subject) -> None:
    """Neither the least channels nor the example inputs, which the pass's own proof looks at."""
    original, pruned = graphs(subject, ratio=0.3, importance="random", heads="width")
    inputs = random_inputs_like(original.info.example_inputs)
    expect_the_numbers(original, pruned, inputs)


@pytest.mark.parametrize("name, shape", [
    ("dynamic_batch", (5, 3, 8, 8)), ("dynamic_batch", (1, 3, 8, 8)),
    ("dynamic_length", (3, 3, 11)), ("dynamic_length", (1, 3, 40)),
])  # fmt: skip
def test_sizes_stay_dynamic(name: str, shape: tuple[int, ...]) -> None:
    original, pruned = graphs(BY_NAME[name])
    expect_the_numbers(original, pruned, (torch.randn(shape),))
