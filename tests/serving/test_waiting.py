"""The queue by itself: what happens between two steps of a worker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from fxopt.serving import QueueFull, ServerClosed, ServerSettings
from fxopt.serving.request import Request
from fxopt.serving.tally import Tally
from fxopt.serving.waiting import Waiting
from tests.serving.models import PATIENCE


def request(rows: int = 1, key: Any = None) -> Request:
    return Request(cast(Any, None), [], rows, key)


class Interrupted(Waiting):
    """A queue in which something happens right after a worker found nothing to do."""

    def __init__(self, happens: Callable[[Waiting], object], **options: Any) -> None:
        super().__init__(ServerSettings(**options), Tally())
        self.happens: list[Callable[[Waiting], object]] = [happens]

    def _take_ready(self) -> Any:
        result = super()._take_ready()
        if not result[0] and self.happens:
            self.happens.pop()(self)
        return result


def within_time(call: Callable[[], Any]) -> Any:
    """Return what a call returns; fail where it hangs."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert found, "it hangs"
    return found[0]


@pytest.mark.parametrize("close", [Waiting.close, Waiting.close_quietly])
def test_what_was_put_before_the_end_is_taken(close: Callable[[Waiting], None]) -> None:
    last = request()

    def put_and_close(waiting: Waiting) -> None:
        waiting.put(last, None)
        close(waiting)

    waiting = Interrupted(put_and_close)
    assert within_time(waiting.take) == [last] and within_time(waiting.take) is None
    with pytest.raises(ServerClosed):
        waiting.put(request(), None)


def test_a_request_that_comes_while_a_worker_goes_to_sleep_wakes_it() -> None:
    late = request()
    waiting = Interrupted(lambda waiting: waiting.put(late, None))
    assert within_time(waiting.take) == [late]


def test_a_wake_up_at_the_last_moment_is_not_owed_to_anybody() -> None:
    """The worker's time is over just when a request joins; the next sleeper is still woken."""
    waiting = Waiting(ServerSettings(max_batch=4, max_wait_ms=1e6), Tally())
    waiting.put(request(), None)
    waiting._take_ready()  # asleep until its time comes
    waiting.put(request(), None)  # a wake-up is on its way
    waiting._wake_up_alone()
    assert waiting._wake_ups.empty()
    for _ in range(2):  # as two workers
        waiting._take_ready()
    waiting._wake_up_alone()  # one of them
    for _ in range(2):
        waiting.put(request(), None)
    assert waiting._wake_ups.qsize() == 1  # the other


def test_who_takes_a_batch_has_somebody_watch_the_rest() -> None:
    waiting = Waiting(ServerSettings(max_batch=2, max_wait_ms=1e6), Tally())
    for _ in range(2):  # two workers find nothing
        waiting._take_ready()
    waiting.put(request(key="lonely"), None)
    waiting._wake_ups.get(timeout=PATIENCE)
    assert waiting._take_ready()[0] == []  # the first now knows when its time comes, the second not
    full = request(rows=2)
    waiting.put(full, None)
    waiting._wake_ups.get(timeout=PATIENCE)
    assert waiting._take_ready()[0] == [full]
    assert waiting._wake_ups.qsize() == 1


def test_the_oldest_of_what_is_ready_goes_first() -> None:
    waiting = Waiting(ServerSettings(max_batch=2), Tally())
    sent = [request(key=key) for key in "abab"]
    for one in (sent[1], sent[0], sent[2], sent[3]):
        waiting.put(one, None)
    assert waiting.take() == [sent[0], sent[2]] and waiting.take() == [sent[1], sent[3]]
    assert len(waiting) == 0


def test_a_batch_is_never_larger_than_allowed_but_for_one_request() -> None:
    waiting = Waiting(ServerSettings(max_batch=4), Tally())
    sent = [request(rows) for rows in (3, 1, 2, 9, 0, 4)]
    for one in sent:
        waiting.put(one, None)
    taken = [within_time(waiting.take) for _ in range(4)]
    assert [[one.rows for one in batch] for batch in taken] == [[3, 1], [2], [9], [0, 4]]


def test_a_full_queue_names_its_size() -> None:
    waiting = Waiting(ServerSettings(queue_size=1), Tally())
    waiting.put(request(), None)
    with pytest.raises(QueueFull, match="1 requests wait already"):
        waiting.put(request(), 0.001)
    assert len(waiting) == 1
