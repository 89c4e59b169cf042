"""A server in this process: requests in, futures out."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fxopt.errors import OptionError
from fxopt.inputs import as_inputs
from fxopt.serving.batching import BatchLayout, batch_layout
from fxopt.serving.proof import prove_rows_apart
from fxopt.serving.refusals import ServerClosed
from fxopt.serving.request import Request
from fxopt.serving.running import answer_all
from fxopt.serving.settings import ServerSettings
from fxopt.serving.tally import Statistics, Tally
from fxopt.serving.waiting import Waiting
from fxopt.serving.workers import Workers

if TYPE_CHECKING:
    from fxopt.compiled import CompiledModel, DeferredModel


class Server:
    """Runs a compiled model on threads of its own; see `CompiledModel.serve`.

    Use it in a `with` statement, or `close` it. One that nobody holds any more runs what waits, and
    its threads end.
    """

    def __init__(
        self,
        model: CompiledModel | DeferredModel,
        settings: ServerSettings,
        layout: BatchLayout | None = None,
    ) -> None:
        self._model = model
        self._layout = layout
        self.settings = settings
        self._tally = Tally()
        self._waiting = Waiting(settings, self._tally)
        serve = functools.partial(answer_all, layout=layout, tally=self._tally)
        self._workers = Workers(settings.workers, self._waiting, serve)
        weakref.finalize(self, self._waiting.close_quietly).atexit = False

    def submit(self, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call of the model, and return the future of its outputs.

        Waits where the queue is full, unless `queue_timeout` says otherwise; in a worker's own
        thread (the callback of a future) it never waits. Until the future is done the inputs must
        not be written to. Raises ShapeError for inputs that the model does not take, QueueFull and
        ServerClosed; what fails later is raised by the future's `result()`.
        """
        self._check_open()
        model = self._model.for_call(args, kwargs)
        check_state(model, self.settings.workers)
        flat = model.signature.flatten(args, kwargs)
        model.signature.check(flat)
        request = Request(model, flat)
        if self._layout is not None:
            request.rows, request.key = self._layout.rows(flat), self._layout.key(flat)
        future = request.future  # once it is queued, the request is its worker's
        timeout = 0.0 if self._workers.is_own_thread else self.settings.queue_timeout
        self._waiting.put(request, timeout)
        return future

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait for those that were taken; or cancel those that wait.

        Closing twice does nothing. In a worker's own thread it does not wait.
        """
        if self._workers.is_elsewhere:
            return
        self._waiting.close()
        if cancel:
            self._waiting.cancel()
        if not self._workers.is_own_thread:
            self._workers.join()

    @property
    def statistics(self) -> Statistics:
        """What was done so far."""
        return self._tally.snapshot()

    def _check_open(self) -> None:
        if self._workers.is_elsewhere:
            raise ServerClosed(
                "This process is a fork of the one that made the server, and a fork takes no "
                "threads along. Make the server (or submit to the model) after the fork only, or "
                "start processes with multiprocessing's 'spawn'."
            )
        if self._waiting.is_closed:
            raise ServerClosed("The server is closed, and takes no more requests.")

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(cancel=kind is not None)

    def __repr__(self) -> str:
        state = "closed" if self._waiting.is_closed else f"{len(self._waiting)} waiting"
        return f"<fxopt Server of {self._model!r}, {self.settings.workers} workers, {state}>"


def serve(model: CompiledModel, settings: ServerSettings, example_inputs: Any = None) -> Server:
    """Return a server of a model; with `max_batch`, once it is proven that requests can be joined.

    Raises OptionError for what the model does not allow.
    """
    check_state(model, settings.workers)
    if settings.max_batch == 1:
        return Server(model, settings)
    if model.has_state:
        raise OptionError(
            "The model changes its own state at each call (a cache, a counter), so requests cannot "
            "run as one batch. Serve it without max_batch."
        )
    layout = batch_layout(model.signature, model.graph, settings.max_batch)
    prove_rows_apart(model, layout, _example(model, example_inputs))
    return Server(model, settings, layout)


def check_state(model: CompiledModel, workers: int) -> None:
    """Raise OptionError where chance would decide in which order calls change a model's state."""
    if workers > 1 and model.has_state:
        raise OptionError(
            f"The model changes its own state at each call (a cache, a counter), and with "
            f"workers={workers} chance would decide which comes first. Serve it with workers=1: "
            "requests then run in the order in which they were submitted."
        )


def _example(model: CompiledModel, given: Any) -> Sequence[Any]:
    if given is not None:
        inputs = as_inputs(given)
        flat = model.signature.flatten(inputs.args, inputs.kwargs)
        model.signature.check(flat)
        return flat
    if model.graph is None:
        raise OptionError(
            "Whether requests can run as one batch must be tried, and a loaded model holds no "
            "example inputs. Give some with example_inputs=."
        )
    return model.graph.info.example_inputs
