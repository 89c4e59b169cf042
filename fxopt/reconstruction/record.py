"""What a reconstruction did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Fit:
    """One layer: how far it is from the original's outputs, before and after its weights were fit.

    The errors are Σ (found − original)² / Σ (original − its mean)², on rows held out: 0 is exact,
    and 1 what a constant would do. Where no weights fit better they stay, and both are the same.
    """

    layer: str
    node: str
    before: float
    after: float


@dataclass(frozen=True)
class Reconstruction:
    """All layers that were fit, in order, and why the others were not; print it."""

    fits: tuple[Fit, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # (layer, why)

    def __str__(self) -> str:
        lines = [f"reconstructed: no layer{'' if self.skipped else ' was off'}"]
        if self.fits:
            before, after = (fmean(getattr(f, e) for f in self.fits) for e in ("before", "after"))
            count = f"{len(self.fits)} layer{'s' * (len(self.fits) > 1)}"
            lines = [f"reconstructed: {count}, mean error {before:.2g} → {after:.2g}"]
        lines += [f"not reconstructed: {layer}: {why}" for layer, why in self.skipped]
        return "\n".join(lines)
