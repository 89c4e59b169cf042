"""A sensitivity analysis as a picture: curves for few families, a map of colours for many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.comparison.plot import BASELINE, COLOURS, GRID, STYLE
from fxopt.plotting import plot_format, save_plot
from fxopt.sensitivity.result import Sensitivity
from fxopt.sensitivity.table import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CURVES = 14  # so many can be told apart: the colours, drawn through and dashed


def plot(found: Sensitivity, path: Path) -> None:
    """Draw into a file; see `Sensitivity.plot`."""
    plot_format(path)
    import matplotlib
    from matplotlib.figure import Figure

    few = len(found.rows) <= _CURVES
    height = 4.5 if few else 1.5 + 0.22 * len(found.rows)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, height), layout="constrained")
        axis = figure.subplots()
        (_curves if few else _map)(axis, figure, found)
        axis.set_title(title(found))
        axis.set_xlabel("share of the channels removed")
        save_plot(figure, path)


def _curves(axis: Axes, figure: Any, found: Sensitivity) -> None:
    axis.axhline(found.baseline, color=BASELINE, linewidth=1, linestyle=":")
    for place, row in enumerate(found.rows):
        axis.plot(
            [0, *found.measured], [found.baseline, *row.values], marker="o", markersize=3.5,
            color=COLOURS[place % len(COLOURS)], label=row.name, linewidth=1.8,
            linestyle="-" if place < len(COLOURS) else "--",
        )  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_ylabel("evaluate(model)")
    axis.margins(x=0.02)
    figure.legend(loc="outside right center", frameon=False, fontsize=8, handlelength=3.5)


def _map(axis: Axes, figure: Any, found: Sensitivity) -> None:
    image = axis.imshow([row.values for row in found.rows], aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(found.measured)), [f"{ratio:.4g}" for ratio in found.measured])
    axis.set_yticks(range(len(found.rows)), [row.name for row in found.rows], fontsize=7)
    axis.tick_params(length=0)
    figure.colorbar(image, ax=axis, label="evaluate(model)")
