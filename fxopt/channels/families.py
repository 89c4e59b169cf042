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
    roots = [_free_roots(follower, ids) for _, _, ids in places]
    standing = _standing(roots)
    computed = _computed(follower)
    computing = _computing(computed)
    heads = {root for ids in follower.batches for root in _free_roots(follower, ids).tolist()}
    found = []
    for signature, channels in standing.items():
        members = tuple(
            Member(
                places[place][0], places[place][1], follower.role_of(places[place][2]),
                positions_of(roots[place], channels),
            )
            for place, _ in signature
        )  # fmt: skip
        if not any(member.role is Role.OUTPUT for member in members):
            continue  # no layer computes them: there is nothing to save
        by = [computed[index] for index in computing.get(int(channels[0]), ())]
        appearances = tuple(
            Appearance(node, dim, positions_of(seen, channels)) for node, _, dim, seen in by
        )
        layers = tuple(dict.fromkeys(path for _, path, _, _ in by))
        kind = "heads" if int(channels[0]) in heads else "channels"
        found.append(Family(_name(layers), layers, len(channels), members, appearances, kind))
    return tuple(_numbered(found))


def _free_roots(follower: Follower, ids: Ids) -> Ids:
    """Return the class of each identity, -1 where it may not go."""
    return np.where(follower.partition.is_frozen(ids), -1, follower.partition.roots(ids))


def _standing(roots: list[Ids]) -> dict[tuple[tuple[int, int], ...], Ids]:
    """Group classes by where they stand: (place, how often) of each."""
    found = [ids[ids >= 0] * len(roots) + place for place, ids in enumerate(roots)]
    keys, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *found]), return_counts=True)
    classes, places = np.divmod(keys, max(len(roots), 1))
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    ends = np.append(starts[1:], len(classes))
    signatures: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        key = tuple(zip(places[start:end].tolist(), counts[start:end].tolist(), strict=True))
        signatures.setdefault(key, []).append(int(classes[start]))
    return {key: np.array(channels) for key, channels in signatures.items()}


def _computed(follower: Follower) -> list[tuple[str, str, int, Ids]]:
    return [
        (node.name, str(node.meta.get("path") or node.name), dim, _free_roots(follower, ids))
        for node, dim, ids in follower.computed
    ]


def _computing(computed: list[tuple[str, str, int, Ids]]) -> dict[int, list[int]]:
    """Map each class to the values, by their place in the list, that it stands in."""
    found: dict[int, list[int]] = {}
    for index, (_, _, _, seen) in enumerate(computed):
        for root in np.unique(seen[seen >= 0]).tolist():
            found.setdefault(root, []).append(index)
    return found


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
