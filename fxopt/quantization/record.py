"""What a quantization did: which values and weights are rounded, how, and what stayed float."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class RoundedValue:
    """An activation that is rounded: `low` and `high` are the range that its integers span."""

    node: str
    scheme: str
    low: float
    high: float
    scale: float
    zero_point: int
    readers: tuple[str, ...]
    group: int  # values of one group share a scale


@dataclass(frozen=True)
class RoundedWeight:
    """A weight that is rounded, and the layers that read it."""

    name: str
    scheme: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class QuantizationRecord:
    """What `InsertFakeQuant` did; print it, or `table()`.

    `error` is max |Δ| / max |reference| of the outputs on the example inputs, `sqnr` the
    signal-to-quantization-noise ratio there, in dB, over all outputs.
    """

    target: str
    method: str
    samples: int
    values: tuple[RoundedValue, ...]
    weights: tuple[RoundedWeight, ...]
    floats: tuple[tuple[str, str], ...]  # layers that stay float, and why
    error: float
    sqnr: float

    def table(self) -> str:
        """Return a line of text for each value that is rounded, then for each weight."""
        lines = [
            f"{value.node}: {value.scheme}, {value.low:.4g} to {value.high:.4g}, read by "
            f"{', '.join(value.readers)}"
            for value in self.values
        ]
        lines += [
            f"{weight.name}: {weight.scheme}, weight of {', '.join(weight.layers)}"
            for weight in self.weights
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        lines = [
            f"for {self.target}: {len(self.weights)} weights and {len(self.values)} activations "
            f"are rounded ({self.method} over {self.samples} samples)",
            f"on the example inputs that moves the outputs by {self.error:.2g} of the largest "
            f"(SQNR {self.sqnr:.1f} dB)",
        ]
        for reason, count in Counter(reason for _, reason in self.floats).most_common(6):
            layer = next(name for name, why in self.floats if why == reason)
            more = f" and {count - 1} more stay" if count > 1 else " stays"
            lines.append(f"'{layer}'{more} float: {reason}")
        return "\n".join(lines)
