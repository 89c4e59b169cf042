"""Random numbers in streams: the data's and the model's do not disturb each other.

Order and augmentation then follow from the seed alone, whatever dropout draws in between. That is
what makes a run go on, bit for bit, in the middle of an epoch: the data is started again from the
state at the epoch's start, and the batches that were done are skipped.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


class Stream:
    """The global generators (torch, numpy, Python) in a state of their own, inside a `with`."""

    def __init__(self, seed: int) -> None:
        outside = _read()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self.state = _read()
        _write(outside)
        self._outside: State = {}

    def __enter__(self) -> Stream:
        self._outside = _read()
        _write(self.state)
        return self

    def __exit__(self, *_: object) -> None:
        self.state = _read()
        _write(self._outside)

    def now(self) -> State:
        """Return the state, inside the `with`."""
        return _read()

    def jump(self, state: State) -> None:
        """Go to another state, inside the `with`."""
        _write(state)


def generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its sampler have of their own."""
    sampler = getattr(data, "sampler", None)
    found = [getattr(one, "generator", None) for one in (data, sampler)]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def plain(state: State) -> State:
    """Return a state as plain data and tensors, for a checkpoint."""
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest)}


def from_plain(state: State) -> State:
    """Return the state that `plain` was given."""
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)}


def _read() -> State:
    state: State = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=True),
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _write(state: State) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def skip(batches: Iterator[Any], count: int) -> None:
    """Take this many batches and forget them."""
    for _ in zip(range(count), batches, strict=False):
        continue
