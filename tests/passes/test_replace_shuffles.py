"""replace-shuffles: rolls, windows and channel shuffles as gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt import capture
from fxopt.passes.replace_shuffles import ReplaceShuffles
from fxopt.testing import check_pass, op_counts

X = torch.randn(2, 4, 6, 16, generator=torch.Generator().manual_seed(0))


class Shuffled(torch.nn.Module):
    """Shuffles what a sine made."""

    def __init__(self, shuffle: Callable[[Any], Any]) -> None:
        super().__init__()
        self.shuffle = shuffle

    def forward(self, x: torch.Tensor) -> Any:
        found = self.shuffle(x.sin())
        parts = found if isinstance(found, (list, tuple)) else [found]
        return [part.cos() for part in parts]


def windows(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[0]
    return x.reshape(n, 2, 2, 2, 3, 16).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 6, 16)


def unwindowed(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[0]
    return x.reshape(n, 2, 2, 2, 3, 16).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 6, 16)


def shuffled(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(2, 2, 2, 6, 16).transpose(1, 2).reshape(2, 4, 6, 16)


# A shuffle, and how many gathers and reshapes it becomes.
GOES: list[tuple[Callable[[Any], Any], int, int]] = [
    (lambda x: windows(x.roll((-1, -2), (1, 2))), 1, 2),
    (lambda x: unwindowed(x).roll((1, 2), (1, 2)), 1, 2),
    (lambda x: unwindowed(x.roll(2, 2)).roll((1, 2), (1, 2)), 1, 2),
    (lambda x: x.roll((1, 2), (1, 2)), 1, 2),
    (lambda x: x.roll((1, -1), (0, 1)), 1, 2),
    (lambda x: windows(x.roll((1, 1), (1, 2))).flatten(1, 2), 1, 1),
    (lambda x: x.roll(1, 1), 1, 0),
    (shuffled, 1, 0),
    (lambda x: shuffled(x).split([1, 3], 1), 2, 0),
    (lambda x: shuffled(x).chunk(2, 1), 2, 0),
    (lambda x: shuffled(x).split([1, 3], 1)[1], 1, 0),
    (lambda x: torch.channel_shuffle(x, 2), 1, 0),
]


@pytest.mark.parametrize(("shuffle", "gathers", "reshapes"), GOES)
def test_shuffles_become_gathers(
    shuffle: Callable[[Any], Any], gathers: int, reshapes: int
) -> None:
    graph, _ = check_pass(ReplaceShuffles(), Shuffled(shuffle), X, rewrites=1, tolerance=0)
    counts = op_counts(graph)
    assert counts["index_select"] == gathers and counts.get("reshape", 0) == reshapes, counts
    assert not counts.keys() & {"roll", "permute", "channel_shuffle"}


@pytest.mark.parametrize(
    ("shuffle", "reason"),
    [
        (lambda x: x.roll(5), None),
        (windows, None),
        (lambda x: x.transpose(1, 2), None),
        (lambda x: x.transpose(1, 2).reshape(2, 24, 16), None),
        (lambda x: x.roll((1, 1), (2, 3)), "its rows have 1 elements"),
        (lambda x: x[..., :8].roll((1, 1), (1, 2)), "its rows have 8 elements"),
        (lambda x: x.reshape(2, 4, 6, 4, 4).transpose(1, 3).reshape(2, 4, 6, 16), None),
    ],
)
def test_what_stays(shuffle: Callable[[Any], Any], reason: str | None) -> None:
    wanted = None if reason is None else [reason]
    check_pass(ReplaceShuffles(), Shuffled(shuffle), X, rewrites=0, misses=wanted)


def test_a_value_inside_that_others_use_is_where_the_shuffle_ends() -> None:
    def shuffle(x: torch.Tensor) -> Any:
        rolled = x.roll((1, 1), (1, 2))
        return rolled.exp(), windows(rolled)

    graph, _ = check_pass(ReplaceShuffles(), Shuffled(shuffle), X, rewrites=1)
    assert op_counts(graph)["permute"] == 1


def test_a_split_of_other_dimensions_stays() -> None:
    model = Shuffled(lambda x: shuffled(x).chunk(2, 2))
    check_pass(ReplaceShuffles(), model, X, after={"index_select": 1, "split_with_sizes": 1})


def test_rows_are_shared_by_equal_shuffles_once_duplicates_are_merged() -> None:
    from fxopt.passes.merge_duplicates import MergeDuplicates

    graph = capture(Shuffled(lambda x: [windows(y.roll((1, 1), (1, 2))) for y in (x, x + 1)]), X)
    ReplaceShuffles().run(graph)
    MergeDuplicates().run(graph)
    assert len(list(graph.graph.find_nodes(op="get_attr"))) == 1


def test_rows_survive_new_weights() -> None:
    import fxopt

    model = torch.nn.Sequential(torch.nn.Linear(16, 16), Shuffled(shuffled))
    compiled = fxopt.compile(model, X, passes=[ReplaceShuffles()])
    with torch.no_grad():
        model[0].weight.mul_(2)
    compiled.update(model.state_dict())
    assert torch.allclose(compiled(X)[0], model(X)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.bool])
def test_any_dtype(dtype: torch.dtype) -> None:
    model = Shuffled(lambda x: windows((x > 0).to(dtype).roll((1, 2), (1, 2))).float())
    check_pass(ReplaceShuffles(), model, X, rewrites=1, double=False, gradients=False, tolerance=0)


def test_symbolic_sizes() -> None:
    model = Shuffled(lambda x: windows(x.roll((1, 2), (1, 2))))
    graph, _ = check_pass(ReplaceShuffles(), model, X, rewrites=1, dynamic_shapes={"x": {0: "n"}})
    x = torch.randn(5, 4, 6, 16, dtype=torch.float64)
    assert torch.equal(graph(x)[0], model(x)[0])
    model = Shuffled(lambda x: x.roll((1, 2), (1, 2)))
    check_pass(ReplaceShuffles(), model, X, rewrites=0, dynamic_shapes={"x": {1: "h"}})


def test_rows_beside_sizes_of_one() -> None:
    """Which dimensions hold the rows is open there: (7, 1) and (7,) are the same rows."""
    x = torch.randn(7, 1, 4, 8)
    merged = lambda x: x.reshape(7, 32).reshape(7, 1, 32).permute(1, 0, 2)  # noqa: E731
    check_pass(ReplaceShuffles(), Shuffled(merged), x, rewrites=0)
    rolled = lambda x: merged(x).roll((1, 2), (0, 1))  # noqa: E731
    check_pass(ReplaceShuffles(), Shuffled(rolled), x, after={"index_select": 1, "roll": 0})
