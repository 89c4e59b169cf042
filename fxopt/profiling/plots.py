"""Pictures of a profile: a roofline, and memory over time. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.errors import OptionError
from fxopt.plotting import plot_format, save_plot
from fxopt.profiling.rows import Row
from fxopt.profiling.table import short

if TYPE_CHECKING:
    from fxopt.profiling.result import Profile

NAMED = 6  # how many of the slowest nodes bear their names
_COLOURS = {
    "convolution": "#1f6fb4", "contraction": "#5aa9e6", "attention": "#9b3fb5",
    "recurrent": "#6a4fc3", "normalization": "#c9a400", "activation": "#e8751a",
    "pooling": "#1a9e8a", "reduction": "#5b9a1f", "elementwise": "#d0805a",
}  # fmt: skip
_OTHER = "#8a9099"


def draw_roofline(profile: Profile, path: str | Path) -> None:
    """Draw each measured node at its intensity and speed, below the machine's two ceilings.

    A node reaches at most min(peak, bandwidth · intensity) (Williams, Waterman and Patterson 2009);
    what lies above found its operands in a cache. Nodes that move no bytes or compute nothing have
    no place here. Raises OptionError for a profile without milliseconds.
    """
    plot_format(path)
    if profile.ms is None:
        raise OptionError("A roofline needs milliseconds: profile with measure=True, and without "
                          "at(), at whose sizes nothing ran.")  # fmt: skip
    figure, axes = _figure()
    rows = [row for row in profile.rows if row.ms and row.cost.flops and row.cost.bytes_moved]
    if not rows:
        raise OptionError("There is nothing to draw: no node of this graph computes anything.")
    _draw_ceilings(axes, profile, rows)
    for family in dict.fromkeys(row.family for row in rows):
        part = [row for row in rows if row.family == family]
        axes.scatter(
            [row.cost.intensity for row in part], list(map(_speed, part)),
            s=[12 + 600 * (row.ms or 0) / profile.ms for row in part], alpha=0.75,
            color=_COLOURS.get(family, _OTHER), edgecolors="white", linewidths=0.5, label=family,
        )  # fmt: skip
    for row in _named(rows):
        axes.annotate(
            row.name, (row.cost.intensity, _speed(row)), fontsize=7, xytext=(6, 4),
            textcoords="offset points",
        )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", ylabel="speed reached (FLOP/s)",
        xlabel="arithmetic intensity (FLOPs per byte moved); above the slope: served by a cache",
    )  # fmt: skip
    axes.set_title(f"{profile.name}: roofline on {profile.machine.name}", loc="left", fontsize=9)
    legend = axes.legend(fontsize=7, loc="lower right", title="area: share of the time")
    legend.get_title().set_fontsize(7)
    for handle in legend.legend_handles:
        handle.set_sizes([30])
    save_plot(figure, path)


def _draw_ceilings(axes: Any, profile: Profile, rows: Sequence[Row]) -> None:
    machine = profile.machine
    lowest = min(*(row.cost.intensity for row in rows), machine.ridge) / 2
    highest = max(*(row.cost.intensity for row in rows), machine.ridge) * 2
    axes.plot(
        [lowest, machine.ridge, highest],
        [lowest * machine.bytes_per_second, *[machine.flops_per_second] * 2],
        color="#333333", linewidth=1.2,
    )  # fmt: skip
    peak, bandwidth = machine.flops_per_second, machine.bytes_per_second
    middle = (lowest * machine.ridge) ** 0.5
    axes.text(
        machine.ridge, peak * 1.08, f"{_unit(peak)}FLOP/s", ha="left", va="bottom", fontsize=8
    )
    axes.text(
        middle, middle * bandwidth * 1.15, f"{_unit(bandwidth)}B/s ", ha="right", va="bottom",
        fontsize=8,
    )  # fmt: skip


def _unit(number: float) -> str:
    """Return `173 G` for 1.73e11."""
    text = short(number)
    return f"{text[:-1]} {text[-1]}" if text[-1].isalpha() else f"{text} "


def _named(rows: Sequence[Row]) -> list[Row]:
    """Return the slowest nodes whose names do not lie on one another."""
    named: list[Row] = []
    for row in sorted(rows, key=lambda row: row.ms or 0, reverse=True):
        if len(named) < NAMED and all(_are_apart(row, other) for other in named):
            named.append(row)
    return named


def _are_apart(a: Row, b: Row) -> bool:
    across = abs(math.log10(a.cost.intensity / b.cost.intensity))
    return across > 0.4 or abs(math.log10(_speed(a) / _speed(b))) > 0.15


def _speed(row: Row) -> float:
    return float(row.cost.flops) / ((row.ms or 0.0) / 1e3)


def draw_memory(profile: Profile, path: str | Path) -> None:
    """Draw the bytes of activations alive while each node runs, with the modules below."""
    plot_format(path)
    rows = profile.rows
    if not rows:
        raise OptionError("There is nothing to draw: this graph computes nothing.")
    figure, axes = _figure()
    megabytes = [row.live / 1e6 for row in rows]
    axes.fill_between(range(len(rows)), megabytes, step="mid", color="#5aa9e6", alpha=0.6)
    axes.step(range(len(rows)), megabytes, where="mid", color="#1f6fb4", linewidth=1)
    top = max(range(len(rows)), key=megabytes.__getitem__)
    axes.annotate(
        f"{rows[top].name}: {megabytes[top]:.2f} MB", (top, megabytes[top]), fontsize=8,
        xytext=(6, 2), textcoords="offset points",
    )  # fmt: skip
    free = 0.0  # from where on a name does not lie on the one before it
    for start, name in _parts(rows):
        axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.6)
        if start >= free:
            axes.text(start, 0, f" {name}", rotation=90, va="bottom", fontsize=6, color="#333333")
            free = start + len(rows) / 60
    axes.set(xlabel="node, in the order of the graph", ylabel="activations alive (MB)")
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_ylim(0, max(megabytes) * 1.12 or 1)
    axes.set_title(f"{profile.name}: memory of activations over time", loc="left", fontsize=9)
    save_plot(figure, path)


def _parts(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """Return where each part of the model begins, the longest path that gives few enough parts."""
    for depth in (3, 2, 1):
        found: list[tuple[int, str]] = []
        for index, row in enumerate(rows):
            name = ".".join(row.path.split(".")[:depth])
            if name and (not found or found[-1][1] != name):
                found.append((index, name))
        if len(found) <= 40:
            return found
    return []


def _figure() -> tuple[Any, Any]:
    """Return a figure that no window and no other code knows of, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
