"""A server answers each request, refuses what it must, and ends when it is told."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, as_completed
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.serving import QueueFull, Server, ServerClosed
from tests.serving.models import PATIENCE, Counts, Held, rows, words

FOUR = (torch.arange(20).reshape(4, 5), torch.randn(4, 8))


def workers_alive() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("fxopt-worker")]


def wait_until_gone(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "onnx", "torchscript"])
def test_a_future_holds_what_the_call_returns(backend: str) -> None:
    compiled = words(backend)
    expected = compiled(*FOUR)
    with compiled.serve(workers=2) as server:
        found = server.submit(*FOUR).result(PATIENCE)
        named = server.submit(x=FOUR[1], ids=FOUR[0]).result(PATIENCE)
    assert list(found) == ["scores", "words"]
    for name in expected:
        assert torch.equal(found[name], expected[name]) and torch.equal(named[name], expected[name])


def test_a_model_has_a_server_of_its_own() -> None:
    compiled = words()
    before = workers_alive()
    future = compiled.submit(*FOUR)
    assert torch.equal(future.result(PATIENCE)["words"], compiled(*FOUR)["words"])
    assert compiled.submit(*FOUR).result(PATIENCE)
    assert len([t for t in workers_alive() if t not in before]) == 1


def test_the_first_submits_at_once_share_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = words()
    serve, servers = compiled.serve, []

    def serve_slowly() -> Server:
        time.sleep(0.05)  # the others come in the meantime
        servers.append(serve())
        return servers[-1]

    monkeypatch.setattr(compiled, "serve", serve_slowly)
    start = threading.Barrier(8)
    found: list[Future[Any]] = []

    def submit() -> None:
        start.wait(PATIENCE)
        found.append(compiled.submit(*FOUR))

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len([one.result(PATIENCE) for one in found]) == 8
    assert len(servers) == 1 and servers[0].statistics.completed == 8


def test_new_weights_serve_the_next_request() -> None:
    model = nn.Linear(8, 4)
    compiled = rows(model, 8)
    x = torch.randn(2, 8)
    with compiled.serve() as server:
        old = server.submit(x).result(PATIENCE)
        compiled.update({name: value * 2 for name, value in model.state_dict().items()})
        torch.testing.assert_close(server.submit(x).result(PATIENCE), old * 2)


def test_requests_are_answered_in_their_order() -> None:
    compiled = fxopt.compile(Counts(), torch.ones(1))
    with compiled.serve() as server:
        futures = [server.submit(torch.ones(1)) for _ in range(30)]
        assert [int(one.result(PATIENCE)) for one in futures] == list(range(1, 31))


@pytest.mark.parametrize(
    ("options", "words_"), [({"workers": 2}, "workers=1"), ({"max_batch": 4}, "without max_batch")]
)
def test_a_model_with_state_is_served_in_order_or_not_at_all(
    options: dict[str, Any], words_: str
) -> None:
    compiled = fxopt.compile(Counts(), torch.ones(1))
    with pytest.raises(fxopt.OptionError, match=f"changes its own state.*{words_}"):
        compiled.serve(**options)


def test_asyncio_awaits_a_request() -> None:
    compiled = words()

    async def ask(server: Server) -> list[Any]:
        futures = [asyncio.wrap_future(server.submit(*FOUR)) for _ in range(5)]
        return await asyncio.wait_for(asyncio.gather(*futures), PATIENCE)

    with compiled.serve(queue_timeout=0) as server:
        results = asyncio.run(ask(server))
    assert all(torch.equal(one["words"], compiled(*FOUR)["words"]) for one in results)


def test_asyncio_may_give_up() -> None:
    compiled = words()
    held = Held(compiled)

    async def ask(server: Server) -> Any:
        running = asyncio.wrap_future(server.submit(*FOUR))
        held.wait_until_one_runs()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(server.submit(*FOUR)), 0.01)
        held.gate.set()
        return await running

    with compiled.serve() as server:
        assert asyncio.run(ask(server))
    assert server.statistics.cancelled == 1 and held.batches == [4]


# -- errors ----------------------------------------------------------------------------------------


def test_a_wrong_shape_is_refused_at_once() -> None:
    compiled = words()
    with compiled.serve() as server:
        with pytest.raises(fxopt.ShapeError, match="dimension 1 is 9"):
            server.submit(FOUR[0], torch.zeros(4, 9))
        with pytest.raises(fxopt.ShapeError, match="does not fit"):
            server.submit(*FOUR, 3)
        assert server.submit(*FOUR).result(PATIENCE)
        assert server.statistics.requests == 1


def test_an_error_of_the_model_is_its_future_s() -> None:
    with words().serve() as server:
        bad = server.submit(torch.full((4, 5), 99), FOUR[1])
        good = server.submit(*FOUR)
        with pytest.raises(IndexError, match="out of range"):
            bad.result(PATIENCE)
        assert good.result(PATIENCE)
        counts = server.statistics
    assert (counts.requests, counts.completed, counts.failed) == (2, 1, 1)


def test_an_error_keeps_no_request_alive() -> None:
    """Without a cycle: what an exception's traceback holds must not hold the future."""
    with words().serve() as server:
        gc.collect()
        gc.disable()
        try:
            future = server.submit(torch.full((4, 5), 99), FOUR[1])
            assert isinstance(future.exception(PATIENCE), IndexError)
            gone = weakref.ref(future)
            assert server.submit(*FOUR).result(PATIENCE)  # the worker is through with the other
            del future
            assert gone() is None
        finally:
            gc.enable()


