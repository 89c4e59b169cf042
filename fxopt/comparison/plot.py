"""A comparison as a picture: latencies, and beside them what else was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.comparison.result import Comparison, Row
from fxopt.comparison.throughput import threads_text
from fxopt.plotting import plot_format, save_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINE = "#8a8f98"
# Okabe and Ito's colours, which people with any colour vision can tell apart
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
INK, GRID = "#22262e", "#e3e6ea"
STYLE = {
    "font.size": 10, "axes.edgecolor": GRID, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "svg.fonttype": "none", "svg.hashsalt": "fxopt",
}  # fmt: skip


def plot(comparison: Comparison, path: Path) -> None:
    """Draw into a file; see `Comparison.plot`."""
    plot_format(path)
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in comparison.rows if row.latency is not None]
    colours = _colours(comparison)
    panels = [_latency, *([_classes] if comparison.decisions else [_errors])]
    height = 0.36 * len(rows) + 1.3
    rates = _rates(comparison)
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(11, height + (3.2 if rates else 0)), layout="constrained")
        figure.suptitle(
            f"{comparison.model_name} on {comparison.inputs}, {threads_text(comparison.threads)}",
            x=0.01, ha="left", fontsize=12,
        )  # fmt: skip
        parts: Any = [figure]
        if rates:
            parts = figure.subfigures(2, 1, height_ratios=[height, 3.2])
        axes = parts[0].subplots(1, 2, width_ratios=[3, 2], sharey=True)
        for panel, axis in zip(panels, axes, strict=True):
            panel(axis, comparison, rows, colours)
        if rates:
            _throughput(parts[1].subplots(1, len(rates), sharey=True, squeeze=False)[0], rates,
                        colours)  # fmt: skip
        save_plot(figure, path)


def _colours(comparison: Comparison) -> dict[str, str]:
    """Return a colour per row: grey for the baseline, else one per backend or variant."""
    kinds = list(dict.fromkeys(_kind(comparison, row) for row in comparison.rows[1:]))
    by_kind = {kind: COLOURS[place % len(COLOURS)] for place, kind in enumerate(kinds)}
    found = {row.name: by_kind[_kind(comparison, row)] for row in comparison.rows[1:]}
    return {comparison.baseline.name: BASELINE, **found}


def _kind(comparison: Comparison, row: Row) -> str:
    """Return what rows of one colour have in common."""
    several = len({one.variant for one in comparison.rows}) > 1
    return row.variant if several else str(row.backend)


# -- panels ----------------------------------------------------------------------------------------


def _latency(
    axis: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, str]
) -> None:
    """Bars of medians with the quartiles as whiskers; logarithmic where they lie far apart."""
    latencies = [row.latency for row in rows if row.latency is not None]
    medians = [one.median for one in latencies]
    below = [one.median - one.quartiles[0] for one in latencies]
    above = [one.quartiles[1] - one.median for one in latencies]
    places = range(len(rows))
    axis.barh(
        places, medians, color=[colours[row.name] for row in rows], height=0.68,
        xerr=(below, above), error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 3},
    )  # fmt: skip
    far_apart = max(medians) > 20 * min(medians)
    if far_apart:
        axis.set_xscale("log")
    for place, row, median, more in zip(places, rows, medians, above, strict=True):
        axis.annotate(
            _bar_text(comparison, row), (median + more, place), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=9,
        )  # fmt: skip
    axis.set_yticks(places, [row.name for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.3 if far_apart else 0.22)
    axis.set_xlim(left=min(medians) / 4 if far_apart else 0)
    axis.set_title("latency in ms" + (", logarithmic" if far_apart else ""))
    _bare(axis, "x")


def _bar_text(comparison: Comparison, row: Row) -> str:
    from fxopt.comparison.table import milliseconds, speed

    assert row.latency is not None
    text = milliseconds(row.latency.median)
    return text if row is comparison.baseline else f"{text}   {speed(comparison, row)}"


def _errors(
    axis: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, str]
) -> None:
    """Relative errors on a logarithmic scale, as dots on a line."""
    errors = [row.relative_error for row in rows if row.relative_error]
    finite = [error for error in errors if math.isfinite(error)]
    low = 10 ** math.floor(math.log10(min(finite, default=1e-7)) - 0.5)
    high = 10 ** math.ceil(math.log10(max(finite, default=1e-6)) + 0.5)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    for place, row in enumerate(rows):
        error = row.relative_error
        if row is comparison.baseline or error is None:
            continue
        if error == 0 or math.isinf(error):
            text, at = ("exactly equal", low) if error == 0 else ("not comparable", low)
            axis.annotate(text, (at, place), xytext=(4, 0), textcoords="offset points",
                          va="center", fontsize=9)  # fmt: skip
            continue
        axis.plot([low, error], [place, place], color=colours[row.name], linewidth=1.5, alpha=0.5)
        axis.plot([error], [place], "o", color=colours[row.name], markersize=7)
    axis.set_title("max |Δ| / max |reference|")
    _bare(axis, "x")


def _classes(
    axis: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, str]
) -> None:
    """Top-1 accuracy where there are labels, else agreement with the baseline."""
    labelled = comparison.labels > 0
    values = [row.accuracy if labelled else row.agreement for row in rows]
    known = [value for value in values if value is not None]
    low = max(0.0, min(known) - 0.05) if min(known) > 0.5 else 0.0
    width = max(max(known) - low, 0.02)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        if value is None:
            continue
        axis.plot([low, value], [place, place], color=colours[row.name], linewidth=1.5, alpha=0.5)
        axis.plot([value], [place], "o", color=colours[row.name], markersize=7)
        axis.annotate(f"{value:.1%}", (value, place), xytext=(8, 0), textcoords="offset points",
                      va="center", fontsize=9)  # fmt: skip
    axis.set_xlim(low, low + 1.3 * width)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
    axis.set_title("top-1 accuracy" if labelled else "top-1 agreement with the baseline")
    _bare(axis, "x")


Rates = dict[int, dict[str, list[tuple[int, float]]]]  # threads → name → (batch, inputs/s)


def _rates(comparison: Comparison) -> Rates:
    found: Rates = {}
    for one in comparison.throughput:
        if one.per_second is not None:
            series = found.setdefault(one.threads, {}).setdefault(one.name, [])
            series.append((one.batch, one.per_second))
    return found


def _throughput(axes: Sequence[Axes], rates: Rates, colours: dict[str, str]) -> None:
    """Inputs per second over the batch size: a panel for each number of threads."""
    styles = ("-", "--", ":", "-.")
    highest = max(value for one in rates.values() for s in one.values() for _, value in s)
    for axis, (threads, series) in zip(axes, sorted(rates.items()), strict=True):
        seen: dict[str, int] = {}
        for name, points in series.items():
            again = seen[colours[name]] = seen.get(colours[name], -1) + 1
            batches, values = zip(*sorted(points), strict=True)
            axis.plot(
                range(len(batches)), values, marker="o", color=colours[name], label=name,
                linestyle=styles[again % len(styles)], linewidth=1.8,
            )  # fmt: skip
            axis.set_xticks(range(len(batches)), [str(batch) for batch in batches])
        axis.set_ylim(bottom=0, top=1.08 * highest)
        axis.set_xlabel("batch size")
        axis.set_title(f"inputs per second, {threads_text(threads)}")
        _bare(axis, "y")
    axes[-1].legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bare(axis: Axes, grid: str) -> None:
    """Leave nothing but a light grid behind the data."""
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0, which="both")
    axis.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
