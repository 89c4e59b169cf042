"""What importances with data share: the batches they look at, and the graph they run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from fxopt.errors import OptionError
from fxopt.objective import Batches, each_batch


def check_batches(importance: Any, data: Any, batches: int | None) -> None:
    """Raise OptionError for data that cannot be iterated, or a number of batches below 1."""
    if isinstance(data, (str, torch.Tensor)) or not hasattr(data, "__iter__"):
        raise OptionError(
            f"The importance '{importance.name}' needs data, so it is given as an object: "
            f"{type(importance).__name__}(data=…), with something that gives batches again and "
            f"again, such as a DataLoader or a list; got {type(data).__name__}."
        )
    if batches is not None and (not isinstance(batches, int) or batches < 1):
        raise OptionError(f"batches={batches!r}: it is None, for all, or a number above 0.")


def first_batches(data: Batches, batches: int | None) -> Iterator[Any]:
    """Yield at most so many batches; None for all. Raises ObjectiveError where there is none."""
    return islice(each_batch(data), batches)