class Exits:
    """An executable that wants to end the program."""

    notes = ()

    def run(self, *flat: Any) -> Any:
        raise SystemExit(3)


def test_whatever_the_model_raises_the_worker_lives() -> None:
    compiled = words()
    kept, compiled.executable = compiled.executable, Exits()  # type: ignore[assignment]
    with compiled.serve() as server:
        with pytest.raises(SystemExit):
            server.submit(*FOUR).result(PATIENCE)
        compiled.executable = kept
        assert server.submit(*FOUR).result(PATIENCE)


def test_whatever_a_callback_raises_the_worker_lives() -> None:
    def leave(future: Future[Any]) -> None:
        raise SystemExit(3)

    compiled = words()
    held = Held(compiled)
    with compiled.serve() as server:
        future = server.submit(*FOUR)
        future.add_done_callback(leave)
        held.gate.set()
        assert server.submit(*FOUR).result(PATIENCE)


def test_whoever_sets_a_result_of_their_own_harms_nobody_else() -> None:
    compiled = words()
    held = Held(compiled)
    with compiled.serve() as server:
        running = server.submit(*FOUR)
        held.wait_until_one_runs()
        waiting = server.submit(*FOUR)
        waiting.set_result("mine")
        running.set_result("mine")
        held.gate.set()
        assert server.submit(*FOUR).result(PATIENCE)
    assert running.result() == waiting.result() == "mine"


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0}, {"workers": True}, {"queue_size": 0}, {"queue_size": 2.0},
        {"max_batch": 0}, {"queue_timeout": -1}, {"queue_timeout": "1"},
        {"max_batch": 2, "max_wait_ms": -1}, {"max_batch": 2, "max_wait_ms": float("nan")},
        {"max_wait_ms": 5}, {"max_batch": 2, "max_wait_ms": float("inf")},
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(fxopt.OptionError, match=list(options)[-1]):
        words().serve(**options)


# -- the bounded queue -----------------------------------------------------------------------------


