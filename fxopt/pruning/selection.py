"""Which channels go: the least important ones, as many as asked for.

    scores            per family of channels, from an importance
    ranking           the order in which channels go: within each family, over all families, or
                      over families of one kind (isomorphic layers)
    number            a share of the channels, or as many as it takes to save a share of the MACs,
                      the parameters or the bytes (bisection over that share)
    repairs           widths that the hardware likes, no empty dimension
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from fxopt.channels.analysis import Channels
from fxopt.channels.groups import Family, Role
from fxopt.channels.partition import Ids, Mask
from fxopt.errors import OptionError, unknown_name
from fxopt.pruning.budget import KINDS

Scores = npt.NDArray[np.float64]
SCOPES = ("layer", "global", "isomorphic")
FAMILY_KINDS = ("channels", "heads")
_BISECTIONS = 20


@dataclass(frozen=True)
class Wish:
    """How much is to go, and from where; see `PruneChannels` for the fields."""

    ratio: float
    scope: str
    overrides: Mapping[str, float]
    kinds: tuple[str, ...]
    round_to: int
    min_channels: int
    max_ratio: float
    whole: Mapping[str, int]  # what ratios are shares of, by family; else the width it has


class Selection:
    """The channels of a graph, their scores, and the order in which they go."""

    def __init__(self, channels: Channels, scores: Sequence[Scores], wish: Wish) -> None:
        self.channels = channels
        self.families = channels.families
        self.scores = scores
        self.wish = wish
        self._ids = [channels.ids_of(family) for family in self.families]
        self._told = ratios_told(channels, wish.overrides)
        self._told |= {
            index: 0.0 for index, one in enumerate(self.families) if one.kind not in wish.kinds
        }
        self._places = {
            root: (index, place)
            for index, ids in enumerate(self._ids)
            for place, root in enumerate(ids.tolist())
        }
        self._dimensions = list(_dimensions(channels))
        self._order = [np.argsort(s, kind="stable") for s in scores]

    def at_ratio(self, ratio: float) -> list[Mask]:
        """Return for each family which channels go at this ratio."""
        counts = self._counts(ratio)
        found = []
        for index, (family, order) in enumerate(zip(self.families, self._order, strict=True)):
            gone = np.zeros(family.channels, np.bool_)
            gone[order[: self._rounded(family, counts[index])]] = True
            found.append(gone)
        return found

    def gone(self, removed: Sequence[Mask]) -> Mask:
        """Return for each identity, by its root, whether it goes."""
        return gone_of(self.channels, removed)

    def spare(self, removed: list[Mask]) -> list[Mask]:
        """Take back, in place, the most important channel wherever a dimension would be empty."""
        gone = self.gone(removed)
        for roots in self._dimensions:
            if gone[roots].all():
                best = max(np.unique(roots).tolist(), key=lambda root: self._score(root))
                index, place = self._places[best]
                removed[index][place] = False
                gone[best] = False
        return removed

    def at_budget(
        self, cost: Callable[[Mask], float], what: str, trials: int = _BISECTIONS
    ) -> list[Mask]:
        """Return what goes for the cost to fall by the wished share.

        Raises OptionError where it cannot fall so far.
        """
        if self.wish.ratio == 0.0:
            return [np.zeros(family.channels, np.bool_) for family in self.families]
        whole = cost(np.zeros(len(self.channels.partition), np.bool_))
        goal = whole * (1.0 - self.wish.ratio)
        low, high = 0.0, 1.0
        best = self.spare(self.at_ratio(1.0))
        least = cost(self.gone(best))
        if least > goal:
            raise OptionError(
                f"ratio={self.wish.ratio:.3g} of the {what} cannot go: without all channels that "
                f"may go, {1 - least / whole:.0%} of them would be gone. Ask for less, or let more "
                "go (max_ratio, min_channels, keep, overrides, residual=True)."
            )
        for _ in range(trials):
            middle = (low + high) / 2
            trial = self.spare(self.at_ratio(middle))
            if cost(self.gone(trial)) > goal:
                low = middle
            else:
                high, best = middle, trial
        return best

    def _score(self, root: int) -> float:
        index, place = self._places[root]
        return float(self.scores[index][place])

    # -- how many -----------------------------------------------------------------------------

    def _counts(self, ratio: float) -> list[int]:
        """Return how many channels of each family go."""
        counts = [0] * len(self.families)
        for group in self._ranked_together():
            for index, count in zip(group, self._shared(group, ratio), strict=True):
                counts[index] = count
        for index, own in self._told.items():
            counts[index] = self._share(index, own)
        return counts

    def _share(self, index: int, ratio: float) -> int:
        """Return how many channels of a family go for `ratio` of its whole width to be gone."""
        family = self.families[index]
        whole = max(self.wish.whole.get(family.name, 0), family.channels)
        return max(round_half_up(ratio * whole) - (whole - family.channels), 0)

    def _ranked_together(self) -> list[list[int]]:
        """Return the families, by index, whose channels are ranked in one order."""
        free = [index for index in range(len(self.families)) if index not in self._told]
        if self.wish.scope == "global":
            return [free]
        if self.wish.scope == "layer":
            return [[index] for index in free]
        kinds: dict[object, list[int]] = {}
        for index in free:
            kinds.setdefault(_kind(self.channels, self.families[index]), []).append(index)
        return list(kinds.values())

    def _shared(self, group: list[int], ratio: float) -> list[int]:
        """Return how many of the lowest channels of a group fall on each of its families."""
        if not group:
            return []
        limits = [self._limit(index) for index in group]
        if len(group) == 1:
            return [min(self._share(group[0], ratio), limits[0])]
        values, owners = [], []
        for place, index in enumerate(group):
            # beyond its limit a family gives nothing
            values.append(np.sort(self.scores[index])[: limits[place]])
            owners.append(np.full(len(values[-1]), place))
        lowest = np.argsort(np.concatenate(values), kind="stable")
        wanted = sum(self._share(index, ratio) for index in group)
        taken = np.concatenate(owners)[lowest[:wanted]]
        return np.bincount(taken, minlength=len(group)).tolist()

    def _limit(self, index: int) -> int:
        """Return how many channels of a family may go at most."""
        family = self.families[index]
        whole = max(self.wish.whole.get(family.name, 0), family.channels)
        return max(math.floor(self.wish.max_ratio * whole) - (whole - family.channels), 0)

    def _rounded(self, family: Family, count: int) -> int:
        """Return a number of channels to remove that leaves a width the hardware likes.

        The width nearest to the wished one, of the multiples of `round_to` up to the family's own.
        """
        least = min(self.wish.min_channels, family.channels)
        unit = self.wish.round_to // math.gcd(self.wish.round_to, _indices_per_channel(family))
        left = family.channels - count
        if unit > 1 and count:
            left = max(unit, round_half_up(left / unit) * unit)
        return max(family.channels - max(left, least), 0)


def gone_of(channels: Channels, removed: Sequence[Mask]) -> Mask:
    """Return for each identity, by its root, whether it is one of the channels that go."""
    gone = np.zeros(len(channels.partition), np.bool_)
    for family, mask in zip(channels.families, removed, strict=True):
        gone[channels.ids_of(family)[mask]] = True
    return gone


def _dimensions(channels: Channels) -> Iterator[Ids]:
    """Yield the classes along each dimension of each value that channels may go from."""
    seen: set[int] = set()
    for _, along in channels.values():
        for ids in along:
            if ids is not None and len(ids) and id(ids) not in seen:
                seen.add(id(ids))
                if not channels.partition.is_frozen(ids).any():
                    yield channels.partition.roots(ids)


def round_half_up(value: float) -> int:
    """Return the nearest integer; of two, the larger one (and 2.4999999 is meant as 2.5)."""
    return math.floor(value + 0.5 + 1e-9)


def ratios_told(channels: Channels, overrides: Mapping[str, float]) -> dict[int, float]:
    """Return the ratio of each family that a name gives one: the least of several.

    A name is a pattern for the paths of layers, or of a module with layers in it. Raises
    OptionError for one that no layer which computes channels bears.
    """
    found: dict[int, float] = {}
    names = [_names(family) for family in channels.families]
    known = set().union(*names, (one.layer for one in channels.frozen()))
    for pattern, ratio in overrides.items():
        if not any(_fits(name, pattern) for name in known):
            raise unknown_name("layer", pattern, known)
        for index, own in enumerate(names):
            if any(_fits(name, pattern) for name in own):
                found[index] = min(ratio, found.get(index, 1.0))
    return found


def _names(family: Family) -> set[str]:
    """Return the family's name, and the paths of the calls and modules that compute it."""
    weights = [one.constant for one in family.members if one.role is Role.OUTPUT]
    return {family.name, *family.layers, *(name.rpartition(".")[0] or name for name in weights)}


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _indices_per_channel(family: Family) -> int:
    """Return how many rows of the layer that computes them go with one channel."""
    made = [member for member in family.members if member.role is Role.OUTPUT]
    return int(made[0].positions.shape[1])


