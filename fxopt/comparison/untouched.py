"""Running the user's own model and leaving no trace in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from fxopt.capture import attributes_kept
from fxopt.inputs import evaluation


@contextmanager
def untouched(model: torch.nn.Module, written: Iterable[str] = ()) -> Iterator[None]:
    """Run `model` inside as for inference: evaluation mode, no gradients.

    Afterwards its flags, its attributes, its buffers, and the parameters named in `written` are
    what they were.
    """
    parameters = dict(model.named_parameters())
    state = [*model.buffers(), *(parameters[name] for name in written if name in parameters)]
    kept = [
        (tensor, tensor._version, tensor.detach().clone())
        for tensor in state
        if not tensor.is_inference()  # nobody can write to those
    ]
    try:
        with torch.no_grad(), evaluation(model), attributes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, version, content in kept:
                if tensor._version != version:
                    tensor.copy_(content)
