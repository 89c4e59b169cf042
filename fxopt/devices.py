"""Waiting for devices: a call returns before a GPU has done the work, and a clock must not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


def waiter(values: Iterable[Any]) -> Callable[[], None]:
    """Return what waits until the devices of the tensors among `values` have done their work."""
    devices = {value.device for value in values if isinstance(value, torch.Tensor)}
    others = [device for device in devices if device.type != "cpu"]

    def wait() -> None:
        for device in others:
            torch.accelerator.synchronize(device)

    return wait