def test_a_full_queue_refuses_where_it_must_not_wait() -> None:
    compiled = words()
    held = Held(compiled)
    with compiled.serve(queue_size=2, queue_timeout=0) as server:
        running = server.submit(*FOUR)
        held.wait_until_one_runs()
        waiting = [server.submit(*FOUR) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait already"):
            server.submit(*FOUR)
        held.gate.set()
        assert all(one.result(PATIENCE) for one in (running, *waiting))
        assert server.submit(*FOUR).result(PATIENCE)
    assert server.statistics.requests == server.statistics.completed == 4


def test_a_full_queue_holds_the_caller_back_until_there_is_room() -> None:
    compiled = words()
    held = Held(compiled)
    with compiled.serve(queue_size=1) as server:
        server.submit(*FOUR)
        held.wait_until_one_runs()
        server.submit(*FOUR)
        later: list[Future[Any]] = []
        caller = threading.Thread(target=lambda: later.append(server.submit(*FOUR)))
        caller.start()
        caller.join(0.05)
        assert caller.is_alive() and not later
        held.gate.set()
        caller.join(PATIENCE)
        assert later[0].result(PATIENCE)


def test_cancelled_requests_make_room() -> None:
    compiled = words()
    held = Held(compiled)
    with compiled.serve(queue_size=2, queue_timeout=0) as server:
        server.submit(*FOUR)
        held.wait_until_one_runs()
        first, second = server.submit(*FOUR), server.submit(*FOUR)
        assert first.cancel()
        third = server.submit(*FOUR)
        with pytest.raises(QueueFull):
            server.submit(*FOUR)
        held.gate.set()
        assert second.result(PATIENCE) and third.result(PATIENCE)
    assert server.statistics.cancelled == 1 and held.batches == [4, 4, 4]


def test_a_callback_may_submit_and_never_waits_for_itself() -> None:
    compiled = words()
    held = Held(compiled)
    refused: list[Exception] = []
    asked = threading.Event()

    def ask_again(future: Future[Any]) -> None:
        try:
            for _ in range(3):
                server.submit(*FOUR)
        except QueueFull as error:
            refused.append(error)
        asked.set()

    with compiled.serve(queue_size=2) as server:
        server.submit(*FOUR).add_done_callback(ask_again)
        held.gate.set()
        assert asked.wait(PATIENCE)
    assert len(refused) == 1 and server.statistics.completed == 3


# -- cancelling and closing ------------------------------------------------------------------------


def test_a_request_that_waits_can_be_cancelled_and_one_that_runs_cannot() -> None:
    compiled = words()
    held = Held(compiled)
    with compiled.serve() as server:
        running = server.submit(*FOUR)
        held.wait_until_one_runs()
        waiting = server.submit(*FOUR)
        assert not running.cancel() and waiting.cancel()
        held.gate.set()
        assert running.result(PATIENCE)
        assert set(as_completed([running, waiting], PATIENCE)) == {running, waiting}
    assert held.batches == [4]
    assert server.statistics.cancelled == 1


def test_closing_answers_what_was_taken() -> None:
    compiled = words()
    before = workers_alive()
    held = Held(compiled)
    server = compiled.serve(workers=2)
    threads = [t for t in workers_alive() if t not in before]
    futures = [server.submit(*FOUR) for _ in range(6)]
    held.gate.set()
    server.close()
    assert all(one.done() and one.result() for one in futures)
    assert not any(thread.is_alive() for thread in threads) and len(threads) == 2
    with pytest.raises(ServerClosed, match="closed"):
        server.submit(*FOUR)
    server.close()
    assert "closed" in repr(server)


def test_closing_may_cancel_what_waits() -> None:
    compiled = words()
    held = Held(compiled)
    server = compiled.serve()
    running = server.submit(*FOUR)
    held.wait_until_one_runs()
    waiting = [server.submit(*FOUR) for _ in range(3)]
    closer = threading.Thread(target=lambda: server.close(cancel=True))
    closer.start()
    for one in waiting:
        with pytest.raises(CancelledError):
            one.result(PATIENCE)
    assert len(list(as_completed(waiting, PATIENCE))) == 3
    held.gate.set()
    closer.join(PATIENCE)
    assert running.result(PATIENCE)
    counts = server.statistics
    assert (counts.requests, counts.completed, counts.cancelled) == (4, 1, 3)


def test_closing_wakes_who_waits_for_room() -> None:
    compiled = words()
    held = Held(compiled)
    server = compiled.serve(queue_size=1)
    server.submit(*FOUR)
    held.wait_until_one_runs()
    server.submit(*FOUR)
    refused: list[Exception] = []

    def ask() -> None:
        try:
            server.submit(*FOUR)
        except ServerClosed as error:
            refused.append(error)

    callers = [threading.Thread(target=ask) for _ in range(3)]
    for caller in callers:
        caller.start()
    time.sleep(0.02)  # most will wait by now; those that do not yet are refused all the same
    closer = threading.Thread(target=server.close)
    closer.start()
    for caller in callers:
        caller.join(PATIENCE)
    assert len(refused) == 3
    held.gate.set()
    closer.join(PATIENCE)
    assert not closer.is_alive()


def test_an_error_inside_with_cancels_what_waits() -> None:
    compiled = words()
    held = Held(compiled)
    waiting = []
    with pytest.raises(KeyboardInterrupt), compiled.serve() as server:
        server.submit(*FOUR)
        held.wait_until_one_runs()
        waiting.append(server.submit(*FOUR))
        held.gate.set()
        waiting.append(server.submit(*FOUR))
        raise KeyboardInterrupt
    assert all(one.done() for one in waiting)
    assert server.statistics.requests == server.statistics.completed + server.statistics.cancelled


def test_a_callback_may_close_its_server() -> None:
    compiled = words()
    before = workers_alive()
    server = compiled.serve(workers=2)
    threads = [t for t in workers_alive() if t not in before]
    both_close = threading.Barrier(2)

    def close(future: Future[Any]) -> None:
        both_close.wait(PATIENCE)
        server.close()  # neither waits for the other

    held = Held(compiled)
    for future in [server.submit(*FOUR) for _ in range(2)]:
        future.add_done_callback(close)
    held.gate.set()
    wait_until_gone(threads)


# -- nothing is left behind ------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True])
def test_a_server_that_nobody_holds_leaves_no_thread_and_no_model(used: bool) -> None:
    compiled = words()
    before = workers_alive()
    servers = [compiled.serve(workers=2), compiled.serve(max_batch=4, max_wait_ms=1)]
    futures = [server.submit(*FOUR) for server in servers] if used else []
    futures += [compiled.submit(*FOUR)] if used else []
    results = [one.result(PATIENCE) for one in futures]
    threads = [t for t in workers_alive() if t not in before]
    gone = weakref.ref(compiled)
    del compiled, servers
    gc.collect()
    wait_until_gone(threads)
    gc.collect()
    assert gone() is None
    assert len(results) == len(futures) and len(threads) == (4 if used else 3)


def test_a_server_that_nobody_holds_answers_what_was_taken() -> None:
    compiled = words()
    held = Held(compiled)
    server = compiled.serve()
    futures = [server.submit(*FOUR) for _ in range(3)]
    del server
    gc.collect()
    held.gate.set()
    assert all(one.result(PATIENCE) for one in futures)


def test_an_idle_worker_holds_no_inputs() -> None:
    class Noted(torch.Tensor):
        pass

    with words().serve() as server:
        x = torch.randn(4, 8)
        gone = weakref.ref(x)
        assert server.submit(FOUR[0], x).result(PATIENCE)
        del x
        deadline = time.monotonic() + PATIENCE
        while gone() is not None and time.monotonic() < deadline:
            time.sleep(0.001)  # the worker leaves the function that ran it
        assert gone() is None


# -- a model that compiles at its first call -------------------------------------------------------


def test_a_deferred_model_serves_every_shape() -> None:
    deferred = fxopt.compile(nn.Sequential(nn.ReLU(), nn.Sigmoid()))
    inputs = [torch.randn(2, 3), torch.randn(5), torch.randn(2, 3)]
    with deferred.serve(workers=2) as server:
        for x, future in zip(inputs, [server.submit(x) for x in inputs], strict=True):
            torch.testing.assert_close(future.result(PATIENCE), x.relu().sigmoid())
    x = inputs[0]
    assert torch.equal(deferred.submit(x).result(PATIENCE), deferred(x))
    assert not deferred.has_state
    with pytest.raises(fxopt.OptionError, match="each shape of this model is compiled by itself"):
        deferred.serve(max_batch=4)


def test_a_deferred_model_with_state_is_refused_when_it_is_known() -> None:
    deferred = fxopt.compile(Counts())
    with deferred.serve(workers=2) as server, pytest.raises(fxopt.OptionError, match="workers=1"):
        server.submit(torch.ones(2))
