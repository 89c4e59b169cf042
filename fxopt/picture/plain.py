"""The picture of one graph: coloured by kind of operator."""

from __future__ import annotations

from fxopt.families import FAMILIES
from fxopt.picture.collapse import Box
from fxopt.picture.columns import columns_for, divide
from fxopt.picture.draw import boxed, draw_side, finish, new_picture
from fxopt.picture.labels import sizes_text, title_label
from fxopt.picture.modules import module_tree, opened
from fxopt.picture.palette import FAMILY_COLOURS, GROUP
from fxopt.picture.side import Side


def plain_picture(name: str, side: Side, depth: int | str | None) -> tuple[str, int]:
    """Return the picture of a graph as DOT, and how many boxes it has."""
    open_paths = opened(module_tree(side.network), depth, side.classes)
    drawn = boxed(side.network, open_paths)
    families = dict(side.network.nodes(data="family"))

    def paint(box: Box) -> tuple[str, str]:
        return (GROUP if box.is_module else FAMILY_COLOURS[families[box.members[0]]]), ""

    boxes = [box for _, box in drawn.nodes(data="box")]
    shown = {families[box.members[0]] for box in boxes if not box.is_module}
    legend = [(one, FAMILY_COLOURS[one]) for one in FAMILIES[3:] if one in shown]
    picture = new_picture(name, title_label(name, sizes_text(side.whole), legend))
    draw_side(picture, side, divide(drawn, columns_for(drawn)), paint)
    return finish(picture, drawn)

