"""The requests that wait, and which of them run next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import perf_counter

from fxopt.serving.refusals import QueueFull, ServerClosed
from fxopt.serving.request import Request
from fxopt.serving.settings import ServerSettings
from fxopt.serving.tally import Tally


@dataclass
class _Group:
    """Requests that may run as one batch, oldest first."""

    requests: deque[Request] = field(default_factory=deque)
    rows: int = 0


class Waiting:
    """A bounded queue from which a worker takes one batch at a time.

    Requests of one key form a group. A group is ready once it fills a batch, once its oldest
    request has waited long enough, or once the queue is closed; of several that are ready, the one
    with the oldest request goes first.

    A worker that finds nothing ready sleeps, until its time comes or a wake-up tells it to look
    again; `_asleep` counts those to whom none is on its way, and one too many does no harm. They
    come through a `SimpleQueue`, for a finalizer may put into that whatever its thread is doing.
    """

    def __init__(self, settings: ServerSettings, tally: Tally) -> None:
        self._settings = settings
        self._max_wait = settings.max_wait_ms / 1e3
        self._tally = tally
        self._groups: dict[Hashable, _Group] = {}
        self._count = 0
        self._asleep = 0
        self._room = threading.Condition(threading.Lock())  # the lock guards all that is above
        self._wake_ups: SimpleQueue[None] = SimpleQueue()
        self._closed = False

    def __len__(self) -> int:
        return self._count

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    def put(self, request: Request, timeout: float | None) -> None:
        """Add a request; wait up to `timeout` seconds for room, without end where it is None.

        Raises QueueFull when there is none by then, and ServerClosed.
        """
        size = self._settings.queue_size
        with self._room:
            if self._count >= size and not self._closed:
                self._drop_cancelled()
                self._room.wait_for(lambda: self._count < size or self._closed, timeout)
            if self._closed:
                raise ServerClosed("The server is closed, and takes no more requests.")
            if self._count >= size:
                raise QueueFull(
                    f"{size} requests wait already. Send fewer at a time, serve with a larger "
                    "queue_size= or with max_batch=, or wait longer for room with queue_timeout=."
                )
            self._wake_one()  # first: an interrupt behind this line does no harm
            group = self._groups.get(request.key)
            if group is None:
                group = self._groups[request.key] = _Group()
            group.requests.append(request)
            group.rows += request.rows
            self._count += 1
            self._tally.add("requests")

    def take(self) -> list[Request] | None:
        """Wait for a batch; return None once the queue is closed and empty."""
        while True:
            batch, delay = self._take_ready()
            if batch is None or batch:
                return batch
            try:
                self._wake_ups.get(timeout=delay)
            except Empty:  # the oldest request has waited long enough
                self._wake_up_alone()

    def _take_ready(self) -> tuple[list[Request] | None, float | None]:
        """Return the next batch, None once there will be none.

        Or an empty one, and after how many seconds one is ready if nothing comes; None: never.
        """
        with self._room:
            now = perf_counter()
            due = {key: self._due(group, now) for key, group in self._groups.items()}
            delay = min(due.values()) - now if due else None
            if delay is None and self._closed:
                return None, None
            if delay is None or delay > 0:
                self._asleep += 1
                return [], delay
            ready = [key for key, moment in due.items() if moment <= now]
            key = min(ready, key=lambda one: self._groups[one].requests[0].arrived)
            batch = list(self._cut(self._groups[key]))
            if not self._groups[key].requests:
                del self._groups[key]
            self._freed(len(batch))
            if self._groups:
                self._wake_one()  # somebody must watch the rest
            return batch, None

    def _due(self, group: _Group, now: float) -> float:
        """Return when a group must run."""
        if self._closed or group.rows >= self._settings.max_batch:
            return now
        return group.requests[0].arrived + self._max_wait

    def _cut(self, group: _Group) -> Iterator[Request]:
        """Take requests out of a group, as many as a batch holds; one in any case."""
        rows = 0
        while group.requests:
            following = group.requests[0].rows
            if rows and rows + following > self._settings.max_batch:
                return
            rows += following
            group.rows -= following
            yield group.requests.popleft()

    def _wake_one(self) -> None:
        if self._asleep:
            self._wake_ups.put(None)
            self._asleep -= 1

    def _wake_up_alone(self) -> None:
        """Leave the sleepers; or take the wake-up that was sent at the last moment."""
        with self._room:
            if self._asleep:
                self._asleep -= 1
            else:
                self._wake_ups.get()

    def _freed(self, count: int) -> None:
        self._count -= count
        self._room.notify(count)

    def _drop_cancelled(self) -> None:
        """Make room: nobody waits for a cancelled request any more."""
        for key, group in list(self._groups.items()):
            kept: deque[Request] = deque()
            dropped: list[Request] = []
            for request in group.requests:
                (dropped if request.future.cancelled() else kept).append(request)
            for request in dropped:
                request.future.set_running_or_notify_cancel()
            self._tally.add("cancelled", len(dropped))
            self._groups[key] = _Group(kept, sum(one.rows for one in kept))
            if not kept:
                del self._groups[key]
            self._freed(len(dropped))

    # -- closing --------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more requests; those that wait still run."""
        with self._room:
            self.close_quietly()
            self._room.notify_all()

    def close_quietly(self) -> None:
        """Do so without a lock, for a finalizer: nobody can be waiting for room any more."""
        self._closed = True
        for _ in range(self._settings.workers):
            self._wake_ups.put(None)

    def cancel(self) -> None:
        """Cancel whatever waits."""
        with self._room:
            dropped = [one for group in self._groups.values() for one in group.requests]
            self._groups.clear()
            self._freed(len(dropped))
        for request in dropped:  # without the lock: this calls what the user added to a future
            request.future.cancel()
            request.future.set_running_or_notify_cancel()
        self._tally.add("cancelled", len(dropped))
