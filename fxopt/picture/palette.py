"""The colours of pictures: fills for light backgrounds, under dark text.

Families that cost differ most from each other, also for readers who confuse red and green: they lie
apart in lightness or on the axis from blue to yellow. What moves data is grey. A colour never
stands alone: every box says its operator, too.
"""

from __future__ import annotations

FAMILY_COLOURS = {
    "input": "#d5f0dc",
    "output": "#d5f0dc",
    "constant": "#eceff1",
    "attention": "#e3b8ea",
    "convolution": "#8fc1f0",
    "normalization": "#fff0a8",
    "recurrent": "#c9b6f5",
    "contraction": "#bfe3ff",
    "pooling": "#8ddccf",
    "activation": "#ffbf86",
    "reduction": "#c3e59a",
    "indexing": "#dcd6c8",
    "shape": "#e4e7ea",
    "creation": "#f1ece2",
    "control": "#ffb3b8",
    "elementwise": "#fbe1d0",
    "other": "#ffffff",
}

CHANGE_COLOURS = {
    "removed": "#ffb4ab",
    "added": "#a9e5b4",
    "changed": "#ffdf8c",
    "unchanged": "#ffffff",
}

TEXT = "#1b1f24"
QUIET_TEXT = "#454c55"  # types, paths and arguments
LINE = "#7d8691"
GROUP = "#f2f5f9"  # a collapsed module
CLUSTERS = ("#fafbfc", "#f3f5f8", "#ebeff3")  # expanded modules, by how deep they lie
