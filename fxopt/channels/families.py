"""Families: channels that stand in the same places, so that any may go instead of another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fxopt.channels.follower import Follower
from fxopt.channels.groups import Appearance, Family, Member, Positions, Role
from fxopt.channels.partition import Ids


def families_of(follower: Follower) -> tuple[Family, ...]:
    """Return the families of all channels that a layer computes and that may go."""
    places = [
        (name, dim, ids)
        for name, along in follower.constants.items()
        for dim, ids in enumerate(along)
        if ids is not None
    ]
    computed = [
        (node.name, dim, ids, str(node.meta.get("path") or node.name))
        for node, dim, ids in follower.computed
    ]
    vectors = [*(ids for _, _, ids in places), *(ids for _, _, ids, _ in computed)]
    roots = [_free_roots(follower, ids) for ids in vectors]
    heads = {root for ids in follower.batches for root in _free_roots(follower, ids).tolist()}
    found = []
    for signature, channels in _standing(roots).items():
        standing = {index: positions_of(roots[index], channels) for index, _ in signature}
        members = tuple(
            Member(*places[index][:2], follower.role_of(places[index][2]), positions)
            for index, positions in standing.items()
            if index < len(places)
        )
        if not any(member.role is Role.OUTPUT for member in members):
            continue  # no layer computes them: there is nothing to save
        by = [index for index in standing if index >= len(places)]
        appearances = tuple(
            Appearance(*computed[index - len(places)][:2], standing[index]) for index in by
        )
        layers = tuple(dict.fromkeys(computed[index - len(places)][3] for index in by))
        kind = "heads" if int(channels[0]) in heads else "channels"
        found.append(Family(_name(layers), layers, len(channels), members, appearances, kind))
    return tuple(_numbered(found))


def _free_roots(follower: Follower, ids: Ids) -> Ids:
    """Return the class of each identity, -1 where it may not go."""
    return np.where(follower.partition.is_frozen(ids), -1, follower.partition.roots(ids))


def _standing(roots: list[Ids]) -> dict[tuple[tuple[int, int], ...], Ids]:
    """Group classes by where they stand: (place, how often) of each."""
    found = [ids[ids >= 0] * len(roots) + place for place, ids in enumerate(roots)]
    if not any(len(one) for one in found):
        return {}
    keys, counts = np.unique(np.concatenate(found), return_counts=True)
    classes, places = np.divmod(keys, len(roots))
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    ends = np.append(starts[1:], len(classes))
    signatures: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        key = tuple(zip(places[start:end].tolist(), counts[start:end].tolist(), strict=True))
        signatures.setdefault(key, []).append(int(classes[start]))
    return {key: np.array(channels) for key, channels in signatures.items()}


def positions_of(roots: Ids, wanted: Ids) -> Positions:
    """Return the places, shape [channels, k], where each of `wanted` stands in `roots`."""
    order = np.argsort(roots, kind="stable")
    ordered = roots[order]
    start = np.searchsorted(ordered, wanted)
    count = int(np.searchsorted(ordered, wanted[0], "right") - start[0])
    return order[start[:, None] + np.arange(count)[None, :]]


def _name(layers: tuple[str, ...]) -> str:
    return layers[0] if layers else "constants"


def _numbered(families: list[Family]) -> list[Family]:
    """Make names unique: several families may be computed by one layer."""
    seen: dict[str, int] = {}
    found = []
    for family in families:
        seen[family.name] = count = seen.get(family.name, 0) + 1
        name = family.name if count == 1 else f"{family.name}#{count}"
        found.append(replace(family, name=name))
    return found
