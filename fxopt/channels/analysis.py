"""The analysis of channels: walk the graph until every split has found a factor that may shrink."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from fxopt.channels import (
    contractions,
    elementwise,
    images,
    indexing,
    moves,
    norms,
    recurrent,
    reshapes,
)
from fxopt.channels.families import families_of
from fxopt.channels.follower import Along, Follower, Site
from fxopt.channels.groups import Family
from fxopt.channels.partition import Ids, Mask, Reason
from fxopt.errors import OptionError
from fxopt.graph_module import GraphModule

HEADS = ("heads", "width")
# importing them registers the operators
_FOLLOWED = (contractions, elementwise, images, indexing, moves, norms, recurrent, reshapes)
_ROUNDS = 8
_FEW = 3  # a factor so small is taken only where attention asks for it


@dataclass(frozen=True)
class Frozen:
    """Channels of a layer that may not go, and why."""

    layer: str  # module path of the contraction that computes them
    node: str
    count: int
    of: int
    reason: Reason


class Channels:
    """Which channels of a graph there are, which go together, and which may not go.

    `families` holds those that may; `frozen()` the others, with the reasons. `heads` says what
    attention loses: whole heads, or width of every head ("width"). With `reduced`, channels that a
    mean or a norm reduces may go, which is approximate: `reductions` then says where.

    Raises OptionError where `heads` is none of these.
    """

    def __init__(self, graph: GraphModule, *, heads: str = "heads", reduced: bool = False) -> None:
        if heads not in HEADS:
            raise OptionError(f"heads must be one of {', '.join(map(repr, HEADS))}, not {heads!r}.")
        self.graph = graph
        self.follower = _settled(graph, heads, reduced)
        self.partition = self.follower.partition
        self.families: tuple[Family, ...] = families_of(self.follower)

    def reductions(self, gone: Mask) -> list[tuple[fx.Node, str]]:
        """Return the calls that reduce channels which are gone, with what they do."""
        return [
            (node, text)
            for node, text, ids in self.follower.reductions
            if gone[self.partition.roots(ids)].any()
        ]

    def along(self, node: fx.Node) -> Along:
        """Return the identities along each dimension of a tensor."""
        return self.follower.of(node)

    def constant(self, name: str) -> Along:
        """Return the identities along each dimension of a constant."""
        return self.follower.constants[name]

    def values(self) -> Iterator[tuple[fx.Node, Along]]:
        """Yield every node whose value is a tensor, with what stands along its dimensions."""
        for node, along in self.follower.along.items():
            if isinstance(node.meta.get("val"), torch.Tensor):
                yield node, along

    def ids_of(self, family: Family) -> Ids:
        """Return the identity that stands for each channel of a family."""
        member = family.members[0]
        along = self.constant(member.constant)[member.dim]
        assert along is not None
        return self.partition.roots(along[member.positions[:, 0]])

    def frozen(self) -> list[Frozen]:
        """Return what may not go, for every layer that computes channels."""
        reasons = list(self.partition.reasons)
        found: dict[str, Frozen] = {}
        for node, _, ids in self.follower.computed:
            held = self.partition.reason_indices(ids)
            if (held >= 0).any() and node.name not in found:
                layer = str(node.meta.get("path") or node.name)
                reason = reasons[int(held[held >= 0][0])]
                count = int((held >= 0).sum())
                found[node.name] = Frozen(layer, node.name, count, len(ids), reason)
        return list(found.values())


def _settled(graph: GraphModule, heads: str, reduced: bool) -> Follower:
    """Walk until no site wants another factor, and return the walk with the fewest complaints.

    Every round tries a factor that a site has not had, so that it ends. Of walks that are alike the
    last one is taken: it has what attention asked for.
    """
    choices: dict[tuple[str, str], int] = {}
    tried: dict[tuple[str, str], dict[int, str]] = {}
    walks: list[tuple[int, Follower]] = []
    for _ in range(_ROUNDS):
        walk = Follower(graph, choices, heads=heads, reduced=reduced).walk()
        held = {key for key, site in walk.sites.items() if _is_held(walk, site)}
        walks.append((2 * len(held) + len(walk.disliked), walk))
        # what is held may be so only because of a factor that attention wants to see changed
        wishes = dict(_wishes(walk, walk.disliked, "disliked", tried))
        wishes = wishes or dict(_wishes(walk, held, "held", tried))
        if not wishes:
            break
        choices.update(wishes)
    return min(reversed(walks), key=lambda pair: pair[0])[1]


def _is_held(walk: Follower, site: Site) -> bool:
    """Whether nothing can go along the factor that a site has."""
    held = walk.partition.is_frozen(site.ids)
    return bool(held.all()) or len(np.unique(walk.partition.roots(site.ids[~held]))) < 2


def _wishes(
    walk: Follower,
    keys: Iterable[tuple[str, str]],
    complaint: str,
    tried: dict[tuple[str, str], dict[int, str]],
) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield those of these sites that want another factor than the one they have, and which."""
    for key in sorted(keys):
        site, marks = walk.sites[key], tried.setdefault(key, {})
        marks[site.chosen] = complaint
        wish = _other(site, marks)
        if wish is not None and wish != site.chosen:
            yield key, wish


def _other(site: Site, marks: Mapping[int, str]) -> int | None:
    """Return the factor to try next: an untried one, else one that only was not liked."""
    asked = "disliked" in marks.values()
    for axis in site.axes:
        if axis not in marks and (asked or site.sizes[axis] > _FEW):
            return axis
    return next((axis for axis, mark in marks.items() if mark == "disliked"), None)

