"""What a reconstruction did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Fit:
    """One layer: how far it is from what it should return, before and after it was fit.

    Both are Σ (found − wanted)² / Σ (wanted − its mean)² over all outputs, on inputs that nothing
    was fit to: 0 is exact, and 1 what constants would do. Wanted is what the original returned; for
    a layer whose output is added to something, that and what its other summand lacks.
    """

    layer: str
    node: str
    before: float
    after: float

    @property
    def changed(self) -> bool:
        """Whether any output got other weights."""
        return self.after < self.before


@dataclass(frozen=True)
class Reconstruction:
    """All layers that were looked at, in order, and why the others were not; print it."""

    fits: tuple[Fit, ...]
    skipped: tuple[tuple[str, str], ...] = ()  # (layer, why)

    def table(self) -> str:
        """Return a line of text for each layer."""
        width = max((len(fit.layer) for fit in self.fits), default=0)
        return "\n".join(
            f"{fit.layer:{width}}  error {fit.before:7.2g} → {fit.after:7.2g}" for fit in self.fits
        )

    def __str__(self) -> str:
        changed = [fit for fit in self.fits if fit.changed]
        if not changed:
            lines = ["reconstructed: no layer"]
        else:
            before, after = (fmean(getattr(f, e) for f in changed) for e in ("before", "after"))
            of = f" of {len(self.fits)}" if len(changed) < len(self.fits) else ""
            lines = [
                f"reconstructed: {len(changed)}{of} layer{'s' * (len(self.fits) > 1)}, "
                f"mean error {before:.2g} → {after:.2g}"
            ]
        lines += [f"not reconstructed: '{layer}': {why}" for layer, why in self.skipped[:6]]
        if len(self.skipped) > 6:
            lines.append(f"not reconstructed: {len(self.skipped) - 6} more layers")
        return "\n".join(lines)
