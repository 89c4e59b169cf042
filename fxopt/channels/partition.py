"""Identities of channels: which are one, and which may not go.

Union-find (Tarjan 1975) over integers, by vectors: uniting two widths of a thousand channels is a
few array operations, not a thousand steps of Python.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_NO_REASON = -1


class Reason(NamedTuple):
    """Why channels are frozen: at which node, and what is wrong with removing them there."""

    node: str
    text: str


class Partition:
    """Classes of identities; a class that is frozen knows the first reason."""

    def __init__(self) -> None:
        self._parent: Ids = np.zeros(0, np.int64)
        self._reason: Ids = np.zeros(0, np.int64)  # an index into `reasons`, at the root
        self._size = 0
        self.reasons: dict[Reason, int] = {}

    def __len__(self) -> int:
        return self._size

    def fresh(self, count: int) -> Ids:
        """Return `count` new identities, each alone in its class."""
        start, self._size = self._size, self._size + count
        if self._size > len(self._parent):
            room = max(1024, 2 * self._size)
            old = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(old, room)])
            self._reason = np.concatenate([self._reason, np.full(room - old, _NO_REASON)])
        return np.arange(start, self._size)

    def roots(self, ids: Ids) -> Ids:
        """Return for each identity the one that stands for its class."""
        found = self._parent[ids]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[ids] = found
                return found
            found = above

    def unite(self, first: Ids, second: Ids) -> None:
        """Make `first[i]` and `second[i]` one, for each i; a frozen one freezes the other."""
        while True:
            a, b = self.roots(first), self.roots(second)
            differ = a != b
            if not differ.any():
                return
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            self._parent[high] = low  # of several to hang one on, the last wins; the next turn
            self._inherit(high)       # sees to the others

    def freeze(self, ids: Ids, reason: Reason) -> None:
        """Say that these may not go; an earlier reason stands."""
        roots = self.roots(ids)
        free = roots[self._reason[roots] == _NO_REASON]
        self._reason[free] = self.reasons.setdefault(reason, len(self.reasons))

    def is_frozen(self, ids: Ids) -> Mask:
        """Return for each identity whether it may not go."""
        return self._reason[self.roots(ids)] != _NO_REASON

    def reason_indices(self, ids: Ids) -> Ids:
        """Return for each identity the index of its reason in `reasons`, or -1."""
        return self._reason[self.roots(ids)]

    def _inherit(self, hung: Ids) -> None:
        """Hand the reasons of roots that are roots no more to those that they now hang on."""
        reason = self._reason[hung]
        known = reason != _NO_REASON
        roots = self.roots(hung[known])
        free = self._reason[roots] == _NO_REASON
        self._reason[roots[free]] = reason[known][free]
