"""Autocast, as torch.compile has it: around a graph, or as calls within it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.amp import autocast_mode


def autocast_here(example_inputs: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return how autocast is entered for each device of the inputs where it is on."""
    devices = {v.device.type for v in example_inputs if isinstance(v, torch.Tensor)}
    return [
        (kind, torch.get_autocast_dtype(kind), True, torch.is_autocast_cache_enabled())
        for kind in sorted(devices)
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]


def enter_autocast(*how: Any) -> Any:
    """Enter autocast as a model does; torch.export records PyTorch's own function, but skips it."""
    region = torch.autocast(*how)
    region.__enter__()
    return region


def exit_autocast(region: Any) -> None:
    """Leave a region that `enter_autocast` gave."""
    region.__exit__(None, None, None)


AS_MODELS_DO: dict[Any, Callable[..., Any]] = {
    autocast_mode._enter_autocast: enter_autocast,
    autocast_mode._exit_autocast: exit_autocast,
}
