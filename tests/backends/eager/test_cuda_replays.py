"""When calls are recorded, replayed, and run as they are; by a recorder that needs no GPU."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fxopt.backends.eager.cuda.replays import LIMIT, Replays
from fxopt.errors import LoweringError
from tests.backends.eager.pretended_cuda import PretendedRecorder


class Counted:
    """A function that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: torch.Tensor, times: int = 2) -> tuple[Any, ...]:
        self.runs += 1
        return x * times, x.t().relu(), times


def replays(allowed: int = 10**6, **options: Any) -> tuple[Replays, PretendedRecorder, Counted]:
    recorder, function = PretendedRecorder(allowed), Counted()
    return Replays(function, lambda: recorder, **options), recorder, function


def check(one: Replays, x: torch.Tensor, *rest: int) -> tuple[Any, ...]:
    kept, found, expected = x.clone(), one(x, *rest), Counted()(x, *rest)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))
        if isinstance(ours, torch.Tensor) and torch.empty_like(x).stride() == x.stride():
            assert ours.stride() == theirs.stride()
    assert torch.equal(x, kept)
    return found


def test_the_second_call_is_recorded_and_the_others_replayed() -> None:
    one, recorder, _ = replays()
    for count in range(5):
        check(one, torch.randn(3, 4))
        assert (recorder.recorded, recorder.replayed) == (min(count, 1), count)


def test_outputs_are_the_callers_own() -> None:
    one, _, _ = replays()
    results = [check(one, torch.randn(3, 4)) for _ in range(4)]
    kept = [value.clone() for value, *_ in results]
    results[-1][0].zero_()
    check(one, torch.randn(3, 4))
    assert all(torch.equal(a[0], b) for a, b in zip(results[:-1], kept, strict=False))


def test_what_is_recorded_once_for_each() -> None:
    one, recorder, _ = replays()
    x = torch.randn(4, 4)
    calls: list[tuple[Any, ...]] = [(x,), (x.t(),), (x[:2],), (x, 3), (x, 4)]
    for _ in range(3):
        for call in calls:
            check(one, *call)
    assert recorder.recorded == len(calls) and recorder.replayed == 2 * len(calls)
    recorder.user_settings = "TF32 on"  # starts other kernels
    for _ in range(2):
        check(one, x)
    assert recorder.recorded == len(calls) + 1


def test_inputs_whose_elements_share_memory() -> None:
    one, recorder, _ = replays()
    for value in range(3):
        check(one, torch.full((3, 1), float(value)).expand(3, 4))
        check(one, torch.full((6, 8), float(value))[::2, ::2])
        with torch.inference_mode():
            one(torch.full((2, 2), float(value)))
    assert recorder.replayed == 6


def test_the_least_recently_used_shape_goes_and_only_for_one_that_comes_often() -> None:
    one, recorder, _ = replays()

    def call(size: int, times: int) -> None:
        for _ in range(times):
            check(one, torch.randn(size, 2))

    for size in range(1, LIMIT + 1):
        call(size, 2)
    assert len(one) == recorder.recorded == LIMIT
    call(1, 1)  # so that 2 is the oldest
    call(100, 15)
    assert recorder.recorded == LIMIT and recorder.forgotten == 0
    call(100, 1)
    assert (recorder.recorded, recorder.forgotten, len(one)) == (LIMIT + 1, 1, LIMIT)
    before = recorder.replayed
    call(1, 1)
    assert recorder.replayed == before + 1
    call(2, 1)
    assert recorder.replayed == before + 1


def test_one_shape_too_many_in_turn_records_seldom() -> None:
    one, recorder, _ = replays()
    for _ in range(32):
        for size in range(1, LIMIT + 2):
            check(one, torch.randn(size, 2))
    assert recorder.recorded <= LIMIT + 32


def test_shapes_that_come_once_record_nothing_and_are_forgotten() -> None:
    one, recorder, _ = replays()
    for size in range(1, 600):
        one(torch.zeros(size, 1))
    assert recorder.recorded == 0 and len(one._seen) <= 256


def test_where_cuda_does_not_allow_it_calls_run_as_they_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, recorder, function = replays(allowed=1)
    for size in (3, 3, 4, 4, 4, 5, 5):
        check(one, torch.randn(size, 2))
    assert len(caplog.records) == 1
    assert "not permitted when stream is capturing" in caplog.text and "hint" not in caplog.text
    runs, replayed = function.runs, recorder.replayed
    check(one, torch.randn(4, 2))
    assert (function.runs, recorder.replayed) == (runs + 1, replayed)
    check(one, torch.randn(3, 2))  # what was recorded before stays
    assert recorder.replayed == replayed + 1


def test_where_a_recording_is_required() -> None:
    one, _, _ = replays(allowed=0, required=True)
    check(one, torch.randn(3, 2))
    with pytest.raises(LoweringError, match="not permitted when stream is capturing.*cuda_graphs"):
        one(torch.randn(3, 2))


def test_inside_of_a_recording_of_the_users_nothing_is_replayed() -> None:
    one, recorder, _ = replays()
    for _ in range(3):
        check(one, torch.randn(3, 2))
    replayed, recorder.busy = recorder.replayed, True
    check(one, torch.randn(3, 2))
    assert recorder.replayed == replayed


def test_inputs_on_another_device_get_the_error_of_the_program() -> None:
    one, recorder, _ = replays()
    recorder.index = lambda: 0  # type: ignore[method-assign]
    for _ in range(3):
        check(one, torch.randn(3, 2))
    assert recorder.recorded == 0


def test_an_error_of_the_program_is_the_callers() -> None:
    one, recorder, _ = replays()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="t\\(\\) expects a tensor with <= 2 dimensions"):
            one(torch.randn(2, 2, 2))
    assert recorder.recorded == 0 and one.failure is None


def test_threads_take_turns() -> None:
    one, recorder, _ = replays()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for turn in range(150):
                x = torch.randn(2 + turn % 3, 4, generator=generator)
                twice, turned, _ = one(x)
                assert torch.equal(twice, x * 2) and torch.equal(turned, x.t().relu())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and recorder.recorded == 3 and recorder.replayed >= 6 * 150 - 30
