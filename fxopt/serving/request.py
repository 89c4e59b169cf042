"""One request: what shall run, and where its result goes."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel

log = logging.getLogger("fxopt")


@dataclass(slots=True, eq=False)
class Request:
    """A call that waits. Requests of one `key` may run as one batch."""

    model: CompiledModel
    flat: list[Any]
    rows: int = 1
    key: Hashable = None
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=perf_counter)

    def begin(self) -> bool:
        """Whether the request shall run: it was not cancelled, and from now on cannot be."""
        try:
            return self.future.set_running_or_notify_cancel()
        except RuntimeError:  # whoever holds the future has set a result of their own
            return False

    def answer(self, outcome: Outcome) -> None:
        """Hand the result, or the error, to whoever waits for it; once.

        The request lets go of its future: an error's traceback holds the frames that held requests,
        and a future holds its error, so that they would keep each other alive.
        """
        future = self.future
        del self.future, self.flat
        try:
            if outcome.error is not None:
                future.set_exception(outcome.error)
            else:
                future.set_result(outcome.result)
        except BaseException:  # a callback of the user's must not take the worker down
            log.exception("a callback of a request failed")


@dataclass(slots=True)
class Outcome:
    """What came of a request: the model's own outputs, or an error."""

    result: Any = None
    error: BaseException | None = None


def run_alone(model: CompiledModel, flat: list[Any]) -> Outcome:
    """Run one request by itself."""
    try:
        return Outcome(model.signature.output.unflatten(model.run_flat(flat)))
    except BaseException as error:  # all of it belongs to whoever asked
        return Outcome(error=error)
