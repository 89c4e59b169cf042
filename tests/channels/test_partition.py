"""Classes of identities against sets that are united one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fxopt.channels.partition import Partition, Reason

COUNT = 12
pairs = st.lists(st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)), max_size=12)


@given(st.lists(pairs, max_size=4), st.sets(st.integers(0, COUNT - 1), max_size=3), st.booleans())
def test_unites_like_sets(
    vectors: list[list[tuple[int, int]]], held: set[int], first: bool
) -> None:
    partition = Partition()
    partition.fresh(COUNT)
    classes = [{i} for i in range(COUNT)]
    frozen = np.array(sorted(held), dtype=np.int64)
    if first:
        partition.freeze(frozen, Reason("node", "why"))
    for vector in vectors:
        partition.unite(
            np.array([a for a, _ in vector], dtype=np.int64),
            np.array([b for _, b in vector], dtype=np.int64),
        )
        for a, b in vector:
            merged = classes[a] | classes[b]
            for member in merged:
                classes[member] = merged
    if not first:
        partition.freeze(frozen, Reason("node", "why"))
    roots = partition.roots(np.arange(COUNT))
    for a in range(COUNT):
        assert {b for b in range(COUNT) if roots[b] == roots[a]} == classes[a]
        assert partition.is_frozen(np.array([a]))[0] == bool(classes[a] & held)


def test_the_first_reason_stands() -> None:
    partition = Partition()
    a, b = partition.fresh(2), partition.fresh(2)
    partition.freeze(b, Reason("early", "first"))
    partition.unite(a, b)
    partition.freeze(a, Reason("late", "second"))
    assert [list(partition.reasons)[i] for i in partition.reason_indices(a)] == [
        Reason("early", "first")
    ] * 2


def test_grows() -> None:
    partition = Partition()
    first = partition.fresh(10)
    partition.unite(first[:1], first[9:])
    partition.fresh(5000)
    assert len(partition) == 5010
    assert partition.roots(first)[0] == partition.roots(first)[9]
