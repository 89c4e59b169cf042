"""How a server works: its options, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fxopt.errors import OptionError


@dataclass(frozen=True)
class ServerSettings:
    """The options of `CompiledModel.serve`; a wrong one raises OptionError.

    `workers`: threads that run the model. `queue_size`: requests that may wait beside those that
    run. `queue_timeout`: seconds that `submit` waits for room in the queue (None: as long as it
    takes) before it raises QueueFull. `max_batch`: rows that run as one batch; 1 runs each request
    by itself. `max_wait_ms`: milliseconds that the oldest request waits for others to join it.
    """

    workers: int = 1
    queue_size: int = 64
    queue_timeout: float | None = None
    max_batch: int = 1
    max_wait_ms: float = 0.0

    def __post_init__(self) -> None:
        for option in ("workers", "queue_size", "max_batch"):
            value = getattr(self, option)
            if not (type(value) is int and value >= 1):
                raise OptionError(f"{option} must be an integer, at least 1, not {value!r}.")
        if not _is_duration(self.max_wait_ms):
            raise OptionError(
                f"max_wait_ms must be milliseconds, at least 0, not {self.max_wait_ms!r}."
            )
        if self.queue_timeout is not None and not _is_duration(self.queue_timeout):
            raise OptionError(
                f"queue_timeout must be seconds, at least 0, not {self.queue_timeout!r}, or None "
                "to wait until there is room."
            )
        if self.max_wait_ms and self.max_batch == 1:
            raise OptionError(
                f"max_wait_ms={self.max_wait_ms!r} waits for requests to join a batch, and "
                "max_batch=1 allows none. Give max_batch, too."
            )


def _is_duration(value: object) -> bool:
    """Whether a value is a number of seconds (or milliseconds) that threads can wait for."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and 0 <= value <= 1e6  # type: ignore[operator,arg-type]
