"""The table of subjects that every test of pruning runs over."""

from __future__ import annotations

import functools

import torch

import fxopt
from fxopt.graph_module import GraphModule
from tests.pruning import (
    subjects_attention,
    subjects_convolutions,
    subjects_corners,
    subjects_frozen,
    subjects_moves,
)
from tests.pruning.subject import Subject

SUBJECTS: tuple[Subject, ...] = (
    *subjects_convolutions.table.subjects,
    *subjects_moves.table.subjects,
    *subjects_attention.table.subjects,
    *subjects_frozen.table.subjects,
    *subjects_corners.table.subjects,
)

BY_NAME = {subject.name: subject for subject in SUBJECTS}


@functools.cache
def captured(name: str) -> GraphModule:
    """Return the graph of a subject, in float64 where it was float32; change only copies of it."""
    subject = BY_NAME[name]
    inputs = tuple(x.double() if x.dtype is torch.float32 else x for x in subject.inputs)
    model = subject.model()
    wide = not any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return fxopt.capture(
        model.double() if wide else model, inputs, dynamic_shapes=subject.dynamic_shapes
    )
