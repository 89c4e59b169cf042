"""Requests that run as one batch get what each gets alone; where they would not, it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.serving.batching import BatchLayout
from tests.models import ConvBnRelu, Function
from tests.serving.models import PATIENCE, Held, rows, words

BACKENDS = ("eager", "onnx", "torchscript")


def request(rows: int, length: int = 5, word: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((rows, length), word), torch.randn(rows, 8)


# -- joined and split ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_run_together_and_are_told_apart(backend: str) -> None:
    compiled = words(backend)
    sent = [request(1), request(3), request(2), request(1, length=2), request(4), request(9)]
    expected = [compiled(*one) for one in sent]
    server = compiled.serve(max_batch=6)
    held = Held(compiled)
    with server:
        futures = [server.submit(*request(1))]
        held.wait_until_one_runs()
        futures += [server.submit(*one) for one in sent]
        held.gate.set()
        results = [one.result(PATIENCE) for one in futures][1:]
    for found, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    # the first alone, those of 5 words up to 6 rows, then the other length, then what is left
    assert held.batches == [1, 6, 1, 4, 9]
    counts = server.statistics
    assert (counts.requests, counts.completed, counts.runs, counts.rows) == (7, 7, 5, 21)
    assert counts.mean_batch == pytest.approx(21 / 5)
    assert counts.max_queue_wait_ms >= counts.mean_queue_wait_ms > 0
    assert "7 requests: 7 completed" in str(counts) and "5 runs of 4.2 rows" in str(counts)


def test_the_oldest_waits_for_company_and_a_full_batch_does_not() -> None:
    compiled = words()
    server = compiled.serve(max_batch=4, max_wait_ms=1e6)
    held = Held(compiled)
    held.gate.set()
    with server:
        full = [server.submit(*request(1)) for _ in range(4)]
        assert all(one.result(PATIENCE) for one in full)
        alone = server.submit(*request(1))
        other = server.submit(*request(1, length=3))
        assert not alone.done() and not other.done()
    assert alone.result() and other.result()  # closing waits for nobody
    assert held.batches == [4, 1, 1]


def test_a_wait_ends() -> None:
    with words().serve(workers=2, max_batch=4, max_wait_ms=5) as server:
        futures = [server.submit(*request(1, length=n)) for n in (2, 3, 4)]
        assert all(one.result(PATIENCE) for one in futures)


def test_another_worker_watches_who_waits_while_one_runs() -> None:
    """The worker that takes the pair may be the one that watched the first request."""
    compiled = words()
    server = compiled.serve(workers=2, max_batch=2, max_wait_ms=300)
    held = Held(compiled)
    with server:
        lonely = server.submit(*request(1, length=3))
        pair = [server.submit(*request(1)) for _ in range(2)]
        held.wait_until_one_runs()
        held.wait_until_one_runs()  # though nothing more was submitted
        held.gate.set()
        assert lonely.result(PATIENCE) and all(one.result(PATIENCE) for one in pair)


def test_results_share_no_memory() -> None:
    compiled = rows(Function(lambda x: (x + 1, x[:, :1].expand(-1, 4))), 4)
    server = compiled.serve(max_batch=4)
    held = Held(compiled)
    with server:
        server.submit(torch.zeros(1, 4))
        held.wait_until_one_runs()
        first, second = server.submit(torch.zeros(2, 4)), server.submit(torch.ones(2, 4))
        held.gate.set()
        ours, theirs = first.result(PATIENCE), second.result(PATIENCE)
    assert held.batches == [1, 4]
    for value in ours:
        value.fill_(9)
        assert value.untyped_storage().nbytes() == value.numel() * 4
    assert torch.equal(theirs[0], torch.full((2, 4), 2.0))
    assert torch.equal(theirs[1], torch.ones(2, 4))


def test_only_the_very_same_shared_tensor_is_shared() -> None:
    compiled = fxopt.compile(
        Function(lambda x, scale: x * scale), (torch.randn(3, 4), torch.randn(4)),
        dynamic_shapes={"x": {0: "batch"}, "others": (None,)},
    )  # fmt: skip
    server = compiled.serve(max_batch=8)
    held = Held(compiled)
    ones, twos, x = torch.ones(4), torch.full((4,), 2.0), torch.ones(2, 4)
    with server:
        server.submit(x, ones)
        held.wait_until_one_runs()
        futures = [server.submit(x, scale) for scale in (ones, twos, ones, twos)]
        held.gate.set()
        assert [float(one.result(PATIENCE)[0, 0]) for one in futures] == [1, 2, 1, 2]
    assert held.batches == [2, 4, 4]


def test_one_poisoned_request_does_not_fail_its_neighbours() -> None:
    compiled = words()
    sent = [request(1), request(2, word=99), request(1, word=3)]
    server = compiled.serve(max_batch=8)
    held = Held(compiled)
    with server:
        server.submit(*request(1))
        held.wait_until_one_runs()
        futures = [server.submit(*one) for one in sent]
        held.gate.set()
        with pytest.raises(IndexError):
            futures[1].result(PATIENCE)
        for index in (0, 2):
            torch.testing.assert_close(futures[index].result(PATIENCE), compiled(*sent[index]))
    counts = server.statistics
    assert (counts.completed, counts.failed, counts.retried, counts.runs) == (3, 1, 3, 5)


def test_a_cancelled_request_is_left_out_of_its_batch() -> None:
    compiled = words()
    sent = [request(1), request(2, word=4), request(1, word=3)]
    server = compiled.serve(max_batch=8)
    held = Held(compiled)
    with server:
        server.submit(*request(1))
        held.wait_until_one_runs()
        futures = [server.submit(*one) for one in sent]
        assert futures[1].cancel()
        held.gate.set()
        torch.testing.assert_close(futures[2].result(PATIENCE), compiled(*sent[2]))
    assert held.batches[:2] == [1, 2] and server.statistics.cancelled == 1


def test_sizes_that_are_refused_together_run_alone() -> None:
    """A guard of the model holds for two rows and for four, not for six."""
    compiled = rows(nn.Linear(4, 4), 4)
    guarded = compiled.signature
    server = compiled.serve(max_batch=8)
    (batch,) = guarded.tensors[0].shape[:1]
    guarded.guards = (batch < 6,)  # type: ignore[operator,assignment]
    held = Held(compiled)
    with server:
        server.submit(torch.zeros(2, 4))
        held.wait_until_one_runs()
        inputs = [torch.full((2, 4), float(n)) for n in range(3)]
        futures = [server.submit(x) for x in inputs]
        held.gate.set()
        for x, future in zip(inputs, futures, strict=True):
            torch.testing.assert_close(future.result(PATIENCE), compiled(x))
    assert held.batches[:4] == [2, 2, 2, 2] and server.statistics.retried == 3


# -- what is refused -------------------------------------------------------------------------------


def refused(model: nn.Module, example: Any, shapes: Any, **options: Any) -> str:
    compiled = fxopt.compile(model.eval(), example, dynamic_shapes=shapes)
    with pytest.raises(fxopt.OptionError) as error:
        compiled.serve(max_batch=4, **options)
    return str(error.value)


X = torch.randn(3, 4)
BATCH = {0: "batch"}


@pytest.mark.parametrize(
    ("function", "words_"),
    [
        (lambda x: x.mean(0), r"output 0 .* has the shape \(4\)"),
        (lambda x: x.sum(), r"output 0 .* has the shape \(\)"),
        (lambda x: (x, torch.cat([x, x])), r"output 1 .* has the shape \(2\*batch, 4\)"),
        (lambda x: x.t(), r"has the shape \(4, batch\)"),
        (lambda x: x @ x.t(), r"has the shape \(batch, batch\)"),
        (lambda x: (x, x.shape[0]), "returns a Python number"),
        (lambda x: x.nonzero(), "each output must have the batch in dimension 0"),
        (lambda x: x + torch.rand_like(x), "it is random"),
        (lambda x: nn.functional.dropout(x, training=True), "it is in training mode"),
        (lambda x: x.add_(1), "it writes to its argument"),
        (lambda x: x.softmax(0), "mixes the rows"),
        (lambda x: x - x.mean(0), "mixes the rows"),
        (lambda x: x + x.mean(0), "mixes the rows"),
        (lambda x: x * x.shape[0], "mixes the rows"),
        (lambda x: x.cumsum(0), "mixes the rows"),
        (lambda x: x.flip(0), "mixes the rows"),
        (lambda x: x.sort(0)[0], "mixes the rows"),
        (lambda x: nn.functional.batch_norm(x, None, None, training=True), "training mode|mixes"),
        (lambda x: x * float("nan"), "no output .* is a finite number"),
    ],
)  # fmt: skip
def test_what_lets_rows_meet_is_refused(function: Callable[..., Any], words_: str) -> None:
    compiled = fxopt.compile(
        Function(function), X.clone(), dynamic_shapes=BATCH, verify="off"
    )
    with pytest.raises(fxopt.OptionError, match=words_):
        compiled.serve(max_batch=4)
    assert compiled.serve() is not None


@pytest.mark.parametrize("example", [torch.zeros(3, 4), torch.ones(3, 4), X[:1]])
def test_an_example_whose_rows_are_equal_proves_as_much(example: torch.Tensor) -> None:
    for function in (lambda x: x - x.mean(0), lambda x: x + x.mean(0)):
        assert "mixes the rows" in refused(Function(function), example, BATCH)


def test_integers_are_tried_in_another_order() -> None:
    ids = torch.arange(12).reshape(3, 4)
    assert "mixes the rows" in refused(Function(lambda x: x - x.amax(0)), ids, BATCH)


def test_a_fixed_batch_is_refused() -> None:
    assert "the batch is a fixed number" in refused(nn.Linear(4, 4), X, None)


def test_two_sizes_in_dimension_0_are_refused() -> None:
    shapes = {"x": {0: "n"}, "others": ({0: "m"},)}
    text = refused(Function(lambda x, y: (x, y)), (X, torch.randn(5, 4)), shapes)
    assert "'x' and 'others" in text and "is not one size" in text


def test_the_batch_in_another_dimension_is_refused() -> None:
    shapes = {"x": {0: "n"}, "others": ({1: "n"},)}
    text = refused(Function(lambda x, y: x + y.t()), (X, torch.randn(4, 3)), shapes)
    assert "size of the batch elsewhere" in text


def test_control_flow_is_refused() -> None:
    def either(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 1e9, lambda x: x + 1, lambda x: x * 2, (x,))

    assert "it holds sub-graphs" in refused(Function(either), X, BATCH)


def test_more_rows_than_captured_are_refused() -> None:
    shapes = {0: torch.export.Dim("batch", min=2, max=6)}
    compiled = fxopt.compile(nn.Linear(4, 4), X, dynamic_shapes=shapes)
    with pytest.raises(fxopt.OptionError, match="max_batch=7 .* Give max_batch=6"):
        compiled.serve(max_batch=7)
    with compiled.serve(max_batch=6) as server:
        assert server.submit(X).result(PATIENCE).shape == (3, 4)


def test_a_range_too_narrow_to_try_is_refused() -> None:
    shapes = {0: torch.export.Dim("batch", min=4, max=6)}
    text = refused(nn.Linear(4, 4), torch.randn(4, 4), shapes)
    assert "cannot be tried on the example inputs" in text


# -- loaded models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loaded_model_is_tried_on_inputs_that_are_given(backend: str, tmp_path: Path) -> None:
    compiled = words(backend)
    path = tmp_path / f"model{compiled.backend.suffix}"
    compiled.save(path)
    loaded = fxopt.load(path)
    if loaded.graph is None:
        with pytest.raises(fxopt.OptionError, match="example_inputs"):
            loaded.serve(max_batch=4)
    with loaded.serve(max_batch=4, example_inputs=request(3)) as server:
        one = request(2)
        torch.testing.assert_close(server.submit(*one).result(PATIENCE), compiled(*one))


@pytest.mark.parametrize(
    ("function", "words_"),
    [
        (lambda x: x - x.mean(0), "mixes the rows"),
        (lambda x: x.mean(0), "not every output"),
        (lambda x: torch.cat([x, x]), "not every output"),
    ],
)
def test_a_loaded_model_without_a_graph_is_judged_by_trying(
    function: Callable[..., Any], words_: str, tmp_path: Path
) -> None:
    compiled = fxopt.compile(Function(function), X, backend="onnx", dynamic_shapes=BATCH)
    compiled.save(tmp_path / "model.onnx")
    loaded = fxopt.load(tmp_path / "model.onnx")
    with pytest.raises(fxopt.OptionError, match=words_):
        loaded.serve(max_batch=4, example_inputs=X)
    with pytest.raises(fxopt.OptionError, match="has no rows"):
        loaded.serve(max_batch=4, example_inputs=X[:0])


def test_images_are_served_in_batches() -> None:
    compiled = rows(nn.Sequential(ConvBnRelu(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, 8, 8)
    images = [torch.randn(1, 3, 8, 8) for _ in range(9)]
    images[4] = images[4].to(memory_format=torch.channels_last)
    with compiled.serve(workers=2, max_batch=4) as server:
        for image, future in zip(images, [server.submit(one) for one in images], strict=True):
            torch.testing.assert_close(future.result(PATIENCE), compiled(image))


def test_a_layout_joins_and_splits() -> None:
    layout = BatchLayout((True, False, True), 0, None)
    shared = torch.zeros(2)
    flats = [[torch.full((n, 2), n), shared, torch.full((n,), n)] for n in (1, 3, 0)]
    joined = layout.join(flats)
    assert [layout.rows(flat) for flat in flats] == [1, 3, 0]
    assert joined[0].shape == (4, 2) and joined[1] is shared and joined[2].tolist() == [1, 3, 3, 3]
    parts = layout.split([joined[0], joined[2]], [1, 3, 0])
    assert [[tuple(value.shape) for value in part] for part in parts] == [
        [(1, 2), (1,)], [(3, 2), (3,)], [(0, 2), (0,)],
    ]  # fmt: skip
