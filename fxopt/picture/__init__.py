"""A graph as a picture: DOT always, and what Graphviz makes of it.

    subject      what is drawn: a graph, and the steps of its story
    side         a graph whose constants stand in the labels of their users
    modules      which modules are open
    collapse     the graph with every other module as one box
    parts        what holds together of a module that is called several times
    frames       open modules around what is in them
    columns      a long chain in columns, as text is set
    plain        one graph, coloured by kind of operator
    comparison   before and after a step, side by side
    draw         boxes, clusters and arrows; labels and palette
    render       running `dot`
    notebook     how graphs and compiled models show themselves
"""

from fxopt.picture.palette import CHANGE_COLOURS, FAMILY_COLOURS
from fxopt.picture.subject import moments
from fxopt.picture.write import check_drawable, dot, svg, visualize

__all__ = [
    "CHANGE_COLOURS",
    "FAMILY_COLOURS",
    "check_drawable",
    "dot",
    "moments",
    "svg",
    "visualize",
]
