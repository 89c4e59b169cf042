"""The picture of a step: the graph before and after it, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from fxopt.diff import diff_nodes
from fxopt.picture.collapse import Box
from fxopt.picture.columns import PAGE_WIDTH, columns_for, divide
from fxopt.picture.draw import Paint, boxed, draw_side, finish, new_picture
from fxopt.picture.labels import title_label
from fxopt.picture.modules import module_tree, opened
from fxopt.picture.palette import CHANGE_COLOURS
from fxopt.picture.side import Side
from fxopt.story import Snapshot

READABLE = 40  # how many boxes of each side one page shows legibly


def kinds_of_change(before: Snapshot, after: Snapshot, prefix: str = "") -> dict[str, str]:
    """Return, by node, what happened to it: "removed", "added" or "changed"."""
    diff = diff_nodes(before.records, after.records)
    kinds = {
        **dict.fromkeys(diff.removed, "removed"),
        **dict.fromkeys(diff.added, "added"),
        **dict.fromkeys(diff.changed, "changed"),
    }
    found = {prefix + name: kind for name, kind in kinds.items()}
    for name, body in after.subgraphs.items():
        if name in before.subgraphs:
            found |= kinds_of_change(before.subgraphs[name], body, f"{prefix}{name}/")
    return found


def comparison_picture(
    name: str, title: str, sides: Sequence[Side], kinds: Mapping[str, str], depth: int | str | None
) -> tuple[str, int]:
    """Return the picture of a graph before and after as DOT, and how many boxes it has.

    `kinds` says what differs, see `kinds_of_change`. Modules are open on both sides or on neither:
    those where something differs, as many as fit.
    """
    tree = module_tree(*(side.network for side in sides))
    classes = sides[0].classes
    open_paths = opened(tree, depth, classes, limit=READABLE, interesting=kinds.keys())
    touched = {module.path for module in tree.below() if module.holds(kinds.keys())}
    picture = new_picture(name, title_label(name, title, list(CHANGE_COLOURS.items())))
    drawn = [boxed(side.network, open_paths) for side in sides]
    count = max(columns_for(boxes, PAGE_WIDTH / 2) for boxes in drawn)
    for word, side, boxes in zip(("before", "after"), sides, drawn, strict=True):
        draw_side(picture, side, divide(boxes, count), _paint(kinds, touched), word)
    return finish(picture, *drawn)


def _paint(kinds: Mapping[str, str], touched: Set[str]) -> Paint:
    """Colour what differs; a collapsed module in which something does says how much.

    `touched` are the paths of the modules in which something differs on either side.
    """

    def paint(box: Box) -> tuple[str, str]:
        found = [kinds[member] for member in box.members if member in kinds]
        if not box.is_module:
            return CHANGE_COLOURS[found[0] if found else "unchanged"], ""
        counts = [f"{found.count(kind)} {kind}" for kind in dict.fromkeys(found)]
        return CHANGE_COLOURS["changed" if box.path in touched else "unchanged"], ", ".join(counts)

    return paint
