"""What a pruning did: widths before and after, what was frozen and why, and the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.channels.analysis import Frozen
from fxopt.reconstruction import Reconstruction


@dataclass(frozen=True)
class Width:
    """A family of channels, before and after."""

    name: str
    layers: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class PruningRecord:
    """What one pruning did; print it.

    `error` is max |Δ| / max |reference| between the pruned graph and the original with those
    channels zeroed wherever a contraction reads them. Where channels went that a mean or a norm
    reduces (`approximate` says at which calls), the two are not the same function, and the error
    says by how much.
    """

    widths: tuple[Width, ...]
    frozen: tuple[Frozen, ...]
    macs: tuple[int, int]  # before, after
    parameters: tuple[int, int]
    error: float
    bound: float
    approximate: tuple[str, ...] = ()
    reconstruction: Reconstruction | None = None

    @property
    def channels(self) -> tuple[int, int]:
        """The channels that might go, before and after."""
        return sum(w.before for w in self.widths), sum(w.after for w in self.widths)

    def table(self) -> str:
        """Return a line of text for each family."""
        name = max((len(width.name) for width in self.widths), default=0)
        return "\n".join(
            f"{width.name:{name}}  {width.before:>6} → {width.after:>6}  {_also(width)}".rstrip()
            for width in self.widths
        )

    def __str__(self) -> str:
        lines = [
            f"channels {_change(self.channels)}, MACs {_change(self.macs)}, "
            f"parameters {_change(self.parameters)}"
        ]
        if self.channels[0] == self.channels[1]:
            lines = ["nothing was pruned"]
        elif self.approximate:
            lines.append(
                f"approximate, since {'; '.join(self.approximate[:3])}"
                f"{'; …' if len(self.approximate) > 3 else ''}: differs from the original with "
                f"those channels zeroed by {self.error:.2g}"
            )
        else:
            lines.append(
                "the original with those channels zeroed where they are read computes the same: "
                f"error {self.error:.2g} (bound {self.bound:.2g})"
            )
        if self.reconstruction is not None:
            lines += str(self.reconstruction).splitlines()
        for reason, (count, layer) in _reasons(self.frozen)[:6]:
            more = f" and {count - 1} more layers compute" if count > 1 else " computes"
            lines.append(f"frozen: what '{layer}'{more}: {reason}")
        return "\n".join(lines)


def _also(width: Width) -> str:
    others = len(width.layers) - 1
    return f"with {others} more layers" if others > 0 else ""


def _change(pair: tuple[int, int]) -> str:
    before, after = pair
    share = f" (−{1 - after / before:.0%})" if before else ""
    return f"{before:,} → {after:,}{share}"


def _reasons(frozen: Sequence[Frozen]) -> list[tuple[str, tuple[int, str]]]:
    counts = Counter(one.reason.text for one in frozen)
    first = {one.reason.text: one.layer for one in reversed(frozen)}
    return [(text, (count, first[text])) for text, count in counts.most_common()]