def _kind(channels: Channels, family: Family) -> object:
    """Return what isomorphic families have in common (Fang et al. 2024, Isomorphic Pruning)."""
    return tuple(
        (member.role, member.dim, tuple(channels.graph.constant(member.constant).shape))
        for member in family.members
    )


def check_overrides(overrides: object) -> None:
    """Raise OptionError for overrides that map nothing."""
    if not isinstance(overrides, Mapping):
        raise OptionError(f"overrides must map name patterns to shares, not {overrides!r}.")


def check(wish: Wish, of: str) -> None:
    """Raise OptionError for a wish that cannot be meant."""
    for word, value, known in (("scope", wish.scope, SCOPES), ("of", of, KINDS)):
        if value not in known:
            words = ", ".join(map(repr, known))
            raise OptionError(f"{word} must be one of {words}, not {value!r}.")
    if not wish.kinds or not set(wish.kinds) <= set(FAMILY_KINDS):
        raise OptionError(f"kinds must be some of {FAMILY_KINDS}, not {wish.kinds!r}.")
    for name, ratio in (("ratio", wish.ratio), ("max_ratio", wish.max_ratio),
                        *((f"overrides[{key!r}]", one) for key, one in wish.overrides.items())):
        if not (isinstance(ratio, (int, float)) and 0.0 <= ratio <= 1.0):
            raise OptionError(f"{name} must be a share between 0 and 1, not {ratio!r}.")
    for name, count in (("round_to", wish.round_to), ("min_channels", wish.min_channels)):
        if not (isinstance(count, int) and count >= 1):
            raise OptionError(f"{name} must be a whole number from 1 on, not {count!r}.")
