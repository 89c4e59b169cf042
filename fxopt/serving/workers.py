"""The threads of a server: how they begin, and how they surely end."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Callable

from fxopt.serving.request import Request
from fxopt.serving.waiting import Waiting

_alive: weakref.WeakSet[Workers] = weakref.WeakSet()


class Workers:
    """Threads that run what waits. They know neither their server nor, while idle, any model.

    So a server that nobody holds is collected, and its finalizer ends them. They are daemons, for
    Python waits for others before it calls anybody at its end; `_end_all` then stops and joins
    them, while everything they may need is still there.
    """

    def __init__(
        self, count: int, waiting: Waiting, serve: Callable[[list[Request]], None]
    ) -> None:
        self._waiting = waiting
        self._process = os.getpid()
        self._threads = [
            threading.Thread(
                target=_work, args=(waiting, serve), name=f"fxopt-worker-{number}", daemon=True
            )
            for number in range(count)
        ]
        _alive.add(self)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:  # no more threads to be had, or an interrupt
            waiting.close()
            raise

    @property
    def is_elsewhere(self) -> bool:
        """Whether the threads run in another process: a fork does not take them along."""
        return os.getpid() != self._process

    @property
    def is_own_thread(self) -> bool:
        """Whether it is one of these threads that asks."""
        return threading.current_thread() in self._threads

    def join(self) -> None:
        """Wait until they have ended; one of them does not wait for itself."""
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()

    def stop(self) -> None:
        """Cancel what waits, and let them end with what runs."""
        self._waiting.close()
        self._waiting.cancel()


def _work(waiting: Waiting, serve: Callable[[list[Request]], None]) -> None:
    while _work_once(waiting, serve):
        pass


def _work_once(waiting: Waiting, serve: Callable[[list[Request]], None]) -> bool:
    """Serve one batch; a function of its own, so that an idle thread holds none of it."""
    batch = waiting.take()
    if batch is None:
        return False
    serve(batch)
    return True


@atexit.register
def _end_all() -> None:
    ours = [workers for workers in list(_alive) if not workers.is_elsewhere]
    for workers in ours:
        workers.stop()
    for workers in ours:
        workers.join()
