"""The frames around what is in an open module, one inside of the other.

A frame must hold together: where a module is called twice, or shared between others, what runs
between its calls would tear it apart. Such a module gets a frame per call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fxopt.picture.collapse import Network, enclosing
from fxopt.picture.parts import parts_by_path

Key = tuple[str, int]  # a module's path, and which of its parts


@dataclass
class Frame:
    """A part of an open module, and what is drawn inside of it."""

    path: str
    number: int = 1
    names: list[str] = field(default_factory=list)
    inside: dict[Key, Frame] = field(default_factory=dict)


def frame_tree(drawn: Network, names: Iterable[str]) -> Frame:
    """Return the frames around some of the boxes; one that would hold a single thing is left out.

    `drawn` has been through `mark_frames`.
    """
    root = Frame("")
    for name in names:
        frame = root
        for key in drawn.nodes[name]["frames"]:
            frame = frame.inside.setdefault(key, Frame(*key))
        frame.names.append(name)
    return _without_trivial(root)


def _without_trivial(frame: Frame) -> Frame:
    """Put in the place of frames with one thing inside that thing."""
    result = Frame(frame.path, frame.number, list(frame.names))
    for key, inner in frame.inside.items():
        kept = _without_trivial(inner)
        if len(kept.names) + len(kept.inside) > 1:
            result.inside[key] = kept
        else:
            result.names += kept.names
            result.inside.update(kept.inside)
    return result


def mark_frames(drawn: Network) -> None:
    """Give each box of a contracted graph its frames, outermost first, as attribute `frames`."""
    boxes = dict(drawn.nodes(data="box"))
    # a collapsed module is not inside of itself
    around = {n: enclosing(box.path)[: -1 if box.is_module else None] for n, box in boxes.items()}
    parts = parts_by_path(drawn, around)
    for name, paths in around.items():
        drawn.nodes[name]["frames"] = tuple((path, parts[path][name]) for path in paths)
