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
    heads = np.concatenate([
        np.zeros(0, np.int64), *[_free_roots(follower, ids) for ids in follower.batches]
    ])  # fmt: skip
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
        appearances = tuple(
            Appearance(node, dim, positions_of(seen, channels))
            for node, _, dim, seen in computed
            if np.isin(channels[0], seen)
        )
        layers = tuple(dict.fromkeys(
            path for _, path, _, seen in computed if np.isin(channels[0], seen)
        ))  # fmt: skip
        kind = "heads" if np.isin(channels[0], heads) else "channels"
        found.append(Family(_name(layers), layers, len(channels), members, appearances, kind))
    return tuple(_numbered(found))


def _free_roots(follower: Follower, ids: Ids) -> Ids:
    """Return the class of each identity, -1 where it may not go."""
    return np.where(follower.partition.is_frozen(ids), -1, follower.partition.roots(ids))


def _standing(roots: list[Ids]) -> dict[tuple[tuple[int, int], ...], Ids]:
    """Group classes by where they stand: (place, how often) of each."""
    rows = np.concatenate([
        np.stack([found, np.full(len(found), place)]) for place, found in enumerate(roots)
    ], axis=1) if roots else np.zeros((2, 0), np.int64)  # fmt: skip
    rows = rows[:, rows[0] >= 0]
    unique, counts = np.unique(rows, axis=1, return_counts=True)
    ends = np.flatnonzero(np.diff(unique[0])) + 1
    signatures: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for part, count in zip(np.split(unique, ends, axis=1), np.split(counts, ends), strict=True):
        if part.size:
            key = tuple(zip(part[1].tolist(), count.tolist(), strict=True))
            signatures.setdefault(key, []).append(int(part[0, 0]))
    return {key: np.array(channels) for key, channels in signatures.items()}


def _computed(follower: Follower) -> list[tuple[str, str, int, Ids]]:
    return [
        (node.name, str(node.meta.get("path") or node.name), dim, _free_roots(follower, ids))
        for node, dim, ids in follower.computed
    ]


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
