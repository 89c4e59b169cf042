"""What the numbers of a comparison mean, in sentences; each follows from the rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxopt.comparison.lineup import ITSELF
from fxopt.comparison.race import Ratio, interval_rank
from fxopt.comparison.result import Comparison, Row, Throughput

FEWER = 0.01  # a fraction of MACs worth a word
EXACT = 1e-3  # relative error of what computes the same for all purposes
LARGE = 0.05  # relative error worth a word
BUSY = 0.3  # spread over median at which a machine was busy
FEW_DECISIONS = 100


def remarks(comparison: Comparison) -> list[str]:
    """Return all remarks, the most important first."""
    kinds = (_fastest, _macs, _slower, _classes, _errors, _certainty)
    return [sentence for kind in kinds for sentence in kind(comparison)]


def _fastest(comparison: Comparison) -> Iterator[str]:
    """Who wins; and who of those that compute the same for all purposes."""
    base = comparison.baseline
    others = [row for row in comparison.rows[1:] if row.latency is not None]
    faster = [row for row in others if _ratio(comparison, row).is_faster]
    if others and not faster and _enough_rounds(base):
        yield f"Nothing is faster than {_name(base)} for certain."
    if not faster:
        return
    ranked = sorted(faster, key=lambda row: -_ratio(comparison, row).median)
    best = ranked[0]
    yield f"{_name(best)} is the fastest: {_as_fast(_ratio(comparison, best))} {_name(base)}."
    exact = [row for row in ranked if (row.relative_error or 0.0) <= EXACT]
    if exact and exact[0] is not best:
        yield (
            f"Of those within a relative error of {EXACT:g}, {_name(exact[0])} is: "
            f"{_as_fast(_ratio(comparison, exact[0]))} {_name(base)}."
        )


def _macs(comparison: Comparison) -> Iterator[str]:
    """Fewer multiply-accumulates that did not make a candidate faster."""
    for row in comparison.rows:
        other = _counterpart(comparison, row)
        if other is row or not row.macs or not other.macs:
            continue
        fewer = 1 - row.macs / other.macs
        ratio = comparison.speedup(row, over=other)
        if fewer < FEWER or ratio is None or ratio.is_faster:
            continue
        verdict = f"is slower: {_as_long(ratio)}" if ratio.is_slower else (
            f"is not faster for certain: {_as_fast(ratio)} it"
        )
        yield f"{_name(row)} has {fewer:.0%} fewer MACs than {_name(other)}, but {verdict}."


def _counterpart(comparison: Comparison, row: Row) -> Row:
    """Return the first variant's row on the same backend in the same precision, or the baseline."""
    first = comparison.baseline.variant
    if row.variant == first:
        return comparison.baseline
    for other in comparison.rows:
        if (other.variant, other.backend, other.precision) == (first, row.backend, row.precision):
            return other
    return comparison.baseline


def _slower(comparison: Comparison) -> Iterator[str]:
    """A precision slower than the model's own, and else a backend slower than the baseline."""
    for row in comparison.rows[1:]:
        wide = _in_own_precision(comparison, row)
        ratio = comparison.speedup(row, over=wide) if wide is not None else None
        if ratio is not None and ratio.is_slower:
            assert wide is not None
            yield f"{_name(row)} is slower than {_name(wide)}: {_as_long(ratio)}."
            continue
        ratio = comparison.speedup(row)
        if ratio is not None and ratio.is_slower:
            yield f"{_name(row)} is slower than {_name(comparison.baseline)}: {_as_long(ratio)}."


def _in_own_precision(comparison: Comparison, row: Row) -> Row | None:
    """Return the row of the same variant and backend in the model's own dtype, or in fp32."""
    if row.precision in (None, "fp32"):
        return None
    for precision in (None, "fp32"):
        for other in comparison.rows:
            kind = (other.variant, other.backend, other.precision)
            if kind == (row.variant, row.backend, precision):
                return other
    return None


def _classes(comparison: Comparison) -> Iterator[str]:
    """Other classes than the baseline's, and what that costs in accuracy."""
    base, total = comparison.baseline, comparison.decisions
    for row in comparison.rows[1:]:
        if row.agreement is None or row.agreement == 1.0:
            continue
        other = total - round(row.agreement * total)
        words = f"{_name(row)} names another class than {_name(base)} in {other:,} of {total:,}"
        if row.accuracy is None or base.accuracy is None:
            yield f"{words} decisions."
            continue
        points = (row.accuracy - base.accuracy) * 100
        change = "gains" if points > 0 else "loses"
        lost = f"{change} {abs(points):.2f} points of accuracy" if points else "is as accurate"
        yield f"{words} decisions, and {lost}."
    if 0 < total < FEW_DECISIONS:
        yield f"Agreement comes from {total} decisions only: each is {1 / total:.1%} of it."


def _errors(comparison: Comparison) -> Iterator[str]:
    """Outputs that have little to do with the baseline's."""
    base, rows = comparison.baseline, comparison.rows[1:]
    far = [row for row in rows if LARGE < (row.relative_error or 0.0) < math.inf]
    if far:
        worst = max(row.relative_error or 0.0 for row in far)
        names = ", ".join(_name(row) for row in far)
        yield f"Outputs are off by up to {worst:.0%} of the largest value: {names}."
    for row in rows:
        if row.relative_error == math.inf:
            yield (
                f"{_name(row)} gives outputs of other shapes than {_name(base)}, or infinities or "
                "NaN where the other has none."
            )


def _certainty(comparison: Comparison) -> Iterator[str]:
    """What makes the latencies less certain than they look."""
    rows = [row for row in comparison.rows if row.latency is not None]
    if len(rows) > 1 and not _enough_rounds(rows[0]):
        yield "In so few rounds no difference can be told from chance: six are the least."
    busy = [row.name for row in rows if _unsteady(row)]
    if busy:
        whose = f"The latency of {', '.join(busy)}" if len(busy) < len(rows) else "Every latency"
        yield (
            f"{whose} varied by more than {BUSY:.0%}: the machine was busy. Close what else runs, "
            "or ask for more rounds."
        )
    rates = [one for one in comparison.throughput if one.latency is not None]
    unsteady = sum(map(_unsteady, rates))
    if unsteady:
        yield (
            f"{unsteady} of {len(rates)} throughputs varied by more than {BUSY:.0%}: the machine "
            "was busy, or has fewer free cores than threads."
        )


def _unsteady(measured: Row | Throughput) -> bool:
    latency = measured.latency
    return latency is not None and latency.spread > BUSY * latency.median


def _enough_rounds(row: Row) -> bool:
    return row.latency is not None and interval_rank(len(row.latency.rounds)) > 0


def _ratio(comparison: Comparison, row: Row) -> Ratio:
    ratio = comparison.speedup(row)
    assert ratio is not None
    return ratio


def _name(row: Row) -> str:
    return "the model itself" if row.name == ITSELF else row.name


def _as_fast(ratio: Ratio) -> str:
    """Return `3.20 times as fast (3.08 to 3.31) as`."""
    between = f" ({ratio.low:.2f} to {ratio.high:.2f})" if math.isfinite(ratio.high) else ""
    return f"{ratio.median:.2f} times as fast{between} as"


def _as_long(ratio: Ratio) -> str:
    """Return `it takes 3.20 times as long (3.08 to 3.31)`."""
    longest, shortest = 1 / ratio.low, 1 / ratio.high
    return f"it takes {1 / ratio.median:.2f} times as long ({shortest:.2f} to {longest:.2f})"
